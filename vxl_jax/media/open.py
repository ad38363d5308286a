"""What is watched, as chunks of pixels: the next is decoded while the device works on one.

Files are decoded in a child process, which is ended if it hangs. No more than a few chunks are in
memory at a time, however long the film is.
"""

import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from vxl_jax.errors import ArgumentError, MediaError
from vxl_jax.media.children.decoding import ImageRequest, VideoRequest, absolute, borrowed_decoder
from vxl_jax.media.frames import Resize, fit_square
from vxl_jax.media.images.folder import PICTURES
from vxl_jax.media.images.loading import load_image
from vxl_jax.media.kinds import image_format
from vxl_jax.media.options import MediaOptions
from vxl_jax.media.preprocessing import DEFAULT_PREPROCESSING, ImageTiles, Preprocessing
from vxl_jax.media.reader import FrameChoice, Selection
from vxl_jax.media.sampling import FrameTimes

Chunk = tuple[np.ndarray, np.ndarray]
"""Pixels [F, S, S, 3] (uint8, or floats that are normalised) and the second of each frame [F]."""

FrameLimit = int | None | Literal["model"]
"""How many frames of a video file are taken, see `Video.frames`."""

AT_ONCE = 256
"""Most frames that are decoded at once."""

VIDEO_THREADS = min(16, os.cpu_count() or 1)
"""Threads that decode and resize one video."""


@dataclass(frozen=True)
class Video:
    """A video, or a part of one.

    Attributes:
      source: path of a video file, or of a folder of pictures in the order of their names; pictures
        [F, H, W, 3] uint8, or [F, S, S, 3] floats that are already normalised for the tower; or an
        iterable of pictures [H, W, 3], a camera for example.
      frames: most frames of a file or folder, taken evenly from its first to its last. None takes
        every frame; "model" samples as the model was trained. Arrays and live sources are always
        read in full.
      sample_fps: frames taken from one second of a file, up to `frames`.
      start: second of the file where frames begin.
      end: second of the file where frames end.
      fps: frame rate of arrays, folders and live sources (default 1). Ratios and messages go by
        seconds.
      slow_every: every such frame is slow and the others are fast, which have fewer tokens
        (SlowFast); None: as the model was trained.
      options: how the pixels of files are decoded; None: as the model was trained.
    """

    source: Any
    frames: FrameLimit = "model"
    sample_fps: float | None = None
    start: float | None = None
    end: float | None = None
    fps: float = 1.0
    options: MediaOptions | None = None
    slow_every: int | None = None


@dataclass(frozen=True)
class Picture:
    """An image.

    Attributes:
      source: a path, a Pillow image, or pixels [H, W, 3] uint8.
      options: how the pixels of a file are decoded; None: as the model was trained.
      several: whether it is one of several images that come together, which some models see in
        another way; see `Preprocessing.pad_several`.
    """

    source: Any
    options: MediaOptions | None = None
    several: bool = False


MediaLike = Any
"""`Video`, `Picture`, or the source of one: image files, by their content, and Pillow images are
pictures; everything else is a video, animated images too."""


def as_media(media: MediaLike, **options: Any) -> Video | Picture:
    """What it is, said. options: fields of a `Video` that is not one yet.

    Raises: ArgumentError if they are given for one that is.
    """
    if isinstance(media, Video | Picture):
        given = [name for name, value in options.items() if value != getattr(Video, name)]
        if given:
            raise ArgumentError(f"{', '.join(given)}: a {type(media).__name__} has its own")
        return media
    if _is_image(media):
        return Picture(media, options.get("options"))
    return Video(media, **options)


def _is_image(source: Any) -> bool:
    if not isinstance(source, str | Path):
        return isinstance(source, Image.Image)
    if not os.path.isfile(source):  # opening it tells what is wrong
        return Path(source).suffix.lower() in PICTURES
    form = image_format(source)
    if form is None or form not in ("GIF", "PNG", "WEBP", "AVIF"):
        return form is not None
    with borrowed_decoder() as decoder:
        return not decoder.is_animation(absolute(source))


class Chunks(Protocol):
    """An iterator of `Chunk` that can be closed: a generator, for example."""

    def __iter__(self) -> Iterator[Chunk]:
        """Itself."""
        ...

    def __next__(self) -> Chunk:
        """The next chunk."""
        ...

    def close(self) -> None:
        """Leave it."""
        ...


