"""Media files to uint8 pixels: images, videos, tiles and frame choice.

NumPy, Pillow and decord only: this module runs in data worker processes, where importing JAX
would claim the accelerator. Pixels leave it as uint8 (a quarter of the bytes of float32); the
device normalises them. `normalize` is the same arithmetic in NumPy.

Sizes are (width, height) in pixels, as in Pillow; arrays are [rows, columns, RGB]. What is
computed follows the published Video-XL data code and the CLIP image processor it calls.
"""

import math
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

# Mean and standard deviation of CLIP's RGB input, on the scale 0..1 (openai/CLIP).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Size = tuple[int, int]

# Frames decoded at a stretch. For 3840 x 2160: 8 frames, and 0.6 to 0.95 GB at the process's peak,
# measured. Fewer cost time where the frames lie closer than key frames do.
_BYTES_AT_ONCE = 200_000_000
# Larger images are refused: decoding one takes 10 bytes a pixel, and a header of 74 bytes can ask
# for any number.
_MAX_PIXELS = 2**26
# Pillow knows many more, some of which start other programs (EPS).
_IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")
# FFmpeg follows what is in these to other files.
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]", b"<?xml", b"<MPD", b"v=0", b"[Reference]")
# Images longer than this many times their width are cut before they are resized: the centre crop
# takes 1/32 of the rest, and a 1 x 10000 image would otherwise become 4 GB.
_MAX_ASPECT = 32


class MediaError(ValueError):
    """A media file cannot be used. The message names the file, the fault and the remedy."""


# --- One image as tiles (anyres) -------------------------------------------------------------


