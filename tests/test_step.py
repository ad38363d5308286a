"""The training step: parts, schedule, accumulation, fingerprint."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from train.config import OptimSection, Part, part_of
from train.optimizer import Optimizer
from train.setup import random_model
from train.step import add_batch, empty_sums, fingerprint, split_parts, update
from vxl_jax.config import tiny
from vxl_jax.model import VideoXL
from vxl_jax.stream import IGNORE, IMAGE_TOKEN, Stream, StreamShape, batch_streams, plan_stream

PARTS: tuple[Part, ...] = ("vision", "projector", "language", "beacon")
FRAMES = 2
OPTIM = OptimSection(learning_rate=1e-4, warmup_share=0.0, clip_norm=1e9)


@pytest.fixture(scope="module")
def model() -> VideoXL:
    """A model without parameters that are zero or one, on which decay would not show."""
    graph, state = nnx.split(random_model(tiny(remat="none"), seed=0))
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + rng.uniform(0.02, 0.05, x.shape).astype(x.dtype), state)
    return nnx.merge(graph, noisy)


def make_streams() -> list[Stream]:
    """Four samples of two frames and text, with 1, 2, 3 and 4 labelled tokens."""
    streams = []
    for i in range(4):
        ids = np.array([5, IMAGE_TOKEN, *range(10, 16)], np.int32)
        labels = np.where(np.arange(len(ids)) >= len(ids) - 1 - i, ids + i, IGNORE)
        streams.append(
            plan_stream(ids, [4 * FRAMES], window=16, ratio=(2, 4)[i % 2], labels=labels)
        )
    return streams


def batch_of(chosen: Sequence[int]) -> tuple[Any, Any]:
    """The chosen samples in the first of four places. Always of one shape: one compilation."""
    streams = make_streams()
    shape = StreamShape.of(streams[0])
    for stream in streams:
        shape = shape.union(StreamShape.of(stream))
    pixels = np.random.default_rng(0).integers(0, 256, (4, FRAMES, 56, 56, 3), np.uint8)
    mine = np.zeros_like(pixels)
    mine[: len(chosen)] = pixels[list(chosen)]
    places = [streams[i] for i in chosen] + [None] * (4 - len(chosen))
    return batch_streams(places, shape), mine


def sums_of(model: VideoXL, batches: Sequence[Sequence[int]], parts=PARTS) -> dict[str, Any]:
    """Sums over batches of the chosen samples."""
    graph, trained, frozen = split_parts(model, parts)
    sums = empty_sums(trained)
    for chosen in batches:
        sums = add_batch(graph, trained, frozen, sums, *batch_of(chosen))
    return sums


def step(model: VideoXL, batches: Sequence[Sequence[int]], config: OptimSection = OPTIM) -> Any:
    """One optimizer step: parameters before and after (flat, on the host), metrics."""
    _, trained, _ = split_parts(model, config.train)
    before = jax.tree.map(np.array, flatten_dict(trained))
    optimizer = Optimizer(config, 10, seed=0)
    sums = sums_of(model, batches, config.train)
    trained = jax.tree.map(jnp.array, trained)  # the model's own must not be donated
    after, _, metrics = update(optimizer, trained, jax.jit(optimizer.init)(trained), sums)
    return before, jax.tree.map(np.array, flatten_dict(after)), metrics


# Parts.


def test_every_parameter_belongs_to_one_part(model: VideoXL):
    flat = flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    assert {part_of(path) for path in flat} == set(PARTS)
    found: list[tuple[str, ...]] = []
    for part in PARTS:
        _, trained, frozen = split_parts(model, (part,))
        assert {part_of(path) for path in flatten_dict(trained)} == {part}
        assert flatten_dict(trained).keys() | flatten_dict(frozen).keys() == flat.keys()
        found += flatten_dict(trained)
    assert sorted(found) == sorted(flat)


def test_beacon_parameters_are_the_beacons_own(model: VideoXL):
    _, trained, _ = split_parts(model, ("beacon",))
    names = {"/".join(path) for path in flatten_dict(trained)}
    layers = "language/layers/attention"
    assert names == {
        "language/beacon_embed",
        *(f"{layers}/beacon_{n}/{kind}" for n in "qkv" for kind in ("kernel", "bias")),
    }


def test_split_parts_are_merged_to_the_same_model(model: VideoXL):
    graph, trained, frozen = split_parts(model, ("projector", "beacon"))
    merged = nnx.to_pure_dict(nnx.state(nnx.merge(graph, trained, frozen)))
    jax.tree.map(np.testing.assert_array_equal, merged, nnx.to_pure_dict(nnx.state(model)))


def test_all_trained_parameters_change_and_no_others(model: VideoXL):
    before, after, _ = step(model, [[0, 1, 2, 3]])
    same = ["/".join(path) for path in before if np.array_equal(before[path], after[path])]
    assert same == []

    parts: tuple[Part, ...] = ("projector", "beacon")
    state = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    before, after, _ = step(model, [[0, 1, 2, 3]], OptimSection(1e-3, 0.0, train=parts))
    assert {part_of(path) for path in after} == set(parts)
    assert not any(np.array_equal(before[path], after[path]) for path in after)
    now = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, now, state)


# Accumulation.


@pytest.mark.parametrize("batches", [[[0], [1, 2, 3]], [[3, 2], [], [1, 0]]])
def test_accumulated_batches_equal_one_batch(model: VideoXL, batches: list[list[int]]):
    """Batches of 1 and 9, or of 7 and 3 labelled tokens; every token weighs the same."""
    whole, parts = sums_of(model, [[0, 1, 2, 3]]), sums_of(model, batches)
    assert whole["tokens"] == parts["tokens"] == 1 + 2 + 3 + 4
    assert whole["correct"] == parts["correct"]
    for a, b in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    _, after_whole, metrics_whole = step(model, [[0, 1, 2, 3]])
    _, after_parts, metrics_parts = step(model, batches)
    np.testing.assert_allclose(metrics_whole["loss"], metrics_parts["loss"], rtol=1e-6)
    for path, value in after_whole.items():
        # A shift of all scores changes no softmax: the gradient is rounding, which Adam blows up.
        if path != ("vision", "layers", "k", "bias"):
            np.testing.assert_allclose(value, after_parts[path], atol=1e-6, err_msg=str(path))


def test_loss_is_the_mean_over_labelled_tokens(model: VideoXL):
    losses = []
    for i in range(4):
        sums = sums_of(model, [[i]])
        losses.append((float(sums["loss"]), float(sums["tokens"])))
    _, _, metrics = step(model, [[0, 1, 2, 3]])
    total, tokens = map(sum, zip(*losses, strict=True))
    np.testing.assert_allclose(metrics["loss"], total / tokens, rtol=1e-5)
    gradients = jax.tree.leaves(sums_of(model, [[0, 1], [2, 3]])["gradients"])
    norm = np.sqrt(sum(float(jnp.square(gradient).sum()) for gradient in gradients))
    np.testing.assert_allclose(metrics["gradient_norm"], norm / tokens, rtol=1e-5)
    # Close to a uniform guess at the start, which a wrong denominator would not be.
    assert abs(float(metrics["loss"]) - np.log(96)) < 1.5


def test_an_empty_batch_changes_nothing_but_by_decay(model: VideoXL):
    config = OptimSection(1e-3, 0.0, weight_decay=0.1)
    before, after, metrics = step(model, [[]], config)
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss": 0.0,
        "accuracy": 0.0,
        "gradient_norm": 0.0,
        "learning_rate": pytest.approx(1e-3),
        "finite": 1.0,
    }
    decayed = {path[-1] for path in before if not np.array_equal(before[path], after[path])}
    assert decayed == {"kernel", "embedding"}
    for path, value in before.items():
        expected = value * (1 - 1e-3 * 0.1) if path[-1] in decayed else value
        np.testing.assert_allclose(after[path], expected, rtol=1e-6, err_msg=str(path))


@pytest.mark.parametrize(("clip", "expected"), [(1.0, [0.6, 0.8]), (5.5, [3.0, 4.0])])
def test_gradients_are_clipped_to_the_norm(clip: float, expected: list[float]):
    params = {"vision": {"bias": jnp.zeros(1)}, "projector": {"bias": jnp.zeros(1)}}
    gradients = {"vision": {"bias": jnp.array([3.0])}, "projector": {"bias": jnp.array([4.0])}}
    optimizer = Optimizer(OptimSection(clip_norm=clip, b1=0.0), 10, seed=0)
    scale = optimizer.clipping(jnp.array(5.0))
    _, (_, (adam, *_)) = optimizer.apply(params, optimizer.init(params), gradients, scale)
    mean = [float(adam.mu[name]["bias"][0]) for name in ("vision", "projector")]
    np.testing.assert_allclose(mean, expected, rtol=1e-6)


# Schedule.


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


# Fingerprint.


def test_fingerprint_changes_with_any_bit_and_not_with_order():
    params = {"a": {"x": np.arange(6.0, dtype=np.float32)}, "b": np.zeros((2, 3), np.float32)}
    same = fingerprint(params)
    assert len(same) == 64
    assert fingerprint(dict(reversed(params.items()))) == same
    assert fingerprint({"b": params["b"]}, {"a": params["a"]}) == same
    assert fingerprint(jax.tree.map(jnp.array, params)) == same
    flat = flatten_dict(params)
    others = {same}
    for path, value in flat.items():
        for byte in range(value.nbytes):
            changed = value.copy()
            changed.view(np.uint8).reshape(-1)[byte] ^= 1
            others.add(fingerprint(unflatten_dict({**flat, path: changed})))
    assert len(others) == 1 + sum(value.nbytes for value in flat.values())


def test_fingerprint_sees_names_shapes_and_dtypes():
    zero = np.zeros((2, 3), np.float32)
    values = [
        *({"a": zero}, {"b": zero}, {"a": {"b": zero}}, {"a": zero.reshape(3, 2)}),
        *({"a": zero.astype(np.int32)}, {"a": jnp.zeros((2, 3), jnp.bfloat16)}),
        *({"a": zero, "b": zero[:0]}, {}),
    ]
    assert len({fingerprint(value) for value in values}) == len(values)


def test_trained_parameters_are_float32_whatever_the_model_stores():
    model = nnx.eval_shape(
        lambda: VideoXL(tiny(param_dtype="bfloat16", dtype="bfloat16"), rngs=nnx.Rngs(0))
    )
    concrete = nnx.merge(
        nnx.graphdef(model),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.to_pure_dict(nnx.state(model))),
    )
    _, trained, frozen = split_parts(concrete, ("projector",))
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
