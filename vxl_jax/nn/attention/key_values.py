"""Keys and values that come before the windows: a memory, or one of its bases."""

from dataclasses import dataclass

import jax
from jax import Array
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
