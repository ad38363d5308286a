"""What inference is said to need is what it takes; and the most frames that fit."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from vxl_jax import Model, VideoXL, VisualMemory
from vxl_jax.models.int8 import quantize
from vxl_jax.planning.inference_bytes import (
    TEXT_ROOM,
    Estimator,
    entry_bytes,
    estimate_table,
    tree_bytes,
    video_entries,
)
from vxl_jax.presets import demo, video_xl_7b


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_a_model_and_its_memory(weights: str | None, dtype: str):
    config = demo(dtype=dtype, param_dtype=dtype)
    network = VideoXL(config, rngs=nnx.Rngs(0))
    if weights:
        quantize(network)
    model = Model(network, None)
    estimator = Estimator(config, weights)
    assert estimator.weights == sum(x.nbytes for x in jax.tree.leaves(model.params))
    memory = VisualMemory(np.arange(3))
    memory.attach(model)
    memory.extend(np.zeros((9, 56, 56, 3), np.uint8), ratio=8)
    assert memory.length == 3 + video_entries(config, 9, 8)
    assert tree_bytes(memory.arrays()) == memory.length * entry_bytes(config)


@pytest.mark.parametrize("ratio", [2, 16, None])
def test_published_figures_of_the_7b_model(ratio: int | None):
    config = video_xl_7b(dtype="bfloat16", param_dtype="bfloat16")
    assert entry_bytes(config) == 57_344
    assert video_entries(config, 2048, ratio) == 2048 * 144 // (ratio or 1)
    assert 16.7e9 < Estimator(config).weights < 16.9e9
    assert 9e9 < Estimator(config, "int8").weights < 10e9


def test_activations_do_not_depend_on_the_film():
    estimator = Estimator(demo())
    estimator.windows = 4
    short, long = estimator.estimate(400_000, 8), estimator.estimate(3_200_000, 8)
    assert long.memory > 7 * short.memory
    assert long.activations < 1.05 * short.activations


def test_most_frames_just_fit():
    estimator = Estimator(demo())
    estimator.windows = 4
    like = estimator.estimate(100, 8)
    memory = like.weights + like.activations + 5000 * like.entry
    most = estimator.most_frames(like, memory)
    entries = TEXT_ROOM + video_entries(demo(), most, 8)
    assert entries <= 5000 < 1.07 * entries
    assert estimator.most_frames(like, like.weights) == 0
    assert estimator.most_frames(replace(like, ratio=4), memory) == pytest.approx(most / 2, abs=4)
    assert f"{like.entries:,}" in estimate_table([like])