def grid_pinpoints(tile: int, max_tiles: int = 49, min_tiles: int = 2) -> tuple[Size, ...]:
    """Returns the resolutions that an image may be tiled at, in the published order.

    Args:
      tile: side of a tile in pixels (336).
      max_tiles: most tiles an image may have (49 as published).
      min_tiles: fewest tiles (2 as published: even a small image gets two).

    Returns:
      All (width, height) in pixels that are multiples of `tile` with min_tiles..max_tiles tiles,
      by width, then height.
    """
    return tuple(
        (columns * tile, rows * tile)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    )


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """Returns the pinpoint that keeps most of an image's pixels, then wastes least.

    The effective area is that of the image fitted into the pinpoint with its aspect ratio kept
    (sides truncated to integers), but not more than the image has: enlarging adds nothing. The
    first of equals wins.

    Args:
      size: (width, height) of the image, both at least 1.
      pinpoints: resolutions to choose from, as `grid_pinpoints` gives them.

    Raises:
      ValueError: `pinpoints` is empty or `size` is not positive.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"an image size must be positive, got {width} x {height}")

    def gain(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[0] / width, pinpoint[1] / height)
        # At least one pixel: the published code truncates to 0 and then finds no resolution for
        # images like 1 x 20000.
        fitted = max(1, int(width * scale)) * max(1, int(height * scale))
        effective = min(fitted, width * height)
        return effective, effective - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=gain)


def tile_grid(size: Size, pinpoints: Sequence[Size], tile: int) -> Size:
    """Returns (columns, rows) of the tiles of an image, from its size alone.

    Raises:
      ValueError: `size` is not positive, or the chosen pinpoint is no multiple of `tile`.
    """
    width, height = best_resolution(size, pinpoints)
    if width % tile or height % tile:
        raise ValueError(f"pinpoint {width} x {height} is not a multiple of the tile, {tile} px")
    return width // tile, height // tile


def tile_image(image: Image.Image, pinpoints: Sequence[Size], tile: int) -> np.ndarray:
    """Cuts an image into square tiles (`anyres`).

    The image is resized (bicubic) into its best resolution with its aspect ratio kept, centred
    on black, and cut row by row. A tile has the input size of the vision tower, so that CLIP's
    own resize and crop leave it as it is.

    Returns:
      uint8 [tiles, tile, tile, 3]; tiles row-major over the grid that `tile_grid` gives.

    Raises:
      ValueError: as `tile_grid`.
    """
    columns, rows = tile_grid(image.size, pinpoints, tile)
    width, height = image.size
    scale_x, scale_y = columns * tile / width, rows * tile / height
    # Rounded up (and so never 0), where `best_resolution` rounds down: both as published.
    if scale_x < scale_y:
        fitted = (columns * tile, min(math.ceil(height * scale_x), rows * tile))
    else:
        fitted = (min(math.ceil(width * scale_y), columns * tile), rows * tile)
    canvas = Image.new("RGB", (columns * tile, rows * tile))
    corner = ((canvas.width - fitted[0]) // 2, (canvas.height - fitted[1]) // 2)
    canvas.paste(image.convert("RGB").resize(fitted, Image.Resampling.BICUBIC), corner)
    pixels = np.asarray(canvas).reshape(rows, tile, columns, tile, 3)
    return np.ascontiguousarray(pixels.swapaxes(1, 2)).reshape(-1, tile, tile, 3)


# --- One frame as a square (CLIP) ------------------------------------------------------------


def resize_and_crop(frame: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """Resizes the short side to `size` (bicubic) and crops the centre: CLIP preprocessing.

    Equal, byte for byte, to transformers' CLIP image processor before rescaling (the long side is
    truncated, the crop offset rounded down) for aspect ratios up to 32; beyond that only the
    centre of the image is resized.

    Args:
      frame: an image, or uint8 [H, W, 3].
      size: side of the result in pixels.

    Returns:
      uint8 [size, size, 3].
    """
    image = frame if isinstance(frame, Image.Image) else Image.fromarray(frame)
    image = image.convert("RGB")
    short = min(image.size)
    longest = _MAX_ASPECT * short
    if max(image.size) > longest:
        image = _centre_crop(image, (min(image.width, longest), min(image.height, longest)))
    resized = (size * image.width // short, size * image.height // short)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    return np.array(_centre_crop(image, (size, size)))


def _centre_crop(image: Image.Image, size: Size) -> Image.Image:
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def normalize(
    pixels: np.ndarray,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> np.ndarray:
    """Returns (pixels / 255 - mean) / std as float32, for uint8 pixels [..., 3]."""
    scaled = pixels.astype(np.float32) / np.float32(255)
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


# --- Which frames of a video -----------------------------------------------------------------


def uniform_indices(total_frames: int, count: int) -> list[int]:
    """Returns `count` frame indices from the first to the last frame, truncated to integers.

    Sampling at inference, as published: a video with fewer than `count` frames gives some of
    them more than once.

    Raises:
      ValueError: `total_frames` or `count` is below 1.
    """
    if total_frames < 1 or count < 1:
        raise ValueError(f"cannot choose {count} of {total_frames} frames")
    return [int(index) for index in np.linspace(0, total_frames - 1, count)]


def frame_indices(
    total_frames: int, average_fps: float, max_frames: int, fps: float = 1.0
) -> list[int]:
    """Returns the frame indices of a training video: `fps` a second, at most `max_frames`.

    One frame is taken at the start of every complete period of round(average_fps / fps) frames:
    a last, incomplete period gives none (`golden/preprocess`: 132 frames at 25 fps give 5), but a
    video always gives its first frame. Where that is more than `max_frames`, `uniform_indices`.

    Args:
      total_frames: frames in the video.
      average_fps: its frames per second.
      max_frames: most frames to take.
      fps: frames wanted per second of video; where the video has fewer, all frames are taken.

    Raises:
      ValueError: an argument is not positive.
    """
    if total_frames < 1 or max_frames < 1 or not (average_fps > 0 and fps > 0):
        raise ValueError(
            f"cannot sample {total_frames} frames at {average_fps} fps: "
            f"at most {max_frames}, {fps} a second"
        )
    step = max(1, round(average_fps / fps))
    count = max(1, total_frames // step)
    if count > max_frames:
        return uniform_indices(total_frames, max_frames)
    return [i * step for i in range(count)]


Sampling = Literal["capped", "uniform", "fps"]
"""How frames are chosen, see `choose_frames`."""


def choose_frames(
    frames: int,
    fps: float,
    sampling: Sampling,
    max_frames: int,
    wanted_fps: float = 1.0,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """Returns the frame indices of a training video or of a clip of it, in order.

    Args:
      frames: frames in the video.
      fps: its frames per second.
      sampling: `capped`: `wanted_fps` a second, and `max_frames` uniformly where that is more;
        `uniform`: `max_frames` uniformly, or all where there are fewer; `fps`: `wanted_fps` a
        second, and an error where that is more than `max_frames`.
      max_frames: most frames to take.
      wanted_fps: frames wanted per second.
      start: second of the video where the clip begins; its beginning if None.
      end: second where it ends; the video's end if None.

    Raises:
      MediaError: the clip is empty or outside the video, or `fps` gives too many frames. The
        message names no file.
    """
    first, last = _clip_range(frames, fps, start, end)
    count = last - first
    if sampling == "uniform":
        chosen = uniform_indices(count, min(max_frames, count))
    elif sampling == "capped":
        chosen = frame_indices(count, fps, max_frames, wanted_fps)
    else:
        step = max(1.0, fps / wanted_fps)  # not rounded: 10 a second of 24 are 10
        chosen = [int(i * step) for i in range(max(1, int(count / step + 1e-9)))]
    if len(chosen) > max_frames:
        raise MediaError(
            f"{len(chosen)} frames at {wanted_fps:g} a second are over max_frames {max_frames}; "
            "use a clip of it, or another sampling"
        )
    return [first + index for index in chosen]


def _clip_range(frames: int, fps: float, start: float | None, end: float | None) -> tuple[int, int]:
    """First frame of a clip and one past its last."""
    seconds = frames / fps
    begin, stop = 0.0 if start is None else start, seconds if end is None else end
    if begin >= seconds:
        raise MediaError(
            f"a clip from {begin:g} s on, but the video has {seconds:.2f} s; mend start and end"
        )
    if not 0 <= begin < stop:
        raise MediaError(f"a clip from {begin:g} s to {stop:g} s has no frames; mend start and end")
    first = min(round(begin * fps), frames - 1)
    return first, max(first + 1, min(round(stop * fps), frames))


def jitter_indices(
    indices: Sequence[int], end: int, share: float, rng: np.random.Generator
) -> list[int]:
    """Returns each frame index moved later at random, by up to `share` of the way to the next.

    Args:
      indices: rising frame indices.
      end: one past the last frame that may be taken.
      share: 0 (not at all) to 1.
      rng: where the randomness is from.
    """
    index = np.asarray(indices, np.int64)
    # The last one has as much room as the one before it.
    room = np.diff(index, append=min(end, 2 * index[-1] - index[-2]) if len(index) > 1 else end)
    return [
        int(i) for i in index + np.floor(rng.random(len(index)) * share * room).astype(np.int64)
    ]


# --- Files -----------------------------------------------------------------------------------


def resolve_media(root: str | Path, relative: str, allow_outside: bool = False) -> Path:
    """Returns the path of a sample's media file, which must lie inside `root`.

    Sample files come from elsewhere; they must not make the loader open other files. The path is
    returned with symbolic links followed. That the file exists is not checked. allow_outside:
    absolute paths, `..` and links out of `root` are followed, for sample files that one trusts.

    Raises:
      MediaError: `relative` is absolute, holds `..`, leads out of `root` through a link, or is
        no usable path.
    """
    if not isinstance(relative, str) or not relative.strip() or "\0" in relative:
        raise MediaError(f"{relative!r}: not a file name; give a path relative to {root}")
    leaves = Path(relative).is_absolute() or ".." in Path(relative).parts
    if leaves and not allow_outside:
        raise MediaError(f"{relative}: leaves the media folder; give a path relative to {root}")
    base = Path(root).resolve()
    try:
        path = (base / relative).resolve()
    except (OSError, RuntimeError, UnicodeError) as error:  # RuntimeError: links in a circle
        raise MediaError(f"{relative!r}: cannot be followed inside {root}: {error}") from error
    if not allow_outside and not path.is_relative_to(base):
        raise MediaError(f"{relative}: a link leads out of {root} to {path}; put the file inside")
    return path


def load_image(path: str | Path) -> Image.Image:
    """Reads an image as RGB, the first picture of an animation.

    As published, EXIF orientation is not applied, alpha is dropped, and 16-bit grey saturates.

    Raises:
      MediaError: missing, unreadable, truncated, empty or larger than 67 million pixels.
    """
    with _open_image(path) as image:
        try:
            return image.convert("RGB")
        except Exception as error:  # Decoders raise OSError, ValueError, SyntaxError, IndexError...
            raise MediaError(
                f"{path}: image cannot be decoded ({error}); truncated or damaged, replace it"
            ) from error


def image_size(path: str | Path) -> Size:
    """Returns (width, height) of an image in pixels from its header, without decoding it.

    Raises:
      MediaError: missing, not an image, empty or far too large.
    """
    with _open_image(path) as image:
        return image.size


def _open_image(path: str | Path) -> Image.Image:
    """Opens an image file: its header is read, its pixels are not."""
    _check_file(path)
    try:
        with warnings.catch_warnings():
            # Pillow warns of images that are refused below, and refuses those twice as large.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path}: {error}; reduce the image") from error
    except Exception as error:  # As in `load_image`; images of 0 pixels are refused here too.
        raise MediaError(f"{path}: not a readable image ({error}); replace it") from error
    if image.width * image.height > _MAX_PIXELS:
        image.close()
        raise MediaError(
            f"{path}: {image.width} x {image.height} pixels are more than {_MAX_PIXELS:,}, it may "
            "be a decompression bomb; reduce the image"
        )
    return image


@dataclass(frozen=True)
class VideoInfo:
    """What a video's container and first frame say: frames, frames per second, pixels."""

    frames: int
    fps: float
    width: int
    height: int


