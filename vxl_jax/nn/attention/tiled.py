"""Attention by tiles, without storing the matrix of scores.

Scores are computed tile by tile with a running softmax, and again in the backward pass
(FlashAttention, arXiv 2205.14135). Tiles that no query sees are skipped. Axis letters as in
CONTRIBUTING.md: B T N K H M L, with S the keys of one source, R the queries of a block and
G = N / K query heads of a KV head. Sources are the own windows (always the first), the memory and
its bases.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from vxl_jax.nn.attention.key_values import KeyValues
from vxl_jax.nn.backend import on_cpu, row_unit
from vxl_jax.nn.scan import gradient_of_stack
from vxl_jax.nn.sharding import sample_shards

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a masked key: finite, so that the difference of two is not NaN."""


def tile_bytes() -> int:
    """Bytes of float32 scores in one tile: within a CPU's cache, or enough to fill a GPU."""
    return 2**21 if on_cpu() else 2**28


KEY_BYTES = 2**28
"""Most bytes of a tile's keys and values. It is the limit where there are few queries: in decoding,
`tile_bytes` of scores would be the whole memory."""


def tiled_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    window_start: Int[Array, "B T"],
    past: Sequence[KeyValues] = (),
    tile: tuple[int, int] | None = None,
) -> Float[Array, "B T N H"]:
    """Attend by tiles; see `window_attention`.

    Differentiable once, in reverse mode. Forward mode raises TypeError: `jax.jvp`, `jax.jacfwd` and
    `jax.hessian` need "dense".

    Args:
        q: queries.
        k: keys of the same tokens.
        v: their values.
        window_start: index of the first token of each token's window.
        past: memory and bases.
        tile: most queries and most keys of a tile; from `tile_bytes` by default.
    """
    tokens, kv_heads = k.shape[1:3]
    rows, columns = tile or _default_tile(q, k)
    q = rearrange(q, "B T (K G) H -> B K G T H", K=kv_heads)
    if tokens > row_unit():  # pad own keys to whole units; the padding is masked
        padding = ((0, 0), (0, -tokens % row_unit()), (0, 0), (0, 0))
        k, v = jnp.pad(k, padding), jnp.pad(v, padding)
    own = KeyValues(
        rearrange(k, "B T K H -> 1 B K T H"),
        rearrange(v, "B T K H -> 1 B K T H"),
        layer=0,
        seen=jnp.broadcast_to(jnp.arange(1, tokens + 1), window_start.shape),
    )
    sources = (own, *past)
    tiling = _Tiling(rows, columns, tuple(source.keys.shape[0] for source in sources))
    out = _attend(tiling, q, sources, window_start)
    return rearrange(out, "B K G T H -> B T (K G) H")


