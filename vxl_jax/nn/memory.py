"""The compressed memory: keys and values of the persistent tokens, an explicit pytree."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from vxl_jax.config import DTYPES, VideoXLConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """Keys and values of the persistent tokens of B samples, in stream order.

    keys: rotated at the entry's rank: its slot, plus the entries of the bases before the memory.
    values: of the same entries.
    length: int32, slots in use.

    XLA drops writes past the capacity M silently, so the host checks it first
    (`stream.batch_streams`, `inference.entries.Continuation`).
    """

    keys: Float[Array, "L B K M H"]
    values: Float[Array, "L B K M H"]
    length: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        """Slots for one sample (M)."""
        return self.keys.shape[3]


def empty_memory(config: VideoXLConfig, batch: int, capacity: int) -> Memory:
    """Allocate a memory without entries for `batch` samples, in the compute dtype."""
    language = config.language
    shape = (language.layers, batch, language.kv_heads, capacity, language.head_size)
    dtype = DTYPES[config.dtype]
    return Memory(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))


# One row of indices a token: (layer, slot). Samples are a batching dimension, so that each device
# writes the samples that it has; as an index, they would be gathered first. `vmap` over
# `keys.at[layer, :, slot].set(…)` gives the same numbers, but transposes the whole memory: with one
# of 328 MB, 853 ms and 328 MB of temporaries on two CPU cores, instead of 9 ms and 3 MB.
_SLOTS = lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3),
    inserted_window_dims=(0, 3),
    scatter_dims_to_operand_dims=(0, 3),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)


def write(
    memory: Float[Array, "L B K M H"],
    layer: Int[Array, ""] | int,
    slot: Int[Array, "B T"],
    entries: Float[Array, "B T K H"],
) -> Float[Array, "L B K M H"]:
    """Write entries into the slots of one layer of a memory's keys or values.

    Entries whose slot is past the end are dropped. Other slots of a sample must differ.
    """
    capacity, tokens = memory.shape[3], slot.shape[1]
    # Dropped entries get different slots too: unique indices halve the work of the gradient.
    slot = jnp.where(slot < capacity, slot, capacity + jnp.arange(tokens))
    index = jnp.stack([jnp.broadcast_to(layer, slot.shape), slot], axis=-1)
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return lax.scatter(memory, index, entries, _SLOTS, unique_indices=True, mode=mode)
