"""A group of windows on the device, from a `StreamBatch` of the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from vxl_jax.config import LanguageConfig
from vxl_jax.nn.rope import Angles, rope_angles
from vxl_jax.stream.batch import StreamBatch
from vxl_jax.stream.plan import BEACON
from vxl_jax.typing import AnyArray

# Registered here and not in `vxl_jax.stream`: data workers make batches without importing JAX.
jax.tree_util.register_dataclass(
    StreamBatch,
    data_fields=[
        *("kind", "source", "rank", "window_start", "window_memory"),
        *("last", "length", "label_index", "label"),
    ],
    meta_fields=["memory", "has_beacons"],
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Group:
    """One group of windows on the device: a `StreamBatch` without its group axis."""

    is_beacon: Bool[Array, "B T"] | None  # None where the stream has no beacon
    slot: Int[Array, "B T"]  # in the memory; past its end for transient tokens
    window_start: Int[Array, "B T"]
    window_memory: Int[Array, "B T"]  # slots of the memory that each token sees
    window_base: tuple[Int[Array, "B T"], ...]  # slots of each base that each token sees
    own_angles: Angles  # at the position in the own window
    memory_angles: Angles  # at the rank


def make_group(
    config: LanguageConfig, streams: StreamBatch, base_lengths: Sequence[Int[Array, " 1"]] = ()
) -> Group:
    """Compute the device arrays that all layers share, from a batch without its group axis.

    base_lengths: entries of each base, in stream order.
    """
    kind, rank, window_start, window_memory = (
        jnp.asarray(getattr(streams, name))
        for name in ("kind", "rank", "window_start", "window_memory")
    )
    before: Array | int = 0
    window_base = []
    for length in base_lengths:
        window_base.append(jnp.clip(window_memory - before, 0, length))
        before = before + length
    offset = jnp.arange(kind.shape[1]) - window_start
    angles = partial(rope_angles, head_size=config.head_size, theta=config.rope_theta)
    return Group(
        is_beacon=kind == BEACON if streams.has_beacons else None,
        slot=rank - before,
        window_start=window_start,
        window_memory=jnp.maximum(window_memory - before, 0),
        window_base=tuple(window_base),
        own_angles=angles(window_memory + offset),
        memory_angles=angles(rank),
    )


GROUP_FIELDS = ("kind", "source", "rank", "window_start", "window_memory")
"""Fields of a `StreamBatch` with a group axis."""


def take_group(streams: StreamBatch, index: int | Int[Array, ""]) -> StreamBatch:
    """Select group `index` of a batch; the result has no group axis."""
    return replace(streams, **{name: getattr(streams, name)[index] for name in GROUP_FIELDS})


def map_by_sample(fn: Callable[[Any, int], AnyArray], streams: StreamBatch) -> StreamBatch:
    """Replace each array of a batch with `fn(array, axis of samples)`."""
    arrays = {
        name: fn(value, 1 if name in GROUP_FIELDS else 0)
        for name, value in vars(streams).items()
        if hasattr(value, "shape")
    }
    return replace(streams, **arrays)  # type: ignore[arg-type]
