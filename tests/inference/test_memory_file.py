"""A memory in a file: saved, loaded, extended, refused."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tests.support.networks import assert_same, frames
from vxl_jax import Model, VisualMemoryError, load_memory
from vxl_jax.errors import CheckpointError
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import demo

pytestmark = pytest.mark.usefixtures("exact_products")


def test_a_saved_memory_gives_the_same_answers_and_goes_on(model: Model, tmp_path: Path):
    pixels = frames(14)
    memory = model.watch(pixels[:9], ratio=np.int64(4))
    memory.save(tmp_path / "film.safetensors")
    for loaded in (
        load_memory(tmp_path / "film.safetensors", model),
        load_memory(tmp_path / "film.safetensors"),
    ):
        assert loaded.length == memory.length
        assert loaded.watched == memory.watched
        answer = model.ask(loaded, "What happens?", max_new_tokens=8)
        assert answer == model.ask(memory, "What happens?", max_new_tokens=8)
        assert_same(loaded, memory)
        loaded.extend(pixels[9:], ratio=4)
        assert_same(loaded, model.watch(pixels, ratio=4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.safetensors"]


def test_a_file_is_not_replaced_unless_told(model: Model, tmp_path: Path):
    memory = model.watch(frames(2))
    memory.save(tmp_path / "film")
    with pytest.raises(VisualMemoryError, match="film: exists already"):
        memory.save(tmp_path / "film")
    memory.save(tmp_path / "film", overwrite=True)
    with pytest.raises(VisualMemoryError, match="is a name for pickles"):
        memory.save(tmp_path / "film.pt")
    with pytest.raises(VisualMemoryError, match="the parent directory does not exist"):
        memory.save(tmp_path / "none" / "film")


@pytest.mark.parametrize("change", ["seed", "dtype", "window"])
def test_a_memory_of_another_model_is_refused(model: Model, tmp_path: Path, change: str):
    memory = model.watch(frames(4), ratio=4)
    memory.save(tmp_path / "film")
    config = {"dtype": demo(dtype="bfloat16"), "window": demo(window=32)}.get(change, demo())
    seed = 4 if change == "seed" else 3
    other = Model(VideoXL(config, rngs=nnx.Rngs(seed)), model.tokenizer)
    for load in (lambda: load_memory(tmp_path / "film", other), lambda: other.ask(memory, "Who?")):
        with pytest.raises(VisualMemoryError, match="was made by another model"):
            load()
    same = Model(VideoXL(demo(), rngs=nnx.Rngs(3)), model.tokenizer)
    assert same.fingerprint == model.fingerprint
    assert same.ask(memory, "Who?") == model.ask(memory, "Who?")


def test_a_damaged_file_is_one_error(model: Model, tmp_path: Path):
    model.watch(frames(4)).save(tmp_path / "film")
    data = (tmp_path / "film").read_bytes()
    (tmp_path / "short").write_bytes(data[:-5])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "lacks").write_bytes(data.replace(b'\\"length\\"', b'\\"langth\\"'))
    save_file({"keys": np.zeros(3, np.float32)}, tmp_path / "other")
    for name, reason in (
        ("short", "cannot be read as safetensors"),
        ("empty", "cannot be read as safetensors"),
        ("none", "cannot be read as safetensors"),
        ("lacks", "is damaged"),
        ("other", "is not a saved memory"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: {reason}"):
            load_memory(tmp_path / name, model)


def test_a_memory_without_its_model_cannot_be_extended(model: Model, tmp_path: Path):
    model.watch(frames(4)).save(tmp_path / "film")
    with pytest.raises(VisualMemoryError, match="has no model yet"):
        load_memory(tmp_path / "film").extend(frames(1))