@dataclass(frozen=True)
class Film:
    """The frames of one visual block in order: of a video, or the tiles of an image.

    Attributes:
      name: for messages.
      is_video: whether it is a video.
      seconds: of each frame; None where their number is unknown before they are read.
      chunks: function from a number of frames to chunks of at most that many, in order. It raises
        MediaError where a frame cannot be decoded, after all frames before it.
      step: seconds between frames where `seconds` count from the first frame; None where they
        count from the beginning of a file.
      begin: second at which the clip begins.
      end: second at which the video or clip ends; None: `step` after the last frame.
      image: how an image is cut; None of a video.
      slow_every: of a video, see `Video`.
    """

    name: str
    is_video: bool
    seconds: np.ndarray | None
    chunks: Callable[[int], "Chunks"]
    step: float | None = None
    begin: float = 0.0
    end: float | None = None
    image: ImageTiles | None = None
    slow_every: int | None = None

    @property
    def times(self) -> FrameTimes | None:
        """When its frames are shown; None of an image, and where it is unknown."""
        if not self.is_video or self.seconds is None:
            return None
        return self.times_of(self.seconds.tolist())

    def times_of(self, seconds: Sequence[float]) -> FrameTimes:
        """When frames at these seconds are shown."""
        after = (seconds[-1] if seconds else 0.0) + (self.step or 0.0)
        is_whole = self.seconds is None or len(seconds) == len(self.seconds)
        end = self.end if self.end is not None and is_whole else after
        return FrameTimes(tuple(seconds), self.begin, end)


def open_together(
    media: Sequence[Video | Picture], size: int, preprocessing: Preprocessing
) -> list[Film]:
    """Open videos and images that are watched one after another; arguments as for `open_film`.

    Images are told whether there are several of them.
    """
    several = sum(isinstance(item, Picture) for item in media) > 1
    return [
        open_film(
            replace(item, several=several) if isinstance(item, Picture) else item,
            size,
            preprocessing,
        )
        for item in media
    ]


def open_film(
    media: Video | Picture, size: int, preprocessing: Preprocessing = DEFAULT_PREPROCESSING
) -> Film:
    """Open a video or image for watching.

    Args:
      media: the video or image.
      size: side of a frame or tile in pixels.
      preprocessing: how it becomes pixels; that of the model that watches.

    Raises:
      MediaError: missing, empty, or neither an image nor a video.
    """
    if media.options is not None:
        preprocessing = replace(preprocessing, options=media.options)
    if isinstance(media.source, bytes):
        media = replace(media, source=os.fsdecode(media.source))
    if isinstance(media.source, str) and not media.source:
        raise MediaError("the path is empty; give the path of a file or folder")
    if isinstance(media, Picture):
        return _picture(media, size, preprocessing)
    return replace(_video(media, size, preprocessing), slow_every=media.slow_every)


def _video(media: Video, size: int, preprocessing: Preprocessing) -> Film:
    slow = media.slow_every
    if slow is not None and not (isinstance(slow, Integral) and slow >= 1):
        raise MediaError(f"slow_every is {slow!r}; it must be a whole number of at least 1")
    if not 0 < media.fps < math.inf:
        raise MediaError(f"a video of {media.fps} frames a second; fps must be more than 0")
    if isinstance(media.source, str | Path):
        return _video_file(media, size, preprocessing)
    if isinstance(media.source, np.ndarray):
        return _array(media.source, media.fps, size, preprocessing.resize)
    if isinstance(media.source, Iterable):
        return _live(media.source, media.fps, size, preprocessing)
    raise MediaError(
        f"{type(media.source).__name__}: neither a path nor pictures; see vxl_jax.Video"
    )


def _picture(media: Picture, size: int, preprocessing: Preprocessing) -> Film:
    source = media.source
    if isinstance(source, str | Path):
        return _picture_file(media, size, preprocessing)
    if not isinstance(source, Image.Image):
        source = Image.fromarray(_checked_pixels(np.asarray(source)[None])[0])
    cut = preprocessing.tiles_of(source.size, size, media.several)
    return _of_tiles("image", preprocessing.cut_tiles(source, size, media.several), cut)


def _picture_file(media: Picture, size: int, preprocessing: Preprocessing) -> Film:
    request = ImageRequest(absolute(media.source), size, preprocessing, media.several)
    with borrowed_decoder() as decoder:
        cut = decoder.tiles_of(request)
        tiles = decoder.read_tiles(request, cut.tiles)
    return _of_tiles(str(media.source), tiles, cut)


def _of_tiles(name: str, tiles: np.ndarray, cut: ImageTiles) -> Film:
    seconds = np.zeros(len(tiles))

    def chunks(count: int) -> Generator[Chunk, None, None]:
        for i in range(0, len(tiles), count):
            yield tiles[i : i + count], seconds[i : i + count]

    return Film(name, False, seconds, chunks, image=cut)


def _array(pixels: np.ndarray, fps: float, size: int, resize: Resize) -> Film:
    name = f"{len(pixels)} frames"
    _checked_pixels(pixels, size)
    seconds = np.arange(len(pixels)) / fps

    def chunks(count: int) -> Generator[Chunk, None, None]:
        for i in range(0, len(pixels), count):
            some = pixels[i : i + count]
            if some.dtype == np.uint8:
                some = np.stack([fit_square(frame, size, resize) for frame in some])
            yield some, seconds[i : i + count]

    return Film(name, True, seconds, chunks, 1 / fps)


