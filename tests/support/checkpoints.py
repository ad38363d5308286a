"""Checkpoints and runs that tests convert."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert.writing import published_config, write_tower
from train.config import DataSection, OptimSection, RunSection, TrainConfig
from train.config.resume import save_config
from vxl_jax.checkpoints.json_files import write_json
from vxl_jax.checkpoints.names import to_published
from vxl_jax.checkpoints.safetensors_read import INDEX_FILE
from vxl_jax.config import VideoXLConfig
from vxl_jax.models.video_xl import VideoXL

GOLDEN = Path(__file__).parents[1] / "golden" / "micro"


MICRO = GOLDEN / "hf"


def save_published(
    config: VideoXLConfig, directory: Path, tokenizer: Any = None, seed: int = 0
) -> Path:
    """Write random weights in the published layout, with a tokenizer if there is one."""
    directory.mkdir(parents=True)
    model = VideoXL(config, rngs=nnx.Rngs(seed))
    tensors = to_published(nnx.to_pure_dict(nnx.state(model)), config)
    save_file(tensors, directory / "model.safetensors")
    fields = published_config(config) | {"eos_token_id": 3, "max_position_embeddings": 32768}
    write_json(directory / "config.json", fields)
    write_tower(config.tower, directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


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


def where(directory):
    return json.loads((directory / INDEX_FILE).read_text())["weight_map"]


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
