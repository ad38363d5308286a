"""Low-rank updates: what they compute, what trains, merging, and a run from end to end."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from tests.support.checkpoints import MICRO
from tests.support.lora import (
    ALL,
    TARGETS,
    Arrays,
    arrays_of,
    lora_model,
    new_model,
    outputs,
    plain_model,
    trained_model,
    watched,
    with_arrays,
)
from train.config import OptimSection, part_of
from train.run.optimizer import Optimizer
from train.run.step import add_batch, split_parts, update
from vxl_jax.config import LoRAConfig, LoRATarget
from vxl_jax.models.lora import LORA_NAMES, LoRALinear, add_lora, lora_path, lora_shapes, merge_lora
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import tiny
from vxl_jax.stream.batch import batch_streams

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(scope="module")
def trained() -> VideoXL:
    return trained_model()


# What an update computes.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_update_changes_no_bit(dtype: str):
    expected = outputs(plain_model(dtype=dtype))
    ours = lora_model(dtype=dtype)
    assert isinstance(ours.language.layers.attention.beacon_q, LoRALinear)
    for a, b in zip(outputs(ours), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    merge_lora(ours)
    before = arrays_of(plain_model(dtype=dtype))
    for path, value in arrays_of(ours).items():
        np.testing.assert_array_equal(value, before[path], err_msg=str(path))


def test_updates_equal_merged_kernels(trained: VideoXL):
    """In every target by itself, and in all together."""
    arrays = arrays_of(trained)
    plain = outputs(lora_model())
    for chosen in (*((target,) for target in TARGETS), TARGETS):
        b = {path: 0 * x for path, x in arrays.items() if path[-1] == "lora_b"}
        for target in chosen:
            path = (*lora_path(target), "lora_b")
            b[path] = arrays[path]
        model = with_arrays(trained, {**arrays, **b})
        ours = outputs(model)
        merge_lora(model)
        for a, expected, without in zip(ours, outputs(model), plain, strict=True):
            assert np.linalg.norm(a - expected) < 1e-5 * np.linalg.norm(expected), chosen
            assert np.linalg.norm(a - without) > 1e-3 * np.linalg.norm(expected), chosen


def test_merged_kernels_are_those_of_the_paper(trained: VideoXL):
    """W + (alpha / r) A B, in every layer; nothing else changes, and the model is a plain one."""
    before = arrays_of(trained)
    model = with_arrays(trained, before)
    merge_lora(model)
    merged, plain = arrays_of(model), plain_model()
    assert nnx.graphdef(model) == nnx.graphdef(plain)
    assert merged.keys() == arrays_of(plain).keys()
    changed = {path for path, value in merged.items() if not np.array_equal(value, before[path])}
    assert changed == {(*lora_path(target), "kernel") for target in TARGETS}
    for *path, _ in changed:
        a, b = (before[*path, name].astype(np.float64) for name in LORA_NAMES)
        for layer, kernel in enumerate(before[*path, "kernel"]):
            expected = kernel + 6.0 / 4 * a[layer] @ b[layer]
            np.testing.assert_allclose(merged[*path, "kernel"][layer], expected, atol=1e-5)


@pytest.mark.parametrize("trained_in", [np.float32, ml_dtypes.bfloat16])
def test_half_precision(trained_in: Any):
    """Updates are float32; they are computed in the model's dtype, and merged in float32."""
    config = LoRAConfig(4, targets=("q", "down"))
    model = trained_model(config, dtype="bfloat16", param_dtype="bfloat16")
    before = arrays_of(model)
    dtypes = {
        name: {x.dtype.name for p, x in before.items() if p[-1] == name}
        for name in ("kernel", *LORA_NAMES)
    }
    assert dtypes == {"kernel": {"bfloat16"}, "lora_a": {"float32"}, "lora_b": {"float32"}}
    linear = nnx.Linear(3, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    linear = LoRALinear(linear, jnp.ones((3, 4)), jnp.ones((4, 5)), 1.0)
    assert linear(jnp.zeros((2, 3))).dtype == jnp.bfloat16
    before = {p: x.astype(trained_in) if p[-1] in LORA_NAMES else x for p, x in before.items()}
    model = with_arrays(model, before)
    merge_lora(model)
    after = arrays_of(model)
    for target in config.targets:
        path = lora_path(target)
        kernel, a, b = (before[*path, name].astype(np.float32) for name in ("kernel", *LORA_NAMES))
        expected = (kernel + 4 * (a @ b)).astype(ml_dtypes.bfloat16)
        same = after[*path, "kernel"] == expected
        assert same.mean() > 0.999  # a last bit of the product may round the other way
    assert all(x.dtype == ml_dtypes.bfloat16 for x in after.values())


# What an update starts from.


def test_a_start_depends_on_seed_and_name_alone():
    def updates(targets: tuple[LoRATarget, ...], seed: int) -> Arrays:
        arrays = arrays_of(lora_model(LoRAConfig(4, targets=targets), seed))
        return {path: x for path, x in arrays.items() if path[-1] in LORA_NAMES}

    everything, other = updates(TARGETS, 0), updates(TARGETS, 1)
    for targets in [("v",), ("down", "beacon_q", "q")]:
        some = updates(targets, 0)
        assert {path[:-1] for path in some} == set(map(lora_path, targets))
        for path, value in some.items():
            np.testing.assert_array_equal(value, everything[path])
    starts = [x for arrays in (everything, other) for p, x in arrays.items() if p[-1] == "lora_a"]
    numbers = np.concatenate([x.ravel() for x in starts])
    assert len(np.unique(numbers)) > 0.99 * len(numbers)  # no two are alike, nor any two layers
    for path, value in everything.items():
        bound = 32**-0.5 if path[-2] != "down" else 48**-0.5
        if path[-1] == "lora_a":
            assert 0.95 * bound < np.abs(value).max() <= bound
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        else:
            assert not value.any()


def test_a_start_is_the_same_however_it_is_made():
    config = tiny(remat="none")

    def make() -> VideoXL:
        model = VideoXL(config, rngs=nnx.Rngs(0))
        add_lora(model, ALL, 3)
        return model

    model, in_place = (nnx.merge(*new_model(config)) for _ in range(2))
    plain_shapes = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in arrays_of(model).items()}
    add_lora(model, ALL, 3)
    expected = arrays_of(model)
    nnx.jit(lambda model: add_lora(model, ALL, 3))(in_place)
    pure = jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())))()
    for arrays in (arrays_of(in_place), flatten_dict(pure)):
        assert arrays.keys() == expected.keys()
        for path, value in arrays.items():
            np.testing.assert_array_equal(value, expected[path], err_msg=str(path))

    abstract = nnx.eval_shape(make)
    assert nnx.graphdef(abstract) == nnx.graphdef(model)
    shapes = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for path, x in flatten_dict(nnx.to_pure_dict(nnx.state(abstract))).items()
    }
    assert shapes == plain_shapes | lora_shapes(plain_shapes, ALL)
    assert lora_shapes(plain_shapes, LoRAConfig()) == {}


