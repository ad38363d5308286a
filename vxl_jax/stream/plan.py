"""The stream plan: what Video-XL's compression does to a sequence, as a few arrays (host, NumPy).

A sample is a stream of tokens of three kinds. *Text* and *beacon* tokens are persistent, *visual*
tokens are transient. The stream is cut into windows: at most `window` visual tokens with their
interleaved beacons are one, a run of text is one (or several: cutting it changes nothing). The one
rule of the model (arXiv 2409.14485, section 3.2, as the published code computes it):

    A query sees a key if the key is not later in the stream, belongs to the same sample, and is
    persistent or in the query's own window.

In its own window a token stands at (persistent tokens before the window) + (offset in the window);
a persistent key seen from a later window stands at its rank among the sample's persistent tokens.
Everything the network needs to apply the rule is in `Stream`, and, padded and cut into groups of
windows, in `StreamBatch`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vxl_jax.text.chat import IGNORE, IMAGE_TOKEN

TEXT, VISUAL, BEACON, PAD = 0, 1, 2, 3
"""Kinds of token."""

NO_SLOT = np.int32(2**30)
"""Memory slot of a token that is not kept: past the end of any memory, where writes are dropped."""

Ratio = int | None | Sequence[int | None] | Callable[[int], int | None]
"""How visual tokens are compressed: one ratio for all windows, one per visual window in order, or a
function from the number of visual tokens in a window to its ratio. None keeps them uncompressed."""


@dataclass(frozen=True)
class Stream:
    """One sample's tokens in stream order. T tokens, W windows.

    kind:          [T] TEXT, VISUAL or BEACON
    source:        [T] token id (text), index among the sample's features (visual), 0 (beacon)
    rank:          [T] position among the persistent tokens, which is also the token's memory slot;
                   NO_SLOT for transient tokens
    target:        [T] id that the token should predict, or IGNORE
    window_start:  [W] index of each window's first token
    window_memory: [W] persistent tokens before each window
    """

    kind: np.ndarray
    source: np.ndarray
    rank: np.ndarray
    target: np.ndarray
    window_start: np.ndarray
    window_memory: np.ndarray

    @property
    def length(self) -> int:
        """Tokens of all kinds (T)."""
        return len(self.kind)

    @property
    def persistent(self) -> int:
        """Entries that the whole stream leaves in the memory."""
        return int((self.rank != NO_SLOT).sum())

    @property
    def window_lengths(self) -> np.ndarray:
        """[W] tokens in each window."""
        return np.diff(self.window_start, append=self.length)


def plan_stream(
    ids: Sequence[int] | np.ndarray,
    visual_tokens: Sequence[int],
    *,
    window: int,
    ratio: Ratio,
    labels: Sequence[int] | np.ndarray | None = None,
    before: int = 0,
) -> Stream:
    """Plan one sample, or what follows a memory.

    Args:
        ids: token ids of the sample with one `IMAGE_TOKEN` for every visual block.
        visual_tokens: number of visual tokens of each block, in order.
        window: visual tokens in one compression window.
        ratio: see `Ratio`.
        labels: aligned with `ids`, not shifted; `IGNORE` where there is no loss. The target of a
            token is the label of the next token that is not a beacon.
        before: persistent tokens that are in a memory already; ranks go on after them.

    Raises:
        ValueError: blocks and marks differ in number, an empty block, an unusable ratio, or not as
            many ratios as visual windows.
    """
    ids = np.asarray(ids, np.int32)
    labels = np.full(len(ids), IGNORE, np.int32) if labels is None else np.asarray(labels, np.int32)
    marks = np.flatnonzero(ids == IMAGE_TOKEN)
    if len(marks) != len(visual_tokens):
        raise ValueError(
            f"{len(marks)} image marks in the token ids, {len(visual_tokens)} visual blocks given"
        )
    if len(labels) != len(ids):
        raise ValueError(f"{len(ids)} token ids but {len(labels)} labels")
    if len(ids) == 0:
        raise ValueError("a stream needs at least one token")

    builder = _Builder(_ratio_function(ratio), before)
    next_label = np.append(labels[1:], IGNORE)
    start = 0
    for mark, tokens in zip(marks, visual_tokens, strict=True):
        builder.text(ids[start:mark], next_label[start:mark], window)
        builder.visual(int(tokens), window, int(next_label[mark]))
        start = int(mark) + 1
    builder.text(ids[start:], next_label[start:], window)
    if isinstance(ratio, Sequence) and len(ratio) != builder.visual_windows:
        raise ValueError(f"{len(ratio)} ratios given for {builder.visual_windows} visual windows")
    return builder.stream()


class _Builder:
    """Appends windows one after another, keeping count of what is persistent."""

    def __init__(self, ratio: Callable[[int], int | None], kept: int):
        self.ratio, self.kept = ratio, kept
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.starts: list[int] = []
        self.memory: list[int] = []
        self.tokens = self.visual_seen = self.visual_windows = 0

    def text(self, ids: np.ndarray, targets: np.ndarray, window: int) -> None:
        for i in range(0, len(ids), window):
            piece = ids[i : i + window]
            self._append(np.full(len(piece), TEXT), piece, targets[i : i + window])

    def visual(self, tokens: int, window: int, last_target: int) -> None:
        if tokens < 1:
            raise ValueError("a visual block needs at least one token")
        for i in range(0, tokens, window):
            count = min(window, tokens - i)
            ratio = self.ratio(count)
            if ratio is not None and ratio < 1:
                raise ValueError(f"compression ratio {ratio} of a window must be at least 1")
            # One beacon after every `ratio` raw tokens; those left over have none.
            beacons = 0 if ratio is None else count // ratio
            raw = np.ones(count + beacons, bool)
            if ratio is not None:
                raw[ratio :: ratio + 1] = False
            source = np.where(raw, self.visual_seen + np.cumsum(raw) - 1, 0)
            target = np.full(len(raw), IGNORE)
            if i + count == tokens:
                target[np.flatnonzero(raw)[-1]] = last_target
            self._append(np.where(raw, VISUAL, BEACON), source, target, keep_all=ratio is None)
            self.visual_seen += count
            self.visual_windows += 1

    def _append(
        self, kind: np.ndarray, source: np.ndarray, target: np.ndarray, keep_all: bool = False
    ) -> None:
        self.starts.append(self.tokens)
        self.memory.append(self.kept)
        persistent = (kind != VISUAL) | keep_all
        rank = np.where(persistent, self.kept + np.cumsum(persistent) - 1, NO_SLOT)
        self.parts.append((kind, source, rank, target))
        self.tokens += len(kind)
        self.kept += int(persistent.sum())

    def stream(self) -> Stream:
        kind, source, rank, target = (
            np.concatenate(column).astype(np.int32) for column in zip(*self.parts, strict=True)
        )
        starts, memory = np.array(self.starts, np.int32), np.array(self.memory, np.int32)
        return Stream(kind, source, rank, target, starts, memory)


def _ratio_function(ratio: Ratio) -> Callable[[int], int | None]:
    if callable(ratio):
        return ratio
    if isinstance(ratio, Sequence):
        remaining = iter(ratio)
        return lambda count: next(remaining, None)
    return lambda count: ratio


def draw_ratio(ratios: Sequence[int], rng: np.random.Generator) -> Callable[[int], int | None]:
    """Random ratio per window, as in training (`step-random`).

    Drawn uniformly from those `ratios` that divide the window's number of visual tokens. Where none
    does (the published code stops there), from those that do not exceed it, and where none of these
    is left, the window keeps one beacon. No ratios at all: no compression.
    """

    def draw(count: int) -> int | None:
        if not ratios:
            return None
        usable = [r for r in ratios if count % r == 0] or [r for r in ratios if r <= count]
        return int(rng.choice(usable)) if usable else ratio_within(min(ratios), count)

    return draw


def ratio_within(ratio: int | None, count: int) -> int | None:
    """Lower a ratio to the number of tokens of its window, so that the window keeps one beacon.

    With frames of 144 tokens no window is that small. The published code keeps no beacon of it.
    """
    return None if ratio is None else min(ratio, count)