def _default_tile(q: Array, k: Array) -> tuple[int, int]:
    """Most queries and keys of a tile: its scores fill `tile_bytes` on each device."""
    _, tokens, heads, head_size = q.shape
    samples = -(-q.shape[0] // sample_shards())
    scores = tile_bytes() // (4 * samples * heads)
    rows = _tile_size(tokens, math.isqrt(scores))
    bytes_of_key = 2 * samples * k.shape[2] * head_size * k.dtype.itemsize
    return rows, max(1, min(scores // rows, KEY_BYTES // bytes_of_key))


# Forward and backward pass.


class _Tiling(NamedTuple):
    """Static sizes."""

    rows: int  # most queries of a block
    keys: int  # most keys of a tile
    layers: tuple[int, ...]  # L of each source


class _Block(NamedTuple):
    """Queries that are processed together."""

    q: Float[Array, "B K G R H"]
    ranges: Int[Array, "sources 2 B R"]  # of each source, they see the keys first <= i < end


class _Tile(NamedTuple):
    """Keys that are processed together."""

    keys: Float[Array, "#B K S H"]
    values: Float[Array, "#B K S H"]
    start: Int[Array, ""]  # index of the first key in its source
    seen: Bool[Array, "B 1 1 R S"]


class _Softmax(NamedTuple):
    """Running softmax of a block: relative to the highest score so far."""

    highest: Float[Array, "B K G R 1"]
    total: Float[Array, "B K G R 1"]
    out: Float[Array, "B K G R H"]


class _Gradients(NamedTuple):
    """Sums over the tiles of one source so far, float32."""

    q: Float[Array, "B K G R H"]
    keys: Float[Array, "#B K S H"]
    values: Float[Array, "#B K S H"]


_Residuals = tuple[Array, tuple[KeyValues, ...], Array, Array, Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    tiling: _Tiling, q: Array, sources: tuple[KeyValues, ...], window_start: Array
) -> Array:
    """Attend from q [B, K, G, T, H] to all sources. Returns the shape and dtype of q."""
    return _forward(tiling, q, sources, window_start)[0]


def _forward(
    tiling: _Tiling, q: Array, sources: tuple[KeyValues, ...], window_start: Array
) -> tuple[Array, _Residuals]:
    blocks = _all_blocks(tiling.rows, q, sources, window_start)
    out, normaliser = lax.map(partial(_attend_block, tiling, sources), blocks)
    # The backward pass needs one layer of each source only.
    read = tuple(
        replace(
            source,
            keys=lax.dynamic_index_in_dim(source.keys, source.layer),
            values=lax.dynamic_index_in_dim(source.values, source.layer),
        )
        for source in sources
    )
    return _join_blocks(out, q.shape[3]), (q, read, window_start, out, normaliser)


def _attend_block(
    tiling: _Tiling, sources: tuple[KeyValues, ...], block: _Block
) -> tuple[Array, Array]:
    """Output of a block in the dtype of q, and the logarithm of its softmax's denominator."""
    zero = jnp.zeros(block.q.shape, jnp.float32)
    state = _Softmax(zero[..., :1] + MASKED, zero[..., :1], zero)
    for source, (first, end) in zip(sources, block.ranges, strict=True):
        state = _over_tiles(source, first, end, tiling.keys, partial(_add_tile, block.q), state)
    return (state.out / state.total).astype(block.q.dtype), state.highest + jnp.log(state.total)


def _add_tile(q: Array, state: _Softmax, tile: _Tile) -> _Softmax:
    # Sums over masked keys alone are multiplied by exp(MASKED - score) = 0 at the first key that
    # the query sees; each sees itself.
    scores = jnp.where(tile.seen, _scores(q, tile.keys), MASKED)
    highest = jnp.maximum(state.highest, scores.max(-1, keepdims=True))
    likely, shrink = jnp.exp(scores - highest), jnp.exp(state.highest - highest)
    total = state.total * shrink + likely.sum(-1, keepdims=True)
    mixed = _mix(likely.astype(tile.values.dtype), tile.values)
    return _Softmax(highest, total, state.out * shrink + mixed)


def _backward(
    tiling: _Tiling, residuals: _Residuals, gradient: Array
) -> tuple[Array, tuple[KeyValues, ...], None]:
    q, sources, window_start, out, normaliser = residuals
    blocks = _all_blocks(tiling.rows, q, sources, window_start)
    gradients = _query_blocks(gradient, tiling.rows)
    zeros = tuple((_zeros_like_layer(x.keys), _zeros_like_layer(x.values)) for x in sources)
    of_sources, of_q = lax.scan(
        partial(_gradient_block, tiling, sources), zeros, (blocks, gradients, out, normaliser)
    )
    stacked = tuple(
        KeyValues(
            gradient_of_stack(keys.astype(source.keys.dtype), layers, source.layer),
            gradient_of_stack(values.astype(source.values.dtype), layers, source.layer),
            None,  # type: ignore[arg-type]  # integers have no gradient
            None,  # type: ignore[arg-type]
        )
        for source, layers, (keys, values) in zip(sources, tiling.layers, of_sources, strict=True)
    )
    return _join_blocks(of_q, q.shape[3]).astype(q.dtype), stacked, None


_attend.defvjp(_forward, _backward)

_OfSources = tuple[tuple[Array, Array], ...]
"""Gradients of the keys and values of each source, [B, K, S, H] float32."""


def _gradient_block(
    tiling: _Tiling,
    sources: tuple[KeyValues, ...],
    so_far: _OfSources,
    scanned: tuple[_Block, Array, Array, Array],
) -> tuple[_OfSources, Array]:
    """Add a block's part to the gradients of the sources; returns that of its queries as well."""
    block, gradient, out, normaliser = scanned
    # Gradient of the softmax: weight × (gradient of the weight - its mean under the weights).
    mean = (gradient.astype(jnp.float32) * out).sum(-1, keepdims=True)

    def add_tile(state: _Gradients, tile: _Tile) -> _Gradients:
        q = block.q
        likely = jnp.exp(jnp.where(tile.seen, _scores(q, tile.keys), MASKED) - normaliser)
        slope = (likely * (_scores(gradient, tile.values) - mean)).astype(q.dtype)
        likely = likely.astype(q.dtype)
        return _Gradients(
            state.q + _mix(slope, tile.keys),
            _add_at(state.keys, tile.start, _mix_back(slope, q)),
            _add_at(state.values, tile.start, _mix_back(likely, gradient)),
        )

    of_q, of_sources = jnp.zeros(block.q.shape, jnp.float32), []
    for source, (first, end), sums in zip(sources, block.ranges, so_far, strict=True):
        one_layer, state = replace(source, layer=0), _Gradients(of_q, *sums)
        state = _over_tiles(one_layer, first, end, tiling.keys, add_tile, state)
        of_q = state.q
        of_sources.append((state.keys, state.values))
    return tuple(of_sources), of_q


# Tiles of keys.

_State = TypeVar("_State")


def _over_tiles(
    source: KeyValues,
    first: Int[Array, "B R"],
    end: Int[Array, "B R"],
    most: int,
    add_tile: Callable[[_State, _Tile], _State],
    state: _State,
) -> _State:
    """Apply `add_tile` to each tile of a source that any query of the block sees.

    first, end: range of keys that each query sees. most: keys of a tile at most.
    """
    _, samples, heads, count, head_size = source.keys.shape
    if count == 0:
        return state
    size = count if count <= most else _tile_size(count, most)

    def step(index: Array | int, state: _State) -> _State:
        # The last tile is moved back into bounds; its overlap with the tile before is masked.
        start = jnp.minimum(index * size, count - size)
        key = start + jnp.arange(size)
        lowest = jnp.maximum(first, index * size)
        seen = (lowest[..., None] <= key) & (key < end[..., None])
        corner = (source.layer, 0, 0, start, 0)
        sizes = (1, samples, heads, size, head_size)
        keys, values = (
            lax.dynamic_slice(x, corner, sizes)[0] for x in (source.keys, source.values)
        )
        return add_tile(state, _Tile(keys, values, start, seen[:, None, None]))

    if size == count:  # a loop with a dynamic bound costs more than skipping one tile saves
        return step(0, state)
    return lax.fori_loop(first.min() // size, -(-end.max() // size), step, state)


def _tile_size(count: int, most: int) -> int:
    """Size of equal tiles that cover `count` rows or keys: the fewest tiles of at most `most`.

    A multiple of `row_unit()` unless `count` or `most` is smaller. The last tile may overhang.
    """
    most = max(1, most)
    unit = row_unit() if min(count, most) >= row_unit() else 1
    tiles = -(-count // (most // unit * unit))
    return -(-count // (tiles * unit)) * unit


# Blocks of queries.


def _all_blocks(most: int, q: Array, sources: tuple[KeyValues, ...], window_start: Array) -> _Block:
    """All blocks, stacked; padded queries see the keys that the last one sees."""
    zero = jnp.zeros_like(window_start)
    first = [window_start, *(zero for _ in sources[1:])]
    ranges = [jnp.stack([start, source.seen]) for start, source in zip(first, sources, strict=True)]
    return _Block(_query_blocks(q, most), _blocks(jnp.stack(ranges), 3, most, "edge"))


def _query_blocks(x: Array, most: int) -> Array:
    """[B, K, G, T, H] -> [blocks, B, K, G, R, H], padded with zeros."""
    return _blocks(x, 3, most, "constant")


def _blocks(x: Array, axis: int, most: int, fill: str) -> Array:
    """Split the axis of queries into equal blocks and move the block axis to the front."""
    tokens = x.shape[axis]
    rows = _tile_size(tokens, most)
    padding = [(0, -tokens % rows if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, padding, mode=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, rows, *x.shape[axis + 1 :]), axis, 0)


def _join_blocks(blocks: Array, tokens: int) -> Array:
    """[blocks, B, K, G, R, H] -> [B, K, G, T, H]."""
    return rearrange(blocks, "blocks B K G R H -> B K G (blocks R) H")[:, :, :, :tokens]


# Products. Keys and values of a source that all samples share are read from memory once.


# Heads of a group are merged with the rows: with two axes, XLA gives the keys of the whole memory
# another layout on a GPU, and copies them at every step.


def _scores(q: Float[Array, "B K G R H"], k: Float[Array, "#B K S H"]) -> Array:
    rows = _merged(q)
    if k.shape[0] < q.shape[0]:
        scores = jnp.einsum("BKRH,KSH->BKRS", rows, k[0], preferred_element_type=jnp.float32)
    else:
        scores = jnp.einsum("BKRH,BKSH->BKRS", rows, k, preferred_element_type=jnp.float32)
    return scores.reshape(*q.shape[:4], -1)


def _mix(weights: Float[Array, "B K G R S"], v: Float[Array, "#B K S H"]) -> Array:
    rows = _merged(weights)
    if v.shape[0] < weights.shape[0]:
        mixed = jnp.einsum("BKRS,KSH->BKRH", rows, v[0], preferred_element_type=jnp.float32)
    else:
        mixed = jnp.einsum("BKRS,BKSH->BKRH", rows, v, preferred_element_type=jnp.float32)
    return mixed.reshape(*weights.shape[:4], -1)


def _mix_back(weights: Float[Array, "B K G R S"], x: Float[Array, "B K G R H"]) -> Array:
    weights, x = _merged(weights), _merged(x)
    return jnp.einsum("BKRS,BKRH->BKSH", weights, x, preferred_element_type=jnp.float32)


def _merged(x: Float[Array, "B K G R X"]) -> Float[Array, "B K G*R X"]:
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _zeros_like_layer(stacked: Float[Array, "1 #B K S H"]) -> Float[Array, "#B K S H"]:
    return jnp.zeros(stacked.shape[1:], jnp.float32)


def _add_at(total: Array, start: Array, part: Array) -> Array:
    """Add part [B, K, S', H] to total [B, K, S, H], or [1, K, S, H], from `start` of S on."""
    if total.shape[0] < part.shape[0]:  # shared by all samples
        part = part.sum(0, keepdims=True)
    old = lax.dynamic_slice_in_dim(total, start, part.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, axis=2)
