"""Kernels of fused attention, in Pallas and compiled by Triton; `fused` puts them together.

A program holds a block of queries of one head and goes over the tiles of keys that any of them sees
(FlashAttention, arXiv 2205.14135, 2307.08691). Few queries, as in decoding, are held with all heads
that share their keys, and the tiles are divided over programs (Flash-Decoding). Scores are in base
2. Axis letters as in `tiled`: B T N K H L, S the keys of a source, G = N / K.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float, Int

from vxl_jax.nn.backend import PROGRAMS

_MASKED = -1e30
"""Score of a masked key: finite, so that the difference of two is not NaN."""

_LOG2E = math.log2(math.e)


class BlockSizes(NamedTuple):
    """Sizes of a program: queries, keys, warps, and tiles that are loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


class Kernels(NamedTuple):
    """Blocks of the kernels: the pass, that of few queries, the gradients of queries and of keys.

    parts: over which the keys of few queries are divided; 0: there are never few; None: chosen by
    `PROGRAMS`. interpret: run the kernels as JAX operations, on any backend.
    """

    forward: BlockSizes
    few: BlockSizes
    of_queries: BlockSizes
    of_keys: BlockSizes
    parts: int | None = None
    interpret: bool = False


class KeySource(NamedTuple):
    """One source of keys; which layer of it is read, and which keys each query sees."""

    keys: Float[Array, " L #B K S H"]
    values: Float[Array, " L #B K S H"]
    layer: Int[Array, " 1"]
    first: Int[Array, "B T"]
    end: Int[Array, "B T"]


Rows = tuple[Array, Array, Array, Array]
"""Queries, gradient of the output, logarithm of the denominator, mean gradient of the weights."""


# Kernels. The first axes of their grids are samples and heads. A reference to a source is to all
# of its layers, and to one sample and head.

_State = TypeVar("_State")


class _Refs(NamedTuple):
    """References of a kernel to a source; the ranges are of the queries of its block."""

    keys: Any
    values: Any
    layer: Any
    first: Any
    end: Any


def _over_keys(
    refs: _Refs,
    size: int,
    add_tile: Callable[[_State, Array, Array, Array | None], _State],
    state: _State,
    part: tuple[Array, int] | None = None,
) -> _State:
    """Go over the tiles of `size` keys that any query of the block sees.

    add_tile: gets the state, keys, values, and which query sees which key (None: each sees all).
    part: index and number of the parts that the tiles are divided into, where they are.
    """
    count, layer = refs.keys.shape[1], refs.layer[0]
    first, end = refs.first[...], refs.end[...]

    def whole(index: Array, state: _State) -> _State:
        at = pl.ds(index * size, size)
        return add_tile(state, refs.keys[layer, at, :], refs.values[layer, at, :], None)

    def edge(index: Array, state: _State) -> _State:
        # The last tile is moved back into bounds; its overlap with the tile before is masked.
        start = jnp.minimum(index * size, count - size)
        key = start + jnp.arange(size)
        lowest = jnp.maximum(first, index * size)
        seen = (lowest[:, None] <= key[None, :]) & (key[None, :] < end[:, None])
        at = pl.ds(start, size)
        return add_tile(state, refs.keys[layer, at, :], refs.values[layer, at, :], seen)

    begin, stop = lax.div(jnp.min(first), size), lax.div(jnp.max(end) + size - 1, size)
    if part is not None:
        share = lax.div(jnp.maximum(stop - begin, 0) + part[1] - 1, part[1])
        begin = begin + part[0] * share
        stop = jnp.minimum(stop, begin + share)
    inner = lax.div(jnp.max(first) + size - 1, size)  # the first tile that all see whole
    inner = jnp.clip(inner, begin, stop)
    outer = jnp.clip(lax.div(jnp.min(end), size), inner, stop)
    state = lax.fori_loop(begin, inner, edge, state)
    state = lax.fori_loop(inner, outer, whole, state)
    return lax.fori_loop(outer, stop, edge, state)


