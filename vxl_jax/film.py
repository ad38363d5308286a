"""What is watched, as chunks of pixels: a thread decodes the next while the device works on one.

No more than a few chunks stand in memory, whatever the length of the film.
"""

import math
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vxl_jax.media import (
    FrameFolder,
    MediaError,
    Sampling,
    VideoFile,
    choose_frames,
    grid_pinpoints,
    load_image,
    resize_and_crop,
    tile_image,
)
from vxl_jax.media.truncated_mp4 import readable

Chunk = tuple[np.ndarray, np.ndarray]
"""Pixels [F, S, S, 3] (uint8, or floats that are normalised) and the second of each frame [F]."""

PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Suffixes of files that are one picture; all other files are videos."""

FRAMES = 128
"""Frames of a video file, unless told: what the published evaluations take."""

AT_ONCE = 256
"""Most frames that are decoded at a stretch. Each stretch begins at a key frame."""

THREADS = 16
"""Most threads that decode and resize one video."""


@dataclass(frozen=True)
class Video:
    """A video, or a part of one.

    source: path of a video file, or of a folder of pictures in the order of their names; pictures
        [F, H, W, 3] uint8, or [F, S, S, 3] floats that are normalised for the tower already; or
        anything that gives pictures [H, W, 3] one by one, a camera for example.
    frames: at most so many are taken of a file or folder, evenly from its first to its last; all
        if None. What is neither is taken whole.
    sample_fps: frames a second that are taken of a file, where these are fewer than `frames`.
    start, end: seconds of the file between which frames are taken.
    fps: frames a second of what is no video file, 1 if it is not known. Ratios and messages go by
        seconds.
    """

    source: Any
    frames: int | None = FRAMES
    sample_fps: float | None = None
    start: float | None = None
    end: float | None = None
    fps: float = 1.0


@dataclass(frozen=True)
class Picture:
    """An image, cut into tiles: a path, a Pillow image, or pixels [H, W, 3] uint8."""

    source: Any


Media = Any
"""`Video`, `Picture`, or the source of one: paths of `PICTURE_SUFFIXES` and Pillow images are
pictures, everything else is a video."""


def as_media(media: Media, **options: Any) -> Video | Picture:
    """What it is, said. options: fields of a `Video` that is not one yet.

    Raises: ValueError if they are given for one that is.
    """
    if isinstance(media, Video | Picture):
        given = [name for name, value in options.items() if value != getattr(Video, name)]
        if given:
            raise ValueError(f"{', '.join(given)}: a {type(media).__name__} has its own")
        return media
    is_picture = isinstance(media, Image.Image) or (
        isinstance(media, str | Path) and Path(media).suffix.lower() in PICTURE_SUFFIXES
    )
    return Picture(media) if is_picture else Video(media, **options)


@dataclass(frozen=True)
class Film:
    """The frames of one visual block in order: of a video, or the tiles of an image.

    name: for messages. seconds: of each frame, None where their number is not known before they
    come. chunks: a function from a number of frames to chunks of at most so many, in order. It
    raises MediaError where a frame cannot be decoded, after all before it. step: seconds from a
    frame to the next where seconds count from the first of these frames, and not from the beginning
    of a file; else None.
    """

    name: str
    is_video: bool
    seconds: np.ndarray | None
    chunks: Callable[[int], Generator[Chunk, None, None]]
    step: float | None = None


def open_film(media: Video | Picture, size: int) -> Film:
    """Open what is to be watched.

    size: side of a frame or tile in pixels.

    Raises: MediaError if it is missing, empty or no picture or video.
    """
    if isinstance(media, Picture):
        return _picture(media.source, size)
    if not 0 < media.fps < math.inf:
        raise MediaError(f"a video of {media.fps} frames a second; fps must be more than 0")
    if isinstance(media.source, str | Path):
        return _video_file(media, size)
    if isinstance(media.source, np.ndarray):
        return _array(media.source, media.fps, size)
    if isinstance(media.source, Iterable):
        return _live(media.source, media.fps, size)
    raise MediaError(
        f"{type(media.source).__name__}: neither a path nor pictures; see vxl_jax.Video"
    )


def _picture(source: Any, size: int) -> Film:
    name = "image"
    if isinstance(source, str | Path):
        name, source = str(source), load_image(source)
    elif not isinstance(source, Image.Image):
        source = Image.fromarray(_checked_pixels(np.asarray(source)[None])[0])
    tiles = tile_image(source, grid_pinpoints(size), size)
    seconds = np.zeros(len(tiles))

    def chunks(count: int) -> Generator[Chunk, None, None]:
        for i in range(0, len(tiles), count):
            yield tiles[i : i + count], seconds[i : i + count]

    return Film(name, False, seconds, chunks)


def _array(pixels: np.ndarray, fps: float, size: int) -> Film:
    name = f"{len(pixels)} frames"
    _checked_pixels(pixels, size)
    seconds = np.arange(len(pixels)) / fps

    def chunks(count: int) -> Generator[Chunk, None, None]:
        for i in range(0, len(pixels), count):
            some = pixels[i : i + count]
            if some.dtype == np.uint8:
                some = np.stack([resize_and_crop(frame, size) for frame in some])
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


def _live(pictures: Iterable[Any], fps: float, size: int) -> Film:
    def resized(picture: Any) -> np.ndarray:
        if isinstance(picture, str | Path):
            picture = load_image(picture)
        elif not isinstance(picture, Image.Image):
            picture = _checked_pixels(np.asarray(picture)[None])[0]
        return resize_and_crop(picture, size)

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


def _video_file(media: Video, size: int) -> Film:
    path = Path(media.source)
    with readable(path) as (whole, promised):
        file = _open(path, whole, media.fps)
    total = promised or file.frames
    most = total if media.frames is None else media.frames
    if most < 1:
        raise MediaError(f"{path}: {most} frames asked for; give at least one")
    sampling: Sampling = "uniform" if media.sample_fps is None else "capped"
    wanted = 1.0 if media.sample_fps is None else media.sample_fps
    try:
        indices = choose_frames(total, file.fps, sampling, most, wanted, media.start, media.end)
    except ValueError as error:
        raise MediaError(f"{path}: {error}") from error
    return Film(
        str(path), True, np.array(indices) / file.fps, _decoder(path, media.fps, indices, size)
    )


def _decoder(
    path: Path, fps: float, indices: Sequence[int], size: int
) -> Callable[[int], Generator[Chunk, None, None]]:
    def chunks(count: int) -> Generator[Chunk, None, None]:
        with readable(path) as (whole, promised):
            file = _open(path, whole, fps, THREADS)  # in the thread that reads it
            there = [index for index in indices if index < file.frames]
            done, stretch = 0, count
            while done < len(there):
                some = there[done : done + stretch]
                error: MediaError | None = None
                try:
                    pixels = file.read(some, size)
                except MediaError:
                    pixels, error = _before_damage(path, whole, fps, some, size)
                for i in range(0, len(pixels), count):
                    part = pixels[i : i + count]
                    yield part, np.array(there[done : done + len(part)]) / file.fps
                    done += len(part)
                if error is not None:
                    raise error
                # The first chunk comes soon, and later there are few seeks back to a key frame.
                stretch = max(count, min(2 * stretch, AT_ONCE) // count * count)
            if len(there) < len(indices):
                raise MediaError(
                    f"{path}: ends early, {file.frames} of its {promised} frames are there; "
                    "fetch it again"
                )

    return chunks


def _open(path: Path, whole: Path, fps: float, threads: int = 1) -> FrameFolder | VideoFile:
    """whole: where the video is read from; it has the name of `path` in messages."""
    if path.is_dir():
        return FrameFolder(path, fps)
    try:
        file = VideoFile(whole, threads)
    except MediaError as error:
        raise MediaError(str(error).replace(str(whole), str(path))) from error
    file.path = path
    return file


def _before_damage(
    path: Path, whole: Path, fps: float, indices: Sequence[int], size: int
) -> tuple[np.ndarray, MediaError | None]:
    """Pixels of the frames before one that cannot be decoded, and the error.

    decord's thread reads ahead, and fails for frames that stand well before the damage: each is
    tried by a reader of its own, which does not help those that stand close to it.
    """
    found = np.empty((len(indices), size, size, 3), np.uint8)
    for i, index in enumerate(indices):
        try:
            _open(path, whole, fps).read([index], size, out=found[i : i + 1])
        except MediaError as error:
            return found[:i], error
    return found, None


def ahead(chunks: Generator[Any, None, None], depth: int = 1) -> Generator[Any, None, None]:
    """The same items, made by a thread, up to `depth` of them before they are asked for.

    An error of the thread is raised after the items before it.
    """
    made: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    left = threading.Event()

    def put(kind: str, item: Any = None) -> bool:
        while not left.is_set():
            try:
                made.put((kind, item), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            with closing(chunks):
                for item in chunks:
                    if not put("item", item):
                        return
            put("end")
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=make, daemon=True)  # a camera may never give its next picture
    thread.start()
    try:
        while True:
            kind, item = made.get()
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item
    finally:
        left.set()