def probe_video(path: str | Path, num_threads: int = 1) -> VideoInfo:
    """Returns frame count, average frame rate and frame size; decodes one frame.

    Raises:
      MediaError: missing, no video, no frames, no frame rate, or damaged at its start.
    """
    video = VideoFile(path, num_threads)
    height, width, _ = _read_frames(video._reader, path, [0])[0].shape
    return VideoInfo(frames=video.frames, fps=video.fps, width=width, height=height)


def load_video_frames(
    path: str | Path, indices: Sequence[int], size: int, num_threads: int = 1
) -> np.ndarray:
    """Decodes frames of a video, each through `resize_and_crop`.

    Few frames at a time stand in memory at full size.

    Args:
      path: the video file.
      indices: frame numbers, in any order; one may stand several times.
      size: side of the result in pixels.
      num_threads: decoding threads; 1 is right in a data worker.

    Returns:
      uint8 [F, size, size, 3].

    Raises:
      MediaError: missing, no video, damaged, or an index past the end.
    """
    return VideoFile(path, num_threads).read(indices, size)


class VideoFile:
    """An open video: `frames`, `fps` (frames a second), and its pixels. For one process only."""

    def __init__(self, path: str | Path, num_threads: int = 1):
        """Reads the container. Raises: MediaError: missing, no video, no frames or frame rate.

        num_threads: that decode, and that resize.
        """
        self.path, self._reader = Path(path), _open_video(path, num_threads)
        self.num_threads = num_threads
        self.frames, self.fps = len(self._reader), float(self._reader.get_avg_fps())
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise MediaError(f"{path}: video with a frame rate of {self.fps}; encode it again")

    def read(self, indices: Sequence[int], size: int, out: np.ndarray | None = None) -> np.ndarray:
        """As `load_video_frames`; into `out` if it is given."""
        _check_indices(self._reader, self.path, indices)
        result = np.empty((len(indices), size, size, 3), np.uint8) if out is None else out

        def resize(place: int, frame: np.ndarray) -> None:
            result[place] = resize_and_crop(frame, size)

        done = 0
        with ThreadPoolExecutor(self.num_threads) as pool:
            many = pool.map if self.num_threads > 1 else map
            while done < len(indices):
                frames = _read_frames(self._reader, self.path, indices[done:])
                list(many(resize, range(done, done + len(frames)), frames))
                done += len(frames)
        return result