def _dot(a: Array, b: Array) -> Array:
    return triton.dot(a, b, allow_tf32=False)


_Softmax = tuple[Array, Array, Array]
"""Running softmax of a block, float32: output, highest score so far (base 2), sum of weights."""


def _no_keys(q: Array) -> _Softmax:
    zero = jnp.zeros(q.shape, jnp.float32)
    return zero, jnp.full(q.shape[:1], _MASKED, jnp.float32), jnp.zeros(q.shape[:1], jnp.float32)


def _add_tile(q: Array, state: _Softmax, k: Array, v: Array, seen: Array | None) -> _Softmax:
    out, highest, total = state
    scores = _dot(q, k.T) * _LOG2E
    if seen is not None:
        scores = jnp.where(seen, scores, _MASKED)
    higher = jnp.maximum(highest, scores.max(-1))
    shrink = jnp.exp2(highest - higher)
    likely = jnp.exp2(scores - higher[:, None])
    total = total * shrink + likely.sum(-1)
    return out * shrink[:, None] + _dot(likely.astype(v.dtype), v), higher, total


def _forward_kernel(sizes: BlockSizes, q_ref: Any, *refs: Any) -> None:
    *of_sources, out_ref, normaliser_ref = refs
    q = q_ref[...]
    state = _no_keys(q)
    for source in _by_source(of_sources):
        state = _over_keys(source, sizes.keys, partial(_add_tile, q), state)
    out, highest, total = state
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    normaliser_ref[...] = highest + jnp.log2(total)


def _few_kernel(sizes: BlockSizes, parts: int, q_ref: Any, *refs: Any) -> None:
    """As `_forward_kernel` over one part of the tiles, without the division."""
    *of_sources, out_ref, highest_ref, total_ref = refs
    q = q_ref[...]
    state = _no_keys(q)
    for source in _by_source(of_sources):
        part = pl.program_id(2), parts
        state = _over_keys(source, sizes.keys, partial(_add_tile, q), state, part)
    for ref, x in zip((out_ref, highest_ref, total_ref), state, strict=True):
        ref[...] = x


def _slope(rows: Rows, k: Array, v: Array, seen: Array | None) -> tuple[Array, Array]:
    """Weights of a tile, and the gradient of its scores, [queries, keys] float32."""
    q, gradient, normaliser, mean = rows
    likely = jnp.exp2(_dot(q, k.T) * _LOG2E - normaliser[:, None])
    if seen is not None:
        likely = jnp.where(seen, likely, 0.0)
    return likely, likely * (_dot(gradient, v.T) - mean[:, None])


def _of_queries_kernel(sizes: BlockSizes, *refs: Any) -> None:
    q_ref, gradient_ref, normaliser_ref, mean_ref, *of_sources, out_ref = refs
    rows = q_ref[...], gradient_ref[...], normaliser_ref[...], mean_ref[...]

    def add_tile(total: Array, k: Array, v: Array, seen: Array | None) -> Array:
        _, slope = _slope(rows, k, v, seen)
        return total + _dot(slope.astype(k.dtype), k)

    total = jnp.zeros(q_ref.shape, jnp.float32)
    for source in _by_source(of_sources):
        total = _over_keys(source, sizes.keys, add_tile, total)
    out_ref[...] = total.astype(out_ref.dtype)


