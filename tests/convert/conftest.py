"""Converted checkpoints."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from convert import convert_from_hf, convert_to_hf
from tests.support.checkpoints import MICRO, save_published
from vxl_jax.presets import tiny_llava


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "model"
    convert_from_hf(MICRO, directory)
    return directory


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-Video with random weights, in the published layout."""
    return save_published(tiny_llava(), tmp_path_factory.mktemp("llava") / "hf")


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