class FrameFolder:
    """A video as a folder of pictures in the order of their names, as `VideoFile` otherwise."""

    def __init__(self, path: str | Path, fps: float):
        """fps: frames a second that they were taken at. Raises: MediaError: none there."""
        self.path, self.fps = Path(path), fps
        try:
            names = [
                entry.name for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)
            ]
        except OSError as error:
            raise MediaError(f"{path}: cannot be read ({error.strerror})") from error
        names = [name for name in names if Path(name).suffix.lower() in PICTURES]
        if not names:
            raise MediaError(
                f"{path}: a folder without pictures ({', '.join(PICTURES)}; links are not followed)"
            )
        self._names = sorted(names, key=lambda name: (_natural(Path(name).stem), name))
        self.frames = len(names)

    def read(self, indices: Sequence[int], size: int, out: np.ndarray | None = None) -> np.ndarray:
        """As `load_video_frames`; into `out` if it is given."""
        result = np.empty((len(indices), size, size, 3), np.uint8) if out is None else out
        for i, index in enumerate(indices):
            result[i] = resize_and_crop(load_image(self.path / self._names[index]), size)
        return result


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Suffixes of the pictures in a folder of frames."""


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which 10.png comes after 9.png."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _check_file(path: str | Path) -> None:
    try:
        is_file = Path(path).is_file()
    except OSError as error:  # a folder that may not be read, a name that is too long
        raise MediaError(f"{path}: cannot be read ({error.strerror})") from error
    if not is_file:
        fault = "is not a file" if Path(path).exists() else "no such file"
        raise MediaError(f"{path}: {fault}; check the sample and the media folder")


def _open_video(path: str | Path, num_threads: int) -> Any:
    """Opens a decord reader; for one call only, since one opened before a fork hangs after it."""
    # Imported here: there are platforms without decord, and images do not need it.
    from decord import VideoReader, logging

    logging.set_level(logging.QUIET)  # FFmpeg writes a line for each damaged part of a frame
    _check_file(path)
    try:
        with open(path, "rb") as file:
            beginning = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror})") from error
    if beginning.startswith(_PLAYLISTS):
        raise MediaError(f"{path}: is a playlist of other files, not a video; replace it")
    try:
        reader = VideoReader(str(path), num_threads=num_threads)
    except Exception as error:  # decord raises RuntimeError or its own DECORDError.
        raise _video_error(path, "not a readable video", error) from error
    if len(reader) == 0:
        raise MediaError(f"{path}: video without frames; replace it")
    return reader


def _check_indices(reader: Any, path: str | Path, indices: Sequence[int]) -> None:
    if not len(indices):
        raise MediaError(f"{path}: no frames asked for; give at least one index")
    low, high = min(indices), max(indices)
    if low < 0 or high >= len(reader):
        raise MediaError(
            f"{path}: frames {low}..{high} asked for, but the video has {len(reader)} "
            f"(0..{len(reader) - 1}); choose the indices from probe_video"
        )


def _read_frames(reader: Any, path: str | Path, indices: Sequence[int]) -> list[np.ndarray]:
    """Returns frames as uint8 [H, W, 3], of the first indices: at most `_BYTES_AT_ONCE`, or one.

    decord's thread decodes on while its caller does something else, and keeps every frame
    (decord issue 208): several GB of a 3840 x 2160 video. So frames are fetched without a pause,
    one by one (`get_batch` lets it run ahead too), and a seek at the end stops the thread.
    """
    try:
        frames = []
        for index in indices:
            frame = reader[int(index)].asnumpy()
            # Rows of narrow videos are padded, and decord takes the padding for more channels.
            height, width, _ = frame.shape
            frames.append(frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3))
            if (len(frames) + 1) * frames[0].nbytes > _BYTES_AT_ONCE:
                break
        reader.seek(0)
        return frames
    except Exception as error:  # As in `_open_video`.
        raise _video_error(path, "video cannot be decoded", error) from error


def _video_error(path: str | Path, fault: str, error: Exception) -> MediaError:
    # decord appends a C++ stack trace to its message.
    reason = str(error).partition("\n")[0]
    return MediaError(f"{path}: {fault} ({reason}); truncated or damaged, replace it")
