"""A new model from Qwen2 and CLIP."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vxl_jax
from convert import convert_to_hf, init, init_checkpoint
from convert.init import compress_checkpoint
from tests.support.checkpoints import GOLDEN, MICRO, save_published, tensors_in
from vxl_jax.config import Compression
from vxl_jax.errors import CheckpointError
from vxl_jax.media.preprocessing import llava_preprocessing
from vxl_jax.presets import tiny_llava


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A Qwen2 and a CLIP checkpoint, taken out of the one we have."""
    folder = tmp_path_factory.mktemp("parts")
    held = load_file(MICRO / "model.safetensors")
    values = json.loads((MICRO / "config.json").read_text())
    qwen, clip = folder / "qwen", folder / "clip"
    qwen.mkdir()
    shutil.copytree(GOLDEN / "clip-vision", clip)
    drop = ("beacon", "mm_")
    values = {name: value for name, value in values.items() if not name.startswith(drop)}
    (qwen / "config.json").write_text(json.dumps({**values, "model_type": "qwen2"}))
    (qwen / "tokenizer.json").write_text("{}")
    language = {
        name: value.astype(ml_dtypes.bfloat16)
        for name, value in held.items()
        if "vision_tower" not in name and "beacon" not in name and "projector" not in name
    }
    save_file(language, qwen / "model.safetensors")
    tower = "model.vision_tower.vision_tower."
    vision = {n.removeprefix(tower): value for n, value in held.items() if n.startswith(tower)}
    vision["text_model.embeddings.token_embedding.weight"] = np.zeros((3, 4), np.float32)
    vision["logit_scale"] = np.array(4.6, np.float32)
    save_file(vision, clip / "model.safetensors")
    return qwen, clip


def test_a_new_model_from_qwen_and_clip(parts, tmp_path):
    init_checkpoint(*parts, tmp_path / "new", seed=3)
    model = vxl_jax.load_network(tmp_path / "new")
    assert (model.config.param_dtype, model.config.dtype) == ("bfloat16", "bfloat16")
    assert (model.config.window, model.config.ratios) == (1440, (2, 4, 8, 12, 16))
    assert (tmp_path / "new" / "tokenizer.json").exists()
    language = model.language
    for name in ("q", "k", "v"):
        own = getattr(language.layers.attention, name)
        beacon = getattr(language.layers.attention, f"beacon_{name}")
        np.testing.assert_array_equal(own.kernel[...], beacon.kernel[...])
        np.testing.assert_array_equal(own.bias[...], beacon.bias[...])
    np.testing.assert_array_equal(language.beacon_embed[0], language.embed.embedding[504])
    convert_to_hf(tmp_path / "new", tmp_path / "hf", dtype="float32")
    ours, held = tensors_in(tmp_path / "hf"), tensors_in(MICRO)
    for name in held:
        if "beacon" not in name and "projector" not in name:
            expected = held[name].astype(ml_dtypes.bfloat16).astype(np.float32)
            if "post_layernorm" not in name and "layers.2" not in name:
                np.testing.assert_array_equal(ours[name], expected, err_msg=name)
    for i, inputs in ((0, 32), (2, 64)):
        weight = ours[f"model.mm_projector.{i}.weight"]
        assert weight.shape == (64, inputs)
        assert abs(weight).max() == pytest.approx(inputs**-0.5, rel=0.02)
        assert abs(weight.mean()) < 0.02 * inputs**-0.5 + 0.005


def test_the_seed_decides_the_new_projector(parts, tmp_path):
    weights = []
    for i, seed in enumerate((0, 0, 1)):
        init_checkpoint(*parts, tmp_path / str(i), seed=seed)
        weights.append(np.asarray(vxl_jax.load_network(tmp_path / str(i)).projector.up.kernel[...]))
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


