"""Pad streams into batches of few shapes: the network is compiled once for each."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import pairwise

import numpy as np
from jaxtyping import Int32

from vxl_jax.stream.plan import BEACON, NO_SLOT, PAD, Stream
from vxl_jax.text.template import IGNORE
from vxl_jax.typing import AnyArray


@dataclass(frozen=True)
class StreamShape:
    """Padded sizes of a `StreamBatch`: a program is compiled for each.

    groups: G.
    tokens: T, of one group.
    memory: M, slots for persistent tokens.
    labels: loss positions of a sample.
    beacons: 1 if there may be beacons, else 0: text alone does not need their projections.
    """

    groups: int
    tokens: int
    memory: int
    labels: int
    beacons: int

    @classmethod
    def of(cls, stream: Stream, windows_per_group: int | None = None) -> "StreamShape":
        """Compute the smallest shape that holds one stream; arguments as for `batch_streams`."""
        ranges = _group_ranges(stream, windows_per_group)
        return cls(
            groups=len(ranges),
            tokens=max(stop - start for start, stop in ranges),
            memory=max(1, stream.persistent),
            labels=max(1, int((stream.target != IGNORE).sum())),
            beacons=int((stream.kind == BEACON).any()),
        )

    def union(self, other: "StreamShape") -> "StreamShape":
        """Compute the smallest shape that holds both."""
        return StreamShape(
            *(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        )

    def padded(self, steps: int) -> "StreamShape":
        """Round every size up to the ladder of `steps` sizes per doubling; see `round_up`."""
        return StreamShape(*(round_up(getattr(self, f.name), steps) for f in fields(self)))


def round_up(count: int, steps: int) -> int:
    """Round up to the next size of a ladder with `steps` sizes per doubling.

    With 2 steps: 1, 2, 3, 4, 6, 8, 12, 16, 24 … Few sizes mean few compiled programs; the padding
    is at most 1 / steps of the count.

    Raises:
        ValueError: `steps` is not a power of two.
    """
    if steps < 1 or steps.bit_count() != 1:
        raise ValueError(f"steps: {steps}; it must be a power of two")
    if count <= steps:
        return count
    # The octave that ends at or above the count, from 2**(n - 1) to 2**n, in `steps` parts.
    unit = 1 << ((count - 1).bit_length() - steps.bit_length())
    return -(-count // unit) * unit


@dataclass(frozen=True)
class StreamBatch:
    """A batch of streams cut into groups of windows and padded (G groups, B samples).

    Streams are aligned at their last group, so that the last token of every sample is in group
    G - 1. Padding tokens have kind PAD; no other token sees them. `batch_streams` makes NumPy
    arrays; inside of jit they are JAX's (`vxl_jax.nn.groups` registers the class as a pytree).

    kind, source, rank: see `Stream`.
    window_start: index in the group of the first token of the token's window.
    window_memory: persistent tokens before the token's window.
    last: index in the last group of each sample's last token that is not a beacon.
    length: persistent tokens of each sample.
    label_index: index into the flattened [G * T] tokens of those with a target.
    label: their targets; IGNORE for padding.
    memory: M, static.
    has_beacons: whether beacon projections are needed, static.
    """

    kind: Int32[AnyArray, "G B T"]
    source: Int32[AnyArray, "G B T"]
    rank: Int32[AnyArray, "G B T"]
    window_start: Int32[AnyArray, "G B T"]
    window_memory: Int32[AnyArray, "G B T"]
    last: Int32[AnyArray, " B"]
    length: Int32[AnyArray, " B"]
    label_index: Int32[AnyArray, "B labels"]
    label: Int32[AnyArray, "B labels"]
    memory: int
    has_beacons: bool


def batch_streams(
    streams: Sequence[Stream | None],
    shape: StreamShape | None = None,
    windows_per_group: int | None = None,
) -> StreamBatch:
    """Pad streams of any kinds and lengths into one batch.

    Args:
        streams: one per sample; None for a sample that is left out (all padding, no loss).
        shape: padded sizes; the smallest that fits if None.
        windows_per_group: windows in a group; all of a stream if None. The result of the network
            does not depend on it.

    Returns:
        A batch of NumPy arrays.

    Raises:
        ValueError: no stream at all, or `shape` is too small for a stream.
    """
    needed = [StreamShape.of(s, windows_per_group) for s in streams if s is not None]
    if shape is None:
        if not needed:
            raise ValueError("a batch without a shape needs at least one sample")
        shape = reduce(StreamShape.union, needed)
    for small in needed:
        if shape.union(small) != shape:
            raise ValueError(f"a stream needs {small}, more than the batch's {shape}")
    arrays = _padding(shape, len(streams))
    for i, stream in enumerate(streams):
        if stream is not None:
            _put_stream(arrays, i, stream, windows_per_group)
    return StreamBatch(**arrays, memory=shape.memory, has_beacons=bool(shape.beacons))


def _padding(shape: StreamShape, samples: int) -> dict[str, Int32[np.ndarray, "..."]]:
    """Arrays of a batch without any stream."""
    tokens = (shape.groups, samples, shape.tokens)
    return {
        "kind": np.full(tokens, PAD, np.int32),
        "source": np.zeros(tokens, np.int32),
        "rank": np.full(tokens, NO_SLOT, np.int32),
        # Each padding token is a window by itself, and sees itself alone.
        "window_start": np.tile(np.arange(shape.tokens, dtype=np.int32), (*tokens[:2], 1)),
        "window_memory": np.zeros(tokens, np.int32),
        "last": np.zeros(samples, np.int32),
        "length": np.zeros(samples, np.int32),
        "label_index": np.zeros((samples, shape.labels), np.int32),
        "label": np.full((samples, shape.labels), IGNORE, np.int32),
    }


def _put_stream(
    arrays: dict[str, Int32[np.ndarray, "..."]],
    sample: int,
    stream: Stream,
    windows_per_group: int | None,
) -> None:
    """Write a stream into the arrays of a batch, in place."""
    groups, _, tokens = arrays["kind"].shape
    ranges = _group_ranges(stream, windows_per_group)
    window = np.repeat(np.arange(len(stream.window_start)), stream.window_lengths)
    window_start = stream.window_start[window]
    values = {
        "kind": stream.kind,
        "source": stream.source,
        "rank": stream.rank,
        "window_memory": stream.window_memory[window],
    }
    flat_index = np.zeros(stream.length, np.int32)  # into [G * T]
    for group, (start, stop) in enumerate(ranges, start=groups - len(ranges)):
        for name, array in values.items():
            arrays[name][group, sample, : stop - start] = array[start:stop]
        arrays["window_start"][group, sample, : stop - start] = window_start[start:stop] - start
        flat_index[start:stop] = group * tokens + np.arange(stop - start)
    # After an image, the last visual token predicts what follows, not the beacon behind it.
    last_group = stream.kind[slice(*ranges[-1])]
    arrays["last"][sample] = np.flatnonzero(last_group != BEACON)[-1]
    arrays["length"][sample] = stream.persistent
    labelled = np.flatnonzero(stream.target != IGNORE)
    arrays["label_index"][sample, : len(labelled)] = flat_index[labelled]
    arrays["label"][sample, : len(labelled)] = stream.target[labelled]


def _group_ranges(stream: Stream, windows_per_group: int | None) -> list[tuple[int, int]]:
    """Tokens of each group: index of the first, and one past the last."""
    step = len(stream.window_start) if windows_per_group is None else windows_per_group
    if step < 1:
        raise ValueError(f"windows_per_group is {windows_per_group}; it must be at least 1")
    starts = stream.window_start[::step].tolist()
    return list(pairwise([*starts, stream.length]))
