"""What is computed in float32 in a bfloat16 model, each against float64 as sharp as it can be."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.nn.test_attention import exact_attention
from tests.support.networks import gradients, graph_of, noisy_model, relative_error, training_sample
from vxl_jax.models.functions import decode_step, prefill
from vxl_jax.models.int8 import quantize
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn import qwen2 as language, rope
from vxl_jax.nn.attention import window_attention
from vxl_jax.nn.attention.key_values import KeyValues
from vxl_jax.nn.attention.tiled import tiled_attention
from vxl_jax.nn.groups import make_group, take_group
from vxl_jax.nn.layers import product_in_float32
from vxl_jax.nn.memory import empty_memory
from vxl_jax.presets import tiny
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import plan_stream

pytestmark = pytest.mark.usefixtures("exact_products")

BFLOAT16 = {"dtype": "bfloat16", "param_dtype": "bfloat16"}


def to_bfloat16(x: Any) -> Any:
    return np.asarray(jnp.asarray(np.asarray(x, np.float32)).astype(jnp.bfloat16), np.float64)


# The whole model.


@pytest.fixture(scope="module")
def models() -> tuple[VideoXL, VideoXL]:
    """A bfloat16 model, and one that computes in float32 with the same weights."""
    params = nnx.to_pure_dict(nnx.state(noisy_model()))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    return nnx.merge(graph_of(**BFLOAT16), half), nnx.merge(graph_of(), single)


def test_bfloat16_runs_close_to_float32(models: tuple[VideoXL, VideoXL]):
    half, single = models
    stream, pixels = training_sample(half)
    streams = batch_streams([stream])
    loss, expected = gradients(single, streams, pixels)
    ours, grads = gradients(half, streams, pixels)
    assert ours == pytest.approx(loss, rel=0.02)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))
    for part in ("vision", "projector", "language"):
        a, b = (
            np.concatenate([np.float32(x).ravel() for x in jax.tree.leaves(tree[part])])
            for tree in (grads, expected)
        )
        assert relative_error(a, b) < 0.1, part
    assert nnx.jit(lambda model: model.encode(pixels))(half).dtype == jnp.bfloat16


def test_bfloat16_decoding_equals_one_forward_pass(models: tuple[VideoXL, VideoXL]):
    half, _ = models
    graph, params = nnx.split(half)
    ids = np.random.default_rng(0).integers(0, 90, 24)
    streams = batch_streams([plan_stream(ids, [], window=16, ratio=2)])
    expected = nnx.jit(lambda model: model.logits(model(streams)))(half)[0, 19:]
    first = batch_streams([plan_stream(ids[:20], [], window=16, ratio=2)])
    logits, memory = prefill(graph, params, first, None, 32)
    ours = [logits[0]]
    for token in ids[20:]:
        logits, memory = decode_step(graph, params, memory, jnp.array([token], jnp.int32))
        ours.append(logits[0])
    assert np.asarray(ours).dtype == np.float32
    assert relative_error(ours, expected) < 0.02


# Logits.


@pytest.mark.parametrize("head", ["linear", "tied", "int8"])
def test_logits_are_float32_sums(head: str):
    base = tiny(**BFLOAT16)
    wide = replace(base.language, vocab_size=16_384, tie_embeddings=head == "tied")
    model = noisy_model(replace(base, language=wide))
    hidden = jax.random.normal(jax.random.key(0), (3, 160, wide.width), jnp.bfloat16)
    kernel = model.language.embed.embedding[...].T if head == "tied" else None
    if head == "linear":
        kernel = model.language.head.kernel[...]
    if head == "int8":
        quantize(model)
        int8 = model.language.head
        kernel = np.asarray(int8.kernel[...], np.float64) * np.asarray(int8.scale[...], np.float64)
    logits = np.asarray(nnx.jit(lambda model, x: model.logits(x))(model, hidden))
    assert logits.dtype == np.float32
    expected = np.asarray(model.language.norm(hidden), np.float64) @ np.asarray(kernel, np.float64)
    assert relative_error(logits, expected) < 1e-6

    def ties(x: np.ndarray) -> int:
        return int(((x == x.max(-1, keepdims=True)).sum(-1) > 1).sum())

    assert np.mean(to_bfloat16(logits) == logits) < 0.01
    assert ties(logits) == 0
    assert ties(to_bfloat16(logits)) > 5  # what rounding would do to them


def test_gradients_of_logits_are_those_of_a_plain_product():
    """In float32 exactly, in bfloat16 with each factor rounded once and in its dtype."""
    draw = np.random.default_rng(0)
    x, kernel, direction = (
        draw.normal(size=shape).astype(np.float32) for shape in ((2, 5, 12), (12, 30), (2, 5, 30))
    )
    x, kernel = to_bfloat16(x), to_bfloat16(kernel)
    for dtype, bound in ((jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)):
        ours = jax.grad(
            lambda x, kernel: (product_in_float32(x, kernel) * direction).sum(), (0, 1)
        )(jnp.asarray(x, dtype), jnp.asarray(kernel, dtype))
        expected = direction @ kernel.T, np.einsum("bnd,bnv->dv", x, direction)
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == dtype
            assert relative_error(a, b) < bound


# Queries and scores.


def rotated_in_float64(x: Any, positions: Any, theta: float) -> np.ndarray:
    half = x.shape[-1] // 2
    angle = np.asarray(positions)[..., None, None] * theta ** (-np.arange(half) / half)
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def test_queries_are_rounded_once(models: tuple[VideoXL, VideoXL], monkeypatch: pytest.MonkeyPatch):
    """Scores of a layer's queries are as good as one rounding of the queries lets them be."""
    c = models[0].config
    streams = batch_streams([plan_stream(np.arange(60), [], window=16, ratio=2)])
    group = make_group(c.language, take_group(streams, 0))
    layers = nnx.split(models[0].language.layers)
    layer = nnx.merge(layers[0], jax.tree.map(lambda x: x[0], layers[1])).attention
    x = jax.random.normal(jax.random.key(1), (1, 60, c.language.width), jnp.bfloat16)
    given: list[Any] = []

    def noted(q: Any, *rest: Any, **named: Any) -> Any:
        given.append(q)
        return window_attention(q, *rest, **named)

    monkeypatch.setattr(language, "window_attention", noted)
    memory = empty_memory(c, 1, 64)
    layer(x, group, (KeyValues(memory.keys, memory.values, 0, group.window_memory),))
    q = layer.project(x, None)[0]
    head_size = c.language.head_size
    assert head_size**-0.5 not in (2.0**-i for i in range(9))  # a power of two rounds nothing
    exact = rotated_in_float64(q, np.arange(60)[None], c.language.rope_theta) * head_size**-0.5
    keys = np.random.default_rng(0).normal(size=(head_size, 500))

    def score_error(q: Any) -> float:
        return float(np.sqrt(np.mean((np.asarray(q, np.float64) @ keys - exact @ keys) ** 2)))

    (ours,) = given
    assert ours.dtype == jnp.bfloat16
    assert score_error(ours) < 1.02 * score_error(to_bfloat16(exact))