def test_a_projector_from_a_file_or_a_checkpoint(parts, converted, tmp_path):
    held = load_file(MICRO / "model.safetensors")
    projector = {name: value for name, value in held.items() if "mm_projector" in name}
    save_file(projector, tmp_path / "mm_projector.safetensors")
    for i, source in enumerate((tmp_path / "mm_projector.safetensors", converted, MICRO)):
        init_checkpoint(*parts, tmp_path / str(i), projector=source, dtype="float32")
        model = vxl_jax.load_network(tmp_path / str(i))
        np.testing.assert_array_equal(
            model.projector.down.kernel[...], projector["model.mm_projector.2.weight"].T
        )
    save_file({"other": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="has no tensor named"):
        init_checkpoint(*parts, tmp_path / "x", projector=tmp_path / "other.safetensors")


def test_parts_that_do_not_fit_are_refused(parts, tmp_path):
    qwen, clip = parts
    with pytest.raises(CheckpointError, match="model_type is 'llava_qwen'; only 'qwen2'"):
        init_checkpoint(MICRO, clip, tmp_path / "x")
    with pytest.raises(CheckpointError, match="hidden_act is 'silu'; only 'quick_gelu'"):
        init_checkpoint(qwen, qwen, tmp_path / "x")
    with pytest.raises(CheckpointError, match="pickle files"):
        init_checkpoint(qwen, clip, tmp_path / "x", projector=tmp_path / "a.bin")
    shutil.copytree(qwen, tmp_path / "qwen")
    path = tmp_path / "qwen" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "eos_token_id": 9999}))
    with pytest.raises(CheckpointError, match="eos_token_id 9999 is not a token"):
        init_checkpoint(tmp_path / "qwen", clip, tmp_path / "x")


def test_a_new_llava_video_from_qwen_and_siglip(
    parts: tuple[Path, Path], llava: Path, tmp_path: Path
):
    tower = tmp_path / "siglip"
    shutil.copytree(llava / "vision_tower", tower)
    prefix = "model.vision_tower.vision_tower."
    vision = {
        name.removeprefix(prefix): value
        for name, value in tensors_in(llava).items()
        if name.startswith(prefix)
    }
    vision |= {"logit_scale": np.zeros(1, np.float32), "logit_bias": np.zeros(1, np.float32)}
    save_file(vision, tower / "model.safetensors")
    init_checkpoint(parts[0], tower, tmp_path / "new", seed=3)
    model = vxl_jax.load_network(tmp_path / "new")
    config = model.config
    assert (config.family, config.compression) == ("llava_video", None)
    assert (config.newline, config.image_tokens, config.max_image_tiles) == ("grid", "unpad", 9)
    assert config.preprocessing == llava_preprocessing()
    newline = np.asarray(model.projector.newline[...], np.float32)
    assert 0.5 < float(np.std(newline)) * config.language.width**0.5 < 1.5


def test_a_llava_video_is_given_beacons(llava: Path, tmp_path: Path):
    assert init.main([str(llava), str(tmp_path / "new"), "--ratios", "2", "4"]) == 0
    before, now = (vxl_jax.load_network(path) for path in (llava, tmp_path / "new"))
    assert now.config.compression == Compression(8 * 12, (2, 4))
    assert replace(now.config, compression=None) == before.config
    attention = now.language.layers.attention
    np.testing.assert_array_equal(attention.beacon_k.kernel[...], attention.k.kernel[...])
    convert_to_hf(tmp_path / "new", tmp_path / "hf")
    held = tensors_in(llava)
    for name, tensor in tensors_in(tmp_path / "hf").items():
        if "beacon" not in name:
            np.testing.assert_array_equal(tensor, held[name])


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_tokenizer_names_the_end_of_a_turn_where_config_json_does_not(
    with_tokenizer: bool, tmp_path: Path, demo_tokenizer: Any
):
    """As in the export of a run from random weights."""
    config = tiny_llava(language=replace(tiny_llava().language, vocab_size=1024))
    tokenizer = demo_tokenizer if with_tokenizer else None
    source = save_published(config, tmp_path / "llava", tokenizer)
    values = json.loads((source / "config.json").read_text())
    del values["eos_token_id"]
    (source / "config.json").write_text(json.dumps(values))
    if not with_tokenizer:
        message = r"has no eos_token_id.*has neither tokenizer\.json"
        with pytest.raises(CheckpointError, match=message):
            compress_checkpoint(source, tmp_path / "new", ratios=(2,))
        return
    compress_checkpoint(source, tmp_path / "new", ratios=(2,))
    language = vxl_jax.load_network(tmp_path / "new").language
    end = demo_tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = language.embed.embedding[...][end]
    np.testing.assert_array_equal(language.beacon_embed[...][0], expected)


def test_what_cannot_be_given_beacons_is_refused(llava: Path, tmp_path: Path, capsys: Any):
    new = tmp_path / "new"
    for arguments, message in (
        ([MICRO, new], "has beacons already"),
        ([llava, new, "--seed", 1], "--projector and --seed"),
        ([llava], "give QWEN_DIR TOWER_DIR DST"),
        ([llava, llava, new, "--window", 8], "give QWEN_DIR TOWER_DIR DST"),
        ([llava, new, "--window", 1], "ratios .* must be between 1 and the window 1"),
    ):
        assert init.main([str(argument) for argument in arguments]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not new.exists()