def _of_keys_kernel(sizes: BlockSizes, group: int, *refs: Any) -> None:
    """Gradient of one tile of keys and values: over the queries that see it, of all heads."""
    *rows, keys_ref, values_ref, first_ref, end_ref, bounds_ref, of_keys_ref, of_values_ref = refs
    tile = pl.program_id(2)
    # As in `_over_keys`, the last tile is moved back into bounds.
    start = jnp.minimum(tile * sizes.keys, keys_ref.shape[0] - sizes.keys)
    key = start + jnp.arange(sizes.keys)
    k, v = (ref[pl.ds(start, sizes.keys), :] for ref in (keys_ref, values_ref))

    def add_block(head: Array, index: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        at = pl.ds(index * sizes.queries, sizes.queries)
        q, gradient = (ref[at, head, :] for ref in rows[:2])
        normaliser, mean = (ref[head, at] for ref in rows[2:])
        lowest = jnp.maximum(first_ref[at], tile * sizes.keys)
        seen = (lowest[:, None] <= key[None, :]) & (key[None, :] < end_ref[at][:, None])
        likely, slope = _slope((q, gradient, normaliser, mean), k, v, seen)
        of_keys, of_values = sums
        of_keys += _dot(slope.astype(q.dtype).T, q)
        return of_keys, of_values + _dot(likely.astype(q.dtype).T, gradient)

    zero = jnp.zeros(k.shape, jnp.float32)
    begin, stop = bounds_ref[0, tile], bounds_ref[1, tile]

    def add_head(head: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        return lax.fori_loop(begin, stop, partial(add_block, head), sums)

    of_keys, of_values = lax.fori_loop(0, group, add_head, (zero, zero))
    of_keys_ref[...] = of_keys.astype(of_keys_ref.dtype)
    of_values_ref[...] = of_values.astype(of_values_ref.dtype)


def _by_source(refs: Sequence[Any]) -> list[_Refs]:
    size = len(_Refs._fields)
    return [_Refs(*refs[i : i + size]) for i in range(0, len(refs), size)]


# Calls.


def _over_queries(
    q: Array, sources: tuple[KeySource, ...], sizes: BlockSizes
) -> tuple[tuple[int, ...], Any, Any, list[Any]]:
    """Grid of a kernel of one block of queries, and specifications of what it gets."""
    batch, tokens, heads, head_size = q.shape
    group = heads // sources[0].keys.shape[2]
    grid = batch, heads, tokens // sizes.queries
    head = pl.BlockSpec((None, sizes.queries, None, head_size), lambda b, n, i: (b, i, n, 0))
    row = pl.BlockSpec((None, None, sizes.queries), lambda b, n, i: (b, n, i))
    specs: list[Any] = []
    for source in sources:
        layers, samples, _, count, _ = source.keys.shape
        shared = samples < batch

        def of_head(b: Any, n: Any, i: Any, shared: bool = shared) -> tuple[Any, ...]:
            return 0, 0 if shared else b, n // group, 0, 0

        stored = pl.BlockSpec((layers, None, None, count, head_size), of_head)
        ranges = pl.BlockSpec((None, sizes.queries), lambda b, n, i: (b, i))
        specs += [stored, stored, pl.BlockSpec((1,), lambda b, n, i: (0,)), ranges, ranges]
    return grid, head, row, specs


def _options(kernels: Kernels, sizes: BlockSizes, name: str) -> dict[str, Any]:
    return {
        "compiler_params": triton.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        "interpret": kernels.interpret,
        "name": name,
    }


def run_forward(
    kernels: Kernels, q: Array, sources: tuple[KeySource, ...]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output, and the base-2 logarithm of each softmax's denominator."""
    sizes, tokens = kernels.forward, q.shape[1]
    q, sources = _pad_axis(q, 1, sizes.queries), _pad_ranges(sources, sizes.queries)
    batch, padded, heads, _ = q.shape
    grid, head, row, specs = _over_queries(q, sources, sizes)
    out, normaliser = pl.pallas_call(
        partial(_forward_kernel, sizes),
        grid=grid,
        in_specs=[head, *specs],
        out_specs=[head, row],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
        ],
        **_options(kernels, sizes, "window_attention"),
    )(q, *(x for source in sources for x in source))
    return out[:, :tokens], normaliser[..., :tokens]


def run_few(
    kernels: Kernels, q: Array, sources: tuple[KeySource, ...]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """As `run_forward` for few queries: a row is a query of one of the G heads of a KV head."""
    sizes, (batch, tokens, _, head_size) = kernels.few, q.shape
    kv_heads = sources[0].keys.shape[2]
    rows = rearrange(q, "B T (K G) H -> B (T G) K H", K=kv_heads)
    group = rows.shape[1] // tokens
    sources = tuple(
        source._replace(
            first=jnp.repeat(source.first, group, 1), end=jnp.repeat(source.end, group, 1)
        )
        for source in sources
    )
    count = rows.shape[1]
    rows, sources = _pad_axis(rows, 1, sizes.queries), _pad_ranges(sources, sizes.queries)
    (_, _, blocks), head, _, specs = _over_queries(rows, sources, sizes)
    parts = kernels.parts or max(1, PROGRAMS // (batch * kv_heads * blocks))

    def spread(spec: pl.BlockSpec) -> pl.BlockSpec:
        # The grid has the parts in its third axis, and the blocks of rows in its fourth.
        index_map = spec.index_map
        assert index_map is not None
        return pl.BlockSpec(spec.block_shape, lambda b, k, part, i: index_map(b, k, i))

    out_spec = pl.BlockSpec(
        (None, None, None, sizes.queries, head_size), lambda b, k, part, i: (b, k, part, i, 0)
    )
    row = pl.BlockSpec((None, None, None, sizes.queries), lambda b, k, part, i: (b, k, part, i))
    shape = batch, kv_heads, parts, rows.shape[1]
    sums = jax.ShapeDtypeStruct(shape, jnp.float32)
    out, highest, total = pl.pallas_call(
        partial(_few_kernel, sizes, parts),
        grid=(batch, kv_heads, parts, blocks),
        in_specs=[spread(head), *map(spread, specs)],
        out_specs=[out_spec, row, row],
        out_shape=[jax.ShapeDtypeStruct((*shape, head_size), jnp.float32), sums, sums],
        **_options(kernels, sizes, "window_attention_few"),
    )(rows, *(x for source in sources for x in source))
    most = highest.max(2, keepdims=True)
    weight = jnp.exp2(highest - most)
    total = (weight * total).sum(2)
    out = (weight[..., None] * out).sum(2) / total[..., None]
    normaliser = most[:, :, 0] + jnp.log2(total)
    out = rearrange(out[:, :, :count], "B K (T G) H -> B T (K G) H", T=tokens)
    normaliser = rearrange(normaliser[:, :, :count], "B K (T G) -> B (K G) T", T=tokens)
    return out.astype(q.dtype), normaliser


def _pad_axis(x: Array, axis: int, unit: int, mode: str = "constant") -> Array:
    """Pad an axis to whole units."""
    return jnp.pad(x, [(0, -n % unit if i == axis else 0) for i, n in enumerate(x.shape)], mode)


def _pad_ranges(sources: tuple[KeySource, ...], unit: int) -> tuple[KeySource, ...]:
    """Pad the queries' ranges: a padded query sees what the last one sees."""
    pad = partial(_pad_axis, axis=1, unit=unit, mode="edge")
    return tuple(
        source._replace(first=pad(source.first), end=pad(source.end)) for source in sources
    )


def run_of_queries(kernels: Kernels, rows: Rows, sources: tuple[KeySource, ...]) -> Array:
    sizes, tokens = kernels.of_queries, rows[0].shape[1]
    rows, sources = _pad_rows(rows, sizes.queries), _pad_ranges(sources, sizes.queries)
    q = rows[0]
    grid, head, row, specs = _over_queries(q, sources, sizes)
    of_q = pl.pallas_call(
        partial(_of_queries_kernel, sizes),
        grid=grid,
        in_specs=[head, head, row, row, *specs],
        out_specs=head,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        **_options(kernels, sizes, "window_attention_of_queries"),
    )(*rows, *(x for source in sources for x in source))
    return of_q[:, :tokens]


def _pad_rows(rows: Rows, unit: int) -> Rows:
    """Padded queries have an infinite denominator: no key has a weight."""
    q, gradient, normaliser, mean = rows
    infinite = jnp.pad(
        normaliser, ((0, 0), (0, 0), (0, -q.shape[1] % unit)), constant_values=jnp.inf
    )
    q, gradient = (_pad_axis(x, 1, unit) for x in (q, gradient))
    return q, gradient, infinite, _pad_axis(mean, 2, unit)


def run_of_keys(kernels: Kernels, rows: Rows, source: KeySource) -> tuple[Array, Array]:
    """Gradients of the keys and values of a source of one layer, [#B, K, S, H] in its dtype."""
    sizes = kernels.of_keys
    rows, (source,) = _pad_rows(rows, sizes.queries), _pad_ranges((source,), sizes.queries)
    batch, tokens, heads, head_size = rows[0].shape
    _, samples, kv_heads, count, _ = source.keys.shape
    group, tiles, shared = heads // kv_heads, -(-count // sizes.keys), samples < batch

    def of_head(b: Any, k: Any, j: Any) -> tuple[Any, ...]:
        return 0, 0 if shared else b, k, 0, 0

    whole = pl.BlockSpec((None, tokens, group, head_size), lambda b, k, j: (b, 0, k, 0))
    row = pl.BlockSpec((None, group, tokens), lambda b, k, j: (b, k, 0))
    stored = pl.BlockSpec((None, None, None, count, head_size), of_head)
    ranges = pl.BlockSpec((None, tokens), lambda b, k, j: (b, 0))
    bounds = pl.BlockSpec((None, 2, tiles), lambda b, k, j: (b, 0, 0))
    out = pl.BlockSpec((None, None, sizes.keys, head_size), lambda b, k, j: (b, k, j, 0))
    dtype = jnp.float32 if shared else source.keys.dtype
    shape = jax.ShapeDtypeStruct((batch, kv_heads, tiles * sizes.keys, head_size), dtype)
    found = pl.pallas_call(
        partial(_of_keys_kernel, sizes, group),
        grid=(batch, kv_heads, tiles),
        in_specs=[whole, whole, row, row, stored, stored, ranges, ranges, bounds],
        out_specs=[out, out],
        out_shape=[shape, shape],
        **_options(kernels, sizes, "window_attention_of_keys"),
    )(*rows, source.keys, source.values, source.first, source.end, _bounds(source, sizes))

    def joined(x: Array) -> Array:
        last = (tiles - 1) * sizes.keys
        x = jnp.concatenate([x[:, :, :last], x[:, :, last + tiles * sizes.keys - count :]], axis=2)
        return x.sum(0, keepdims=True).astype(source.keys.dtype) if shared else x

    of_keys, of_values = map(joined, found)
    return of_keys, of_values


def _bounds(source: KeySource, sizes: BlockSizes) -> Int[Array, "B 2 tiles"]:
    """The blocks of queries, from the first to behind the last, that see each tile of keys."""
    tiles = -(-source.keys.shape[3] // sizes.keys)
    first, end = (
        rearrange(x, "B (I R) -> B I R", R=sizes.queries) for x in (source.first, source.end)
    )
    start = jnp.arange(tiles) * sizes.keys
    # A query of an empty range sees nothing, but makes the range of its block no smaller.
    seen = (first.min(-1)[..., None] < start + sizes.keys) & (end.max(-1)[..., None] > start)
    index = jnp.arange(seen.shape[1])[:, None]
    begin = jnp.where(seen, index, seen.shape[1]).min(1)
    stop = jnp.where(seen, index + 1, 0).max(1)
    return jnp.stack([jnp.minimum(begin, stop), stop], axis=1).astype(jnp.int32)