def bfloat16_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[Any, np.ndarray]:
    """Causal attention of bfloat16 arrays by 32 tiles of 16 keys, and what it is in float64."""
    none = np.zeros((1, 1, 1, 0, q.shape[3]))
    zero = np.zeros(q.shape[:2], np.int32)

    # Without this, XLA leaves out a rounding to bfloat16 that the program asks for.
    @partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def run(q: Any, k: Any, v: Any, none: Any) -> Any:
        return tiled_attention(q, k, v, zero, [KeyValues(none, none, 0, zero)], (64, 16))

    q, k, v = (to_bfloat16(x) for x in (q, k, v))
    ours = run(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, none)))
    assert ours.dtype == jnp.bfloat16
    return ours, exact_attention(q, k, v, none[0], none[0], zero, zero)


def test_scores_and_sums_of_bfloat16_are_float32():
    """Scores to 20: the output is as good as its own rounding, and a little for that of the weights
    before they meet the values.
    """
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 512, 2, 16)) * 1.2
    k, v = rng.normal(size=(2, 1, 512, 1, 16))
    ours, expected = bfloat16_attention(q, k, v)
    assert relative_error(ours, expected) < 1.1 * relative_error(to_bfloat16(expected), expected)


def test_weights_of_bfloat16_are_float32():
    """One key has nearly all the weight and no value. The others' scores are lower by 12 1/32,
    between two numbers of bfloat16: rounded, their weights would be off by 3 %.
    """
    q, k, v = np.zeros((1, 512, 1, 8)), np.zeros((1, 512, 1, 8)), np.ones((1, 512, 1, 8))
    q[..., :2], k[0, 0, 0, :2], v[0, 0] = 1, (12, 1 / 32), 0
    ours, expected = bfloat16_attention(q, k, v)
    assert relative_error(ours, expected) < 5e-3


# Positions.


POSITIONS = [0, 1, 2**15, 74_240, 1_180_160, 2**24 - 1, 2**31 - 1]


@pytest.mark.parametrize(("head_size", "theta"), [(128, 1e6), (128, 1e4), (8, 1e4)])
def test_rope_angles_are_right_at_every_position(head_size: int, theta: float):
    rng = np.random.default_rng(0)
    positions = np.concatenate([POSITIONS, rng.integers(0, 2**24, 5000)]).astype(np.int32)
    ours = jax.jit(lambda x: rope.rope_angles(x, head_size, theta))(positions)
    angle = positions[:, None].astype(np.float64) * theta ** (
        -np.arange(0, head_size, 2) / head_size
    )
    for a, b in zip(ours, (np.cos(angle), np.sin(angle)), strict=True):
        assert a.shape == (len(positions), 1, head_size // 2)
        assert a.dtype == jnp.float32
        assert np.abs(np.asarray(a[:, 0], np.float64) - b).max() < 5e-7
