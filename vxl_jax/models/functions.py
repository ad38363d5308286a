"""Pure jitted functions over a split model: encode, read, prefill, decode.

graph and params are `nnx.split(model)`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from vxl_jax.models.video_xl import VideoXL, scan_groups
from vxl_jax.nn.layers import ModuleState
from vxl_jax.nn.memory import Memory, empty_memory
from vxl_jax.stream.batch import StreamBatch
from vxl_jax.stream.visual import Pixels

Graph = nnx.GraphDef[VideoXL]
"""Structure of a model without its arrays: hashable, a static argument of jit."""


@partial(jax.jit, static_argnums=0)
def encode(graph: Graph, params: ModuleState, pixels: Pixels) -> Float[Array, "B V D"]:
    """Encode frames to visual tokens: `VideoXL.encode` of split parameters."""
    return nnx.merge(graph, params).encode(pixels)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(
    graph: Graph,
    params: ModuleState,
    memory: Memory,
    streams: StreamBatch,
    visual: Float[Array, "B V D"] | None,
    bases: tuple[Memory, ...] = (),
) -> tuple[Float[Array, "B V"], Memory]:
    """Run the streams through the model and append their persistent tokens to the memory.

    Args:
        graph: structure of the model.
        params: its arrays.
        memory: donated. The caller checks its capacity.
        streams: from `batch_streams`; their ranks start after the memory.
        visual: tokens that the streams' sources count in, None for text alone.
        bases: see `scan_groups`; not donated.

    Returns:
        Float32 logits after each sample's last token, and the memory.
    """
    return _read_streams(nnx.merge(graph, params), memory, streams, visual, bases)


def _read_streams(
    model: VideoXL,
    memory: Memory,
    streams: StreamBatch,
    visual: Array | None,
    bases: tuple[Memory, ...] = (),
) -> tuple[Array, Memory]:
    hidden, memory, _ = scan_groups(model, streams, visual, memory, bases)
    last = jax.vmap(lambda rows, index: rows[index])(hidden, streams.last)
    return model.logits(last), memory


@partial(jax.jit, static_argnums=(0, 4))
def prefill(
    graph: Graph,
    params: ModuleState,
    streams: StreamBatch,
    pixels: Pixels | None,
    capacity: int,
) -> tuple[Float[Array, "B V"], Memory]:
    """Compress the streams into a new memory and read the logits after each sample's last token.

    Args:
        graph: structure of the model.
        params: its arrays.
        streams: from `batch_streams`.
        pixels: see `Pixels`; None for text alone.
        capacity: memory slots of a sample, at least `streams.memory`.

    Returns:
        Float32 logits and the memory.

    Raises:
        ValueError: the capacity is too small.
    """
    if capacity < streams.memory:
        raise ValueError(f"capacity {capacity} is less than the {streams.memory} slots needed")
    model = nnx.merge(graph, params)
    visual = None if pixels is None else model.encode(pixels)
    memory = empty_memory(model.config, streams.kind.shape[1], capacity)
    return _read_streams(model, memory, streams, visual)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_step(
    graph: Graph,
    params: ModuleState,
    memory: Memory,
    token: Int[Array, " B"],
    bases: tuple[Memory, ...] = (),
) -> tuple[Float[Array, "B V"], Memory]:
    """Append one text token to every sample: a group of one window of one token.

    Args:
        graph: structure of the model.
        params: its arrays.
        memory: donated. The caller checks its capacity: a full memory drops the entry.
        token: id of each sample's token, int32.
        bases: see `scan_groups`; not donated.

    Returns:
        Float32 logits after the token, and the memory, one entry longer.
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
    hidden, memory, _ = scan_groups(model, streams, None, memory, bases)
    return model.logits(hidden[:, 0]), memory


def parameter_count(params: ModuleState) -> int:
    """Count the scalars in a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
