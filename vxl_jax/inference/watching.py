"""Watching: frames in, entries out, a few windows in each step while a thread decodes the next."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jax import Array

from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.errors import MediaError
from vxl_jax.inference.entries import Base, Continuation, device_memory
from vxl_jax.inference.ratios import Ratios, ratio_at
from vxl_jax.inference.runtime import Runtime
from vxl_jax.interrupts import held_interrupts
from vxl_jax.media.layout import FrameCounts, ImageLayout, VisualLayout
from vxl_jax.media.open import AT_ONCE, Film
from vxl_jax.media.prefetch import ahead
from vxl_jax.models.functions import encode
from vxl_jax.progress import progress_bar
from vxl_jax.stream.batch import round_up
from vxl_jax.stream.plan import plan_stream, ratio_within
from vxl_jax.stream.visual import Pixels, batch_visual
from vxl_jax.text.template import IMAGE_TOKEN


@dataclass(frozen=True)
class Block:
    """A visual block whose last window may not be full.

    A partial window is in the entries as well, as far as it goes. It is read again when more frames
    arrive. Its entries stay, since nothing in them sees what is later, unless it `is_provisional`.

    Attributes:
      start: entries before that window.
      features: [n, D] visual tokens from there on.
      ratios: of the windows that `features` begin.
      tokens: in all windows, `features` included.
      layout: which tokens its frames or tiles give.
      is_ended: whether an entry of the token that ends a video comes after the features.
    """

    start: int
    features: Array
    layout: VisualLayout | ImageLayout
    ratios: tuple[int | None, ...] = ()
    tokens: int = 0
    is_ended: bool = False

    @property
    def is_provisional(self) -> bool:
        """Whether entries are written again when more frames arrive: that of a partial window of
        fewer tokens than its ratio, and that of the token at the end.
        """
        if self.is_ended:
            return True
        ratio = self.ratios[0] if self.ratios else None
        return ratio is not None and 0 < len(self.features) < ratio


def begin_block(runtime: Runtime, film: Film, start: int) -> Block:
    """A block without a frame, after `start` entries."""
    return Block(start, no_features(runtime.config), runtime.layout_of(film))


def no_features(config: VideoXLConfig) -> Array:
    """No visual token."""
    return jnp.zeros((0, config.language.width), DTYPES[config.dtype])


@dataclass(frozen=True)
class Progress:
    """How far a watcher has come: what is in the entries.

    Attributes:
      length: entries that count.
      block: cut to the frames that have entries; of the last one, tokens may wait for a window to
        be full.
      seconds: of the frames of this watcher that have entries.
    """

    length: int
    block: Block
    seconds: Sequence[float]


@dataclass(frozen=True)
class _Step:
    """Windows that a device is reading: their memory `own` follows `start` entries, and will have
    `persistent`. block: after them. partial: tokens of the last window that are read, if it is not
    full; they are the first of the block's features.
    """

    own: Continuation
    start: int
    persistent: int
    block: Block
    partial: int


class Watcher:
    """Puts the frames of one block into entries, after those that count.

    bases: entries before, and last those that are appended to, with the length that counts. noted:
    called under their lock whenever some are appended. What fails is not appended.
    """

    def __init__(
        self,
        bases: Sequence[Base],
        block: Block,
        noted: Callable[[Progress], None] = lambda progress: None,
    ):
        *before, (self.entries, self.length) = bases
        self.bases, self.block, self.noted = tuple(before), block, noted
        self.runtime: Runtime = self.entries.runtime
        self.before = sum(length for _, length in self.bases)
        self._seconds: list[float] = []  # of the frames taken in
        self._first = block.tokens  # where the tokens of the first frame begin
        self.layout = block.layout
        self._frames_before = self.layout.frames_of(block.tokens)
        # Entries from here on stay as they are written.
        self._final = block.start if block.is_provisional else self.length
        self._ratio: int | None = None  # of the last window
        self._step: _Step | None = None  # on the device, and not in the entries yet
        self._failed = False

    @property
    def _frames(self) -> int:
        """Frames of the block that are taken in."""
        return self._frames_before + len(self._seconds)

    def see(self, pixels: np.ndarray, seconds: np.ndarray, ratios: Ratios) -> None:
        """Take in frames [F, S, S, 3]; their full windows go into the entries.

        Raises: VisualMemoryError if the device has no room.
        """
        padded = np.pad(pixels, ((0, round_up(len(pixels), 4) - len(pixels)), *[(0, 0)] * 3))
        count = self.layout.count(len(pixels), self._frames)
        with device_memory(f"encoding {len(pixels)} frames"):
            inputs = self._inputs(padded[None], len(pixels))
            visual = encode(self.runtime.graph, self.runtime.params, inputs)[0][:count]
        self.take(visual, seconds, ratios)

    def _inputs(self, pixels: np.ndarray, frames: int) -> Pixels:
        """What the tower takes: the first `frames` of some pixels, with their visual tokens."""
        if self.runtime.config.layout.is_uniform:
            return pixels
        if isinstance(self.layout, ImageLayout):
            layout, tokens = self.layout.model, self.layout.tokens()
        else:
            layout = self.layout
            tokens = layout.video_tokens(frames, self._frames, ends=False)
        # Few sizes: the tower is compiled for each.
        return batch_visual(layout, pixels, [tokens], round_up(len(tokens), 2))

    def take(self, visual: Array, seconds: np.ndarray, ratios: Ratios) -> None:
        """As `see`, of frames that are encoded: visual tokens [n, D]."""
        config, old = self.runtime.config, self.block
        window, end = config.window, old.tokens + len(visual)
        begin = np.arange(-(-old.tokens // window) * window, end, window) - old.tokens
        begun = _ratios_at(self.layout, begin, seconds, ratios, self._frames)
        with device_memory(f"encoding {len(seconds)} frames"):
            features = jnp.concatenate([old.features, visual])
        self._failed = True
        self.block = replace(
            old, features=features, ratios=old.ratios + begun, tokens=end, is_ended=False
        )
        self._seconds += seconds.tolist()
        self._absorb_full()
        self._failed = False

    def finish(self) -> None:
        """Append the remaining frames, with a partial window; after a failure, the last good step.

        Raises: VisualMemoryError if the device has no room.
        """
        try:
            if self._seconds and not self._failed:
                self._absorb_full()
                if len(self.block.features) or self.layout.end_tokens:
                    self._absorb(len(self.block.features), ends=True)
        finally:
            self._commit()

    def _absorb_full(self) -> None:
        """Put full steps into the entries."""
        step = self.runtime.windows_at_once * self.runtime.config.window
        while len(self.block.features) >= step:
            self._absorb(step)

    def _absorb(self, count: int, ends: bool = False) -> None:
        """Dispatch the first `count` tokens of the features, once the step before is appended.

        ends: append the tokens that end the block, too.
        """
        config, block = self.runtime.config, self.block
        window, full = config.window, count // config.window
        end = self._end() if ends else block.features[:0]
        total = count + len(end)
        ratios = block.ratios[: -(-count // window)]
        if -(-total // window) > len(ratios):  # a window of the end alone
            ratios = (*ratios, ratios[-1] if ratios else self._ratio)
        self._ratio = ratios[-1]
        finest = min((ratio for ratio in ratios if ratio is not None), default=0)
        if total % window:
            ratios = (*ratios[:-1], ratio_within(ratios[-1], total % window))
        before = self.before + block.start
        stream = plan_stream([IMAGE_TOKEN], [total], window=window, ratio=ratios, before=before)
        # Padded, so that one program serves one window and another serves several.
        windows = 1 if total <= window else self.runtime.windows_at_once
        beacons = window // finest if finest else 0
        kept = window if None in ratios else beacons
        with device_memory("reading frames"):
            visual = jnp.concatenate([block.features[:count], end])
            visual = jnp.pad(visual, ((0, windows * window - total), (0, 0)))
            rest = block.features[full * window :]
        self._commit()
        bases = (*self.bases, (self.entries, block.start))
        own = Continuation(self.runtime, bases, capacity=windows * kept)
        own.read([stream], visual[None], windows * (window + beacons))
        after = np.append(stream.window_memory, before + stream.persistent)[full] - self.before
        self.block = replace(
            block,
            start=int(after),
            features=rest,
            ratios=block.ratios[full:],
            is_ended=len(end) > 0,
        )
        self._step = _Step(own, block.start, stream.persistent, self.block, count % window)

    def _end(self) -> Array:
        """Visual tokens that end the block."""
        if not self.layout.end_tokens:
            return no_features(self.runtime.config)
        newline = self.runtime.network.projector.newline[...]
        return jnp.broadcast_to(newline, (self.layout.end_tokens, len(newline))).astype(
            DTYPES[self.runtime.config.dtype]
        )

    def _commit(self) -> None:
        """Append the step that the device has done, and note how far that is."""
        if self._step is None:
            return
        step, self._step = self._step, None
        length = step.start + step.persistent
        self.entries.reserve(length)
        with self.entries.lock, held_interrupts():
            held = max(0, self._final - step.start)  # of a partial window: these stay
            start = step.start + held
            self.entries.append(start, step.own.memory, held, step.persistent - held)
            self.length = self._final = length
            self.noted(self._progress(step))

    def _progress(self, step: _Step) -> Progress:
        """How far the watcher is after a step."""
        config, block = self.runtime.config, step.block
        begun = block.tokens - len(block.features)  # where the features begin
        layout, before = self.layout, self._frames_before
        frames = layout.frames_of(max(0, begun + step.partial - self._first), before)
        tokens = self._first + layout.count(frames, before)
        ratios = block.ratios[: -(-(tokens - begun) // config.window)]
        features = block.features[: tokens - begun]
        block = replace(block, features=features, ratios=ratios, tokens=tokens)
        return Progress(self.length, block, self._seconds[:frames])


def watch_film(
    watcher: Watcher, film: Film, ratios: Ratios, shift: float = 0.0, progress: bool = False
) -> None:
    """Watch a film, chunk by chunk, while a thread decodes the next. Ctrl-C is heard after each.

    shift: added to the film's seconds.

    Raises: MediaError where a frame cannot be decoded; VisualMemoryError if there is no room. What
        came before is in the entries, as it is after Ctrl-C.
    """
    runtime, entries, known = watcher.runtime, watcher.entries, film.seconds

    def needed(seconds: np.ndarray) -> int:
        count = watcher.block.start + count_entries(
            runtime.config, watcher.block, seconds + shift, ratios
        )
        runtime.check_context(watcher.before + count, film.name)
        return count

    if known is not None:
        entries.reserve(needed(known))
    # As many frames as fit into the windows of a step.
    at_once = runtime.windows_at_once * runtime.config.window
    frames = min(max(1, watcher.layout.frames_of(at_once + 1) - 1), AT_ONCE)
    # The tokens of an image are made of all of its tiles.
    chunks = film.chunks(frames if film.image is None else max(frames, film.image.tiles))
    total = None if known is None else len(known)
    bar = progress_bar(progress, total=total, desc="watching", unit="frame")
    with bar, closing(ahead(chunks)) as decoded:
        try:
            while (chunk := next(decoded, None)) is not None:  # Ctrl-C is heard while it waits
                pixels, seconds = chunk
                with held_interrupts():
                    if known is None:
                        needed(seconds)
                    watcher.see(pixels, seconds + shift, ratios)
                    bar.update(len(pixels))
        finally:
            with held_interrupts():
                watcher.finish()
    if not watcher.block.tokens:
        raise MediaError(f"{film.name}: gave no frame")


def films_entries(
    runtime: Runtime, before: int, films: Sequence[Film], ratios: Ratios, text: int = 0
) -> int:
    """Entries after all films whose frames are known, for `Entries.reserve`.

    before: entries before the first. text: tokens of a question and its answer.

    Raises: VisualMemoryError if the context of the model has no room for them.
    """
    needed = before
    for film in films:
        if film.seconds is not None:
            block = begin_block(runtime, film, 0)
            needed += count_entries(runtime.config, block, film.seconds, ratios)
            runtime.check_context(needed, film.name)
    runtime.check_context(needed + text, "the question")
    return needed


def count_entries(config: VideoXLConfig, block: Block, seconds: np.ndarray, ratios: Ratios) -> int:
    """Entries that frames at these seconds make, after all full windows of a block."""
    layout, window, waiting = block.layout, config.window, len(block.features)
    first = layout.frames_of(block.tokens)
    total = waiting + layout.count(len(seconds), first)
    starts = np.arange(0, total, window)
    later = _ratios_at(layout, starts[len(block.ratios) :] - waiting, seconds, ratios, first)
    found = block.ratios + later
    total += layout.end_tokens
    if -(-total // window) > len(found):
        found = (*found, found[-1] if found else None)
    entries = 0
    for start, ratio in zip(range(0, total, window), found, strict=True):
        count = min(window, total - start)
        ratio = ratio_within(ratio, count)
        entries += count if ratio is None else count // ratio
    return entries


def _ratios_at(
    layout: FrameCounts, tokens: np.ndarray, seconds: np.ndarray, ratios: Ratios, first: int
) -> tuple[int | None, ...]:
    """Ratios of windows that begin at some tokens of frames; frame `first` of a block is the first.

    seconds: of the frames.
    """
    frames = layout.frame_at(tokens, len(seconds), first)
    return tuple(ratio_at(ratios, seconds[frame]) for frame in frames)