def _checked_pixels(pixels: np.ndarray, size: int | None = None) -> np.ndarray:
    """Pictures [F, H, W, 3]; where a size is given, they may also be normalised floats."""
    given = f"an array {pixels.dtype} {list(pixels.shape)}"
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise MediaError(f"{given}: pictures are [height, width, 3], videos [F, H, W, 3]")
    normalised = size and np.issubdtype(pixels.dtype, np.floating)
    if normalised and pixels.shape[1:3] != (size, size):
        raise MediaError(f"{given}: normalised frames must be {size} x {size}; or give uint8")
    if not normalised and pixels.dtype != np.uint8:
        raise MediaError(f"{given}: pixels must be uint8 RGB")
    return pixels


def _live(pictures: Iterable[Any], fps: float, size: int, preprocessing: Preprocessing) -> Film:
    def resized(picture: Any) -> np.ndarray:
        if isinstance(picture, str | Path):
            picture = load_image(picture, preprocessing.options)
        elif not isinstance(picture, Image.Image):
            picture = _checked_pixels(np.asarray(picture)[None])[0]
        return fit_square(picture, size, preprocessing.resize)

    def chunks(count: int) -> Generator[Chunk, None, None]:
        some: list[np.ndarray] = []
        done, failed = 0, None
        each = iter(pictures)
        while failed is None:
            try:
                some.append(resized(next(each)))
            except Exception as error:  # those before it come first
                failed = error
            if some and (failed is not None or len(some) == count):
                yield np.stack(some), (done + np.arange(len(some))) / fps
                some, done = [], done + len(some)
        if not isinstance(failed, StopIteration):
            raise failed

    return Film("frames", True, None, chunks, 1 / fps)


def _video_file(media: Video, size: int, preprocessing: Preprocessing) -> Film:
    _check_numbers(media)
    choice, options = _choose(media, preprocessing), preprocessing.options
    request = VideoRequest(
        absolute(media.source), choice, media.fps, VIDEO_THREADS, options, preprocessing.resize
    )
    with borrowed_decoder() as decoder:
        selection = decoder.open_video(request)
    name = str(media.source)
    chunks = partial(_FileChunks, request, selection, size)
    return Film(name, True, selection.seconds, chunks, None, selection.begin, selection.end)


def _choose(media: Video, preprocessing: Preprocessing) -> FrameChoice:
    """Which frames of a file: those that the caller asks for, or those of training."""
    start, end = media.start, media.end
    if media.sample_fps is not None:
        most = preprocessing.max_frames if media.frames == "model" else media.frames
        return FrameChoice("capped", most, media.sample_fps, start, end)
    if media.frames == "model":
        return preprocessing.choose(start, end)
    return FrameChoice("uniform", media.frames, 1.0, start, end)


def _check_numbers(media: Video) -> None:
    """Refuses numbers that choose no frames. Raises: MediaError."""
    frames, name = media.frames, media.source
    whole = isinstance(frames, Integral) and frames >= 1
    if frames is not None and frames != "model" and not whole:
        raise MediaError(f"{name}: {frames!r} frames asked for; give at least one")
    for field in ("sample_fps", "start", "end"):
        value = getattr(media, field)
        if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
            raise MediaError(f"{name}: {field} is {value!r}; it must be a number")
    if media.sample_fps is not None and media.sample_fps <= 0:
        raise MediaError(f"{name}: sample_fps is {media.sample_fps}; it must be more than 0")


class _FileChunks:
    """Chunks of a video file, decoded in a child process."""

    def __init__(self, request: VideoRequest, selection: Selection, size: int, count: int):
        self._stopped = threading.Event()
        self._chunks = self._decode(request, selection, size, count)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def stop(self) -> None:
        """Give up what is being decoded; for any thread."""
        self._stopped.set()

    def close(self) -> None:
        """Leave it, in the thread that has used it."""
        self._chunks.close()

    def _decode(
        self, request: VideoRequest, selection: Selection, size: int, count: int
    ) -> Generator[Chunk, None, None]:
        there = [index for index in selection.indices if index < selection.there]
        with borrowed_decoder() as decoder:
            try:
                for start in range(0, len(there), count):
                    some = there[start : start + count]
                    pixels, error = decoder.read_frames(request, some, size, self._stopped.is_set)
                    if len(pixels):
                        yield pixels, selection.seconds[start : start + len(pixels)]
                    if error is not None:
                        raise error
            finally:
                decoder.forget()
        if selection.missing is not None:
            raise MediaError(f"{request.path}: {selection.missing}; fetch it again")
