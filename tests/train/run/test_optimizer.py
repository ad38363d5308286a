"""AdamW and Adafactor: what they compute, what room they take, how bfloat16 is rounded."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict

from tests.support.runs import run_on_four_devices
from train.config import OptimSection
from train.run.optimizer import Optimizer, is_stacked, round_stochastic
from train.run.step import lower_update
from vxl_jax.checkpoints.load import abstract_params
from vxl_jax.checkpoints.names import name_rows
from vxl_jax.presets import tiny, video_xl_7b

SHAPES = {
    ("language", "embed", "embedding"): (200, 160),
    ("language", "layers", "attention", "q", "kernel"): (3, 160, 130),
    ("language", "layers", "attention", "q", "bias"): (3, 130),
    ("language", "layers", "attention", "beacon_q", "kernel"): (3, 160, 130),
    ("language", "layers", "mlp", "up", "lora_a"): (3, 160, 8),
    ("language", "layers", "mlp_norm", "scale"): (3, 160),
    ("language", "norm", "scale"): (160,),
    ("projector", "up", "kernel"): (130, 160),
    ("vision", "layers", "q", "kernel"): (3, 40, 130),
}
DECAY = ("kernel", "embedding", "lora_a", "lora_b")
BOTH = pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])


def draw(seed: int, dtype: Any = jnp.float32) -> Any:
    """A tree of numbers whose sizes grow along the first axis: by layer, by row."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for path, shape in SHAPES.items():
        sizes = np.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))
        drawn[path] = jnp.asarray(sizes * rng.normal(size=shape), dtype)
    return unflatten_dict(drawn)


@partial(jax.jit, static_argnums=0)
def clipped_step(optimizer: Optimizer, params: Any, state: Any, gradients: Any) -> Any:
    return optimizer.apply(params, state, gradients, optimizer.clipping(optax.tree.norm(gradients)))


def run(config: OptimSection, steps: int, dtype: Any = jnp.float32, seed: int = 0) -> Any:
    """Parameters (flat) and state after steps with drawn gradients, of a run of ten."""
    optimizer, params = Optimizer(config, 10, seed), draw(0, dtype)
    state = optimizer.init(params)
    for step in range(steps):
        params, state = clipped_step(optimizer, params, state, draw(step + 1))
    return flatten_dict(params), state


def run_optax(transform: optax.GradientTransformation, params: Any, gradients: Any) -> Any:
    state = transform.init(params)
    for gradient in gradients:
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def adamw_of_optax(optimizer: Optimizer) -> optax.GradientTransformation:
    """AdamW as runs had it whose checkpoints may be at hand."""
    config = optimizer.config

    def decays(params: Any) -> Any:
        return path_aware_map(lambda path, _: path[-1] in DECAY, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            optimizer.schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=decays
        ),
    )


# What they compute.


def test_adamw_is_that_of_optax():
    config = OptimSection(0.01, 0.2, weight_decay=0.1, b1=0.8, b2=0.9, clip_norm=0.5)
    theirs = adamw_of_optax(Optimizer(config, 10, seed=0))
    expected = flatten_dict(run_optax(theirs, draw(0), [draw(step) for step in range(1, 6)]))
    for path, value in run(config, 5)[0].items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=1e-6, err_msg=str(path))


def test_states_of_runs_that_were_saved_before_fit():
    optimizer, params = Optimizer(OptimSection(), 10, seed=0), draw(0)
    theirs = adamw_of_optax(optimizer)
    assert jax.eval_shape(optimizer.init, params) == jax.eval_shape(theirs.init, params)


def test_adafactor_is_that_of_optax_on_every_layer_alone():
    config = OptimSection(0.01, 0.2, weight_decay=0.1, optimizer="adafactor", clip_norm=0.5)
    optimizer = Optimizer(config, 10, seed=0)
    found, (_, (moments, *_)) = run(config, 5)
    assert int(moments.count) == 5
    gradients = []
    for step in range(1, 6):
        gradient = draw(step)
        scale = optimizer.clipping(optax.tree.norm(gradient))
        gradients.append(flatten_dict(jax.tree.map(lambda x, s=scale: s * x, gradient)))

    for path, start in flatten_dict(draw(0)).items():
        theirs = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(0.1 if path[-1] in DECAY else 0.0),
            optax.scale_by_learning_rate(optimizer.schedule),
        )
        for layer in range(start.shape[0]) if is_stacked(path) else [slice(None)]:
            mine = [gradient[path][layer] for gradient in gradients]
            expected = run_optax(theirs, start[layer], mine)
            np.testing.assert_allclose(
                found[path][layer], expected, rtol=1e-4, atol=1e-6, err_msg=str((path, layer))
            )


