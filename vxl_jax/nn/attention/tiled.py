"""Attention: every query sees the memory before its window and, causally, its own window.

The matrix of scores is never stored: scores are computed tile by tile with an online softmax, and
recomputed in the backward pass (FlashAttention, arXiv 2205.14135). Tiles that no query sees are
skipped. Axis letters as in CONTRIBUTING.md: B T N K H M L, with S a source's keys, R the
queries of a block, G = N / K query heads per key head.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax

from vxl_jax.nn.sharding import sample_shards

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a masked key: finite, so that the difference of two is not NaN."""

Sources = tuple[tuple[Array, Array], ...]
"""Keys and values [L, B, K, S, H] of each source of keys: the own windows (L = 1), the memory, its
bases. A source that all samples share is [L, 1, K, S, H]."""


_backend: ContextVar[str | None] = ContextVar("backend", default=None)


@contextmanager
def made_for(backend: str) -> Iterator[None]:
    """Trace programs with the tile sizes of another backend, to plan for a GPU without one."""
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def _on_cpu() -> bool:
    return (_backend.get() or jax.default_backend()) == "cpu"


def tile_bytes() -> int:
    """Bytes of float32 scores in one tile: within a CPU's cache, or enough to fill a GPU."""
    return 2**21 if _on_cpu() else 2**28


def tile_unit() -> int:
    """Tile sizes above this are multiples of it: a CPU's vector width, or a GPU's matrix tiles."""
    return 8 if _on_cpu() else 128


KEY_BYTES = 2**28
"""Most bytes of a tile's keys and values. It is the limit where there are few queries: in decoding,
`tile_bytes` of scores would be the whole memory."""


