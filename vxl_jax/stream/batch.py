"""Streams as padded batches of few shapes; the network is compiled once for each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import numpy as np

from vxl_jax.stream.plan import BEACON, NO_SLOT, PAD, Stream
from vxl_jax.text.chat import IGNORE


@dataclass(frozen=True)
class StreamShape:
    """Padded sizes of a `StreamBatch`: one compilation for each that occurs.

    groups: G; tokens: T of one group; memory: M, slots for persistent tokens; labels: loss
    positions of a sample; beacons: 1 if there may be beacons, whose projections text alone does not
    need, else 0.
    """

    groups: int
    tokens: int
    memory: int
    labels: int
    beacons: int

    @classmethod
    def of(cls, stream: Stream, windows_per_group: int | None = None) -> "StreamShape":
        """Smallest shape that holds one stream; all windows form one group unless told."""
        groups = _groups(stream, windows_per_group)
        return cls(
            groups=len(groups),
            tokens=max(stop - start for start, stop in map(_span(stream), groups)),
            memory=max(1, stream.persistent),
            labels=max(1, int((stream.target != IGNORE).sum())),
            beacons=int((stream.kind == BEACON).any()),
        )

    def union(self, other: "StreamShape") -> "StreamShape":
        """Smallest shape that holds both."""
        return StreamShape(
            *(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        )

    def padded(self, steps: int) -> "StreamShape":
        """Every size rounded up to the ladder of `steps` sizes per doubling."""
        return StreamShape(*(round_up(getattr(self, f.name), steps) for f in fields(self)))


def round_up(count: int, steps: int) -> int:
    """Next size of a ladder with `steps` sizes per doubling (2: 1, 2, 3, 4, 6, 8, 12, 16, 24 …).

    Padding to a ladder bounds the number of compilations by its few sizes, and the padding by
    1/steps of the size below.
    """
    if count <= steps:
        return count
    unit = 2 ** max(0, math.ceil(math.log2(count)) - 1 - int(math.log2(steps)))
    return -(-count // unit) * unit


@dataclass(frozen=True)
class StreamBatch:
    """A batch of streams cut into groups of windows and padded (G groups, B samples).

    Streams are aligned at their last group, so that the last token of every sample is in group
    G - 1. Padding tokens have kind PAD; nothing that is not padding ever sees them.

    kind, source, rank: [G, B, T] int32, see `Stream`
    window_start:  [G, B, T] index in the group of the first token of the token's window
    window_memory: [G, B, T] persistent tokens before the token's window
    last:          [B] index in the last group of each sample's last token that is no beacon
    length:        [B] persistent tokens of each sample
    label_index:   [B, N] index into the flattened [G * T] tokens of those with a target
    label:         [B, N] their targets; IGNORE for padding
    memory, has_beacons: static (M, whether beacon projections are needed)
    """

    kind: Any
    source: Any
    rank: Any
    window_start: Any
    window_memory: Any
    last: Any
    length: Any
    label_index: Any
    label: Any
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

    g, b, t = shape.groups, len(streams), shape.tokens
    token_fields = {name: np.zeros((g, b, t), np.int32) for name in ("source", "window_memory")}
    token_fields["kind"] = np.full((g, b, t), PAD, np.int32)
    token_fields["rank"] = np.full((g, b, t), NO_SLOT, np.int32)
    # Padding is a window of its own in each place, and sees itself alone.
    token_fields["window_start"] = np.tile(np.arange(t, dtype=np.int32), (g, b, 1))
    last, length = np.zeros((2, b), np.int32)
    label_index = np.zeros((b, shape.labels), np.int32)
    label = np.full((b, shape.labels), IGNORE, np.int32)
    for i, stream in enumerate(streams):
        if stream is None:
            continue
        groups = _groups(stream, windows_per_group)
        flat_index = np.zeros(stream.length, np.int32)
        window = np.repeat(np.arange(len(stream.window_start)), stream.window_lengths)
        for group, (first, final) in enumerate(groups, start=g - len(groups)):
            start, stop = _span(stream)((first, final))
            of_token = {
                "kind": stream.kind,
                "source": stream.source,
                "rank": stream.rank,
                "window_start": stream.window_start[window] - start,
                "window_memory": stream.window_memory[window],
            }
            for name, values in of_token.items():
                token_fields[name][group, i, : stop - start] = values[start:stop]
            flat_index[start:stop] = group * t + np.arange(stop - start)
            # After an image, the last raw token predicts what follows, not the beacon behind it.
            last[i] = np.flatnonzero(stream.kind[start:stop] != BEACON)[-1]
        length[i] = stream.persistent
        labelled = np.flatnonzero(stream.target != IGNORE)
        label_index[i, : len(labelled)] = flat_index[labelled]
        label[i, : len(labelled)] = stream.target[labelled]
    return StreamBatch(
        **token_fields,
        last=last,
        length=length,
        label_index=label_index,
        label=label,
        memory=shape.memory,
        has_beacons=bool(shape.beacons),
    )


def _groups(stream: Stream, windows_per_group: int | None) -> list[tuple[int, int]]:
    """(first window, one past the last) of each group."""
    count = len(stream.window_start)
    step = count if windows_per_group is None else windows_per_group
    if step < 1:
        raise ValueError(f"windows_per_group is {windows_per_group}; it must be at least 1")
    return [(i, min(i + step, count)) for i in range(0, count, step)]


def _span(stream: Stream) -> Callable[[tuple[int, int]], tuple[int, int]]:
    """Function from a range of windows to its range of tokens."""
    ends = np.append(stream.window_start, stream.length)
    return lambda group: (int(ends[group[0]]), int(ends[group[1]]))