def test_rank_zero_adds_nothing_and_a_second_update_is_refused():
    model = plain_model()
    graph = nnx.graphdef(model)
    add_lora(model, LoRAConfig(), 0)
    assert nnx.graphdef(model) == graph
    add_lora(model, LoRAConfig(2, targets=("k",)), 0)
    with pytest.raises(ValueError, match="k have updates already"):
        add_lora(model, LoRAConfig(2, targets=("q", "k")), 0)


# Training.


def one_step(model: VideoXL, optim: OptimSection) -> tuple[Arrays, Arrays]:
    """Trained parameters before and after a step."""
    stream, pixels = watched(model.config)
    graph, trained, frozen = split_parts(model, optim.train, optim.param_dtype)
    before = flatten_dict(jax.tree.map(np.array, trained))
    sums = add_batch(graph, trained, frozen, None, batch_streams([stream]), pixels)
    assert flatten_dict(sums["gradients"]).keys() == before.keys()
    trained = jax.tree.map(jnp.array, trained)  # the model's own must not be donated
    optimizer = Optimizer(optim, 10, 0)
    trained, *_ = update(optimizer, trained, jax.jit(optimizer.init)(trained), sums)
    return before, flatten_dict(jax.tree.map(np.array, trained))


def test_updates_alone_are_trained(trained: VideoXL):
    whole = arrays_of(trained)
    assert {part_of(path) for path in whole} == {
        *("vision", "projector", "language", "beacon", "lora")
    }
    optim = OptimSection(1e-3, 0.0, train=("lora",))
    before, after = one_step(trained, optim)
    assert before.keys() == {(*lora_path(t), name) for t in TARGETS for name in LORA_NAMES}
    for path, value in after.items():
        changed = (value != before[path]).any(axis=(1, 2))  # in every layer, but
        last = path[-2] != "beacon_q"  # no token sees what a beacon sees in the last one
        assert changed.tolist() == [True, True, last], path
    for path, value in arrays_of(trained).items():
        np.testing.assert_array_equal(value, whole[path], err_msg=str(path))

    _, others, updates = split_parts(trained, ("vision", "projector", "language", "beacon"))
    assert flatten_dict(updates).keys() == before.keys()
    assert flatten_dict(others).keys() == whole.keys() - before.keys()


def test_a_new_update_begins_to_learn():
    """Its gradient reaches lora_b at once, and lora_a from the second step on."""
    before, after = one_step(lora_model(), OptimSection(1e-3, 0.0, train=("lora",)))
    changed = {path[-1] for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"lora_b"}


# On a mesh.

ON_EIGHT_DEVICES = """
import sys
import jax, numpy as np
from flax import nnx
from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig
from train.run.setup import make_model, read_model_config
from vxl_jax.config import LoRAConfig
from vxl_jax.nn.sharding import make_mesh, param_placement

assert len(jax.devices()) == 8
config = TrainConfig(
    ModelSection(checkpoint=sys.argv[1]), DataSection(("x",), "x"), OptimSection(train=("lora",)),
    RunSection("x"), lora=LoRAConfig(4, targets=("q", "o", "down")),
)
sizes = read_model_config(config)
one = make_model(config, sizes)
model = make_model(config, sizes, param_placement(make_mesh(2, 2, 2), sizes))
cut = []
states = (nnx.to_flat_state(nnx.state(x)) for x in (model, one))
for (path, ours), (_, expected) in zip(*states, strict=True):
    ours, expected = ours.get_value(), expected.get_value()
    assert len(ours.addressable_shards) == 8, path
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))
    if path[-1] in ("lora_a", "lora_b"):
        cut.append((*path[-2:], ours.size // ours.addressable_shards[0].data.size))
print(sorted(cut))
"""


def test_each_device_of_a_mesh_makes_its_part_of_the_same_updates():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, str(MICRO)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [(target, name, 2) for target in ("down", "o", "q") for name in LORA_NAMES]
    assert done.stdout.splitlines()[-1] == str(expected)  # after a warning about preprocessing
