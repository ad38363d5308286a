"""Animated images (GIF, WebP, PNG, AVIF) as videos.

The containers are read here: Pillow tells neither the times of the frames before it decodes them
nor how many of a truncated file are whole. Pillow decodes the pixels. The frames of GIF and APNG
are composed here, by their specifications: Pillow fills what they leave free or clear with colours
of the file, where browsers show the page behind. WebP and AVIF frames come composed.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vxl_jax.errors import MediaError
from vxl_jax.media.frames import Resize, fit_square
from vxl_jax.media.heartbeat import beat
from vxl_jax.media.images.folder import frames_array
from vxl_jax.media.images.loading import (
    check_size,
    clean,
    flatten,
    load_image,
    open_image,
    orientation,
    to_rgba,
    upright,
)
from vxl_jax.media.kinds import format_of
from vxl_jax.media.options import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.media.paths import check_file, printable
from vxl_jax.media.tiles import Size

# Browsers show frames of 10 ms and less, of all formats, for 0.1 s.
_SHORTEST, _DEFAULT_DELAY = 0.010, 0.1


def is_animation(path: str | Path) -> bool:
    """Return whether a file is a GIF, WebP, PNG or AVIF with more than one whole picture.

    False for a file that cannot be read: `load_image` raises the error.
    """
    try:
        check_file(path)
        return len(_content(path).delays) > 1
    except MediaError:
        return False


class Animation:
    """An animated image as a video, its frames as a browser shows them, on white.

    Frames of 10 ms and less last 0.1 s, as in browsers. An image that does not move is a video of
    one frame. For one process only.

    Attributes:
      path: the file.
      frames: number of complete frames.
      seconds: time of each frame, float64 [frames]; the first is at 0.
      duration: seconds to the end of the last frame.
      fps: average frames per second.
      truncated: description of the missing part if the file is truncated, else None.
    """

    def __init__(self, path: str | Path, options: MediaOptions = DEFAULT_OPTIONS):
        """Read the container; no frame is decoded.

        Args:
          path: the file.
          options: how pixels are decoded.

        Raises:
          MediaError: missing, not an image, too large, or cut off before its first frame ends.
        """
        self.path, self._options = Path(path), options
        check_file(path)
        content = _content(path)
        if content.pictures is None:
            open_image(path).close()  # raises the error
        elif not content.delays:
            raise MediaError(
                f"{printable(path)}: image cannot be decoded (cut off before its first frame "
                "ends); fetch it again"
            )
        self._content, self.truncated = content, content.truncated
        nanoseconds = [
            round(1e9 * (delay if delay > _SHORTEST else _DEFAULT_DELAY))
            for delay in content.delays or [_DEFAULT_DELAY]
        ]
        ends = np.cumsum(nanoseconds)
        self.frames = len(ends)
        self.seconds = np.concatenate([[0], ends[:-1]]) / 1e9
        self.duration = float(ends[-1] / 1e9)
        self.fps = round(self.frames / self.duration, 6)
        self._running: Iterator[Image.Image] | None = None
        self._at = -1  # the frame that was decoded last
        self._picture: Image.Image | None = None

    def read(
        self,
        indices: Sequence[int],
        size: int,
        out: np.ndarray | None = None,
        resize: Resize = "crop",
    ) -> np.ndarray:
        """Decode frames, each through `fit_square`.

        Decodes in order, from the last frame that was read unless an earlier one is wanted.

        Args:
          indices: frame numbers in any order, repeated ones too.
          size: side of the result in pixels.
          out: array for the result; None allocates one.
          resize: how a frame becomes a square.

        Returns:
          uint8 [F, size, size, 3].

        Raises:
          MediaError: a frame cannot be decoded, or an index is past the end.
        """
        result = frames_array(self.path, indices, self.frames, size, out)
        wanted = np.asarray(indices)
        for index in np.unique(wanted):
            result[wanted == index] = self._frame(int(index), size, resize)
        return result

    def _frame(self, index: int, size: int, resize: Resize) -> np.ndarray:
        if self._running is None or index < self._at:
            self._running = (self._content.pictures or self._still)()
            self._at, self._picture = -1, None
        try:
            while self._at < index or self._picture is None:
                self._picture = next(self._running)
                self._at += 1
                beat()
            profile = self._content.profile if self._options.color_profile else None
            picture = upright(flatten(self._picture, profile), self._content.turn)
            return fit_square(picture, size, resize)
        except MediaError:
            self._running = None
            raise
        except Exception as error:  # As in `load_image`; StopIteration if Pillow finds fewer.
            self._running = None
            raise MediaError(
                f"{printable(self.path)}: frame {self._at + 1} (of 0..{self.frames - 1}) cannot be "
                f"decoded ({clean(error) or 'damaged'}); replace the file"
            ) from error

    def _still(self) -> Iterator[Image.Image]:
        yield load_image(self.path, self._options)


@dataclass(frozen=True)
class _Content:
    """Contents of an animation's container.

    delays: seconds of each whole frame. pictures: decodes them, from the first one on; None where
    the file is an ordinary image. truncated: what is missing. turn: EXIF orientation. profile: ICC.
    """

    delays: Sequence[float] = ()
    pictures: Callable[[], Iterator[Image.Image]] | None = None
    truncated: str | None = None
    turn: int = 1
    profile: bytes | None = None


def _content(path: str | Path) -> _Content:
    """Read the container of a file. Raises: MediaError."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise MediaError(f"{printable(path)}: cannot be read ({error.strerror})") from error
    readers = {"GIF": _gif, "PNG": _png, "WEBP": _webp, "AVIF": _avif}
    reader = readers.get(format_of(data[:1024]) or "")
    return reader(path, data) if reader else _Content()


