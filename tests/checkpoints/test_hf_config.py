"""config.json of checkpoints that people have: fields that change numbers are read or refused."""

import json
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vxl_jax
from convert import convert_from_hf, convert_to_hf
from tests.support.checkpoints import GOLDEN, MICRO, assert_same, tensors_in
from vxl_jax.checkpoints.hf_config import UNUSED, read_config
from vxl_jax.checkpoints.hf_tower import KNOWN_TOWERS, find_tower, known_tower
from vxl_jax.checkpoints.names import EMBEDDING_NAME, HEAD_NAME
from vxl_jax.config import VisionConfig
from vxl_jax.errors import CheckpointError

KNOWN = "openai/clip-vit-large-patch14-336"


@pytest.fixture
def change(tmp_path):
    """A function that copies the checkpoint with other fields and tensors; None removes a field."""

    def change(fields=None, tensors=None, tower=None, pixels=None):
        shutil.copytree(GOLDEN, tmp_path / "model", ignore=shutil.ignore_patterns("golden*"))
        directory = tmp_path / "model" / "hf"
        clip = tmp_path / "model" / "clip-vision"
        for path, changed in (
            (directory / "config.json", fields),
            (clip / "config.json", tower),
            (clip / "preprocessor_config.json", pixels),
        ):
            values = json.loads(path.read_text()) if path.is_file() else {}
            values |= changed or {}
            path.write_text(json.dumps({k: v for k, v in values.items() if v != "removed"}))
        if tensors:
            held = load_file(directory / "model.safetensors")
            save_file(held | tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    return change


# The tower.


@pytest.mark.parametrize(
    "name",
    [
        KNOWN,
        "/share/somebody/clip-vit-large-patch14-336",
        "/share/somebody/clip-vit-large-patch14-336/",
        "../elsewhere/clip-vit-large-patch14-336",
        "clip-vit-large-patch14-336",
        r"D:\models\clip-vit-large-patch14-336",
        "/root/.cache/hub/models--openai--clip-vit-large-patch14-336/snapshots/ce19dc912ca5",
    ],
)
def test_a_path_that_ends_in_the_name_of_a_known_tower_is_that_tower(name, tmp_path):
    assert known_tower(name) == KNOWN
    assert find_tower(tmp_path, name, None) == KNOWN_TOWERS[KNOWN]


@pytest.mark.parametrize(
    "name", ["", "/", "google/siglip-base-patch16-224", "/a/clip-vit-large-patch14-336/b"]
)
def test_another_path_is_not_a_known_tower(name, tmp_path):
    assert known_tower(name) is None
    with pytest.raises(CheckpointError, match=rf"copy .* to {tmp_path}/vision_tower"):
        find_tower(tmp_path, name, None)


def test_files_of_a_tower_come_before_its_name(change):
    directory = change({"mm_vision_tower": f"/share/{KNOWN}"})
    shutil.copytree(directory.parent / "clip-vision", directory / "vision_tower")
    assert read_config(directory).vision.image_size == 112


def test_a_known_tower_gives_the_layer_that_the_checkpoint_asks_for(change):
    fields = {"mm_vision_tower": KNOWN, "mm_hidden_size": 1024, "image_grid_pinpoints": None}
    directory = change({**fields, "mm_vision_select_layer": -3})
    assert read_config(directory).vision == replace(VisionConfig(), feature_layer=-3)


# The head.


def other_head():
    held = load_file(MICRO / "model.safetensors")
    return {HEAD_NAME: held[HEAD_NAME] + np.float32(0.25) * held[EMBEDDING_NAME]}


def test_a_head_that_differs_from_tied_embeddings_is_used(change, tmp_path):
    directory = change({"tie_word_embeddings": True}, other_head())
    assert not read_config(directory).language.tie_embeddings
    converted, back = tmp_path / "converted", tmp_path / "back"
    convert_from_hf(directory, converted)
    convert_to_hf(converted, back)
    for place in (directory, converted, back):
        network = vxl_jax.load_network(place)
        np.testing.assert_array_equal(network.language.head.kernel[...].T, other_head()[HEAD_NAME])
    assert_same(tensors_in(back), tensors_in(directory))
    for place in (converted, back):  # for readers that follow the flag
        assert json.loads((place / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_head_with_the_same_weights_stays_tied(change, tmp_path, dtype):
    held = {name: x.astype(dtype) for name, x in load_file(MICRO / "model.safetensors").items()}
    directory = change({"tie_word_embeddings": True}, {**held, HEAD_NAME: held[EMBEDDING_NAME]})
    assert read_config(directory).language.tie_embeddings
    convert_from_hf(directory, tmp_path / "converted")
    convert_to_hf(tmp_path / "converted", tmp_path / "back")
    assert vxl_jax.load_network(tmp_path / "converted").config.language.tie_embeddings
    assert_same(tensors_in(tmp_path / "back"), tensors_in(directory))
    for name in ("converted", "back"):
        ours = json.loads((tmp_path / name / "config.json").read_text())
        assert ours == json.loads((directory / "config.json").read_text())


def test_one_weight_that_differs_is_enough(change):
    embedding = load_file(MICRO / "model.safetensors")[EMBEDDING_NAME]
    head = embedding.copy()
    head[-1, -1] += 1
    directory = change({"tie_word_embeddings": True}, {HEAD_NAME: head})
    assert not read_config(directory).language.tie_embeddings


def test_a_head_of_another_shape_is_an_error_that_names_it(change):
    head = load_file(MICRO / "model.safetensors")[HEAD_NAME][:-1]
    directory = change({"tie_word_embeddings": True}, {HEAD_NAME: head})
    with pytest.raises(CheckpointError, match=rf"tensor {HEAD_NAME} has shape"):
        vxl_jax.load_network(directory)


def test_a_head_that_is_left_out_leaves_embeddings_tied(change, tmp_path):
    directory = change({"tie_word_embeddings": True}, other_head())
    convert_from_hf(directory, tmp_path / "out", ignore=r"lm_head\.weight")
    assert vxl_jax.load_network(tmp_path / "out").config.language.tie_embeddings


def test_a_conversion_that_dropped_the_head_is_refused(change, tmp_path):
    """Earlier versions put a head that differs among the unused tensors."""
    directory = change({"tie_word_embeddings": True}, other_head())
    convert_from_hf(directory, tmp_path / "out", ignore=r"lm_head\.weight")
    unused = load_file(tmp_path / "out" / UNUSED)
    save_file(unused | other_head(), tmp_path / "out" / UNUSED)
    for read in (vxl_jax.load_network, lambda path: convert_to_hf(path, tmp_path / "back")):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight .* convert that checkpoint"):
            read(tmp_path / "out")


# Fields that change numbers.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"head_dim": 32}, "head_dim is 32; only .*16, is implemented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_att"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"rope_scaling": {"rope_type": "longrope", "factors": [1.0]}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 1000000.0, and 10000.0"),
        ({"rope_parameters": "default"}, "rope_parameters is 'default'; it must be an object"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_resampler_type is 'spatial_pool'"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_hidden_size": 1152}, "mm_hidden_size is 1152, but .* hidden_size is 32"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"beacon_accum": False}, "beacon_accum is False"),
        ({"beacon_parallel_window": 2}, "beacon_parallel_window is 2"),
        ({"beacon_ratio_mix": "adapt-1024"}, "beacon_ratio_mix is 'adapt-1024'"),
    ],
)
def test_a_field_that_asks_for_other_numbers_is_refused(fields, message, change):
    with pytest.raises(CheckpointError, match=message):
        read_config(change(fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": "removed"},
        {"rope_parameters": {"rope_type": "default"}},
        {"layer_types": ["full_attention"] * 3, "head_dim": 16},
        {"attention_bias": True, "mlp_bias": False, "quantization_config": None},
        {"attention_dropout": 0, "beacon_accum": "removed", "mm_hidden_size": "removed"},
    ],
)
def test_a_field_that_says_what_is_computed_is_accepted(fields, change):
    assert read_config(change(fields)) == read_config(MICRO)


@pytest.mark.parametrize(
    ("tower", "pixels", "message"),
    [
        ({"model_type": "siglip_vision_model"}, {}, "hidden_act is 'quick_gelu'"),
        ({"model_type": "dinov2"}, {}, "model_type is 'dinov2'"),
        ({"hidden_act": "gelu"}, {}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, {}, "attention_dropout is 0.1"),
        ({}, {"do_normalize": False}, "do_normalize is False"),
        ({}, {"resample": 2}, "resample is 2"),
        ({}, {"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({}, {"crop_size": {"height": 224, "width": 224}}, "crop_size is .*image_size is 112"),
        ({}, {"size": 224}, "size is 224, but the tower's image_size is 112"),
    ],
)
def test_a_tower_with_other_numbers_is_refused(tower, pixels, message, change):
    with pytest.raises(CheckpointError, match=message):
        read_config(change(tower=tower, pixels=pixels))


def test_mean_and_deviation_of_pixels_are_read(change):
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1], "crop_size": 112}
    vision = read_config(change(pixels=pixels)).vision
    assert (vision.image_mean, vision.image_std) == ((0.1, 0.2, 0.3), (0.5, 0.25, 1))
