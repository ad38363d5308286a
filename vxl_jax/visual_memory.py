"""The memory of what was watched: made chunk by chunk, extended, saved, and loaded again."""

import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vxl_jax.chat import IMAGE_TOKEN
from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.decode import Sampling, decode
from vxl_jax.estimate import entry_bytes
from vxl_jax.film import AT_ONCE, FRAMES, Film, Media, ahead, as_media, open_film
from vxl_jax.interrupts import held_interrupts
from vxl_jax.media import DEFAULT_OPTIONS, MediaError, MediaOptions
from vxl_jax.memory import Memory, empty_memory
from vxl_jax.model import decode_step, encode, read
from vxl_jax.progress import progress_bar
from vxl_jax.stream import Stream, StreamShape, batch_streams, plan_stream, round_up
from vxl_jax.tensor_files import Piece, Planned, write_tensors
from vxl_jax.tensors import PICKLES, STORED_NAME, CheckpointError, Tensor, metadata_of, tensors_of

if TYPE_CHECKING:
    from vxl_jax.inference import Model

Ratios = int | None | Mapping[float, int | None]
"""How frames are compressed: one ratio; or from which second on which ratio, such as
`{0: 16, 60: 4, 90: 16}`. None leaves visual tokens as they are. A window of frames has the ratio of
its first frame."""


class VisualMemoryError(ValueError):
    """A memory cannot be used, or has no room. The message says why and what to do."""


class PartlyWatched(MediaError):
    """A video ended early, or is damaged. `memory` has what came before, and can be used."""

    def __init__(self, message: str, memory: "VisualMemory"):
        super().__init__(message)
        self.memory = memory


def ratio_at(ratios: Ratios, second: float) -> int | None:
    """The ratio of a window whose first frame is at a second."""
    if isinstance(ratios, Mapping):
        # Files that were joined may have times before their start.
        ratios = ratios[max(start for start in ratios if start <= max(second, 0.0))]
    return None if ratios is None else int(ratios)


def check_ratios(ratios: Ratios, window: int) -> None:
    """Refuse ratios that no window can have.

    Raises: ValueError.
    """
    pairs = ratios if isinstance(ratios, Mapping) else {0: ratios}
    if not pairs or min(pairs) > 0:
        raise ValueError(f"ratio {ratios!r}: say which one holds from second 0 on")
    for ratio in pairs.values():
        whole = isinstance(ratio, Integral) and not isinstance(ratio, bool)
        if ratio is not None and not (whole and 1 <= ratio <= window):
            raise ValueError(
                f"ratio {ratio!r}: it must be a whole number from 1 to {window}, the visual tokens "
                "of a window, or None for no compression"
            )


OWN_SLOTS, OWN_SLOTS_OF_MANY, TEXT_STEP = 1024, 128, 64
"""Least slots of what stands behind a base, where it is one sample and where it is several, and by
how many tokens text grows: so that questions of other lengths compile nothing."""


