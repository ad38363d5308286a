"""Checkpoints with beacons and without, with a vision tower and without."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import vxl_jax
from convert import convert_from_hf, convert_to_hf
from tests.support.checkpoints import MICRO, assert_same, tensors_in
from vxl_jax.checkpoints.hf_config import read_config
from vxl_jax.checkpoints.load import abstract_params
from vxl_jax.config import Compression, with_changes
from vxl_jax.presets import demo, tiny
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import plan_stream
from vxl_jax.text.template import IMAGE_TOKEN


def has_beacon(name):
    return "beacon" in name


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The golden checkpoint without beacon tensors and fields, as a plain LLaVA-Qwen has none."""
    directory = tmp_path_factory.mktemp("without") / "hf"
    shutil.copytree(MICRO, directory)
    shutil.copytree(MICRO.parent / "clip-vision", directory / "vision_tower")
    tensors = tensors_in(directory)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    kept = {name: value for name, value in tensors.items() if not has_beacon(name)}
    assert len(kept) < len(tensors)
    save_file(kept, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config = {name: value for name, value in config.items() if not has_beacon(name)}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def uncompressed_logits(model):
    """Logits of a stream whose visual tokens all stay."""
    config = model.config
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 2, *[config.tower.image_size] * 2, 3), np.uint8)
    tokens = [config.layout.count(2)]
    stream = plan_stream([1, IMAGE_TOKEN, 2, 3], tokens, window=64, ratio=None)
    run = jax.jit(lambda model: model.logits(model(batch_streams([stream]), model.encode(pixels))))
    return np.asarray(run(model))


def test_checkpoint_without_beacons_loads_and_computes_the_same(without):
    model, full = vxl_jax.load_network(without), vxl_jax.load_network(MICRO)
    assert model.config.compression is None
    assert model.config.ratios == ()
    assert not any(has_beacon(str(path)) for path, _ in nnx.to_flat_state(nnx.state(model)))
    np.testing.assert_array_equal(uncompressed_logits(model), uncompressed_logits(full))


def test_beacons_of_a_checkpoint_can_be_left_out(without):
    model = vxl_jax.load_network(MICRO, compression=None)
    expected = vxl_jax.load_network(without)
    np.testing.assert_array_equal(uncompressed_logits(model), uncompressed_logits(expected))


def test_checkpoint_without_beacons_converts_back_bit_for_bit(without, tmp_path):
    convert_from_hf(without, tmp_path / "ours")
    convert_to_hf(tmp_path / "ours", tmp_path / "back")
    assert_same(tensors_in(tmp_path / "back"), tensors_in(without))
    assert read_config(tmp_path / "back") == read_config(without)


def test_beacons_of_a_converted_checkpoint_can_be_left_out(without, tmp_path):
    convert_from_hf(MICRO, tmp_path / "ours", vision=MICRO.parent / "clip-vision")
    model = vxl_jax.load_network(tmp_path / "ours", compression=None)
    expected = vxl_jax.load_network(without)
    np.testing.assert_array_equal(uncompressed_logits(model), uncompressed_logits(expected))


@pytest.mark.parametrize("fields", [{}, {"enable_beacon": None}])
def test_beacons_that_the_configuration_forgot_are_an_error(without, tmp_path, fields):
    directory = tmp_path / "hf"
    shutil.copytree(without, directory)
    shutil.copy(MICRO / "model.safetensors", directory / "model.safetensors")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | fields))
    with pytest.raises(vxl_jax.CheckpointError, match=r"has no beacon_window, .* beacon tensors"):
        vxl_jax.load_network(directory)
    (directory / "config.json").write_text(json.dumps(values | {"enable_beacon": False}))
    assert vxl_jax.load_network(directory).config.compression is None


def test_a_ratio_without_beacons_is_refused(demo_tokenizer):
    network = vxl_jax.VideoXL(demo(compression=None), rngs=nnx.Rngs(0))
    model = vxl_jax.Model(network, demo_tokenizer)
    pixels = np.zeros((5, 56, 56, 3), np.uint8)
    with pytest.raises(vxl_jax.ArgumentError, match="ratio 4: the model has no beacons"):
        model.watch(pixels, ratio=4)
    memory = model.watch(pixels)
    assert memory.length == len(model.head_ids()) + 5 * 4
    assert isinstance(model.ask(memory, "what is the colour", max_new_tokens=2), str)


def test_a_model_of_text_alone_chats_and_refuses_media(demo_tokenizer):
    network = vxl_jax.VideoXL(demo(compression=None, vision=None), rngs=nnx.Rngs(0))
    model = vxl_jax.Model(network, demo_tokenizer)
    chat = model.chat()
    for _ in range(2):
        assert isinstance(chat.ask("what is the colour", max_new_tokens=2), str)
    with pytest.raises(vxl_jax.ConfigError, match="reads text alone"):
        model.watch(np.zeros((5, 56, 56, 3), np.uint8))


def test_missing_beacons_are_named(without, tmp_path):
    directory = tmp_path / "hf"
    shutil.copytree(without, directory)
    shutil.copy(MICRO / "config.json", directory / "config.json")
    with pytest.raises(vxl_jax.CheckpointError, match=r"model\.beacon_embed_tokens\.weight"):
        vxl_jax.load_network(directory)


def test_parameters_without_compression_are_those_with_it_but_the_beacons():
    _, some = abstract_params(tiny(compression=None))
    _, all_of_them = abstract_params(tiny())
    assert all_of_them.keys() - some.keys() == {
        path for path in all_of_them if any(map(has_beacon, path))
    }
    assert all(some[path] == all_of_them[path] for path in some)


@pytest.mark.parametrize("changes", [{"ratios": (2,)}, {"window": 8}])
def test_ratios_of_a_model_without_compression_are_refused(changes):
    with pytest.raises(vxl_jax.ConfigError, match="no compression"):
        with_changes(tiny(compression=None), **changes)


def test_changes_of_window_and_ratios_are_those_of_the_compression():
    changed = with_changes(tiny(), window=32, ratios=(8, 16), dtype="bfloat16")
    assert changed.compression == Compression(32, (8, 16))
    assert (changed.window, changed.ratios, changed.dtype) == (32, (8, 16), "bfloat16")
    with pytest.raises(vxl_jax.ConfigError, match="no_such: not a field"):
        with_changes(tiny(), no_such=1)
    with pytest.raises(vxl_jax.ConfigError, match=r"Compression\.ratios \[33\]"):
        with_changes(tiny(), window=32, ratios=(33,))
