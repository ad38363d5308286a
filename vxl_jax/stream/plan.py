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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int32

from vxl_jax.text.template import IGNORE, IMAGE_TOKEN

TEXT, VISUAL, BEACON, PAD = 0, 1, 2, 3
"""Kinds of token."""

NO_SLOT = np.int32(2**30)
"""Memory slot of a token that is not kept: past the end of any memory, where writes are dropped."""

RatioFunction = Callable[[int], int | None]
"""From the number of visual tokens in a window to its compression ratio."""

Ratio = int | None | Sequence[int | None] | RatioFunction
"""How visual tokens are compressed: one ratio for all windows, one per visual window in order, or a
function. None keeps them uncompressed."""


@dataclass(frozen=True)
class Stream:
    """One sample's tokens in stream order. T tokens, W windows.

    kind: TEXT, VISUAL or BEACON.
    source: token id (text), index among the sample's features (visual), 0 (beacon).
    rank: position among the persistent tokens, which is also the token's memory slot; NO_SLOT for
        transient tokens.
    target: id that the token should predict, or IGNORE.
    window_start: index of each window's first token.
    window_memory: persistent tokens before each window.
    """

    kind: Int32[np.ndarray, " T"]
    source: Int32[np.ndarray, " T"]
    rank: Int32[np.ndarray, " T"]
    target: Int32[np.ndarray, " T"]
    window_start: Int32[np.ndarray, " W"]
    window_memory: Int32[np.ndarray, " W"]

    @property
    def length(self) -> int:
        """Tokens of all kinds (T)."""
        return len(self.kind)

    @property
    def persistent(self) -> int:
        """Entries that the whole stream leaves in the memory."""
        return int((self.rank != NO_SLOT).sum())

    @property
    def window_lengths(self) -> Int32[np.ndarray, " W"]:
        """Tokens in each window."""
        return np.diff(self.window_start, append=self.length)


def plan_stream(
    ids: Sequence[int] | Int[np.ndarray, " ids"],
    visual_tokens: Sequence[int],
    *,
    window: int,
    ratio: Ratio,
    labels: Sequence[int] | Int[np.ndarray, " ids"] | None = None,
    before: int = 0,
) -> Stream:
    """Plan the token stream of one sample, or of a continuation of a memory.

    Args:
        ids: token ids of the sample with one `IMAGE_TOKEN` for every visual block.
        visual_tokens: number of visual tokens of each block, in order.
        window: visual tokens in one compression window.
        ratio: see `Ratio`.
        labels: aligned with `ids`, not shifted; `IGNORE` where there is no loss. The target of a
            token is the label of the next token that is not a beacon.
        before: entries of the memory that the sample continues; ranks start after them.

    Raises:
        ValueError: blocks and marks differ in number, an empty block, an unusable ratio, or a
            number of ratios that differs from that of the visual windows.
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
    if min(visual_tokens, default=1) < 1:
        raise ValueError("a visual block needs at least one token")

    next_label = np.append(labels[1:], IGNORE)
    ratio_of = _ratio_function(ratio, visual_windows=sum(-(-n // window) for n in visual_tokens))
    windows: list[_Window] = []
    start = first_visual = 0
    for mark, tokens in zip(marks.tolist(), visual_tokens, strict=True):
        windows += _text_windows(ids[start:mark], next_label[start:mark], window)
        windows += _visual_windows(first_visual, tokens, window, ratio_of, next_label[mark])
        start, first_visual = mark + 1, first_visual + tokens
    windows += _text_windows(ids[start:], next_label[start:], window)
    return _join(windows, before)


@dataclass(frozen=True)
class _Window:
    """Tokens of one window, before their ranks are known; see `Stream`."""

    kind: Int[np.ndarray, " T"]
    source: Int[np.ndarray, " T"]
    target: Int[np.ndarray, " T"]
    persistent: Bool[np.ndarray, " T"]


def _text_windows(
    ids: Int[np.ndarray, " T"], targets: Int[np.ndarray, " T"], window: int
) -> Iterator[_Window]:
    """Cut a run of text into windows."""
    for i in range(0, len(ids), window):
        piece = ids[i : i + window]
        kept = np.ones(len(piece), bool)
        yield _Window(np.full(len(piece), TEXT), piece, targets[i : i + window], kept)


def _visual_windows(
    first: int, tokens: int, window: int, ratio_of: RatioFunction, last_target: int
) -> Iterator[_Window]:
    """Cut a visual block into windows and put beacons between its tokens.

    first: index of the block's first token among the sample's features. last_target: what the last
    visual token predicts.
    """
    for i in range(0, tokens, window):
        count = min(window, tokens - i)
        ratio = ratio_of(count)
        if ratio is not None and ratio < 1:
            raise ValueError(f"compression ratio {ratio} of a window must be at least 1")
        # One beacon after every `ratio` visual tokens; left-over tokens have none.
        beacons = 0 if ratio is None else count // ratio
        is_beacon = np.zeros(count + beacons, bool)
        if ratio is not None:
            is_beacon[ratio :: ratio + 1] = True
        target = np.full(len(is_beacon), IGNORE)
        if i + count == tokens:
            target[np.flatnonzero(~is_beacon)[-1]] = last_target
        yield _Window(
            kind=np.where(is_beacon, BEACON, VISUAL),
            source=np.where(is_beacon, 0, first + i + np.cumsum(~is_beacon) - 1),
            target=target,
            persistent=is_beacon | (ratio is None),
        )


def _join(windows: Sequence[_Window], before: int) -> Stream:
    """Put windows one after another and count their persistent tokens from `before` on."""
    persistent = np.concatenate([window.persistent for window in windows])
    rank = before + np.cumsum(persistent) - persistent  # persistent tokens before each token
    ends = np.cumsum([len(window.kind) for window in windows])
    start = np.append(0, ends[:-1])
    arrays = (
        np.concatenate([window.kind for window in windows]),
        np.concatenate([window.source for window in windows]),
        np.where(persistent, rank, NO_SLOT),
        np.concatenate([window.target for window in windows]),
        start,
        rank[start],
    )
    return Stream(*(array.astype(np.int32) for array in arrays))


def _ratio_function(ratio: Ratio, visual_windows: int) -> RatioFunction:
    if callable(ratio):
        return ratio
    if not isinstance(ratio, Sequence):
        return lambda count: ratio
    if len(ratio) != visual_windows:
        raise ValueError(f"{len(ratio)} ratios given for {visual_windows} visual windows")
    remaining = iter(ratio)
    return lambda count: next(remaining)


def draw_ratio(ratios: Sequence[int], rng: np.random.Generator) -> RatioFunction:
    """Draw a random ratio for each window, as in training (`step-random`).

    The draw is uniform over the `ratios` that divide the window's number of visual tokens. If there
    are none (the published code stops there), it is over those that do not exceed the number; if
    there are none either, the window keeps one beacon. Without ratios nothing is compressed.
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
