"""Attention over the memory and the own window, by one of several implementations.

In import order: `key_values`, `dense` (the definition), `tiled`, `fused_kernels`, `fused`.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Literal

from jax import Array
from jaxtyping import Float, Int

from vxl_jax.nn.attention.dense import dense_attention
from vxl_jax.nn.attention.fused import fused_attention, why_not_fused
from vxl_jax.nn.attention.key_values import KeyValues
from vxl_jax.nn.attention.tiled import tiled_attention
from vxl_jax.nn.backend import gpu_capability

AttentionName = Literal["dense", "tiled", "fused"]
"""Implementations. dense: a softmax over whole rows, differentiable in every mode; its memory grows
with the square of the tokens. tiled: a running softmax over tiles, differentiable once in reverse
mode; on any backend. fused: the same in kernels for NVIDIA GPUs, in half precision."""

_IMPLEMENTATIONS = {"dense": dense_attention, "tiled": tiled_attention, "fused": fused_attention}


def window_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    window_start: Int[Array, "B T"],
    past: Sequence[KeyValues] = (),
    implementation: AttentionName | None = None,
) -> Float[Array, "B T N H"]:
    """Attend from each token to the past before its window and causally to its own window.

    Args:
        q: queries, rotated and scaled by H**-0.5 (`rotate` does both in float32).
        k: rotated keys of the same tokens; N is a multiple of K.
        v: their values.
        window_start: index of the first token of each token's window, at most its own.
        past: memory and bases; see `KeyValues`.
        implementation: one of `AttentionName`; None takes "fused" on a GPU where it can take the
            shapes, and "tiled" otherwise.

    Returns:
        [B, T, N, H] in the dtype of q. The softmax is computed in float32.

    Raises:
        ValueError: an unknown implementation, one that cannot take these shapes, or shapes that do
            not belong together.
    """
    name = implementation or _fastest(q, past)
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation: {name!r}; use one of {', '.join(_IMPLEMENTATIONS)}")
    _check_shapes(q, k, v, window_start, past)
    if name == "fused":
        capability = gpu_capability()
        if capability is None:
            raise ValueError("implementation: 'fused' needs an NVIDIA GPU; use 'tiled'")
        if reason := why_not_fused(q, past, capability):
            raise ValueError(f"implementation: 'fused' cannot take {reason}; use 'tiled'")
    return _IMPLEMENTATIONS[name](q, k, v, window_start, past)


def _fastest(q: Array, past: Sequence[KeyValues]) -> AttentionName:
    capability = gpu_capability()
    if capability is None:
        return "tiled"
    if reason := why_not_fused(q, past, capability):
        _warn_not_fused(reason)
        return "tiled"
    return "fused"


@cache
def _warn_not_fused(reason: str) -> None:
    """Once for each reason."""
    warnings.warn(
        f"fused attention cannot take {reason}; attention by tiles is slower and takes its place",
        RuntimeWarning,
        stacklevel=5,
    )


def _check_shapes(
    q: Array, k: Array, v: Array, window_start: Array, past: Sequence[KeyValues]
) -> None:
    batch, tokens, heads, head_size = q.shape
    kv_heads = k.shape[2]
    if k.shape != (batch, tokens, kv_heads, head_size) or heads % kv_heads:
        raise ValueError(f"k: shape {k.shape} with q {q.shape}; it must be [B, T, K, H], K | N")
    if v.shape != k.shape:
        raise ValueError(f"v: shape {v.shape} with k {k.shape}; they must be equal")
    if window_start.shape != (batch, tokens):
        raise ValueError(f"window_start: shape {window_start.shape}; it must be {(batch, tokens)}")
    for i, each in enumerate(past):
        layers, samples, *_, slots, _ = each.keys.shape
        expected = (layers, samples, kv_heads, slots, head_size)
        if not each.keys.shape == each.values.shape == expected or samples not in (1, batch):
            raise ValueError(
                f"past[{i}]: keys {each.keys.shape} and values {each.values.shape}; both must be "
                f"[L, {batch} or 1, {kv_heads}, S, {head_size}]"
            )
        if each.seen.shape != (batch, tokens):
            raise ValueError(
                f"past[{i}].seen: shape {each.seen.shape}; it must be {(batch, tokens)}"
            )
