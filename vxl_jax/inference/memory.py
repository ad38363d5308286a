"""The memory of what was watched: asked, extended and saved, by several threads at once."""

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vxl_jax.errors import ArgumentError, MediaError, PartlyWatched, VisualMemoryError
from vxl_jax.inference.entries import Base, Entries, append_text
from vxl_jax.inference.memory_file import SavedMemory, check_fingerprint, check_free, write_memory
from vxl_jax.inference.ratios import Ratios
from vxl_jax.inference.runtime import Runtime
from vxl_jax.inference.watching import (
    Block,
    Progress,
    Watcher,
    begin_block,
    films_entries,
    watch_film,
)
from vxl_jax.media import MediaOptions
from vxl_jax.media.layout import VisualLayout
from vxl_jax.media.open import Film, FrameLimit, MediaLike
from vxl_jax.media.sampling import FrameTimes
from vxl_jax.text.template import IMAGE_TOKEN


@dataclass(frozen=True)
class Watched:
    """One visual block of a memory: its name, frames, and the seconds of its first and last.

    times: of all frames, of a video that a model trained with `Preprocessing.time_prompt` watches.
    """

    name: str
    is_video: bool
    frames: int
    first: float
    last: float
    times: FrameTimes | None = None

    def as_json(self) -> dict[str, Any]:
        """As a JSON object, without what has no value."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Watched":
        """Read what `as_json` has written."""
        times = values.get("times")
        if times is not None:
            values = values | {"times": FrameTimes(**times | {"seconds": tuple(times["seconds"])})}
        return cls(**values)


@dataclass(frozen=True)
class Snapshot:
    """A memory at one moment.

    Attributes:
      length: entries that count.
      ids: all text and blocks, int32, `IMAGE_TOKEN` for each block.
      watched: the blocks.
      block: the last one.
      held: the buffer of the entries; None until a model has taken the memory.
    """

    length: int
    ids: np.ndarray
    watched: tuple[Watched, ...] = ()
    block: Block | None = None
    held: Entries | None = None

    @property
    def base(self) -> Base:
        """The entries that count, to be read by what follows them.

        Raises: VisualMemoryError if no model has taken the memory yet.
        """
        return self.entries, self.length

    @property
    def entries(self) -> Entries:
        """The buffer of the entries.

        Raises: VisualMemoryError if no model has taken the memory yet.
        """
        if self.held is None:
            raise VisualMemoryError(
                "this memory has no model yet: use load_memory(path, model), or ask it something"
            )
        return self.held

    def video_times(self) -> FrameTimes | None:
        """When the frames are shown, if the memory is of one video and its model is told so."""
        return self.watched[0].times if len(self.watched) == 1 else None


class VisualMemory:
    """What a model keeps of the videos and images that it has watched, to be asked about.

    Any number of threads may ask about it, save it, and extend it at the same time: each sees it as
    it was at one moment, and one extension waits for another. Made by `Model.watch` and
    `load_memory`.
    """

    def __init__(self, ids: np.ndarray, watched: Sequence[Watched] = ()):
        self._lock, self._extending = threading.RLock(), threading.RLock()
        self._saved: SavedMemory | None = None
        # Text is read when the room for what follows it is known.
        self._snapshot = Snapshot(0, ids, tuple(watched))

    @classmethod
    def of_file(cls, saved: SavedMemory) -> "VisualMemory":
        """A memory whose entries are read from a file when a model takes it."""
        with saved.damaged():
            ids = np.array(saved.about["ids"], np.int32)
            memory = cls(ids, [*map(Watched.from_json, saved.about["watched"])])
        memory._saved = saved
        return memory

    @property
    def watched(self) -> list[Watched]:
        """The visual blocks, in order."""
        return list(self._snapshot.watched)

    def video_times(self) -> FrameTimes | None:
        """When the frames are shown, if the memory is of one video and its model is told so."""
        return self._snapshot.video_times()

    @property
    def ids(self) -> np.ndarray:
        """All text and blocks, int32, `IMAGE_TOKEN` for each block."""
        return self._snapshot.ids

    @property
    def length(self) -> int:
        """Entries of the memory, of all its text and blocks."""
        with self._lock:
            return self._saved.length if self._saved is not None else self.snapshot().length

    def __repr__(self) -> str:
        blocks = ", ".join(f"{block.name} ({block.frames} frames)" for block in self.watched)
        return f"VisualMemory({blocks or 'nothing'}; {self.length:,} entries)"

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies of keys and values, [L, K, length, H] in the compute dtype.

        Axis letters as in CONTRIBUTING.md. Keys are rotated at their position.
        """
        entries, length = self.snapshot().base
        return entries.arrays(length)

    def extend(
        self,
        media: MediaLike,
        *,
        frames: FrameLimit = "model",
        ratio: Ratios | Literal["model"] = "model",
        sample_fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        slow_every: int | None = None,
        options: MediaOptions | None = None,
        new_block: bool | None = None,
        progress: bool = False,
    ) -> None:
        """Watch more: the video that was watched last goes on, or something new begins.

        The result is that of watching all of it at once: also where a window of frames is not full
        yet, which keeps the ratio that it has begun with.

        Args:
            media: one video or image, as for `Model.watch`.
            frames: as there, and likewise `ratio`, `sample_fps`, `start` and `end`.
            ratio: from here on.
            sample_fps: frames a second of a file.
            start: first second of a file.
            end: last second of a file.
            slow_every: as there; a video that goes on keeps its own.
            options: how the pixels of a file are decoded.
            new_block: whether another video begins. By default, a file does unless it is the one
                that was watched last, and arrays, folders and live sources go on. After an image,
                and for one, a block always begins.
            progress: show a bar.

        Raises: MediaError if it cannot be opened; PartlyWatched if it ends early;
            VisualMemoryError if there is no room, in the context or on the device. What was watched
            before stays usable in each case, as it does after Ctrl-C.
        """
        runtime = self.entries.runtime
        ratios = runtime.checked_ratios(ratio)
        fields = {"frames": frames, "sample_fps": sample_fps, "start": start, "end": end}
        fields["slow_every"] = slow_every
        (film,) = runtime.open_films([media], options=options, **fields)
        self.watch(film, ratios, new_block, progress)

    def watch(
        self, film: Film, ratios: Ratios, new_block: bool | None = True, progress: bool = False
    ) -> None:
        """As `extend`, of a film that is open already."""
        with self._extending:
            old = self.snapshot()
            last = old.watched[-1] if old.watched else None
            goes_on = last is not None and last.is_video and film.is_video
            if goes_on and new_block is None:
                goes_on = film.step is not None or film.name == old.watched[-1].name
            elif goes_on:
                goes_on = not new_block
            shift = old.watched[-1].last + film.step if goes_on and film.step else 0.0
            block = old.block if goes_on else None
            if block is not None:
                _check_goes_on(block, film)
            block = block or begin_block(old.entries.runtime, film, old.length)
            # What reads the memory as it is now keeps entries that are about to be written again.
            entries = old.entries.copied() if block.is_provisional else old.entries

            def noted(now: Progress) -> None:
                """Publish what is in the entries; they are locked."""
                ids, watched = old.ids, old.watched
                if not goes_on:
                    ids = np.append(ids, np.int32(IMAGE_TOKEN))
                    watched = (*watched, self._begun(film, now.seconds))
                elif now.seconds:
                    watched = (*watched[:-1], _continued(watched[-1], film, now.seconds))
                self._snapshot = Snapshot(now.length, ids, watched, now.block, entries)

            watcher = Watcher([(entries, old.length)], block, noted)
            try:
                watch_film(watcher, film, ratios, shift, progress)
            except MediaError as error:
                if not self.watched:
                    raise
                raise PartlyWatched(f"{error}; {self._end()}", self) from error
            except VisualMemoryError as error:
                if self._snapshot is old:
                    raise
                cause = error.__cause__ or error
                raise VisualMemoryError(f"{error}; {self._end()}", self) from cause

    def _begun(self, film: Film, seconds: Sequence[float]) -> Watched:
        """A block of the frames that were watched of a film."""
        times = None
        if film.is_video and self.entries.runtime.config.preprocessing.time_prompt:
            times = film.times_of(seconds)
        first, last = (seconds[0], seconds[-1]) if seconds else (0.0, 0.0)
        return Watched(film.name, film.is_video, len(seconds), first, last, times)

    def _end(self) -> str:
        last = self.watched[-1]
        end = f"{last.name} {last.frames:,} frames, up to second {last.last:.1f}"
        return f"what was watched can be used, of {end}"

    def check_room(self, films: Sequence[Film], ratios: Ratios, text: int = 0) -> None:
        """Check that the context and the device have room for films, and reserve it.

        text: tokens of a question and its answer, for which the context has to have room as well.

        Raises: VisualMemoryError if they have not.
        """
        entries, held = self.entries, self._snapshot
        before = held.length or len(held.ids)
        entries.reserve(films_entries(entries.runtime, before, films, ratios, text))

    @property
    def entries(self) -> Entries:
        """Its entries on the device.

        Raises: VisualMemoryError if it was loaded without a model, and none has taken it yet.
        """
        return self._snapshot.entries

    def snapshot(self) -> Snapshot:
        """Take a snapshot, which later frames do not change."""
        with self._lock:
            now = self._snapshot
            entries = now.entries
            if now.length == 0 and len(now.ids):
                length = append_text([(entries, 0)], now.ids)
                self._snapshot = replace(now, length=length)
            return self._snapshot

    def attach(self, runtime: Runtime) -> None:
        """Let a model use the memory; one that was loaded is read from its file now.

        Raises: VisualMemoryError if another model has made it, or the device has no room;
            CheckpointError if its file is damaged.
        """
        with self._lock:
            if self._saved is not None:
                entries, block = self._saved.read(runtime)
                self._snapshot = replace(
                    self._snapshot, length=self._saved.length, block=block, held=entries
                )
                self._saved = None
            elif self._snapshot.held is None:
                self._snapshot = replace(self._snapshot, held=Entries(runtime))
            elif self.entries.runtime is not runtime:
                theirs = self.entries.runtime.fingerprint
                check_fingerprint("this memory", theirs, runtime.fingerprint)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the memory to one safetensors file, with the fingerprint of its model: whole, or
        not at all. What is watched meanwhile is left out.

        Raises: VisualMemoryError if there is a file already, or no room for it.
        """
        path = Path(path)
        check_free(path, overwrite)
        now = self.snapshot()
        about = {"ids": now.ids.tolist(), "watched": [block.as_json() for block in now.watched]}
        write_memory(path, now.entries, now.length, now.block, about)


def _check_goes_on(block: Block, film: Film) -> None:
    """Check that a film that goes on has slow and fast frames as it began.

    Raises: ArgumentError.
    """
    begun = block.layout.slow_every if isinstance(block.layout, VisualLayout) else None
    if film.slow_every not in (None, begun):
        raise ArgumentError(
            f"{film.name}: slow_every is {film.slow_every}, but the video that goes on has begun "
            f"with {begun}; leave it out, or begin a new block"
        )


def _continued(block: Watched, film: Film, seconds: Sequence[float]) -> Watched:
    """A block with the frames that were watched of a film that goes on."""
    times = block.times and block.times.extended(film.times_of(seconds))
    frames = block.frames + len(seconds)
    return replace(block, frames=frames, last=seconds[-1], times=times)


def load_memory(path: str | Path, model: Runtime | None = None) -> VisualMemory:
    """A memory that `VisualMemory.save` has written, for the model that has made it.

    model: reads the entries at once. Without it, they are read when a model is first asked about
    them.

    Raises: CheckpointError if the file is damaged or not a memory; VisualMemoryError if another
        model has made it.
    """
    memory = VisualMemory.of_file(SavedMemory(Path(path)))
    if model is not None:
        memory.attach(model)
    return memory