def test_adafactor_keeps_a_row_and_a_column_for_each_layer():
    params = draw(0, jnp.bfloat16)
    _, (moments, *_) = Optimizer(OptimSection(optimizer="adafactor"), 10, seed=0).init(params)
    rows, columns, whole = (flatten_dict(tree) for tree in moments[1:])
    path = ("language", "layers", "attention", "q", "kernel")
    shapes = (rows[path].shape, columns[path].shape, whole[path].shape)
    assert shapes == ((3, 130), (3, 160), (3, 1))
    assert whole["language", "layers", "mlp_norm", "scale"].shape == (3, 160)


@BOTH
def test_moments_are_float32_whatever_the_parameters(optimizer: Any):
    config = OptimSection(optimizer=optimizer)
    for steps in (0, 2):
        params, state = run(config, steps, jnp.bfloat16)
        assert {x.dtype for x in params.values()} == {jnp.dtype("bfloat16")}
        dtypes = {x.dtype for x in jax.tree.leaves(state) if x.ndim}
        assert dtypes == {jnp.dtype("float32")}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("config", [tiny(), video_xl_7b()])
def test_stacked_parameters_are_those_with_a_layer_axis(config: Any):
    rows = name_rows(config)
    for row in rows:
        assert is_stacked(row.ours) == (row.layers > 0), row.ours


# Clipping and learning rates.


@pytest.mark.parametrize(("clip", "expected"), [(1.0, [0.6, 0.8]), (5.5, [3.0, 4.0])])
def test_gradients_are_clipped_to_the_norm(clip: float, expected: list[float]):
    gradients = {
        "projector": {"bias": jnp.array([3.0])},
        "vision": {"layers": {"bias": jnp.array([[4.0]])}},
    }
    params = jax.tree.map(jnp.zeros_like, gradients)
    optimizer = Optimizer(OptimSection(clip_norm=clip, b1=0.0), 10, seed=0)
    _, (_, (adam, *_)) = clipped_step(optimizer, params, optimizer.init(params), gradients)
    mean = np.concatenate([x.ravel() for x in jax.tree.leaves(adam.mu)])
    np.testing.assert_allclose(mean, expected, rtol=1e-6)


def test_warm_up_then_cosine_to_zero():
    schedule = Optimizer(OptimSection(2.0, warmup_share=0.1), 100, seed=0).schedule
    values = np.array([float(schedule(i)) for i in range(101)])
    np.testing.assert_allclose(values[:11], np.linspace(0, 2, 11), rtol=1e-6)
    cosine = 1 + np.cos(np.pi * np.arange(91) / 90)
    np.testing.assert_allclose(values[10:], cosine, atol=1e-6)
    assert values[100] == 0


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.99])
def test_short_runs_have_a_schedule(steps: int, share: float):
    schedule = Optimizer(OptimSection(1.0, warmup_share=share), steps, seed=0).schedule
    values = [float(schedule(i)) for i in range(steps + 1)]
    assert np.isfinite(values).all()
    assert max(values) == 1.0  # the peak is reached
    assert values[steps] == pytest.approx(0.0, abs=1e-6)
    assert values[0] == (1.0 if share == 0 or steps == 1 else 0.0)


@BOTH
def test_parts_have_their_own_learning_rates(optimizer: Any):
    plain = OptimSection(0.01, 0.0, weight_decay=0.1, optimizer=optimizer)
    rates = OptimSection(
        *(0.01, 0.0),
        weight_decay=0.1,
        optimizer=optimizer,
        train=("vision", "projector", "language", "beacon", "lora"),
        vision_learning_rate=0.002,
        lora_learning_rate=0.03,
        beacon_learning_rate=0.05,
        projector_learning_rate=0.01,
    )
    before = flatten_dict(draw(0))
    one, other = run(plain, 1)[0], run(rates, 1)[0]
    for path, value in before.items():
        names = {"beacon_q": 5.0, "vision": 0.2, "lora_a": 3.0}
        factor = next((names[name] for name in path if name in names), 1.0)
        moved = factor * (one[path] - value)
        assert np.abs(moved).max() > 1e-3
        np.testing.assert_allclose(other[path] - value, moved, atol=3e-6, err_msg=str(path))