def window_attention(
    q: Array,
    k: Array,
    v: Array,
    memory_keys: Array,
    memory_values: Array,
    layer: Array | int,
    window_start: Array,
    window_memory: Array,
    tile: tuple[int, int] | None = None,
    bases: Sequence[tuple[Array, Array, Array]] = (),
) -> Array:
    """Attend from each token to the memory before its window and causally to its window.

    Args:
        q: [B, T, N, H] queries, rotated and scaled by H**-0.5 (`rotate` does both in float32).
        k: [B, T, K, H] rotated keys of the same tokens.
        v: [B, T, K, H] their values.
        memory_keys: [L, B, K, M, H] keys rotated at their memory position.
        memory_values: [L, B, K, M, H] their values.
        layer: which of the L to read.
        window_start: [B, T] index of the first token of each token's window.
        window_memory: [B, T] number of leading memory slots that each token sees.
        tile: most queries and keys of a tile; from `tile_bytes` by default.
        bases: memories that come before, the same for all samples: for each its keys and values
            [L, 1, K, M', H], and [B, T] number of leading slots that each token sees.

    Returns:
        [B, T, N, H] in the dtype of q. Softmax in float32. Differentiable once, in reverse mode, in
        q, keys and values. Forward mode raises TypeError: no `jax.jvp`, `jax.jacfwd`,
        `jax.hessian` or other second derivative.
    """
    batch, tokens, heads, head_size = q.shape
    if tile is None:
        scores = tile_bytes() // (4 * -(-batch // sample_shards()) * heads)
        rows = _tile_size(tokens, math.isqrt(scores))
        of_key = 2 * -(-batch // sample_shards()) * k.shape[2] * head_size * k.dtype.itemsize
        tile = rows, max(1, min(scores // rows, KEY_BYTES // of_key))
    q = rearrange(q, "B T (K G) H -> B K G T H", K=k.shape[2])
    if tokens > tile_unit():  # pad own keys to whole units; the padding is masked
        padding = ((0, 0), (0, -tokens % tile_unit()), (0, 0), (0, 0))
        k, v = jnp.pad(k, padding), jnp.pad(v, padding)
    own = rearrange(k, "B T K H -> 1 B K T H"), rearrange(v, "B T K H -> 1 B K T H")
    causal = jnp.broadcast_to(jnp.arange(1, tokens + 1), window_start.shape)
    zero = jnp.zeros_like(window_memory)
    sources: Sources = (own, (memory_keys, memory_values))
    layers: tuple[Array | int, ...] = (0, layer)
    first, end = [window_start, zero], [causal, window_memory]
    for base_keys, base_values, base_seen in bases:
        sources, layers = (*sources, (base_keys, base_values)), (*layers, layer)
        first, end = [*first, zero], [*end, base_seen]
    out = _attend(tile, q, sources, layers, jnp.stack(first), jnp.stack(end))
    return rearrange(out, "B K G T H -> B T (K G) H")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    tile: tuple[int, int],
    q: Array,
    sources: Sources,
    layers: tuple[Array | int, ...],
    first: Array,
    end: Array,
) -> Array:
    """Attend from q [B, K, G, T, H] to the keys `first` <= i < `end` [source, B, T] of each source.

    Every query has to see at least one key. Returns the shape and dtype of q.
    """
    return _forward(tile, q, sources, layers, first, end)[0]


def _forward(
    tile: tuple[int, int],
    q: Array,
    sources: Sources,
    layers: tuple[Array | int, ...],
    first: Array,
    end: Array,
) -> tuple[Array, Any]:
    def attend_block(block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, first, end = block

        def add_tile(state: Any, keys: Array, values: Array, _: Array, seen: Array) -> Any:
            # Sums over masked keys alone are multiplied by exp(MASKED - score) = 0 at the first key
            # that the query sees.
            highest, total, out = state
            scores = jnp.where(seen, _scores(q, keys), MASKED)
            new_highest = jnp.maximum(highest, scores.max(-1, keepdims=True))
            likely, shrink = jnp.exp(scores - new_highest), jnp.exp(highest - new_highest)
            total = total * shrink + likely.sum(-1, keepdims=True)
            return new_highest, total, out * shrink + _mix(likely.astype(values.dtype), values)

        zero = jnp.zeros(q.shape, jnp.float32)
        state = zero[..., :1] + MASKED, zero[..., :1], zero
        for i, (keys, values) in enumerate(sources):
            state = _over_tiles(keys, values, layers[i], first[i], end[i], tile[1], add_tile, state)
        highest, total, out = state
        return (out / total).astype(q.dtype), highest + jnp.log(total)

    out, normaliser = lax.map(attend_block, _all_blocks(tile[0], q, first, end))
    # The backward pass needs one layer of the memory only.
    read = tuple(
        tuple(lax.dynamic_index_in_dim(x, layer) for x in source)
        for source, layer in zip(sources, layers, strict=True)
    )
    empty = jax.tree.map(lambda x: x[..., :0], sources)  # keeps L and the dtype, without data
    return _join_blocks(out, q.shape[3]), (q, read, empty, layers, first, end, out, normaliser)


def _backward(tile: tuple[int, int], residuals: Any, gradient: Array) -> tuple[Any, ...]:
    q, sources, empty, layers, first, end, out, normaliser = residuals

    def attend_block(carry: Any, block: Any) -> tuple[Any, Array]:
        (q, first, end), gradient, out, normaliser = block
        gradient_out = (gradient.astype(jnp.float32) * out).sum(-1, keepdims=True)

        def add_tile(state: Any, keys: Array, values: Array, start: Array, seen: Array) -> Any:
            q_gradient, keys_gradient, values_gradient = state
            likely = jnp.exp(jnp.where(seen, _scores(q, keys), MASKED) - normaliser)
            slope = (likely * (_scores(gradient, values) - gradient_out)).astype(q.dtype)
            likely = likely.astype(q.dtype)
            return (
                q_gradient + _mix(slope, keys),
                _add_at(keys_gradient, start, _mix_back(slope, q)),
                _add_at(values_gradient, start, _mix_back(likely, gradient)),
            )

        q_gradient, carry = jnp.zeros(q.shape, jnp.float32), list(carry)
        for i, (keys, values) in enumerate(sources):
            state = q_gradient, *carry[i]
            q_gradient, *carry[i] = _over_tiles(
                keys, values, 0, first[i], end[i], tile[1], add_tile, state
            )
        return tuple(map(tuple, carry)), q_gradient

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.float32), sources)
    blocks = _all_blocks(tile[0], q, first, end), _query_blocks(gradient, tile[0])
    source_gradients, q_gradient = lax.scan(attend_block, zeros, (*blocks, out, normaliser))
    source_gradients = tuple(
        tuple(_as_stacked(like, x, layer) for like, x in zip(likes, gradients, strict=True))
        for likes, gradients, layer in zip(empty, source_gradients, layers, strict=True)
    )
    return _join_blocks(q_gradient, q.shape[3]).astype(q.dtype), source_gradients, None, None, None


_attend.defvjp(_forward, _backward)


def _over_tiles(
    keys: Array,
    values: Array,
    layer: Array | int,
    first: Array,
    end: Array,
    most: int,
    add_tile: Callable[[Any, Array, Array, Array, Array], Any],
    state: Any,
) -> Any:
    """Apply `add_tile(state, keys, values, start, seen)` to each tile that any query sees.

    first, end: [B, R] range of keys that each query of the block sees. most: keys of a tile at
    most. A tile is keys and values [B, K, S', H] from `start` of the source on, with the mask
    `seen` [B, 1, 1, R, S'].
    """
    if keys.shape[3] == 0:
        return state
    count = keys.shape[3]
    size = count if count <= most else _tile_size(count, most)

    def step(index: Array | int, state: Any) -> Any:
        # The last tile is moved back into bounds; its overlap with the tile before is masked.
        start = jnp.minimum(index * size, count - size)
        key = start + jnp.arange(size)
        lowest = jnp.maximum(first, index * size)
        seen = (lowest[..., None] <= key) & (key < end[..., None])
        corner = (layer, 0, 0, start, 0)
        sizes = (1, *keys.shape[1:3], size, keys.shape[4])
        tile_keys, tile_values = (lax.dynamic_slice(x, corner, sizes)[0] for x in (keys, values))
        return add_tile(state, tile_keys, tile_values, start, seen[:, None, None])

    if size == count:  # a loop with a dynamic bound costs more than skipping one tile saves
        return step(0, state)
    return lax.fori_loop(first.min() // size, -(-end.max() // size), step, state)


def _tile_size(count: int, most: int) -> int:
    """Size of equal tiles that cover `count` rows or keys: the fewest tiles of at most `most`.

    A multiple of `tile_unit()` unless `count` or `most` is smaller. The last tile may overhang.
    """
    most = max(1, most)
    unit = tile_unit() if min(count, most) >= tile_unit() else 1
    tiles = -(-count // (most // unit * unit))
    return -(-count // (tiles * unit)) * unit


def _all_blocks(most: int, q: Array, first: Array, end: Array) -> tuple[Array, Array, Array]:
    """Blocks of queries and of the ranges they see; padded queries see what the last one sees."""
    return _query_blocks(q, most), _blocks(first, 2, most, "edge"), _blocks(end, 2, most, "edge")


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


def _scores(q: Array, k: Array) -> Array:
    if k.shape[0] < q.shape[0]:  # shared by all samples: read from memory once
        return jnp.einsum("BKGRH,KSH->BKGRS", q, k[0], preferred_element_type=jnp.float32)
    return jnp.einsum("BKGRH,BKSH->BKGRS", q, k, preferred_element_type=jnp.float32)


def _mix(weights: Array, v: Array) -> Array:
    if v.shape[0] < weights.shape[0]:
        return jnp.einsum("BKGRS,KSH->BKGRH", weights, v[0], preferred_element_type=jnp.float32)
    return jnp.einsum("BKGRS,BKSH->BKGRH", weights, v, preferred_element_type=jnp.float32)


def _mix_back(weights: Array, x: Array) -> Array:
    return jnp.einsum("BKGRS,BKGRH->BKSH", weights, x, preferred_element_type=jnp.float32)


def _add_at(total: Array, start: Array, part: Array) -> Array:
    """Add part [B, K, S', H] to total [B, K, S, H], or [1, K, S, H], from `start` of S on."""
    if total.shape[0] < part.shape[0]:  # shared by all samples
        part = part.sum(0, keepdims=True)
    old = lax.dynamic_slice_in_dim(total, start, part.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, axis=2)


def _as_stacked(like: Array, gradient: Array, layer: Array | int) -> Array:
    """[B, K, S, H] -> [L, B, K, S, H], zero in other layers; L and dtype are those of `like`."""
    zeros = jnp.zeros((like.shape[0], *gradient.shape), like.dtype)
    return lax.dynamic_update_index_in_dim(zeros, gradient.astype(like.dtype), layer, 0)
