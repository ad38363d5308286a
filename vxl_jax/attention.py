"""Attention in two parts: every query sees the memory and, causally, its own window.

The two parts share one softmax. Scores are made block by block so that they never stand whole in
memory. Axis letters as in `vxl_jax`: B W Q S M N K G H, with S the keys of the own window, M the
memory's slots and G = N / K query heads per key head.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax

BLOCK_BYTES = 2**27
"""Float32 scores held at once, in bytes; above it windows, and then queries, are taken in turn."""

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a key that is not seen: finite, so that a row with no memory has no NaN."""


def rope_angles(positions: Array, head_size: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine, [..., T, 1, H/2] float32, for integer positions [..., T]."""
    frequency = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotary embedding of x [..., T, heads, H] in halves (not interleaved), computed in float32."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def window_attention(
    q: Array,
    k: Array,
    v: Array,
    memory_keys: Array,
    memory_values: Array,
    memory_length: Array,
    block_bytes: int | None = None,
) -> Array:
    """Attend from each window to the memory before it and causally to itself.

    Args:
        q: [B, W, Q, N, H] rotated queries.
        k: [B, W, Q, K, H] rotated keys of the same windows.
        v: [B, W, Q, K, H] their values.
        memory_keys: [B, M, K, H] keys rotated at their memory position.
        memory_values: [B, M, K, H] their values.
        memory_length: [B, W] number of leading memory slots that each window sees.
        block_bytes: bound on the scores held at once, `BLOCK_BYTES` by default.

    Returns:
        [B, W, Q, N, H] in the dtype of q. Softmax in float32.
    """
    batch, windows, queries, heads, _ = q.shape
    keys = memory_keys.shape[1] + queries
    block_bytes = block_bytes or BLOCK_BYTES
    rows = max(1, block_bytes // (4 * batch * heads * keys))  # queries scored at once
    windows_at_once = max(1, rows // queries)

    attend = partial(_attend_window, memory_keys, memory_values, rows_at_once=rows)
    if windows_at_once >= windows:
        return jax.vmap(attend, in_axes=1, out_axes=1)(q, k, v, memory_length)
    by_window = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, memory_length)]
    out = lax.map(
        jax.checkpoint(lambda window: attend(*window)), by_window, batch_size=windows_at_once
    )
    return jnp.moveaxis(out, 0, 1)


def _attend_window(
    memory_keys: Array,
    memory_values: Array,
    q: Array,
    k: Array,
    v: Array,
    memory_length: Array,
    *,
    rows_at_once: int,
) -> Array:
    """One window: q [B, Q, N, H], k and v [B, Q, K, H], memory_length [B] -> [B, Q, N, H]."""
    queries = q.shape[1]
    index = jnp.arange(queries)
    if rows_at_once >= queries:
        return _attend(memory_keys, memory_values, q, k, v, memory_length, index)
    blocks = -(-queries // rows_at_once)
    padding = blocks * rows_at_once - queries
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q = rearrange(q, "B (blocks rows) N H -> blocks B rows N H", blocks=blocks)
    index = jnp.pad(index, (0, padding)).reshape(blocks, rows_at_once)
    attend = jax.checkpoint(
        lambda block: _attend(memory_keys, memory_values, block[0], k, v, memory_length, block[1])
    )
    out = rearrange(lax.map(attend, (q, index)), "blocks B rows N H -> B (blocks rows) N H")
    return out[:, :queries]


def _attend(
    memory_keys: Array,
    memory_values: Array,
    q: Array,
    k: Array,
    v: Array,
    memory_length: Array,
    index: Array,
) -> Array:
    """Queries at `index` [Q] of a window with keys k [B, S, K, H]; see `_attend_window`."""
    kv_heads, head_size = k.shape[-2:]
    # Heads before rows: the products are then batched over B and K without a transposed copy of
    # the scores, and dividing the output is cheaper than dividing them.
    q = rearrange(q * head_size**-0.5, "B Q (K G) H -> B K G Q H", K=kv_heads)
    k, v, memory_keys, memory_values = (
        rearrange(x, "B S K H -> B K S H") for x in (k, v, memory_keys, memory_values)
    )
    score = partial(jnp.einsum, "BKGQH,BKSH->BKGQS", preferred_element_type=jnp.float32)
    own, past = score(q, k), score(q, memory_keys)
    own = jnp.where(jnp.arange(own.shape[-1]) <= index[:, None], own, MASKED)
    seen = jnp.arange(past.shape[-1]) < memory_length[:, None]
    past = jnp.where(seen[:, None, None, None], past, MASKED)

    highest = jnp.maximum(own.max(-1), past.max(-1, initial=MASKED))[..., None]
    highest = lax.stop_gradient(highest)
    own, past = jnp.exp(own - highest), jnp.exp(past - highest)
    total = own.sum(-1, keepdims=True) + past.sum(-1, keepdims=True)
    mix = partial(jnp.einsum, "BKGQS,BKSH->BKGQH", preferred_element_type=jnp.float32)
    out = mix(own.astype(v.dtype), v) + mix(past.astype(v.dtype), memory_values)
    return rearrange(out / total, "B K G Q H -> B Q (K G) H").astype(k.dtype)
