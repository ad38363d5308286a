"""Attention by tiles, and memories in several parts."""

import itertools
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.networks import noisy_model, relative_error
from vxl_jax.models.functions import decode_step, read
from vxl_jax.nn.attention import tiled, window_attention
from vxl_jax.nn.attention.dense import attention_weights
from vxl_jax.nn.attention.fused import fused_attention
from vxl_jax.nn.attention.fused_kernels import BlockSizes, Kernels
from vxl_jax.nn.attention.key_values import KeyValues
from vxl_jax.nn.backend import made_for
from vxl_jax.nn.memory import Memory, empty_memory
from vxl_jax.presets import tiny
from vxl_jax.stream.batch import StreamBatch, batch_streams
from vxl_jax.stream.plan import Stream, plan_stream
from vxl_jax.text.template import IMAGE_TOKEN as I

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(scope="module")
def split_model():
    return nnx.split(noisy_model())


# Tiles.


TILES = [(1, 1), (3, 5), (8, 4), (17, 10), (7, 32), (64, 64)]
"""Some below, at and above the unit of a CPU, 8, and some that divide nothing."""


def fused(forward, few, of_queries, of_keys, parts=None):
    """Sizes of the blocks of each kernel: queries and keys. parts: see `Kernels`."""
    sizes = (BlockSizes(*each, 1, 1) for each in (forward, few, of_queries, of_keys))
    return Kernels(*sizes, parts, interpret=True)


FUSED = [
    fused((4, 4), (4, 4), (4, 4), (4, 4), parts=0),
    fused((8, 16), (4, 4), (4, 8), (2, 4), parts=0),
    fused((4, 4), (4, 4), (16, 8), (8, 16), parts=1),
    fused((4, 4), (16, 8), (4, 4), (4, 4), parts=3),
    fused((4, 4), (32, 16), (4, 4), (4, 4)),
]
"""Fused kernels with blocks of other sizes, run as JAX operations."""


