"""A group of windows on the device, from a `StreamBatch` of the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from vxl_jax.config import LanguageConfig
from vxl_jax.nn.rope import Angles, rope_angles
from vxl_jax.stream.batch import StreamBatch
from vxl_jax.stream.plan import BEACON

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

    is_beacon: Array | None  # [B, T], None where the stream has no beacon
    slot: Array  # [B, T] in the memory; past its end for transient tokens
    window_start: Array  # [B, T]
    window_memory: Array  # [B, T] slots of the memory that each token sees
    window_base: tuple[Array, ...]  # [B, T] for each base: slots of it that each token sees
    own_angles: Angles  # [B, T, 1, H/2] at the position in the own window
    memory_angles: Angles  # [B, T, 1, H/2] at the rank


def make_group(
    config: LanguageConfig, streams: StreamBatch, base_lengths: Sequence[Array] = ()
) -> Group:
    """Device arrays that all layers share, from a batch whose group axis is taken off.

    base_lengths: entries [1] of each base, in stream order.
    """
    before: Array | int = 0
    window_base = []
    for length in base_lengths:
        window_base.append(jnp.clip(streams.window_memory - before, 0, length))
        before = before + length
    offset = jnp.arange(streams.kind.shape[1]) - streams.window_start
    angles = partial(rope_angles, head_size=config.head_size, theta=config.rope_theta)
    return Group(
        is_beacon=streams.kind == BEACON if streams.has_beacons else None,
        slot=streams.rank - before,
        window_start=streams.window_start,
        window_memory=jnp.maximum(streams.window_memory - before, 0),
        window_base=tuple(window_base),
        own_angles=angles(streams.window_memory + offset),
        memory_angles=angles(streams.rank),
    )


GROUP_FIELDS = ("kind", "source", "rank", "window_start", "window_memory")


def take_group(streams: StreamBatch, index: Any) -> StreamBatch:
    """Select group `index` of a batch; the result has no group axis."""
    return replace(streams, **{name: getattr(streams, name)[index] for name in GROUP_FIELDS})


def map_by_sample(fn: Callable[[Any, int], Any], streams: StreamBatch) -> StreamBatch:
    """Replace each array of a batch with `fn(array, axis of samples)`."""
    arrays = {
        name: fn(value, 1 if name in GROUP_FIELDS else 0)
        for name, value in vars(streams).items()
        if hasattr(value, "shape")
    }
    return replace(streams, **arrays)
