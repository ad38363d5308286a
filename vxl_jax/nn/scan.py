"""Stacked layers, what their backward pass keeps, and maps in blocks."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from vxl_jax.config import Remat

_Module = TypeVar("_Module", bound=nnx.Module)
_P = ParamSpec("_P")
_Out = TypeVar("_Out")


def stacked(make: Callable[..., _Module], layers: int, rngs: nnx.Rngs) -> _Module:
    """Build `layers` modules with different random weights, as one with a leading layer axis.

    make: called with the keyword argument `rngs`.
    """

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def build(rngs: nnx.Rngs) -> _Module:
        return make(rngs=rngs)

    return build(rngs)


def gradient_of_stack(
    gradient: Float[Array, "*shape"], layers: int, layer: Int[Array, ""] | int
) -> Float[Array, " L *shape"]:
    """Place the gradient of one layer in the stack that it was read from: zero in all others."""
    zeros = jnp.zeros((layers, *gradient.shape), gradient.dtype)
    return lax.dynamic_update_index_in_dim(zeros, gradient, layer, 0)


def recomputed(body: Callable[_P, _Out], remat: Remat) -> Callable[_P, _Out]:
    """Checkpoint the body of a scan over layers: `remat` says what its backward pass may keep."""
    if remat == "none":
        return body
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policy = keep if remat == "products" else None
    return jax.checkpoint(body, prevent_cse=False, policy=policy)


def map_in_blocks(function: Callable[[Array], Array], x: Array, most: int, unit: int = 1) -> Array:
    """Map over the first axis of x in equal blocks, recomputing for gradients.

    most: rows of a block at most. unit: blocks are multiples of it, where `most` leaves room.
    """
    if len(x) <= most:
        return function(x)
    unit = unit if most >= unit else 1
    blocks = -(-len(x) // (most // unit * unit))
    rows = -(-len(x) // (blocks * unit)) * unit
    padded = jnp.pad(x, ((0, blocks * rows - len(x)), *((0, 0) for _ in x.shape[1:])))
    out = lax.map(jax.checkpoint(function), padded.reshape(blocks, rows, *x.shape[1:]))
    return out.reshape(blocks * rows, *out.shape[2:])[: len(x)]
