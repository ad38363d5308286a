"""Keys and values that come before the windows: a memory, or one of its bases."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """One layer of stored keys and values, and how many of them each query sees.

    keys, values: [L, B, K, S, H], keys rotated at their memory position. [L, 1, K, S, H] if all
        samples share them.
    layer: which of the L layers is read.
    seen: [B, T] int32. A query sees the first `seen` of the S slots.
    """

    keys: Float[Array, " L #B K S H"]
    values: Float[Array, " L #B K S H"]
    layer: Int[Array, ""] | int
    seen: Int[Array, "B T"]


def gradient_of_stack(
    gradient: Float[Array, "B K S H"], layers: int, layer: Int[Array, ""] | int
) -> Float[Array, "L B K S H"]:
    """Place the gradient of one layer in the stack that it was read from: zero in all others."""
    zeros = jnp.zeros((layers, *gradient.shape), gradient.dtype)
    return lax.dynamic_update_index_in_dim(zeros, gradient, layer, 0)
