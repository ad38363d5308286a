"""Samples as they are drawn on the sheet."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from train.data.dataset import Dataset
from train.data.lengths import KINDS
from train.data.records.sample import BadSample, Sample, VisualBlock
from train.data.workers import LoadedSample
from train.inspect.media import load_each
from train.inspect.pictures import CONTEXT, LEFT_OUT, LOSS, MEDIA, SheetSample
from vxl_jax.text.template import IGNORE, IMAGE_TOKEN

FRAMES_SHOWN = 6
"""Frames of a sample on the sheet at most."""


FIRST_TOKENS, LAST_TOKENS = 140, 200
"""Tokens of a long text on the sheet, from its beginning and its end."""


def choose_samples(data: Dataset, count: int, seed: int) -> list[int]:
    """Samples for the sheet: in turn one of every source and kind, at random; in their order."""
    rng = np.random.default_rng(seed)
    groups = []
    for samples in data.ranges:
        kinds = data.kind[samples.start : samples.stop]
        for kind in np.unique(kinds):
            members = samples.start + np.flatnonzero(kinds == kind)
            groups.append(deque(rng.choice(members, min(count, len(members)), replace=False)))
    chosen: list[int] = []
    while len(chosen) < count and any(groups):
        for i in rng.permutation(len(groups)):
            if groups[i] and len(chosen) < count:
                chosen.append(int(groups[i].popleft()))
    return sorted(chosen)


Frames = list[tuple[str, np.ndarray]]


def load_shown(
    data: Dataset, indices: Sequence[int]
) -> Iterator[tuple[int, LoadedSample | BadSample, Frames]]:
    """Samples with the few frames that are shown of each."""

    def keep(
        index: int, loaded: LoadedSample | BadSample, pixels: np.ndarray
    ) -> tuple[int, LoadedSample | BadSample, Frames]:
        if isinstance(loaded, BadSample):
            return index, loaded, []
        shown = shown_frames(loaded.sample.blocks)
        return index, loaded, [(caption, pixels[i].copy()) for i, caption in shown]

    return load_each(data, indices, keep)


def shown_frames(blocks: Sequence[VisualBlock]) -> list[tuple[int, str]]:
    """The frames to show, and their captions: all blocks have some as long as there is room; of a
    video they are spread from its first to its last, of an image they are the first tiles.
    """
    room = [0] * len(blocks)
    while sum(room) < min(FRAMES_SHOWN, sum(block.frames for block in blocks)):
        for i, block in enumerate(blocks):
            if room[i] < block.frames and sum(room) < FRAMES_SHOWN:
                room[i] += 1
    shown = []
    start = 0
    for number, (block, count) in enumerate(zip(blocks, room, strict=True), 1):
        where = np.arange(count)
        if block.is_video and count > 1:
            where = np.linspace(0, block.frames - 1, count).round().astype(int)
        which = f"{number}: " if len(blocks) > 1 else ""
        shown += [(start + int(i), f"{which}{i + 1} of {block.frames}") for i in where]
        start += block.frames
    return shown


def sheet_sample(
    data: Dataset, index: int, loaded: LoadedSample | BadSample, frames: Frames, tokenizer: Any
) -> SheetSample:
    """A sample for the sheet; one that cannot be decoded is there with its reason."""
    kind = KINDS[data.kind[index]]
    if isinstance(loaded, BadSample):
        pieces = [(loaded.reason, LEFT_OUT)]
        return SheetSample(loaded.name, kind, "bad sample", [], pieces, loaded.reason)
    sample, lengths = loaded.sample, data.lengths
    text, visual, beacons = (int(a[index]) for a in (lengths.text, lengths.visual, lengths.beacons))
    parts = [f"{text + visual + beacons:,} tokens"]
    if visual:
        parts[0] += f" ({text:,} of text, {visual:,} visual, {_plural(beacons, 'beacon')})"
        parts.append(_amount(sample.blocks))
    parts.append(f"{lengths.labels[index]:,} labelled")
    return SheetSample(sample.name, kind, " · ".join(parts), frames, text_pieces(sample, tokenizer))


def _amount(blocks: Sequence[VisualBlock]) -> str:
    frames = sum(block.frames for block in blocks)
    where = "" if len(blocks) == 1 else f" of {len(blocks)} files"
    return _plural(frames, "frame" if blocks[0].is_video else "tile") + where


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def text_pieces(sample: Sample, tokenizer: Any) -> list[tuple[str, int]]:
    """The sample's text in pieces, each with its style; the middle of a long one left out."""
    styles = np.where(sample.labels == IGNORE, CONTEXT, LOSS)
    styles[sample.ids == IMAGE_TOKEN] = MEDIA
    count = len(sample.ids)
    left_out = range(0)
    if count > FIRST_TOKENS + LAST_TOKENS:
        left_out = range(FIRST_TOKENS, count - LAST_TOKENS)
    pieces: list[tuple[str, int]] = []
    marks = iter(sample.blocks)
    start = 0
    # A run of one style ends where the style changes, at every mark, and where text is left out.
    for end in range(1, count + 1):
        inside = end < count and end not in (left_out.start, left_out.stop)
        if inside and styles[end] == styles[start] != MEDIA:
            continue
        block = next(marks) if styles[start] == MEDIA else None
        if start == left_out.start and left_out:
            pieces.append((f" [{len(left_out):,} tokens left out] ", LEFT_OUT))
        if start not in left_out:
            text = (
                f"⟨{block.path.name}: {_amount([block])}⟩"
                if block
                else _decode_ids(tokenizer, sample.ids[start:end])
            )
            pieces.append((text, int(styles[start])))
        start = end
    return pieces


def _decode_ids(tokenizer: Any, ids: np.ndarray) -> str:
    text = tokenizer.decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    # A turn a line; other newlines are marked.
    return text.replace("<|im_end|>\n", "<|im_end|>\0").replace("\n", "↵").replace("\0", "↵\n")