def test_rates_are_those_of_their_parts():
    config = OptimSection(1e-5, train=("projector", "language"), projector_learning_rate=1e-3)
    peaks = {part: config.peak(part) for part in ("vision", "projector", "language", "lora")}
    assert peaks == {"vision": 1e-5, "projector": 1e-3, "language": 1e-5, "lora": 1e-5}


def test_the_rate_of_the_step_to_come_follows_from_the_state():
    config = OptimSection(0.01, 0.2)
    optimizer = Optimizer(config, 10, seed=0)
    for steps in (0, 1, 3):
        assert optimizer.rate(run(config, steps)[1]) == optimizer.schedule(steps)


def test_equal_optimizers_share_a_compilation():
    params = {"projector": {"bias": jnp.zeros(1)}}
    before = clipped_step._cache_size()
    for rate in (0.25, 0.25, 0.125):
        optimizer = Optimizer(OptimSection(rate), 7, seed=3)
        clipped_step(optimizer, params, optimizer.init(params), params)
    assert clipped_step._cache_size() == before + 2


# Room.


def shapes_of_update(optimizer: Optimizer, params: Any, dtype: Any = jnp.float32) -> tuple:
    """Arguments of `update` without numbers; gradients have this dtype."""
    number = jax.ShapeDtypeStruct((), jnp.float32)
    gradients = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    sums = {"gradients": gradients, **dict.fromkeys(("loss", "tokens", "correct"), number)}
    return optimizer, params, jax.eval_shape(optimizer.init, params), sums


