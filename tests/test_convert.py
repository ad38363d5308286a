"""Conversion in all directions: bit for bit, everything accounted for, whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import vxl_jax
from convert import convert_from_hf, convert_to_hf, from_hf, init_checkpoint, parity
from train.checkpoints import Checkpoints, Position
from train.config import (
    DataSection,
    ModelSection,
    OptimSection,
    RunSection,
    TrainConfig,
    save_config,
)
from train.step import split_parts
from vxl_jax.errors import CheckpointError
from vxl_jax.names import LINEAR, SAME, table
from vxl_jax.tensors import INDEX

GOLDEN = Path(__file__).parent / "golden" / "micro"
MICRO = GOLDEN / "hf"


def tensors_in(directory):
    """All tensors of a directory in the published layout."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        assert ours[name].tobytes() == value.tobytes(), name


def assert_same_model(ours, expected):
    for a, b in zip(
        jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(expected)), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "model"
    convert_from_hf(MICRO, directory)
    return directory


@pytest.fixture
def sharded(tmp_path):
    """The checkpoint in bfloat16 and several shards, and a function that damages it."""
    directory = tmp_path / "sharded"
    convert_to_hf(MICRO, directory, dtype="bfloat16", shard_size="150KB")

    def change(file=None, config=None, **tensors):
        if config:
            path = directory / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        if file:
            held = load_file(directory / file)
            held |= {name: value for name, value in tensors.items() if value is not None}
            held = {name: value for name, value in held.items() if tensors.get(name, 0) is not None}
            save_file(held, directory / file)

    return directory, change


def where(directory):
    return json.loads((directory / INDEX).read_text())["weight_map"]


# There and back.


def test_there_and_back_is_the_same_bit_for_bit(converted, tmp_path):
    convert_to_hf(converted, tmp_path / "back")
    assert_same(tensors_in(tmp_path / "back"), tensors_in(MICRO))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (MICRO / "config.json").read_text()
    )


