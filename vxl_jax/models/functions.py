"""Pure jitted functions over a split model: encode, read, prefill, decode."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vxl_jax.models.video_xl import VideoXL, scan_groups
from vxl_jax.nn.memory import Memory, empty_memory
from vxl_jax.stream.batch import StreamBatch


@partial(jax.jit, static_argnums=0)
def encode(graph: Any, params: Any, pixels: Array) -> Array:
    """`VideoXL.encode` of split parameters."""
    return nnx.merge(graph, params).encode(pixels)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(
    graph: Any,
    params: Any,
    memory: Memory,
    streams: StreamBatch,
    visual: Array | None,
    bases: tuple[Memory, ...] = (),
) -> tuple[Array, Memory]:
    """Run the streams through the model and append their persistent tokens to the memory.

    visual: features [B, V, D] that the streams' sources count in, None for text alone. bases: see
    `scan_groups`; they are not donated. Returns logits [B, V] float32 after each sample's last
    token, and the memory; the one passed in is donated. The caller checks that there is room.
    """
    return _read_streams(nnx.merge(graph, params), memory, streams, visual, bases)


def _read_streams(
    model: VideoXL,
    memory: Memory,
    streams: StreamBatch,
    visual: Array | None,
    bases: tuple[Memory, ...] = (),
) -> tuple[Array, Memory]:
    hidden, memory = scan_groups(model, streams, visual, memory, keep_hidden=False, bases=bases)
    last = jax.vmap(lambda rows, index: rows[index])(hidden, streams.last)
    return model.logits(last), memory


@partial(jax.jit, static_argnums=(0, 4))
def prefill(
    graph: Any, params: Any, streams: StreamBatch, pixels: Array | None, capacity: int
) -> tuple[Array, Memory]:
    """Compress the streams into a new memory and read the logits after each sample's last token.

    graph, params: `nnx.split(model)`. capacity: memory slots for a sample, `streams.memory` at
    least. Returns logits [B, V] float32 and the memory.
    """
    if capacity < streams.memory:
        raise ValueError(f"capacity {capacity} is less than the {streams.memory} slots needed")
    model = nnx.merge(graph, params)
    visual = None if pixels is None else model.encode(pixels)
    memory = empty_memory(model.config, streams.kind.shape[1], capacity)
    return _read_streams(model, memory, streams, visual)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_step(
    graph: Any, params: Any, memory: Memory, token: Array, bases: tuple[Memory, ...] = ()
) -> tuple[Array, Memory]:
    """Append one text token to every sample: a group of one window of one token.

    token [B] int32. bases: see `scan_groups`; they are not donated. Returns logits [B, V] float32
    and the memory, one entry longer; the memory passed in is donated. The caller checks that there
    is room: a full memory would drop the entry.
    """
    model = nnx.merge(graph, params)
    rank = sum((base.length for base in bases), memory.length)  # [B]
    one = rank[None, :, None]  # [G, B, T]
    zero = jnp.zeros_like(one)
    streams = StreamBatch(
        kind=zero,
        source=token[None, :, None],
        rank=one,
        window_start=zero,
        window_memory=one,
        last=zero[0, :, 0],
        length=jnp.ones_like(token),
        label_index=zero[0],
        label=zero[0],
        memory=memory.capacity,
        has_beacons=False,
    )
    hidden, memory = scan_groups(model, streams, None, memory, keep_hidden=False, bases=bases)
    return model.logits(hidden[:, 0]), memory


def parameter_count(params: Any) -> int:
    """Number of scalars in a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