def size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# Not with bfloat16: on CPUs, XLA widens whole arrays of it.
@pytest.mark.parametrize(("optimizer", "layers"), [("adafactor", 3.0), ("adamw", 0.1)])
def test_updates_are_in_place_and_take_the_room_of_a_layer(optimizer: Any, layers: float):
    shape = (24, 256, 512)
    paths = [("language", "layers", name, "kernel") for name in ("gate", "up")]
    params = unflatten_dict({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path in paths})
    chosen = Optimizer(OptimSection(optimizer=optimizer), 10, seed=0)
    arguments = shapes_of_update(chosen, params)
    memory = lower_update(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size(arguments[1]) + size(arguments[2])
    assert memory.temp_size_in_bytes < layers * 4 * shape[1] * shape[2]


def test_a_7b_model_at_rest():
    """bfloat16 weights and gradients, and Adafactor's moments, in the room of one 80 GB card."""
    _, shapes = abstract_params(video_xl_7b(param_dtype="bfloat16"))
    optimizer = Optimizer(OptimSection(optimizer="adafactor"), 10, seed=0)
    _, params, state, sums = shapes_of_update(optimizer, unflatten_dict(shapes), jnp.bfloat16)
    number = sum(x.size for x in shapes.values())
    assert 8.3e9 < number < 8.5e9
    assert size(params) == size(sums["gradients"]) == 2 * number
    assert size(state) < 0.02e9


# Rounding.


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 numbers next to x towards zero and away from it, as float32."""
    bits = x.view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32), (bits + np.uint32(0x10000)).view(np.float32)


def test_rounding_is_unbiased_and_goes_to_a_neighbour():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200).astype(np.float32) * np.float32(10.0) ** rng.integers(-30, 30, 200)
    x = x.astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    rounded = jax.vmap(partial(round_stochastic, jnp.asarray(x)))(keys)
    assert rounded.dtype == jnp.bfloat16
    rounded = np.asarray(rounded, np.float32)
    inner, outer = neighbours(x)
    up = rounded == outer
    assert (up | (rounded == inner)).all()
    share = np.float64(x - inner) / np.float64(outer - inner)
    deviation = np.sqrt(share * (1 - share) / len(keys))
    assert (np.abs(up.mean(0) - share) < 5 * deviation + 1e-9).all()
    assert np.abs(up.mean() - share.mean()) < 4 * deviation.mean() / np.sqrt(len(x))


def test_what_bfloat16_can_hold_does_not_move():
    every = np.arange(2**16, dtype=np.uint32) << 16
    x = jnp.asarray(every.view(np.float32))
    for seed in range(3):
        rounded = round_stochastic(x, jax.random.key(seed))
        back = np.asarray(rounded).view(np.uint16)
        finite = np.isfinite(every.view(np.float32))
        np.testing.assert_array_equal(back[finite], (every >> 16)[finite])
        np.testing.assert_array_equal(rounded.astype(jnp.float32), x)  # NaN is NaN here
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000], np.uint32).view(np.float32)
    rounded = np.asarray(round_stochastic(jnp.asarray(odd), jax.random.key(0)), np.float32)
    assert np.isnan(rounded[:3]).all()
    assert rounded[3] == np.inf


@BOTH
def test_small_steps_count_in_the_mean(optimizer: Any):
    """Forty steps of 1e-5 on weights of 0.02, between which bfloat16 has steps of 1.2e-4."""
    chosen = Optimizer(OptimSection(1e-5, 0.0, optimizer=optimizer), 100, seed=0)
    path = ("language", "layers", "mlp", "up", "kernel")
    moved = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        params = unflatten_dict({path: jnp.full((2, 128, 130), 0.02, jnp.bfloat16).astype(dtype)})
        start, state = flatten_dict(params)[path], chosen.init(params)
        gradients = jax.tree.map(lambda x: jnp.ones(x.shape), params)
        for _ in range(40):
            params, state = clipped_step(chosen, params, state, gradients)
        now = flatten_dict(params)[path]
        moved[dtype] = np.mean(np.asarray(now, np.float64) - np.asarray(start, np.float64))
    assert moved[jnp.float32] < -3e-4
    np.testing.assert_allclose(moved[jnp.bfloat16], moved[jnp.float32], rtol=0.03)
    nearest = jnp.bfloat16(0.02)
    for _ in range(40):
        nearest = (nearest.astype(jnp.float32) - 1e-5).astype(jnp.bfloat16)
    assert nearest == jnp.bfloat16(0.02)  # what stochastic rounding is for


def test_random_bits_follow_from_seed_step_name_and_layer():
    shape = (2, 40, 50)
    paths = [("language", "layers", name, "kernel") for name in ("gate", "up")]

    def rounded(seed: int, steps: int, optimizer: Any) -> dict[Any, np.ndarray]:
        """Which weights of 0.02 a step has moved, by name and layer."""
        chosen = Optimizer(OptimSection(1e-5, 0.0, optimizer=optimizer), 10**6, seed=seed)
        params = unflatten_dict({path: jnp.full(shape, 0.02, jnp.bfloat16) for path in paths})
        state = chosen.init(params)
        gradients = jax.tree.map(jnp.ones_like, params)
        for _ in range(steps):
            new, state = clipped_step(chosen, params, state, gradients)
        flat = flatten_dict(new)
        return {(p[2], i): np.asarray(flat[p][i] != 0.02) for p in paths for i in range(2)}

    patterns = {}
    for optimizer in ("adamw", "adafactor"):
        for seed, steps in ((0, 1), (0, 2), (1, 1)):
            first, second = (rounded(seed, steps, optimizer) for _ in range(2))
            for name, pattern in first.items():
                np.testing.assert_array_equal(pattern, second[name])
                assert 0.03 < pattern.mean() < 0.15  # 8 % are to move
                patterns[(seed, steps, *name)] = pattern.tobytes()
    assert len(set(patterns.values())) == len(patterns) == 3 * 4


ON_FOUR_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from train.config import OptimSection
from train.run.optimizer import Optimizer

assert len(jax.devices()) == 4
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
path = ("language", "layers", "q", "kernel")
other = ("language", "embed", "embedding")
start = {path: rng.normal(size=(2, 128, 256)), other: rng.normal(size=(256, 128))}
# Sums of squares of small whole numbers are the same in any order.
gradients = {name: rng.integers(-3, 4, x.shape).astype(np.float32) for name, x in start.items()}

for optimizer in ("adamw", "adafactor"):
    chosen = Optimizer(OptimSection(1e-3, 0.0, optimizer=optimizer), 10, seed=0)

    def step(params, state, gradients):
        return chosen.apply(params, state, gradients, 2.0**-10)

    results = []
    for spec in (PartitionSpec(), PartitionSpec("a", "b"), PartitionSpec("b")):
        def place(x):
            layer = (None,) * (x.ndim - 2)
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*layer, *spec)))

        params = unflatten_dict({k: place(jnp.asarray(x, jnp.bfloat16)) for k, x in start.items()})
        mine = unflatten_dict({k: place(jnp.asarray(x)) for k, x in gradients.items()})
        state = chosen.init(params)
        for _ in range(3):
            params, state = jax.jit(step)(params, state, mine)
        assert all(
            not x.sharding.is_fully_replicated for x in jax.tree.leaves(params)
        ) or spec == PartitionSpec()
        results.append(jax.tree.map(np.asarray, params))
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, result, results[0])
print("equal on every mesh")
"""


def test_every_mesh_arrives_at_the_same_parameters():
    assert "equal on every mesh" in run_on_four_devices(ON_FOUR_DEVICES)