def test_shards_in_bfloat16_there_and_back(sharded, tmp_path):
    directory, _ = sharded
    assert len(list(directory.glob("*.safetensors"))) >= 4
    assert max(file.stat().st_size for file in directory.glob("*.safetensors")) < 160_000
    index = json.loads((directory / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors_in(directory).values())
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "bfloat16"
    expected = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors_in(MICRO).items()}
    ours = tensors_in(directory)
    assert_same(ours, expected)
    convert_from_hf(directory, tmp_path / "model")
    convert_to_hf(tmp_path / "model", tmp_path / "back", shard_size=150_000)
    assert_same(tensors_in(tmp_path / "back"), ours)
    assert where(tmp_path / "back") == where(directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_ways_of_loading_give_one_model(dtype, converted, tmp_path):
    direct = vxl_jax.load_network(MICRO, param_dtype=dtype, dtype=dtype)
    assert_same_model(vxl_jax.load_network(converted, param_dtype=dtype, dtype=dtype), direct)
    convert_from_hf(MICRO, tmp_path / "model", dtype=dtype)
    model = vxl_jax.load_network(tmp_path / "model")
    assert model.config == direct.config
    assert_same_model(model, direct)


def test_parity_runs_on_a_converted_checkpoint(converted):
    assert parity.main([str(converted), str(GOLDEN)]) == 0


def test_a_converted_checkpoint_stands_by_itself(converted, tmp_path):
    """It can be moved, and everything that is needed beside the weights is there."""
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(converted, moved)
    assert vxl_jax.load_network(moved).config == vxl_jax.load_network(MICRO).config
    assert (moved / "generation_config.json").exists()
    assert (moved / "vision_tower" / "preprocessor_config.json").exists()


# What is refused.


def test_every_problem_is_in_one_error(sharded, tmp_path):
    directory, change = sharded
    norm, gate = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"
    up, bias = "model.layers.0.mlp.up_proj.weight", "model.mm_projector.0.bias"
    embed = "model.embed_tokens.weight"
    held = tensors_in(directory)
    nan = held[embed].copy()
    nan[3, 5] = np.nan
    at = where(directory)
    change(at[norm], **{norm: None})
    change(at[gate], **{gate: held[gate][:-1].copy()})
    change(at[up], **{up: held[up].astype(np.float32)})
    change(at[bias], **{bias: np.zeros(64, np.int32)})
    change(at[embed], **{embed: nan, "model.extra": np.zeros(2, np.float32)})
    other = next(file for file in sorted(set(at.values())) if file != at["lm_head.weight"])
    change(other, **{"lm_head.weight": held["lm_head.weight"]})
    with pytest.raises(CheckpointError) as caught:
        convert_from_hf(directory, tmp_path / "out")
    message = str(caught.value)
    for part in (
        f"missing tensor {norm}",
        f"{INDEX} has tensor {norm} in {at[norm]}, which does not hold it",
        f"tensor {gate} has shape (127, 64), config.json asks for (128, 64)",
        f"tensor {up} has dtype F32, not bfloat16",
        f"tensor {bias} has dtype I32, which is not one of weights",
        f"tensor {embed} in {at[embed]} has NaN or infinite weights",
        f"unexpected tensor model.extra in {at[embed]}",
        f"{INDEX} does not have tensor model.extra",
        "tensor lm_head.weight is in ",
    ):
        assert part in message, message
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.k_proj.bias"])
def test_weights_that_are_not_finite_are_refused(name, value, sharded, tmp_path):
    directory, change = sharded
    held = tensors_in(directory)[name].copy()
    held.flat[-1] = value
    change(where(directory)[name], **{name: held})
    with pytest.raises(CheckpointError, match=f"tensor {name} in .* has NaN or infinite weights"):
        convert_from_hf(directory, tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"tensor {name} in .* has NaN or infinite weights"):
        vxl_jax.load_network(directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded"]


def test_largest_finite_weights_are_taken(sharded, tmp_path):
    directory, change = sharded
    norm = np.full(64, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), ml_dtypes.bfloat16)
    change(where(directory)["model.norm.weight"], **{"model.norm.weight": norm})
    convert_from_hf(directory, tmp_path / "out")


def test_tensors_are_left_out_only_where_that_is_asked_for(tmp_path, capsys):
    shutil.copytree(GOLDEN, tmp_path / "set")
    path = tmp_path / "set" / "hf" / "model.safetensors"
    save_file({**load_file(path), "model.extra.weight": np.zeros(2, np.float32)}, path)
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.extra\.weight in model"):
        convert_from_hf(path.parent, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"--ignore '\(': not a regular expression"):
        convert_from_hf(path.parent, tmp_path / "out", ignore="(")
    convert_from_hf(path.parent, tmp_path / "out", ignore=r"model\.extra\..*")
    assert "left out model.extra.weight (--ignore)" in capsys.readouterr().err
    convert_to_hf(tmp_path / "out", tmp_path / "back")
    assert_same(tensors_in(tmp_path / "back"), tensors_in(MICRO))


def test_float16_is_converted_only_where_a_dtype_is_given(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "set")
    path = tmp_path / "set" / "hf" / "model.safetensors"
    save_file({name: x.astype(np.float16) for name, x in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match="has dtype F16, not float32; say which dtype"):
        convert_from_hf(path.parent, tmp_path / "out")
    convert_from_hf(path.parent, tmp_path / "out", dtype="float32")
    model = vxl_jax.load_network(tmp_path / "out")
    expected = load_file(path)["model.norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(model.language.norm.scale[...], expected)


def test_truncated_and_pickled_files_are_refused(sharded, tmp_path, capsys):
    directory, _ = sharded
    first = sorted(directory.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-100])
    command = [str(directory), str(tmp_path / "out")]
    assert from_hf.main(command) == 2
    assert f"{first.name}: cannot be read as safetensors" in capsys.readouterr().err
    for file in directory.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    assert from_hf.main(command) == 2
    error = capsys.readouterr().err
    assert "pickle files (.bin, .pt) are not read because" in error
    assert "safe_serialization=True" in error


def test_what_is_there_is_not_overwritten_unasked(converted, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match="exists already; choose another, or --overwrite it"):
        convert_from_hf(MICRO, out)
    with pytest.raises(CheckpointError, match="is no checkpoint, and not overwritten"):
        convert_from_hf(MICRO, out, overwrite=True)
    assert (out / "mine.txt").read_text() == "kept"
    shutil.rmtree(out)
    convert_to_hf(converted, out)
    with pytest.raises(CheckpointError, match="exists already"):
        convert_from_hf(MICRO, out)
    convert_from_hf(MICRO, out, overwrite=True)
    assert [file.name for file in out.glob("*.safetensors")] == ["unused.safetensors"]
    assert_same_model(vxl_jax.load_network(out), vxl_jax.load_network(MICRO))
    (out / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint, and not overwritten"):
        from_hf.convert_from_hf(MICRO, out, overwrite=True)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(CheckpointError, match="is a link; name the directory itself"):
        convert_from_hf(MICRO, tmp_path / "link", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_what_a_kill_between_the_renames_left_is_put_back(converted, tmp_path):
    convert_to_hf(converted, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.vxl-old")
    with pytest.raises(CheckpointError, match="exists already"):
        convert_from_hf(MICRO, tmp_path / "out")
    assert_same(tensors_in(tmp_path / "out"), tensors_in(MICRO))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", "x"),
        ("beacon_param", 5),
        ("beacon_ratio", 4),
        ("beacon_ratio", ["a"]),
        ("rope_theta", None),
        ("hidden_size", "64"),
        ("num_hidden_layers", 2.0),
        ("mm_vision_tower", None),
        ("mm_spatial_pool_stride", None),
        ("mm_vision_select_layer", "a"),
    ],
)
def test_fields_of_the_wrong_type_are_named(field, value, sharded, tmp_path, capsys):
    directory, change = sharded
    change(config={field: value})
    assert from_hf.main([str(directory), str(tmp_path / "out")]) == 2
    assert f"config.json: {field} is {value!r}; it must be" in capsys.readouterr().err


@pytest.mark.parametrize("place", [".", ".."])
def test_nothing_is_written_over_what_is_read(place, tmp_path):
    source = tmp_path / "outer" / "hf"
    convert_to_hf(MICRO, source)
    before = sorted(source.rglob("*"))
    for write in (convert_from_hf, convert_to_hf):
        with pytest.raises(CheckpointError, match="which is read; choose another"):
            write(source, source / place, overwrite=True)
    assert sorted(source.rglob("*")) == before


def test_a_disk_that_is_too_small_is_noticed_first(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(CheckpointError, match=r"0\.00 GB will be written, and the disk has 0\.00"):
        convert_from_hf(MICRO, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["", "5 bananas", "0", "-1GB"])
def test_shard_sizes_that_are_none(size, tmp_path):
    with pytest.raises(CheckpointError, match="use a number of bytes, or one such as 5GB"):
        convert_to_hf(MICRO, tmp_path / "out", shard_size=size)


def test_a_damaged_converted_checkpoint_is_refused(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["intermediate_size"] = 96
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"(?s)3 problems.*has shape \(3, 64, 128\), config"):
        vxl_jax.load_network(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "params" / "projector.up.kernel")
    with pytest.raises(CheckpointError, match="params: cannot be read"):
        vxl_jax.load_network(tmp_path / "model")
    with pytest.raises(CheckpointError, match="neither a converted checkpoint"):
        convert_to_hf(tmp_path, tmp_path / "out")


# Killed in the middle.


@pytest.mark.parametrize(
    "moment", [".out.vxl-part", ".out.vxl-part/config.json", ".out.vxl-part/params*"]
)
def test_killed_at_any_moment_nothing_or_all_is_there(moment, tmp_path):
    command = [sys.executable, "-m", "convert.from_hf", str(MICRO), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not list(tmp_path.glob(f".out.vxl-part{moment}")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if (tmp_path / "out").exists():
        assert_same_model(vxl_jax.load_network(tmp_path / "out"), vxl_jax.load_network(MICRO))
        return
    assert (tmp_path / ".out.vxl-part").exists()
    # What is left over does not stand in the way of the next.
    convert_from_hf(MICRO, tmp_path / "out")
    assert_same_model(vxl_jax.load_network(tmp_path / "out"), vxl_jax.load_network(MICRO))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_that_write_the_same_do_not_mix(tmp_path):
    from convert.writing import new_directory

    with (
        new_directory(tmp_path / "out", 1, overwrite=False),
        pytest.raises(CheckpointError, match="another process is writing it"),
        new_directory(tmp_path / "out", 1, overwrite=False),
    ):
        pass


# A new model.


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


# What a training run has come to.


def run_config(section):
    return TrainConfig(
        section, DataSection(("a.json",), "media"), OptimSection(), RunSection("runs/a")
    )


def a_run(directory, section, trained):
    """A run's directory as `train.finetune` leaves it, with two saved steps."""
    directory.mkdir()
    save_config(run_config(section), directory / "config.json")
    manager = ocp.CheckpointManager((directory / "checkpoints").absolute())
    for step, factor in ((5, 3), (9, 2)):
        params = jax.tree.map(lambda x, factor=factor: factor * x, trained)
        tree = {"params": params, "opt_state": optax.adamw(1e-3).init(params)}
        manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(tree)))
    manager.close()
    return directory


def test_a_run_that_trained_a_part(tmp_path):
    base = tmp_path / "base"
    convert_to_hf(MICRO, base, dtype="bfloat16")
    _, trained, _ = split_parts(vxl_jax.load_network(base), ("projector", "beacon"))
    trained = jax.tree.map(lambda x: 1.0001 * x, trained)  # float32: nothing in bfloat16
    section = ModelSection(checkpoint=str(base), tokenizer=None, pool_stride=1, ratios=(4,))
    run = a_run(tmp_path / "run", section, trained)
    before = tensors_in(base)
    for dtype in ("float32", None):
        out = tmp_path / str(dtype)
        convert_to_hf(run, out, dtype=dtype)
        ours = tensors_in(out)
        assert ours.keys() == before.keys()
        for name, value in before.items():
            expected = value.astype(np.float32)
            if "beacon" in name or "mm_projector" in name:
                expected = np.float32(2) * (np.float32(1.0001) * expected)
            expected = expected.astype(dtype or ml_dtypes.bfloat16)
            np.testing.assert_array_equal(ours[name], expected, err_msg=name)
        config = vxl_jax.load_network(out).config
        assert (config.pool_stride, config.ratios) == (1, (4,))


def test_a_run_from_random_weights(tmp_path, demo_data):
    section = ModelSection(preset="tiny", tokenizer=str(demo_data / "tokenizer"))
    config = vxl_jax.config.tiny()
    model = nnx.jit(lambda: vxl_jax.VideoXL(config, rngs=nnx.Rngs(0)))()
    everything = ("vision", "projector", "language", "beacon")
    _, trained, _ = split_parts(model, everything)
    run = a_run(tmp_path / "run", section, trained)
    convert_to_hf(run, tmp_path / "out")
    loaded = vxl_jax.load_network(tmp_path / "out")
    assert loaded.config == config
    assert (tmp_path / "out" / "tokenizer.json").exists()
    np.testing.assert_array_equal(
        loaded.language.head.kernel[...], 2 * model.language.head.kernel[...]
    )
    _, trained, _ = split_parts(model, ("projector",))
    with pytest.raises(CheckpointError, match="began with random weights and did not train lang"):
        convert_to_hf(a_run(tmp_path / "some", section, trained), tmp_path / "none")


def test_a_run_that_diverged_is_not_exported(tmp_path):
    _, trained, _ = split_parts(vxl_jax.load_network(MICRO), ("projector",))
    trained["projector"]["up"]["bias"] = trained["projector"]["up"]["bias"].at[3].set(jnp.inf)
    run = a_run(tmp_path / "run", ModelSection(checkpoint=str(MICRO)), trained)
    with pytest.raises(CheckpointError, match=r"model\.mm_projector\.0\.bias has NaN or infinite"):
        convert_to_hf(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_step_of_a_run_can_be_chosen(tmp_path):
    """By its number, or the one with most held-out questions right."""
    _, trained, _ = split_parts(vxl_jax.load_network(MICRO), ("projector",))
    config = run_config(ModelSection(checkpoint=str(MICRO)))
    path = tmp_path / "run"
    path.mkdir()
    save_config(config, path / "config.json")
    run = replace(config.run, keep_checkpoints=3)
    with closing(Checkpoints(path, replace(config, run=run))) as checkpoints:
        for step, accuracy in ((3, None), (6, 0.75), (9, 0.5)):
            params = jax.tree.map(lambda x, step=step: step * x, trained)
            checkpoints.save(step, params, {}, Position(0, ""), accuracy)
    name = "model.mm_projector.0.bias"
    one = tensors_in(MICRO)[name]
    for chosen, factor in ((None, 9), ("3", 3), (9, 9), ("best", 6)):
        out = tmp_path / f"out-{chosen}"
        convert_to_hf(path, out, step=chosen)
        np.testing.assert_array_equal(tensors_in(out)[name], np.float32(factor) * one)
    with pytest.raises(CheckpointError, match="has no step 4; it has 3, 6, 9, and best"):
        convert_to_hf(path, tmp_path / "none", step=4)
    with pytest.raises(CheckpointError, match="has no steps to choose from"):
        convert_to_hf(MICRO, tmp_path / "none", step=4)
    shutil.rmtree(path / "checkpoints/6")
    shutil.rmtree(path / "checkpoints/9")
    with pytest.raises(CheckpointError, match=r"no step has a score; train with run\.eval_every"):
        convert_to_hf(path, tmp_path / "none", step="best")


def test_runs_without_a_step_or_configuration(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        convert_to_hf(tmp_path, tmp_path / "out")
    save_config(run_config(ModelSection(checkpoint="x")), tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="no step has been saved yet"):
        convert_to_hf(tmp_path, tmp_path / "out")


# On a mesh.

ON_EIGHT_DEVICES = """
import sys
import jax, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import vxl_jax

assert len(jax.devices()) == 8
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

def placement(path, shape):
    divisible = [axis for axis, size in enumerate(shape) if size % 4 == 0]
    axes = [None] * len(shape)
    if divisible:
        axes[max(divisible, key=lambda axis: shape[axis])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*axes))

one = vxl_jax.load_network(sys.argv[1])
for directory in sys.argv[1:]:
    model = vxl_jax.load_network(directory, placement=placement)
    split = 0
    for ours, expected in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(one)), strict=True
    ):
        shards = {shard.data.size for shard in ours.addressable_shards}
        assert len(ours.addressable_shards) == 8
        split += shards == {ours.size // 4}
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))
    print(directory, split)
    assert split > 40, split
"""


def test_each_device_of_a_mesh_reads_its_part(converted):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, str(MICRO), str(converted)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_the_documentation_has_every_row_of_the_table():
    text = (Path(__file__).parents[1] / "docs" / "conversion.md").read_text()
    for row in table(vxl_jax.VideoXLConfig()):
        layout = {id(LINEAR): "transposed", id(SAME): ""}.get(id(row.layout), "patch")
        assert f"| `{row.theirs}` | `{'.'.join(row.ours)}` | {layout} |" in text
