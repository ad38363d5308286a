"""Small video files of all kinds, made by PyAV, and what is in them.

Every frame carries its number: a code of 4 x 4 cells in the centre (bit 0 top left, row by row),
over quadrants red, green / blue, yellow. What a test expects is in the table `KINDS`, computed from
what was encoded.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

os.environ.setdefault("SVT_LOG", "1")  # the encoder of AV1 talks

FRAMES = 50
RATE = 25
SIDE = 64

Matrix = tuple[int, int, int, int]
"""a, b, c, d of ISO/IEC 14496-12: the pixel (x, y) is shown at (ax + cy, bx + dy)."""


# Pictures.

_COLOURS = {"R": (200, 40, 40), "G": (40, 200, 40), "B": (40, 40, 200), "Y": (200, 200, 40)}
_LUMA = (0.299, 0.587, 0.114)
_WEIGHTS = 2 ** np.arange(16)


def draw(number: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """The picture of a frame, uint8 [height, width, 3]."""
    picture = np.empty((height, width, 3), np.uint8)
    rows, columns = (slice(height // 2), slice(height // 2, None)), width // 2
    for letters, part in zip(("RG", "BY"), rows, strict=True):
        picture[part, :columns] = _COLOURS[letters[0]]
        picture[part, columns:] = _COLOURS[letters[1]]
    side = min(width, height)
    cell = np.arange(side // 2) * 4 // (side // 2)
    code = 30 + 195 * (number // _WEIGHTS % 2).reshape(4, 4)
    top, left = (height - side) // 2 + side // 4, (width - side) // 2 + side // 4
    block = code[cell][:, cell].astype(np.uint8)
    picture[top : top + len(cell), left : left + len(cell)] = block[..., None]
    return picture


def number_of(picture: np.ndarray) -> int:
    """The number in a picture, uint8 [H, W, 3]; 65535 and the like where there is no code."""
    square = centre(picture).mean(-1)
    side = len(square)
    at = np.round((0.25 + (np.arange(4) + 0.5) / 8) * side - 0.5).astype(int)
    near = max(0, side // 32 - 1)
    around = [slice(place - near, place + near + 1) for place in at]
    cells = [square[rows, columns].mean() > 127 for rows in around for columns in around]
    return int((np.array(cells) * _WEIGHTS).sum())


def numbers_of(pictures: Iterable[np.ndarray]) -> list[int]:
    """The numbers in pictures."""
    return [number_of(picture) for picture in pictures]


def centre(picture: np.ndarray) -> np.ndarray:
    """The largest square in the middle."""
    height, width, _ = picture.shape
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]


def corners_of(picture: np.ndarray) -> str:
    """Colours of the corners, row by row: letters of the nearest colour, small ones for its grey.

    `?` where none is near.
    """
    square = centre(picture).astype(float)
    near = len(square) // 8
    letters = ""
    for y in (near, -near - 1):
        for x in (near, -near - 1):
            off = {
                name: np.abs(square[y, x] - colour).max() for name, colour in _all_colours().items()
            }
            best = min(off, key=lambda name: off[name])
            letters += best if off[best] < 12 else "?"
    return letters


def _all_colours() -> dict[str, Any]:
    greys = {name.lower(): [np.dot(_LUMA, colour)] * 3 for name, colour in _COLOURS.items()}
    return {**_COLOURS, **greys}


def stored_turned(picture: np.ndarray, matrix: Matrix) -> np.ndarray:
    """What has to be stored for a picture to be shown upright through a display matrix."""
    a, b, c, d = matrix
    height, width = picture.shape[:2] if a else picture.shape[1::-1]
    y, x = np.mgrid[:height, :width]
    to_x, to_y = a * x + c * y, b * x + d * y
    return picture[to_y - to_y.min(), to_x - to_x.min()]


# Files.

X265 = "log-level=none:pools=none:frame-threads=1:keyint=12:min-keyint=12:scenecut=0:bframes=3"
ONE_THREAD = {"threads": "1"}
_OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "10", "g": "12"},
    "libx264rgb": {"preset": "veryfast", "crf": "10", "g": "12"},
    "libx265": {"preset": "ultrafast", "crf": "10", "x265-params": X265},
    "libsvtav1": {"preset": "9", "crf": "5", "g": "12", "svtav1-params": "lp=1"},
    "libvpx": {"crf": "8", "b": "2M", "g": "12", "deadline": "realtime", "cpu-used": "4"},
    "libvpx-vp9": {"crf": "15", "b": "0", "g": "12", "deadline": "realtime", "cpu-used": "8"},
    "mpeg4": {"q": "2", "g": "12", "flags": "+qscale", "global_quality": "236"},
    "mpeg1video": {"flags": "+qscale", "global_quality": "236", "g": "12"},
    "mpeg2video": {"flags": "+qscale", "global_quality": "236", "g": "12"},
    "wmv1": {"flags": "+qscale", "global_quality": "236", "g": "12"},
    "wmv2": {"flags": "+qscale", "global_quality": "236", "g": "12"},
    "h263": {"flags": "+qscale", "global_quality": "236", "g": "12"},
    "flv": {"flags": "+qscale", "global_quality": "236", "g": "12"},
    "mjpeg": {"flags": "+qscale", "global_quality": "236"},
    "ffv1": {"g": "12"},
    "qtrle": {"g": "12"},
}


class _Pipe:
    """A file that cannot be sought in: what is written to it was recorded live."""

    def __init__(self) -> None:
        self.written = bytearray()

    def write(self, data: Any) -> int:
        """Appends."""
        self.written += data
        return len(data)


def encode(
    path: Path,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    *,
    numbers: Sequence[int] = range(FRAMES),
    times: Sequence[int] | None = None,
    rate: Fraction | int = RATE,
    clock: Fraction | None = None,
    size: tuple[int, int] = (SIDE, SIDE),
    pix_fmt: str = "yuv420p",
    picture: Callable[[int, int, int], np.ndarray] = draw,
    muxer: str | None = None,
    container: dict[str, str] | None = None,
    is_piped: bool = False,
    setup: Callable[[Any, Any], None] | None = None,
    before: Callable[[Any], None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> Path:
    """A film.

    numbers: of its frames. times: when each is shown, in units of `clock`, which is 1 / rate.
    size: width and height. setup: changes the stream and its codec. before, after: make other
    streams in front of it and behind it, and may return a function that fills them.
    """
    pipe = _Pipe()
    target: Any = pipe if is_piped else str(path)
    muxer = muxer or _muxer(path)
    with av.open(target, "w", format=muxer, options=container or {}) as output:
        fill = [before(output)] if before else []
        stream = output.add_stream(
            codec, rate=rate, options={**ONE_THREAD, **_OPTIONS.get(codec, {}), **(options or {})}
        )
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        clock = clock or 1 / Fraction(rate)
        stream.codec_context.time_base = clock
        if setup:
            setup(stream, output)
        fill += [after(output)] if after else []
        for add in fill:
            add()
        for i, number in enumerate(numbers):
            pixels = picture(number, *size)
            kind = "rgba" if pixels.shape[-1] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=kind)
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = times[i] if times is not None else i, clock
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    if is_piped:
        path.write_bytes(pipe.written)
    return path


def remux(
    source: Path,
    path: Path,
    *,
    shift: float = 0.0,
    keep: Callable[[int], bool] = lambda place: True,
    muxer: str | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """The packets of a film in another file, as `ffmpeg -c copy` puts them there.

    shift: seconds by which they are shown later. keep: which, by their place in the file.
    """
    with (
        av.open(str(source)) as file,
        av.open(str(path), "w", format=muxer, options=container or {}) as output,
    ):
        stream = output.add_stream_from_template(file.streams.video[0])
        for place, packet in enumerate(file.demux(video=0)):
            if packet.size and keep(place):
                ticks = round(shift / packet.time_base)
                packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
                packet.stream = stream
                output.mux(packet)
    return path


@dataclass(frozen=True)
class Packet:
    """Where a frame is in a file: its number by order of time, and the bytes of its packet.

    start: of the packet, or of the part of the file that it begins in.
    """

    number: int
    start: int
    size: int
    is_key: bool


def packets_of(path: Path) -> list[Packet]:
    """The frames of a film of one rate in the order in which they are stored."""
    with av.open(str(path)) as file:
        packets = [p for p in file.demux(video=0) if p.size]
        times = [p.dts if p.pts is None else p.pts for p in packets]
        order, found, start = sorted(times), [], 0
        for packet, time in zip(packets, times, strict=True):
            start = start if packet.pos is None else packet.pos
            found.append(Packet(order.index(time), start, packet.size, packet.is_keyframe))
    return found


def patch(path: Path, old: bytes, new: bytes) -> Path:
    """Other bytes of the same number in the one place where some stand."""
    data = path.read_bytes()
    assert data.count(old) == 1, f"{old!r} is in {path} {data.count(old)} times"
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new))
    return path


def _muxer(path: Path) -> str | None:
    """Where PyAV does not know a suffix, or writes into a pipe."""
    names = {".m2ts": "mpegts", ".mts": "mpegts", ".mkv": "matroska"}
    return names.get(path.suffix, path.suffix[1:] if path.suffix in {".webm", ".flv"} else None)
