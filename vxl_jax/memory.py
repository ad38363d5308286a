"""The compressed memory: keys and values of the persistent tokens, an explicit pytree."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from vxl_jax.config import DTYPES, VideoXLConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """Keys and values of the persistent tokens of B samples, in stream order.

    keys:   [L, B, K, M, H] already rotated at the entry's rank, which is its slot
    values: [L, B, K, M, H]
    length: [B] int32, slots in use

    Writes past the capacity M are dropped by XLA without a word, so the host checks it first
    (`stream.batch_streams`, `generate`).
    """

    keys: Array
    values: Array
    length: Array

    @property
    def capacity(self) -> int:
        """Slots for one sample (M)."""
        return self.keys.shape[3]


def empty_memory(config: VideoXLConfig, batch: int, capacity: int) -> Memory:
    """Memory of `batch` samples with no entry, in the compute dtype."""
    language = config.language
    shape = (language.layers, batch, language.kv_heads, capacity, language.head_size)
    dtype = DTYPES[config.dtype]
    return Memory(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))
