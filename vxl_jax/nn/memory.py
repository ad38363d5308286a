"""The compressed memory: keys and values of the persistent tokens, an explicit pytree."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from vxl_jax.config import DTYPES, VideoXLConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """Keys and values of the persistent tokens of B samples, in stream order.

    keys:   [L, B, K, M, H] already rotated at the entry's rank: its slot, after the entries of a
            memory before it, if there is one
    values: [L, B, K, M, H]
    length: [B] int32, slots in use

    Writes past the capacity M are dropped by XLA without a word, so the host checks it first
    (`stream.batch_streams`, `inference.entries.Continuation`).
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


# One row of indices a token: (layer, slot). Samples are a batching dimension, so that each device
# writes the samples that it has; as an index, they would be brought together first.
_SLOTS = lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3),
    inserted_window_dims=(0, 3),
    scatter_dims_to_operand_dims=(0, 3),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)


def write(memory: Array, layer: Array | int, slot: Array, entries: Array) -> Array:
    """Put entries [B, T, K, H] into the slots [B, T] of a layer of keys or values [L, B, K, M, H].

    One whose slot is past the end is dropped; no two may have the same slot.
    """
    capacity, tokens = memory.shape[3], slot.shape[1]
    # Also what is dropped has a slot of its own: unique ones are half the work for gradients.
    slot = jnp.where(slot < capacity, slot, capacity + jnp.arange(tokens))
    index = jnp.stack([jnp.broadcast_to(layer, slot.shape), slot], axis=-1)
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return lax.scatter(memory, index, entries, _SLOTS, unique_indices=True, mode=mode)