def exact_attention(q, k, v, keys, values, window_start, window_memory):
    """Softmax over the whole row of scores, in NumPy's float64."""
    group = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        own, past = slice(window_start[b, t], t + 1), slice(window_memory[b, t])
        seen = np.concatenate([k[b, own, n // group], keys[b, n // group, past]])
        p = np.exp(seen.astype(np.float64) @ q[b, t, n])
        read = np.concatenate([v[b, own, n // group], values[b, n // group, past]])
        out[b, t, n] = p @ read / p.sum()
    return out


def attention_case(tokens=30, slots=13):
    """Two samples whose windows differ, the second with padding (windows of one token) behind."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, tokens, 4, 8)).astype(np.float32) / np.float32(8**0.5)
    k, v = rng.normal(size=(2, 2, tokens, 2, 8)).astype(np.float32)
    keys, values = rng.normal(size=(2, 3, 2, 2, slots, 8)).astype(np.float32)
    start = np.array([[0] * 10 + [10] * 13 + [23] * 7, [0] * 4 + [4] * 20 + [*range(24, 30)]])
    seen = np.array([[0] * 10 + [5] * 13 + [12] * 7, [0] * 4 + [3] * 20 + [0] * 6])
    return (q, k, v, keys, values), (1, start.astype(np.int32), seen.astype(np.int32))


def attend(tile, q, k, v, keys, values, layer, start, seen, bases=()):
    """tile: of the tiled implementation, or "dense"."""
    past = [KeyValues(keys, values, layer, seen)]
    past += [KeyValues(*base, layer, base_seen) for *base, base_seen in bases]
    if tile == "dense":
        return window_attention(q, k, v, start, past, "dense")
    if isinstance(tile, Kernels):
        return fused_attention(q, k, v, start, past, tile)
    return tiled.tiled_attention(q, k, v, start, past, tile)


@pytest.mark.parametrize("tile", [*TILES, *FUSED, "dense"])
def test_attention_equals_a_softmax_over_whole_rows(tile):
    (q, k, v, keys, values), (layer, start, seen) = attention_case()
    ours = attend(tile, q, k, v, keys, values, layer, start, seen)
    expected = exact_attention(q, k, v, keys[layer], values[layer], start, seen)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("bases", [0, 2])
@pytest.mark.parametrize("tile", [*TILES, *FUSED])
def test_attention_and_its_gradients_equal_dense(tile, bases):
    arrays, (layer, start, seen) = attention_case()
    rng = np.random.default_rng(1)
    direction = rng.normal(size=arrays[0].shape).astype(np.float32)
    base = rng.normal(size=(bases, 2, 3, 1, 2, 9, 8)).astype(np.float32)

    def run(tile, arrays, base):
        before = [(*pair, jnp.minimum(start, 7)) for pair in base]
        out = attend(tile, *arrays, layer, start, seen, before)
        return (out * direction).sum(), out

    def both(tile):
        function = jax.value_and_grad(partial(run, tile), (0, 1), has_aux=True)
        (_, out), gradients = jax.jit(function)(arrays, base)
        return [out, *jax.tree.leaves(gradients)]

    for ours, expected in zip(both(tile), both("dense"), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("parts", [0, 3, None])
def test_fused_attention_in_bfloat16_at_the_shapes_of_the_7b_model(parts):
    """Groups of 7 heads of 128; float32 is the measure, and bfloat16 has 8 bits."""
    rng = np.random.default_rng(0)
    tokens, slots = 40, 24
    q = rng.normal(size=(2, tokens, 14, 128)).astype(np.float32) / np.float32(128**0.5)
    k, v = rng.normal(size=(2, 2, tokens, 2, 128)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, 2, 2, slots, 128)).astype(np.float32)
    start = np.repeat([[0], [16]], tokens, 1).astype(np.int32) * (np.arange(tokens) >= 16)
    seen = np.stack([np.full(tokens, 24), np.where(np.arange(tokens) < 16, 0, 19)]).astype(np.int32)
    arrays = q, k, v, keys, values
    weight = rng.normal(size=q.shape).astype(np.float32)
    kernels = fused((16, 16), (16, 16), (16, 16), (16, 16), parts)

    def both(tile, dtype):
        def run(arrays):
            out = attend(tile, *arrays, 1, start, seen)
            return (out.astype(jnp.float32) * weight).sum(), out

        cast = tuple(jnp.asarray(x, dtype) for x in arrays)
        (_, out), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(cast)
        return [out, *gradients]

    found = both(kernels, jnp.bfloat16)
    for ours, expected in zip(found, both("dense", jnp.float32), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert relative_error(ours, expected) < 0.01


def test_fused_attention_on_a_mesh():
    """Samples and heads on 8 devices, with a base that all samples share: as on one."""
    code = """
import jax, jax.numpy as jnp, numpy as np
from tests.nn.test_attention import FUSED, attend, attention_case
from vxl_jax.nn.sharding import make_mesh
arrays, (layer, start, seen) = attention_case()
base = np.random.default_rng(1).normal(size=(2, 3, 1, 2, 9, 8)).astype(np.float32)
def run(tile):
    def loss(*arrays):
        out = attend(tile, *arrays, layer, start, seen, [(*base, jnp.minimum(start, 7))])
        return (out ** 2).sum(), out
    return jax.jit(jax.value_and_grad(loss, range(5), has_aux=True))(*arrays)
expected = jax.tree.leaves(run("dense"))
for shape in ((2, 1, 2), (1, 2, 1), (4, 1, 2), (1, 1, 4)):
    with jax.set_mesh(make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])):
        for tile in (FUSED[0], FUSED[3]):
            for ours, one in zip(jax.tree.leaves(run(tile)), expected, strict=True):
                np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-5)
"""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_programs_for_two_backends_are_not_mixed_up():
    """JAX keeps what it traced by function and shapes alone; `made_for` forgets it."""
    arrays = [jax.ShapeDtypeStruct((1, 4096, heads, 16), jnp.bfloat16) for heads in (4, 2, 2)]
    start = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    traced = jax.jit(window_attention)

    def program(*target) -> str:
        with made_for(*target):
            return str(traced.trace(*arrays, start).jaxpr)

    warps = [re.findall(r"num_warps=(\d)", program("gpu", (n, 0))) for n in (9, 8)]
    assert warps == [["8"], ["4"]]
    assert "pallas_call" in program("gpu", (9, 0))
    assert "pallas_call" not in program("gpu")
    assert "pallas_call" not in str(traced.trace(*arrays, start).jaxpr)


def test_every_mode_of_differentiation_applies_to_dense_attention():
    arrays, (layer, start, seen) = attention_case(tokens=30)
    rng = np.random.default_rng(1)
    steps = [rng.normal(size=x.shape).astype(np.float32) for x in arrays]
    weight = rng.normal(size=arrays[0].shape).astype(np.float32)

    def total(*arrays):
        return (attend("dense", *arrays, layer, start, seen) ** 2 * weight).sum()

    gradient = jax.grad(total, range(5))
    _, slope = jax.jit(lambda *a: jax.jvp(total, a, tuple(steps)))(*arrays)
    pairs = zip(jax.jit(gradient)(*arrays), steps, strict=True)
    assert float(slope) == pytest.approx(sum(float((g * s).sum()) for g, s in pairs), rel=1e-4)

    def slope_of(*arrays):
        pairs = zip(gradient(*arrays), steps, strict=True)
        return sum((g * s).sum() for g, s in pairs)

    # Product of the Hessian with `steps`: forward over reverse, reverse over reverse, differences.
    _, forward = jax.jit(lambda *a: jax.jvp(gradient, a, tuple(steps)))(*arrays)
    reverse = jax.jit(jax.grad(slope_of, range(5)))(*arrays)
    h = 1e-3
    ahead, behind = (
        jax.jit(gradient)(*(x + sign * h * s for x, s in zip(arrays, steps, strict=True)))
        for sign in (1, -1)
    )
    for a, b, high, low in zip(forward, reverse, ahead, behind, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        assert relative_error(np.asarray(a), np.asarray(high - low) / (2 * h)) < 1e-2


def test_attention_weights_are_those_of_the_keys_in_order():
    (q, k, v, keys, values), (layer, start, seen) = attention_case()
    past = [KeyValues(keys, values, layer, seen)]
    weights = np.asarray(attention_weights(q, k, start, past))
    assert weights.shape == (2, 4, 30, 13 + 30)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    # The query at 12 of the first sample: 5 slots, and 10 to 12 of its window.
    assert np.flatnonzero(weights[0, 0, 12]).tolist() == [0, 1, 2, 3, 4, 23, 24, 25]
    of_head = np.concatenate([values[layer], np.moveaxis(v, 1, 2)], axis=2).repeat(2, axis=1)
    ours = np.einsum("BNTS,BNSH->BTNH", weights, of_head)
    expected = exact_attention(q, k, v, keys[layer], values[layer], start, seen)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_shapes_that_do_not_belong_together_are_refused():
    (q, k, v, keys, values), (layer, start, seen) = attention_case()
    past = [KeyValues(keys, values, layer, seen)]
    three_heads = np.zeros((2, 30, 3, 8), np.float32)
    for message, arguments in {
        "k: shape": (q, three_heads, three_heads, start, past),
        "v: shape": (q, k, v[:, :-1], start, past),
        "window_start: shape": (q, k, v, start[:1], past),
        "keys .* and values": (q, k, v, start, [replace(past[0], keys=keys[:, :, :1])]),
        "seen: shape": (q, k, v, start, [replace(past[0], seen=seen[:, :-1])]),
        "implementation: 'flash'": (q, k, v, start, past, "flash"),
        "implementation: 'fused' needs an NVIDIA GPU": (q, k, v, start, past, "fused"),
    }.items():
        with pytest.raises(ValueError, match=message):
            window_attention(*arguments)


@pytest.mark.parametrize("source", ["memory", "own window"])
def test_tiles_that_nobody_sees_are_not_computed(source):
    """A value that is NaN would spoil every query that computes with it, at any weight."""
    (q, k, v, keys, values), (layer, start, seen) = attention_case(slots=16)
    q, k, v, keys, values = q[:1], k[:1], v[:1], keys[:, :1], values[:, :1]
    start, seen = start[:1], seen[:1]

    # The queries from 24 on are in a window that starts at 23; nobody sees a slot from 12 on.
    queries = slice(24, 30) if source == "own window" else slice(0, 30)

    def total(q, k, v, keys, values):
        out = attend((8, 4), q, k, v, keys, values, layer, start, seen)
        return (out[:, queries] ** 2).sum()

    gradient = jax.jit(jax.value_and_grad(total))
    expected = gradient(q, k, v, keys, values)
    if source == "own window":
        k[:, :20], v[:, :20] = np.nan, np.nan
    else:
        keys[:, :, :, 12:], values[:, :, :, 12:] = np.nan, np.nan
    ours = gradient(q, k, v, keys, values)
    np.testing.assert_array_equal(ours[0], expected[0])
    np.testing.assert_array_equal(ours[1][:, queries], expected[1][:, queries])


def test_a_memory_without_slots():
    (q, k, v, keys, values), (layer, start, seen) = attention_case()
    none = keys[:, :, :, :0], values[:, :, :, :0]
    ours = attend(None, q, k, v, *none, layer, start, 0 * seen)
    expected = exact_attention(q, k, v, keys[layer], values[layer], start, 0 * seen)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_gradients_of_a_base_are_summed_over_the_samples():
    (q, k, v, keys, values), (layer, start, seen) = attention_case()
    base = keys[:, :1], values[:, :1]
    none = np.zeros_like(keys[:, :, :, :0])
    direction = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def as_base(base):
        bases = [(*base, seen)]
        out = attend((8, 4), q, k, v, none, none, layer, start, 0 * seen, bases)
        return (out * direction).sum()

    def as_memory(base):
        memory = (jnp.repeat(x, 2, axis=1) for x in base)
        out = attend((8, 4), q, k, v, *memory, layer, start, seen)
        return (out * direction).sum()

    ours = jax.jit(jax.value_and_grad(as_base))(base)
    expected = jax.jit(jax.value_and_grad(as_memory))(base)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_tiled_attention_refuses_forward_mode():
    """As the docstring says; dense attention has it."""
    (q, k, v, keys, values), (layer, start, seen) = attention_case()

    def run(q):
        return attend(None, q, k, v, keys, values, layer, start, seen)

    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(run, (q,), (q,))


@pytest.mark.parametrize(("backend", "unit"), [("cpu", 8), ("gpu", 128)])
def test_tiles_are_whole_units_within_their_budget(backend: str, unit: int):
    counts = [1, 7, 8, 9, 127, 128, 129, 1530, 1549, 28_160, 74_240, 100_003]
    for count, most in itertools.product(counts, [1, 5, 136, 200, 1548, 2047, 50_000]):
        with made_for(backend):
            size = tiled._tile_size(count, most)
        tiles = -(-count // size)
        assert 1 <= size <= most
        if min(count, most) >= unit:
            assert size % unit == 0
            # As few as whole units within the budget allow, and less than a unit to spare in each.
            assert tiles == -(-count // (most // unit * unit))
            assert size * tiles - count < unit * tiles
        else:
            assert size * tiles - count < tiles


def test_padding_of_a_long_group_is_modest():
    """Work of 28,160 tokens on a GPU: 18 windows of 1440 tokens and their beacons, 28 heads."""
    with made_for("gpu"):
        most = math.isqrt(tiled.tile_bytes() // (4 * 28))
        rows = tiled._tile_size(28_160, most)
    assert rows == 1536
    assert 28_160 < rows * -(-28_160 // rows) <= 1.04 * 28_160


# Memories before a memory.


FILM = plan_stream([1, 2, I, 5, 6, 7, 8], [48], window=16, ratio=[4, 8, 2])
"""Windows: text (2 entries), visual (4, 2 and 8 entries), text (4 entries)."""


def windows(stream: Stream, first: int, last: int) -> StreamBatch:
    """Windows first <= i < last of a stream, one in each group; ranks as in the whole stream."""
    ends = np.append(stream.window_start, stream.length)
    tokens = slice(ends[first], ends[last])
    part = Stream(
        *(getattr(stream, name)[tokens] for name in ("kind", "source", "rank", "target")),
        stream.window_start[first:last] - ends[first],
        stream.window_memory[first:last],
    )
    batch = batch_streams([part] * 3, windows_per_group=1)
    kept = int((part.rank < stream.persistent).sum())
    return replace(batch, length=np.full(3, kept, np.int32))


def one_sample(memory: Memory) -> Memory:
    return Memory(memory.keys[:, :1], memory.values[:, :1], memory.length[:1])


@pytest.mark.parametrize(
    ("cuts", "spare"), [((2, 4), 0), ((1, 3), 5), ((1, 1, 4), 3), ((2, 2), 0), ((0, 3), 4)]
)
def test_bases_and_a_memory_are_one_memory(cuts: tuple[int, ...], spare: int, split_model):
    """Bases end at the windows `cuts`; where two are equal, a base of spare slots has no entry."""
    graph, params = split_model
    config = tiny()
    visual = np.random.default_rng(2).normal(size=(3, 48, config.language.width))
    visual = np.broadcast_to(visual[:1], visual.shape).astype(np.float32)
    answer = np.array([[3, 1, 4], [9, 2, 6]], np.int32)

    def finish(memory: Memory, bases: tuple[Memory, ...], first: int) -> list[np.ndarray]:
        logits, memory = read(graph, params, memory, windows(FILM, first, 5), visual, bases)
        found = [np.asarray(logits)]
        for token in answer:
            logits, memory = decode_step(graph, params, memory, token, bases)
            found.append(np.asarray(logits))
        before = sum(int(base.length[0]) for base in bases)
        assert (np.asarray(memory.length) == FILM.persistent + len(answer) - before).all()
        return found

    expected = finish(empty_memory(config, 3, 24), (), 0)
    bases: tuple[Memory, ...] = ()
    first = 0
    for cut in cuts:
        kept = FILM.window_memory[cut] - FILM.window_memory[first]
        memory = empty_memory(config, 3, int(kept) + spare)
        if cut > first:
            _, memory = read(graph, params, memory, windows(FILM, first, cut), visual, bases)
        assert (np.asarray(memory.length) == kept).all()
        bases = (*bases, one_sample(memory))
        first = cut
    kept_bases = jax.tree.map(np.array, bases)
    ours = finish(empty_memory(config, 3, 24), bases, first)
    for a, b in zip(ours, expected, strict=True):
        assert relative_error(a, b) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, bases, kept_bases)