def _open(data: bytes, form: str, name: str) -> Image.Image:
    """Open a file in memory. Raises: MediaError: too large; and what Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=[form])
    check_size(image, name)
    return image


# GIF and APNG: pictures that are put on a canvas.

_KEEP, _CLEAR, _RESTORE = range(3)


@dataclass(frozen=True)
class _Frame:
    """A picture that is put on the canvas.

    size, corner: in pixels, from the left and the top. file: makes a file of this picture alone.
    over: whether the canvas shows through. after: what then becomes of its part of the canvas.
    """

    delay: float
    size: Size
    corner: Size
    file: Callable[[], bytes]
    over: bool
    after: int


def _compose(form: str, name: str, size: Size, frames: Sequence[_Frame]) -> Iterator[Image.Image]:
    """Yield the canvas (RGBA) with each frame; it is changed for the next one."""
    canvas = Image.new("RGBA", size)
    for frame in frames:
        before = canvas.copy() if frame.after == _RESTORE else canvas
        left, top = frame.corner
        box = (left, top, left + frame.size[0], top + frame.size[1])
        if min(frame.size) > 0:
            picture = to_rgba(_open(frame.file(), form, name))
            if frame.over:
                picture = Image.alpha_composite(canvas.crop(box), picture)
            canvas.paste(picture, frame.corner)
        yield canvas
        if frame.after == _CLEAR:
            canvas.paste((0, 0, 0, 0), box)
        elif frame.after == _RESTORE:
            canvas = before


def _composed(
    path: str | Path, data: bytes, form: str, frames: Sequence[_Frame], truncated: str | None
) -> _Content:
    if not frames:
        return (
            _Content(pictures=partial(iter, ()), truncated=truncated) if truncated else _Content()
        )
    with open_image(path) as image:
        size, turn = image.size, orientation(image, io.BytesIO(data))
        profile = image.info.get("icc_profile")
    pictures = partial(_compose, form, printable(path), size, frames)
    return _Content([frame.delay for frame in frames], pictures, truncated, turn, profile)


def _gif(path: str | Path, data: bytes) -> _Content:
    """GIF89a specification, sections 15 to 27."""
    frames: list[_Frame] = []
    whole = False
    try:
        at = 13 + _palette_bytes(data[10])
        palette, control, delay, after = data[13:at], b"", 0.0, _KEEP
        while not whole:
            kind = data[at]
            if kind == 0x21:  # an extension
                end = _blocks_end(data, at + 2)
                if data[at + 1] == 0xF9 and data[at + 2] >= 4:  # graphic control
                    control = data[at:end]
                    delay = int.from_bytes(control[4:6], "little") / 100
                    after = {2: _CLEAR, 3: _RESTORE}.get(control[3] >> 2 & 7, _KEEP)
                at = end
            elif kind == 0x2C:  # an image
                left, top, width, height, local = struct.unpack_from("<4HB", data, at + 1)
                end = _blocks_end(data, at + 11 + _palette_bytes(local))
                file = partial(_gif_file, data, (width, height), palette, control, at, end)
                frames.append(_Frame(delay, (width, height), (left, top), file, True, after))
                control, delay, after = b"", 0.0, _KEEP
                at = end
            else:
                whole = kind == 0x3B  # the trailer
                break
    except (IndexError, struct.error):
        pass  # the file ends
    return _composed(path, data, "GIF", frames, None if whole else "ends early")


def _palette_bytes(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _blocks_end(data: bytes, at: int) -> int:
    """Where a row of blocks ends, each with its length in front. Raises: IndexError: nowhere."""
    while length := data[at]:
        at += 1 + length
    return at + 1


def _gif_file(data: bytes, size: Size, palette: bytes, control: bytes, at: int, end: int) -> bytes:
    """A GIF of the one image whose descriptor begins at `at`."""
    screen = b"GIF89a" + struct.pack("<2H3B", *size, data[10], 0, 0)
    descriptor = struct.pack("<c4H", b",", 0, 0, *size)
    return screen + palette + control + descriptor + data[at + 9 : end] + b";"


def _png(path: str | Path, data: bytes) -> _Content:
    """PNG specification, third edition, 11.3.6 (APNG)."""
    frames: list[_Frame] = []
    promised, whole = 0, False
    header = shared = control = b""
    pixels: list[bytes] = []
    for kind, body in _chunks(data):
        if kind not in (b"IDAT", b"fdAT") and control and pixels:
            width, height, left, top, delay, unit = struct.unpack_from(">4I2H", control, 4)
            size, seconds = (width, height), delay / (unit or 100)
            file = partial(_png_file, size, header, shared, pixels)
            frames.append(_Frame(seconds, size, (left, top), file, control[25] == 1, control[24]))
            control, pixels = b"", []
        if kind == b"IHDR":
            header = body
        elif kind in (b"PLTE", b"tRNS"):
            shared += _chunk(kind, body)
        elif kind == b"acTL":
            promised = int.from_bytes(body[:4], "big")
        elif kind == b"fcTL" and len(body) == 26:
            control = body
        elif kind == b"IDAT" and not promised:
            return _Content()  # an ordinary image
        elif kind in (b"IDAT", b"fdAT") and control:  # else: what other readers show instead
            pixels.append(body[4:] if kind == b"fdAT" else body)
        elif kind == b"IEND":
            whole = True
            break
    truncated = None if whole else "ends early"
    if len(frames) < promised:
        truncated = f"ends early: {len(frames)} of its {promised} frames are there"
    return _composed(path, data, "PNG", frames, truncated)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of the whole chunks of a PNG."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            return
        yield data[at + 4 : at + 8], data[at + 8 : end]
        at = end + 4


def _chunk(kind: bytes, body: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + check


def _png_file(size: Size, header: bytes, shared: bytes, pixels: Sequence[bytes]) -> bytes:
    """A PNG of one frame. shared: the palette and the transparent colour, as chunks."""
    start = _chunk(b"IHDR", struct.pack(">2I", *size) + header[8:])
    end = _chunk(b"IDAT", b"".join(pixels)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + start + shared + end


# WebP and AVIF: pictures that Pillow composes.


def _webp(path: str | Path, data: bytes) -> _Content:
    """RFC 9649, section 2.7."""
    promised = 8 + int.from_bytes(data[4:8], "little")
    delays: list[float] = []
    at = 12
    while at + 8 <= min(promised, len(data)):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + length + length % 2
        if end > len(data):
            break
        if data[at : at + 4] == b"ANMF":
            delays.append(int.from_bytes(data[at + 20 : at + 23], "little") / 1000)
        at = end
    if not delays:
        return _Content()
    truncated = "ends early" if promised > len(data) else None
    if truncated:  # libwebp opens no file that is shorter than it says
        data = b"RIFF" + struct.pack("<I", at - 8) + data[8:at]
    return _by_pillow(path, data, "WEBP", lambda frames: delays[:frames], truncated)


def _avif(path: str | Path, data: bytes) -> _Content:
    """AV1 image file format 1.2; a truncated file is not opened by libavif."""
    return _by_pillow(path, data, "AVIF", partial(_avif_delays, data), None)


def _by_pillow(
    path: str | Path,
    data: bytes,
    form: str,
    delays: Callable[[int], Sequence[float]],
    truncated: str | None,
) -> _Content:
    """delays: seconds of each frame, from the number of frames that Pillow finds."""
    name = printable(path)
    try:
        image = _open(data, form, name)
        frames = getattr(image, "n_frames", 1)
        turn, profile = orientation(image, io.BytesIO(data)), image.info.get("icc_profile")
    except MediaError:
        raise
    except Exception:  # `open_image` raises the error
        return _Content()

    def pictures() -> Iterator[Image.Image]:
        image = _open(data, form, name)
        for index in range(frames):
            image.seek(index)
            image.load()
            yield image

    return _Content(delays(frames), pictures, truncated, turn, profile)


def _avif_delays(data: bytes, frames: int) -> Sequence[float]:
    """Seconds of each frame, from the time table (ISO/IEC 14496-12) of the first picture track."""
    delays: list[float] = []
    try:
        for start, end in _boxes(data, (b"moov", b"trak", b"mdia"), 0, len(data)):
            handler, _ = next(_boxes(data, (b"hdlr",), start, end))
            if data[handler + 8 : handler + 12] != b"pict":  # alpha has a track as well
                continue
            header, _ = next(_boxes(data, (b"mdhd",), start, end))
            (scale,) = struct.unpack_from(">I", data, header + (20 if data[header] else 12))
            table, _ = next(_boxes(data, (b"minf", b"stbl", b"stts"), start, end))
            (entries,) = struct.unpack_from(">I", data, table + 4)
            for entry in range(entries):
                if len(delays) == frames:
                    break
                count, units = struct.unpack_from(">2I", data, table + 8 + 8 * entry)
                delays += [units / scale] * min(count, frames - len(delays))
            break
    except (struct.error, StopIteration, IndexError, ZeroDivisionError):
        pass  # the decoder opened it all the same
    return delays + [delays[-1] if delays else 0.0] * (frames - len(delays))


def _boxes(data: bytes, kinds: Sequence[bytes], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where the content of boxes begins and ends; kinds: of a box, of one inside it, and so on."""
    while start + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if length == 1:
            length, head = struct.unpack_from(">Q", data, start + 8)[0], 16
        stop = min(end, start + length) if length else end
        if stop < start + head:
            return
        if kind == kinds[0]:
            if len(kinds) == 1:
                yield start + head, stop
            else:
                yield from _boxes(data, kinds[1:], start + head, stop)
        start = stop
