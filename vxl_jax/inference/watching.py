"""Watching: frames in, entries out, a few windows in each step while a thread decodes the next."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vxl_jax.chat import IMAGE_TOKEN
from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.errors import MediaError
from vxl_jax.film import AT_ONCE, Film, ahead
from vxl_jax.inference.entries import Base, Continuation, Entries, device_memory
from vxl_jax.inference.ratios import Ratios, ratio_at
from vxl_jax.inference.runtime import Runtime
from vxl_jax.interrupts import held_interrupts
from vxl_jax.model import encode
from vxl_jax.progress import progress_bar
from vxl_jax.stream import plan_stream, round_up


@dataclass(frozen=True)
class Block:
    """A visual block whose last window may not be full.

    start: entries before that window. features: [n, D] visual tokens from there on. A partial
    window is in the entries as well, as far as it goes; it is read again when more frames arrive,
    and its entries stay, since nothing in them sees what is later. ratios: of the windows that
    `features` begin. tokens: in all windows, `features` included.
    """

    start: int
    features: Array
    ratios: tuple[int | None, ...] = ()
    tokens: int = 0


def begin_block(config: VideoXLConfig, start: int) -> Block:
    """A block without a frame, after `start` entries."""
    return Block(start, jnp.zeros((0, config.language.width), DTYPES[config.dtype]))


def _nothing(block: Block, frames: int, first: float, last: float) -> None:
    """Note nothing of what is watched."""


class Watcher:
    """Puts the frames of one block into entries. What fails leaves the entries as they were.

    bases: entries before these. noted: called under the lock of the entries whenever some are
    appended: with the block as far as they go, and with the number of this watcher's frames in it
    and the seconds of the first and the last.
    """

    def __init__(
        self,
        entries: Entries,
        block: Block,
        bases: Sequence[Base] = (),
        noted: Callable[[Block, int, float, float], None] = _nothing,
    ):
        self.entries, self.block, self.bases, self.noted = entries, block, tuple(bases), noted
        self.runtime: Runtime = entries.runtime
        self.before = sum(length for _, length in self.bases)
        self._seconds: list[float] = []
        self._first = block.tokens  # of the first frame
        self._step: _Step | None = None  # on the device, and not in the entries yet
        self._failed = False

    def see(self, pixels: np.ndarray, seconds: np.ndarray, ratios: Ratios) -> None:
        """Take in frames [F, S, S, 3]; their full windows go into the entries.

        Raises: VisualMemoryError if the device has no room. This watcher cannot go on then.
        """
        self._failed = True
        padded = np.pad(pixels, ((0, round_up(len(pixels), 4) - len(pixels)), *[(0, 0)] * 3))
        with device_memory(f"encoding {len(pixels)} frames"):
            visual = encode(self.runtime.graph, self.runtime.params, padded[None])[0]
            visual = visual[: len(pixels) * self.runtime.config.tokens_per_frame]
        self.take(visual, seconds, ratios)

    def take(self, visual: Array, seconds: np.ndarray, ratios: Ratios) -> None:
        """As `see`, of frames that are encoded: visual tokens [n, D]."""
        self._failed = True
        config, old = self.runtime.config, self.block
        per_frame, window = config.tokens_per_frame, config.window
        end = old.tokens + len(visual)
        begin = range(-(-old.tokens // window) * window, end, window)
        begun = tuple(ratio_at(ratios, seconds[(at - old.tokens) // per_frame]) for at in begin)
        with device_memory(f"encoding {len(seconds)} frames"):
            features = jnp.concatenate([old.features, visual])
        self.block = Block(old.start, features, old.ratios + begun, end)
        self._seconds += seconds.tolist()
        self._absorb_full()
        self._failed = False

    def _absorb_full(self) -> None:
        """Put full steps into the entries."""
        step = self.runtime.windows_at_once * self.runtime.config.window
        while len(self.block.features) >= step:
            self._absorb(step)

    def finish(self) -> None:
        """Put in what is left, also a partial window; after a failure, the step before it alone."""
        if self._failed or not self._seconds:
            self._commit()
            return
        self._absorb_full()
        if len(self.block.features):
            self._absorb(len(self.block.features))
        self._commit()

    def _absorb(self, count: int) -> None:
        """Dispatch the first `count` tokens of the features, once the step before is appended."""
        config, block = self.runtime.config, self.block
        window, full = config.window, count // config.window
        ratios = block.ratios[: -(-count // window)]
        before = self.before + block.start
        stream = plan_stream([IMAGE_TOKEN], [count], window=window, ratio=ratios, before=before)
        # One program for one window, one for several: what is not full is padded.
        windows = 1 if count <= window else self.runtime.windows_at_once
        finest = min((ratio for ratio in ratios if ratio is not None), default=0)
        beacons = window // finest if finest else 0
        kept = window if None in ratios else beacons
        visual = jnp.pad(block.features[:count], ((0, windows * window - count), (0, 0)))
        self._commit()
        bases = (*self.bases, (self.entries, block.start))
        own = Continuation(self.runtime, bases, capacity=windows * kept)
        own.read([stream], visual[None], windows * (window + beacons))
        after = np.append(stream.window_memory, before + stream.persistent)[full] - self.before
        rest = block.features[full * window :]
        self.block = Block(int(after), rest, block.ratios[full:], block.tokens)
        self._step = _Step(own, block.start, stream.persistent, self.block, count % window)

    def _commit(self) -> None:
        """Append the step that the device has done, and note the frames that it has."""
        if self._step is None:
            return
        step, self._step = self._step, None
        held = self.entries.length - step.start  # of a partial window
        self.entries.reserve(step.start + step.persistent)
        with device_memory("putting frames into the memory"):
            jax.block_until_ready(step.own.memory)
        with self.entries.lock:
            self.entries.append(step.own.memory, held, step.persistent - held)
            # Frames that have a token in the entries; the rest of the last one's wait.
            per_frame = self.runtime.config.tokens_per_frame
            absorbed = step.block.tokens - len(step.block.features) + step.partial
            frames = -(-(absorbed - self._first) // per_frame)
            tokens = self._first + frames * per_frame
            waiting = tokens - (step.block.tokens - len(step.block.features))
            ratios = step.block.ratios[: -(-waiting // self.runtime.config.window)]
            features = step.block.features[:waiting]
            block = replace(step.block, features=features, ratios=ratios, tokens=tokens)
            self.noted(block, frames, self._seconds[0], self._seconds[frames - 1])


@dataclass(frozen=True)
class _Step:
    """A step on the device: its memory, which follows `start` entries; the block after it; and the
    tokens of the partial window that it has read.
    """

    own: Continuation
    start: int
    persistent: int
    block: Block
    partial: int


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
            runtime.config, seconds + shift, ratios, watcher.block
        )
        runtime.check_context(watcher.before + count, film.name)
        return count

    if known is not None:
        entries.reserve(needed(known))
    per_frame, window = runtime.config.tokens_per_frame, runtime.config.window
    chunks = film.chunks(min(max(1, runtime.windows_at_once * window // per_frame), AT_ONCE))
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
            needed += count_entries(runtime.config, film.seconds, ratios)
            runtime.check_context(needed, film.name)
    runtime.check_context(needed + text, "the question")
    return needed


def count_entries(
    config: VideoXLConfig, seconds: np.ndarray, ratios: Ratios, begun: Block | None = None
) -> int:
    """Entries that frames at these seconds make, after all full windows of a block, if any."""
    waiting = 0 if begun is None else len(begun.features)
    per_frame, window = config.tokens_per_frame, config.window
    total, entries = waiting + len(seconds) * per_frame, 0
    for start in range(0, total, window):
        if begun is not None and start < waiting:
            ratio = begun.ratios[start // window]
        else:
            ratio = ratio_at(ratios, seconds[(start - waiting) // per_frame])
        count = min(window, total - start)
        entries += count if ratio is None else count // ratio
    return entries