class Growing:
    """Entries of one growing stream on the device: [B] samples, after a base that all share.

    Entries behind `lengths` are never seen, and are written over: to go back is to make `lengths`
    smaller.
    """

    def __init__(self, model: "Model", samples: int = 1, base: "VisualMemory | None" = None):
        self.model, self._base = model, base
        self.before = 0 if base is None else base.length
        self.lengths = np.zeros(samples, np.int32)
        self.memory: Memory | None = None
        self.decoded = 0

    @property
    def base(self) -> Memory | None:
        """The entries before, as they were when this began: later ones are not seen."""
        if self._base is None:
            return None
        length = jnp.full((1,), self.before, jnp.int32)
        return replace(self._base.entries(), length=length)

    def reserve(self, slots: int) -> None:
        """Make room for so many entries of each sample. The capacity is one of few sizes, each of
        which is compiled for once: of a film, what it needs, or half as much again as it had; of
        what stands behind a base, `OWN_SLOTS` or a multiple.

        Raises: VisualMemoryError if the device has no room; all stays as it was.
        """
        capacity = 0 if self.memory is None else self.memory.capacity
        if slots <= capacity:
            return
        if self._base is None:
            wanted = round_up(max(slots, capacity * 3 // 2), 16)
        else:
            least = OWN_SLOTS if len(self.lengths) == 1 else OWN_SLOTS_OF_MANY
            wanted = least * round_up(-(-slots // least), 1)
        config = self.model.config
        try:
            if self.memory is None:
                self.memory = empty_memory(config, len(self.lengths), wanted)
            else:
                self.memory = jax.block_until_ready(_grown(self.memory, wanted))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            size = len(self.lengths) * wanted * entry_bytes(config) / 1e9
            raise VisualMemoryError(
                f"the device has no room for {wanted:,} entries ({size:.1f} GB): use fewer frames, "
                "a higher ratio, or int8 weights"
            ) from error

    def read(
        self, streams: Sequence[Stream], visual: Array | None = None, tokens: int = 0
    ) -> Array:
        """Put what follows into the memory; returns the logits [B, V] after it.

        streams: one for each sample, planned after `before` and its length. visual: features
        [1, V, D] of a stream with a visual block. tokens: to which they are padded; by default to
        the next multiple of `TEXT_STEP`.
        """
        shape = reduce(StreamShape.union, map(StreamShape.of, streams))
        tokens = tokens or -(-shape.tokens // TEXT_STEP) * TEXT_STEP
        # What there is room for is the memory's own: the plan's must not be compiled for.
        shape = replace(shape, tokens=tokens, memory=tokens)
        lengths = self.lengths + np.array([s.persistent for s in streams], np.int32)
        self.reserve(max(1, int(lengths.max())))
        assert self.memory is not None
        memory = replace(self.memory, length=jnp.array(self.lengths))
        batch = replace(batch_streams(streams, shape), memory=0)
        model, base = self.model, self.base
        with held_interrupts():
            logits, self.memory = read(model.graph, model.params, memory, batch, visual, base)
            self.lengths = lengths
        return logits

    def decode(
        self, logits: Array, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[np.ndarray]:
        """The next token of every sample [B], again and again, from the logits before it on.

        There has to be room for them. `lengths` is left to the caller: `decoded` of the tokens that
        were given have an entry.
        """
        assert self.memory is not None
        self.memory = replace(self.memory, length=jnp.array(self.lengths))
        steps = decode(self._step, logits, max_new_tokens, sampling)
        for before, tokens in enumerate(steps):
            self.decoded = before
            yield tokens

    def _step(self, token: Array) -> Array:
        """Put a token of every sample into the memory; returns the logits after it."""
        model, base = self.model, self.base
        assert self.memory is not None
        with held_interrupts():
            logits, self.memory = decode_step(model.graph, model.params, self.memory, token, base)
        return logits

    def read_text(self, ids: np.ndarray) -> Array:
        """Put text into the memory of the one sample; returns the logits [1, V] after it."""
        return self.read([self.plan_text(ids, 0)])

    def plan_text(self, ids: Sequence[int] | np.ndarray, sample: int) -> Stream:
        """Text that follows the entries of a sample."""
        before = self.before + int(self.lengths[sample])
        window = self.model.config.window
        return plan_stream(ids, [], window=window, ratio=None, before=before)


class Block:
    """A visual block that is being watched: its windows are put into the memory as they fill.

    features: of the window that is not full yet, [n, D]. It is in the memory as far as it goes, and
    is made anew when more frames come: nothing in it sees what is later, so that its entries stay
    the same.
    """

    def __init__(self, entries: Growing):
        self.entries, self.config = entries, entries.model.config
        self.features = jnp.zeros((0, self.config.language.width), DTYPES[self.config.dtype])
        self.start = int(entries.lengths[0])  # entries before the window that is not full
        self.ratios: list[int | None] = []  # of the windows that have begun and are not full
        self.tokens = 0  # in all windows
        self._running: deque[Array] = deque()

    def see(self, pixels: np.ndarray, seconds: np.ndarray, ratios: Ratios) -> None:
        """Take frames [F, S, S, 3] in; their full windows go into the memory."""
        per_frame, window = self.config.tokens_per_frame, self.config.window
        model, first, count = self.entries.model, self.tokens, len(pixels) * per_frame
        begin = range(-(-first // window) * window, first + count, window)
        of_windows = [ratio_at(ratios, seconds[(start - first) // per_frame]) for start in begin]
        padded = np.pad(pixels, ((0, round_up(len(pixels), 4) - len(pixels)), *[(0, 0)] * 3))
        visual = encode(model.graph, model.params, padded[None])[0]
        features = jnp.concatenate([self.features, visual[:count]])
        before = self.start, self.features, self.ratios, self.tokens
        self.features, self.ratios = features, self.ratios + of_windows
        self.tokens += count
        try:
            self._absorb_full()
        except BaseException:
            if self.start == before[0]:  # nothing of it is in the memory
                _, self.features, self.ratios, self.tokens = before
            raise

    def _absorb_full(self) -> None:
        step = self.entries.model.windows_at_once * self.config.window
        while len(self.features) >= step:
            self._absorb(step)

    def finish(self) -> None:
        """Put what is left into the memory, also a window that is not full."""
        self._absorb_full()
        if len(self.features):
            self._absorb(len(self.features))
        jax.block_until_ready(self.entries.memory)

    def _absorb(self, count: int) -> None:
        """Put the first windows into the memory; one that is not full stays here as well."""
        window = self.config.window
        ratios = self.ratios[: -(-count // window)]
        stream = plan_stream(
            [IMAGE_TOKEN],
            [count],
            window=window,
            ratio=ratios,
            before=self.entries.before + self.start,
        )
        full = count // window
        # One program for one window, one for several: what is not full is padded.
        windows = 1 if count <= window else self.entries.model.windows_at_once
        finest = min((ratio for ratio in ratios if ratio is not None), default=0)
        tokens = windows * (window + (window // finest if finest else 0))
        visual = jnp.pad(self.features[:count], ((0, windows * window - count), (0, 0)))
        # The device has one step to do while the host makes the next, and no more.
        while len(self._running) > 1:
            self._running.popleft().block_until_ready()
        held = int(self.entries.lengths[0])
        self.entries.lengths[0] = self.start
        try:
            self._running.append(self.entries.read([stream], visual[None], tokens))
        except BaseException:
            self.entries.lengths[0] = held
            raise
        kept = np.append(stream.window_memory, self.entries.before + self.entries.lengths[0])
        self.start = int(kept[full]) - self.entries.before
        self.features, self.ratios = self.features[full * window :], self.ratios[full:]


def watch_film(
    block: Block,
    film: Film,
    ratios: Ratios,
    shift: float = 0.0,
    taken: Callable[[np.ndarray], None] = lambda seconds: None,
    progress: bool = False,
) -> None:
    """Put a film into a memory, chunk by chunk, while a thread decodes the next. Ctrl-C is heard
    after each chunk.

    shift: what is added to the film's seconds. taken: called with the seconds of frames that have
    been taken in.

    Raises: MediaError where a frame cannot be decoded; VisualMemoryError if there is no room. What
        came before is in the memory, as it is after Ctrl-C.
    """
    model = block.entries.model
    config = model.config
    known = film.seconds
    if known is not None:
        needed = block.start + count_entries(config, known + shift, ratios, block)
        model.check_context(block.entries.before + needed, film.name)
        block.entries.reserve(max(1, needed))
    count = max(1, model.windows_at_once * config.window // config.tokens_per_frame)
    chunks = film.chunks(min(count, AT_ONCE))
    total = None if known is None else len(known)
    bar = progress_bar(progress, total=total, desc="watching", unit="frame")
    with bar, closing(ahead(chunks)) as decoded:
        try:
            while (chunk := next(decoded, None)) is not None:  # Ctrl-C is heard while it waits
                pixels, seconds = chunk
                with held_interrupts():
                    if known is None:
                        more = count_entries(config, seconds + shift, ratios, block)
                        model.check_context(block.entries.before + block.start + more, film.name)
                    before = block.tokens
                    try:
                        block.see(pixels, seconds + shift, ratios)
                    finally:
                        if block.tokens > before:
                            taken(seconds + shift)
                    bar.update(len(pixels))
        finally:
            with held_interrupts():
                block.finish()
    if not block.tokens:
        raise MediaError(f"{film.name}: gave no frame")


@partial(jax.jit, static_argnums=1)
def _grown(memory: Memory, capacity: int) -> Memory:
    room = [(0, 0)] * 3 + [(0, capacity - memory.capacity), (0, 0)]
    return replace(memory, keys=jnp.pad(memory.keys, room), values=jnp.pad(memory.values, room))


def check_room(entries: Growing, films: Sequence[Film], ratios: Ratios, text: int = 0) -> None:
    """See that the context and the device have room for all of some films, and make it.

    text: tokens of a question and its answer, for which the context has to have room as well.

    Raises: VisualMemoryError if they have not.
    """
    model, needed = entries.model, int(entries.lengths[0])
    for film in films:
        if film.seconds is not None:
            needed += count_entries(model.config, film.seconds, ratios)
            model.check_context(entries.before + needed, film.name)
    model.check_context(entries.before + needed + text, "the question")
    entries.reserve(max(1, needed))


def count_entries(
    config: VideoXLConfig, seconds: np.ndarray, ratios: Ratios, begun: "Block | None" = None
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


@dataclass(frozen=True)
class Watched:
    """One visual block of a memory: its name, frames, and the seconds of its first and last."""

    name: str
    is_video: bool
    frames: int
    first: float
    last: float


FORMAT = "vxl-jax memory 1"
"""What a saved memory says it is."""


class VisualMemory:
    """What a model keeps of the videos and images that it has watched, to be asked about.

    watched: its visual blocks, in order. ids: all text and blocks up to here, int32, `IMAGE_TOKEN`
    for each block. Made by `Model.watch` and `load_memory`.
    """

    def __init__(self, ids: np.ndarray, watched: Sequence[Watched] = ()):
        self.ids, self.watched = ids, list(watched)
        self._saved: _Saved | None = None
        self._entries: Growing | None = None
        self._block: Block | None = None

    @property
    def length(self) -> int:
        """Entries of the memory, of all its text and blocks."""
        if self._saved is not None:
            return self._saved.length
        return int(self.growing.lengths[0])

    def __repr__(self) -> str:
        blocks = ", ".join(f"{block.name} ({block.frames} frames)" for block in self.watched)
        return f"VisualMemory({blocks or 'nothing'}; {self.length:,} entries)"

    def extend(
        self,
        media: Media,
        *,
        frames: int | None = FRAMES,
        ratio: Ratios | Literal["model"] = "model",
        sample_fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        options: MediaOptions = DEFAULT_OPTIONS,
        new_block: bool | None = None,
        progress: bool = False,
    ) -> None:
        """Watch more: the video that was watched last goes on, or something new begins.

        The result is that of watching all of it at once: also where a window of frames is not full
        yet, which keeps the ratio that it has begun with.

        Args:
            media: one video or image, as for `Model.watch`.
            frames: as there, and so for `ratio`, `sample_fps`, `start` and `end`.
            ratio: from here on.
            sample_fps: frames a second of a file.
            start: first second of a file.
            end: last second of a file.
            options: how the pixels of a file are decoded.
            new_block: whether another video begins. By default, a file does unless it is the one
                that was watched last, and what is no file goes on. After an image, and for one, it
                always does.
            progress: show a bar.

        Raises: MediaError if it cannot be opened; PartlyWatched if it ends early;
            VisualMemoryError if there is no room. What was watched before stays usable, as it does
            after Ctrl-C.
        """
        model = self.growing.model
        ratios = model.checked_ratios(ratio)
        media = as_media(
            media, frames=frames, sample_fps=sample_fps, start=start, end=end, options=options
        )
        self.watch(open_film(media, model.config.vision.image_size), ratios, new_block, progress)

    def watch(
        self, film: Film, ratios: Ratios, new_block: bool | None = True, progress: bool = False
    ) -> None:
        """As `extend`, of a film that is open already."""
        entries = self.growing
        goes_on = bool(self.watched) and self.watched[-1].is_video and film.is_video
        if goes_on and new_block is None:
            goes_on = film.step is not None or film.name == self.watched[-1].name
        elif goes_on:
            goes_on = not new_block
        block = self._block if goes_on and self._block is not None else Block(entries)
        shift = self._shift(film, goes_on)

        def taken(seconds: np.ndarray) -> None:
            self._note(film, block, seconds)

        try:
            watch_film(block, film, ratios, shift, taken, progress)
        except MediaError as error:
            if not self.watched:
                raise
            last = self.watched[-1]
            raise PartlyWatched(
                f"{error}; what was watched can be used, of {last.name} {last.frames:,} frames, up "
                f"to second {last.last:.1f}",
                self,
            ) from error

    def _shift(self, film: Film, goes_on: bool) -> float:
        """Seconds before what goes on with the last block and counts from 0."""
        return self.watched[-1].last + film.step if goes_on and film.step else 0.0

    def _note(self, film: Film, block: Block, seconds: np.ndarray) -> None:
        """Note that frames were taken in."""
        first, last = float(seconds[0]), float(seconds[-1])
        if self._block is block:
            old = self.watched[-1]
            new = replace(old, frames=old.frames + len(seconds), last=last)
            self.watched[-1] = new
            return
        self._block = block
        self.watched.append(Watched(film.name, film.is_video, len(seconds), first, last))
        self.ids = np.append(self.ids, np.int32(IMAGE_TOKEN))

    @property
    def growing(self) -> Growing:
        """Its entries on the device.

        Raises: VisualMemoryError if it was loaded without a model, and none has taken it yet.
        """
        if self._entries is None:
            raise VisualMemoryError(
                "this memory has no model yet: use load_memory(path, model), or ask it something"
            )
        return self._entries

    def entries(self) -> Memory:
        """Keys and values on the device; `length` of them count."""
        assert self.growing.memory is not None
        return self.growing.memory

    def attach(self, model: "Model") -> None:
        """Let a model use the memory; one that was loaded is read from its file now.

        Raises: VisualMemoryError if another model has made it; CheckpointError if its file is
            damaged.
        """
        if self._saved is not None:
            self._entries, self._block = self._saved.read(model)
            self._saved = None
        elif self._entries is None:
            self._entries = Growing(model)
            self._entries.read_text(self.ids)
        elif self._entries.model is not model:
            theirs = self._entries.model.fingerprint
            check_fingerprint("this memory", theirs, model.fingerprint)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the memory to one safetensors file, with the fingerprint of its model: whole, or
        not at all.

        Raises: VisualMemoryError if there is a file already, or no room for it.
        """
        path, model = Path(path), self.growing.model
        check_free(path, overwrite)
        memory, block, length = self.entries(), self._block, self.length
        features = jnp.zeros((0, model.config.language.width)) if block is None else block.features
        about = {
            "model": model.fingerprint,
            "length": length,
            "ids": self.ids.tolist(),
            "watched": [asdict(watched) for watched in self.watched],
            "block": block and {name: getattr(block, name) for name in BLOCK_FIELDS},
        }
        layers, _, heads, _, size = memory.keys.shape

        def rows(x: Array, layer: int, head: int) -> np.ndarray:
            return np.asarray(_part(x, layer, head))[:length]

        dtype = np.dtype(memory.keys.dtype)
        stored, shape = STORED_NAME[dtype.name], (layers, heads, length, size)
        each = length * size * dtype.itemsize
        planned = []
        for name, x in (("keys", memory.keys), ("values", memory.values)):
            places = itertools.product(range(layers), range(heads))
            pieces = [Piece(each, partial(rows, x, *place)) for place in places]
            planned.append(Planned(name, stored, shape, pieces))
        rest = np.asarray(features.astype(dtype))
        planned.append(Planned("features", stored, rest.shape, [Piece(rest.nbytes, lambda: rest)]))
        needed = sum(tensor.bytes for tensor in planned)
        free = shutil.disk_usage(path.absolute().parent).free
        if needed + SPARE_BYTES > free:
            raise VisualMemoryError(
                f"{path}: {needed / 1e9:.2f} GB will be written, and the disk has "
                f"{free / 1e9:.2f} GB left; make room, or choose another disk"
            )
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            write_tensors(part, planned, {"format": FORMAT, "about": json.dumps(about)})
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


SPARE_BYTES = 2**20
"""Room on the disk beside the tensors of a memory."""


BLOCK_FIELDS = ("start", "ratios", "tokens")
"""What a saved memory notes of its last block, beside its features."""


def check_fingerprint(name: str, made_by: str, model: str) -> None:
    """See that a memory is this model's.

    Raises: VisualMemoryError.
    """
    if made_by != model:
        raise VisualMemoryError(
            f"{name}: was made by another model, or with other weights or dtypes (its fingerprint "
            f"begins with {made_by[:12]}, this one's with {model[:12]}); watch again"
        )


def check_free(path: Path, overwrite: bool) -> None:
    """See that a memory can be saved under a name.

    Raises: VisualMemoryError if there is a file already, or no directory.
    """
    if path.suffix in PICKLES:
        raise VisualMemoryError(f"{path}: {path.suffix} is a name for pickles; use another")
    if path.exists() and not overwrite:
        raise VisualMemoryError(f"{path}: exists already; choose another name, or overwrite it")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise VisualMemoryError(f"{path}: is no name of a file in a directory that there is")


@jax.jit
def _part(x: Array, layer: Any, head: Any) -> Array:
    start = (layer, 0, head, 0, 0)
    return lax.dynamic_slice(x, start, (1, 1, 1, *x.shape[3:]))[0, 0, 0]


@partial(jax.jit, donate_argnums=0)
def _put_layer(x: Array, layer: Array, index: Any) -> Array:
    return lax.dynamic_update_slice(x, layer[None, None], (index, 0, 0, 0, 0))


def load_memory(path: str | Path, model: "Model | None" = None) -> VisualMemory:
    """A memory that `VisualMemory.save` has written, for the model that has made it.

    model: reads the entries at once. Without it, they are read when a model is first asked about
    them.

    Raises: CheckpointError if the file is damaged or none of a memory; VisualMemoryError if another
        model has made it.
    """
    path = Path(path)
    saved = _Saved(path, tensors_of(path), metadata_of(path))
    with saved.damaged():
        ids = np.array(saved.about["ids"], np.int32)
        memory = VisualMemory(ids, [Watched(**watched) for watched in saved.about["watched"]])
    memory._saved = saved
    if model is not None:
        memory.attach(model)
    return memory


class _Saved:
    """A memory in a file: its tensors, and what stands in the header."""

    def __init__(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]):
        self.path, self.tensors = path, tensors
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path}: is not a saved memory ({FORMAT!r})")
        with self.damaged():
            self.about = json.loads(metadata["about"])
            self.length = int(self.about["length"])

    @contextmanager
    def damaged(self) -> Iterator[None]:
        """Whatever the header lacks, as CheckpointError."""
        try:
            yield
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError | VisualMemoryError):
                raise
            raise CheckpointError(f"{self.path}: is damaged ({error!r}); watch again") from error

    def read(self, model: "Model") -> tuple[Growing, Block | None]:
        """Its entries on the device, and its last block."""
        with self.damaged():
            check_fingerprint(str(self.path), self.about["model"], model.fingerprint)
            language = model.config.language
            shape = (language.layers, language.kv_heads, self.length, language.head_size)
            waiting = (self.tensors["features"].shape[0], language.width)
            for name, expected in (("keys", shape), ("values", shape), ("features", waiting)):
                if self.tensors[name].shape != expected:
                    raise ValueError(f"{name} has shape {self.tensors[name].shape}, not {expected}")
            entries = Growing(model)
            entries.reserve(self.length)
            entries.lengths[0] = self.length
            assert entries.memory is not None
            keys, values = entries.memory.keys, entries.memory.values
            for i in range(language.layers):
                keys = _put_layer(keys, self._layer("keys", i), i)
                values = _put_layer(values, self._layer("values", i), i)
            entries.memory = replace(entries.memory, keys=keys, values=values)
            if self.about["block"] is None:
                return entries, None
            block = Block(entries)
            block.features = jnp.array(np.array(self.tensors["features"].read()))
            for name in BLOCK_FIELDS:
                setattr(block, name, self.about["block"][name])
            return entries, block

    def _layer(self, name: str, index: int) -> Array:
        """Copied on the host: the next read overwrites the buffer, and a device may copy later."""
        return jnp.array(np.array(self.tensors[name].rows(index, index + 1).read()[0]))
