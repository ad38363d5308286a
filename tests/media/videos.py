"""Small video files of all kinds, made by PyAV, and what is in them.

Every frame carries its number: a code of 4 x 4 cells in the centre (bit 0 top left, row by row),
over quadrants red, green / blue, yellow. What a test expects is in the table `KINDS`, computed from
what was encoded.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

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

_X265 = "log-level=none:pools=none:frame-threads=1:keyint=12:min-keyint=12:scenecut=0:bframes=3"
_ONE_THREAD = {"threads": "1"}
_OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "10", "g": "12"},
    "libx264rgb": {"preset": "veryfast", "crf": "10", "g": "12"},
    "libx265": {"preset": "ultrafast", "crf": "10", "x265-params": _X265},
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
            codec, rate=rate, options={**_ONE_THREAD, **_OPTIONS.get(codec, {}), **(options or {})}
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


# Makers of the kinds.

Maker = Callable[[Path], Any]


def film(codec: str = "libx264", options: dict[str, str] | None = None, **how: Any) -> Maker:
    """A maker of a film; arguments of `encode`."""
    return partial(_film, codec=codec, options=options, **how)


def _film(path: Path, **how: Any) -> None:
    encode(path, **how)


def x264(parameters: str, **how: Any) -> Maker:
    """A film with parameters of x264."""
    return film("libx264", {"x264-params": parameters}, **how)


def x265(parameters: str, **how: Any) -> Maker:
    """A film with parameters of x265."""
    return film("libx265", {"x265-params": f"{_X265}:{parameters}"}, **how)


def _clock(ticks: int) -> Fraction:
    return Fraction(1, ticks)


def _joined(*parts: Maker) -> Maker:
    """Files written one behind the other."""

    def make(path: Path) -> None:
        data = b""
        for part in parts:
            part(path)
            data += path.read_bytes()
        path.write_bytes(data)

    return make


_CUT_AT = 7


def _cut_start(path: Path, before: int = 0) -> None:
    """A transport stream recorded from the middle of a group of pictures on."""
    encode(path, options={"g": "20", "bf": "0"})
    data = path.read_bytes()
    path.write_bytes(data[packets_of(path)[_CUT_AT].start - before :])


def _hevc_cut_start(path: Path) -> None:
    """The frames before the first key frame need others that are not there."""
    whole = path.with_suffix(".mp4")
    x265("open-gop=1")(whole)
    starts = [i for i, packet in enumerate(packets_of(whole)) if packet.is_key]
    assert min(p.number for p in packets_of(whole)[starts[2] :]) < 24  # it is open
    remux(whole, path, keep=lambda place: place >= starts[2])


def hidden_start(options: dict[str, str], frames: int, **container: str) -> Maker:
    """As `ffmpeg -ss S -c copy` and phones do: an edit list hides frames at the beginning."""

    def make(path: Path) -> None:
        whole = encode(path.with_name(f"whole_{path.stem}.mp4"), options=options)
        remux(whole, path, shift=-frames / RATE, container=container)

    return make


def _hidden_ends(path: Path) -> None:
    """The edit list also hides what comes after 0.6 seconds."""
    hidden_start({"g": "50", "bf": "2"}, 20)(path)
    data = path.read_bytes()
    place = data.index(b"elst") + 12
    assert int.from_bytes(data[place : place + 4]) == 1200  # milliseconds
    path.write_bytes(data[:place] + (600).to_bytes(4) + data[place + 4 :])


def sound(seconds: int = 2, codec: str = "aac") -> Callable[[Any], Callable[[], None]]:
    """Adds a sound stream."""

    def add(output: Any) -> Callable[[], None]:
        stream = output.add_stream(codec, rate=16_000)
        stream.layout = "mono"

        def fill() -> None:
            kind = "fltp" if codec == "aac" else "s16p" if codec == "mp3" else "s16"
            dtype = np.float32 if kind == "fltp" else np.int16
            for i in range(16 * seconds):
                quiet = np.zeros((1, 1000), dtype)
                frame = av.AudioFrame.from_ndarray(quiet, format=kind, layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 16_000, 1000 * i, _clock(16_000)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))

        return fill

    return add


def cover(output: Any) -> Callable[[], None]:
    """Adds a picture, as music has."""
    stream = output.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 128, 128, "yuvj420p"
    stream.disposition = Disposition.attached_pic

    def fill() -> None:
        output.mux(stream.encode(_frame(draw(65535, 128, 128), "yuvj420p")))
        output.mux(stream.encode(None))

    return fill


def _other_video(output: Any) -> Callable[[], None]:
    """Adds a film that is not the default one."""
    stream = output.add_stream("libx264", rate=RATE, options=_ONE_THREAD)
    stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
    stream.disposition = 0

    def fill() -> None:
        for i in range(FRAMES):
            frame = _frame(draw(65535, 48, 48), "yuv420p")
            frame.pts, frame.time_base = i, _clock(RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))

    return fill


def _subtitles(output: Any) -> Callable[[], None]:
    """Adds subtitles that begin before the film and end after it."""
    stream = output.add_mux_stream("subrip")

    def fill() -> None:
        for i in range(5):
            packet = av.Packet(b"so it goes")
            packet.stream, packet.time_base = stream, _clock(1000)
            packet.pts = packet.dts = 1000 * i
            packet.duration = 900
            output.mux(packet)

    return fill


def _frame(pixels: np.ndarray, pix_fmt: str) -> Any:
    return av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)


def _default(stream: Any, output: Any) -> None:
    stream.disposition = Disposition.default


def _shown_by(matrix: Matrix, codec: str = "libx264", **how: Any) -> Maker:
    """Stored turned or mirrored, with the display matrix that undoes it."""
    a, b, c, d = (65536 * value for value in matrix)

    def setup(stream: Any, output: Any) -> None:
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])

    def picture(number: int, width: int, height: int) -> np.ndarray:
        upright = (width, height) if matrix[0] else (height, width)
        return stored_turned(draw(number, *upright), matrix)

    return film(codec, size=(80, 64), picture=picture, setup=setup, **how)


def _translucent(number: int, width: int, height: int) -> np.ndarray:
    """The left half is transparent."""
    alpha = np.full((height, width, 1), 255, np.uint8)
    alpha[:, : width // 2] = 0
    return np.concatenate([draw(number, width, height), alpha], -1)


def _aspect(ratio: Fraction) -> Callable[[Any, Any], None]:
    def setup(stream: Any, output: Any) -> None:
        stream.codec_context.sample_aspect_ratio = ratio

    return setup


def _colours(**values: int) -> Callable[[Any, Any], None]:
    def setup(stream: Any, output: Any) -> None:
        for name, value in values.items():
            setattr(stream.codec_context, name, value)

    return setup


_HALVES = range(25), range(25, 50)
_DIVX = b"\0\0\1\xb2DivX503b1393p\0"


def _packed(path: Path) -> None:
    """As early encoders of DivX and Xvid wrote B frames: in the packet of the frame before.

    A packet that says that there is no frame stands where the B frame would have been.
    """
    source = encode(
        path.with_suffix(".mkv"),
        "mpeg4",
        {"bf": "1", "flags": "+qscale+bitexact", "b_strategy": "0"},
    )
    with av.open(str(source)) as file:
        packets = [(bytes(p), p.is_keyframe, p.pts, p.dts) for p in file.demux(video=0) if p.size]
        header = file.streams.video[0].codec_context.extradata
        assert header is not None
        header = header.rstrip(b"\0")
    stored: list[bytes] = []
    for i, (data, is_key, pts, _) in enumerate(packets):
        is_b = i > 0 and pts < packets[i - 1][2]
        if is_key:
            data = header + (_DIVX if not stored else b"") + data
        if is_b:
            stored[-1] += data
            data = b"\0\0\1\xb6" + bytes([0b01_0_1_0000, 0b0_1_0_11111])  # not coded
        stored.append(data)
    assert sum(len(data) < 10 for data in stored) > 10
    with av.open(str(path), "w") as output:
        stream = output.add_mux_stream("mpeg4", rate=RATE, width=SIDE, height=SIDE)
        stream.time_base = _clock(RATE)
        for i, data in enumerate(stored):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.duration = stream, _clock(RATE), 1
            packet.pts = packet.dts = i
            packet.is_keyframe = packets[i][1]
            output.mux(packet)


# The kinds.


@dataclass(frozen=True)
class Kind:
    """A kind of video file.

    name: of the file. numbers: of its frames in the order in which they are shown. seconds: when
    each is shown, None for 1 / fps apart. fps: None where it is not constant. end: second at which
    the last frame ends; None where the container does not say. corners: see `corners_of`.
    """

    name: str
    make: Maker = field(repr=False)
    numbers: Sequence[int] = range(FRAMES)
    seconds: Sequence[float] | None = None
    fps: float | None = RATE
    end: float | None = None
    corners: str = "RGBY"

    @property
    def times(self) -> np.ndarray:
        """The second of each frame, float64 [F]."""
        if self.seconds is not None:
            return np.array(self.seconds, np.float64)
        assert self.fps is not None
        return np.arange(len(self.numbers)) / self.fps

    @property
    def duration(self) -> float | None:
        """Second at which the last frame ends, if it is known."""
        if self.end is not None or self.fps is None:
            return self.end
        return float(self.times.max()) + 1 / self.fps


_AAC, _MP2 = 1024 / 16_000, 481 / 16_000
"""Seconds by which these encoders of sound begin before the sound does."""
_EVEN = tuple(i / RATE for i in range(FRAMES))
_GAP = tuple(i / RATE + 10 * (i > 24) for i in range(FRAMES))
_OPEN = "keyint=12:min-keyint=12:open-gop=1:bframes=3:scenecut=0:b-adapt=0"
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
_LIVE = {"live": "1"}
_LAST_LATE = [*range(49), 49 + 30 * RATE]


_TABLE = (
    # Containers of H.264.
    Kind("plain.mp4", film()),
    Kind("faststart.mp4", film(container={"movflags": "faststart"})),
    Kind("fragmented.mp4", film(container=_FRAGMENTS)),
    Kind("fragment_each.mp4", film(container={"movflags": "frag_every_frame+empty_moov"})),
    Kind("fragment_dash.mp4", film(container={"movflags": "dash+global_sidx+frag_keyframe"})),
    Kind("fragment_first.mp4", film(container={"movflags": "frag_keyframe"})),
    Kind("hybrid.mp4", film(container={"movflags": "hybrid_fragmented"})),
    Kind("plain.mov", film()),
    Kind("plain.mkv", film()),
    Kind("pipe.mkv", film(is_piped=True)),
    Kind("plain.flv", film()),
    Kind("pipe.flv", film(is_piped=True)),
    Kind("h264.avi", film()),
    Kind("plain.nut", film()),
    Kind("plain.h264", film()),
    Kind("wrong_mp4.avi", film(muxer="mp4")),
    Kind("wrong_mp4.jpg", film(muxer="mp4")),
    Kind("no_suffix", film(muxer="mp4")),
    Kind("wrong_ts.mp4", film(muxer="mpegts")),
    # Transport streams.
    Kind("plain.ts", film()),
    Kind("start10.ts", film(container={"output_ts_offset": "10"})),
    Kind("wrap.ts", film(container={"output_ts_offset": "95442.7"})),
    Kind("camera.m2ts", film(container={"mpegts_m2ts_mode": "1"})),
    Kind(
        "long_group.ts",
        film(options={"g": "170", "bf": "3"}, size=(32, 32), numbers=range(200)),
        range(200),
    ),
    Kind("cut_start.ts", _cut_start, range(20, 50), [i / RATE for i in range(13, 43)]),
    Kind(
        "cut_start_odd.ts",
        partial(_cut_start, before=94),  # in the middle of a packet
        range(20, 50),
        [i / RATE for i in range(13, 43)],
    ),
    Kind("cut_start_open.ts", _hevc_cut_start, range(24, 50)),
    Kind(
        "joined.ts",
        _joined(*(film(numbers=half) for half in _HALVES)),
        seconds=[*_EVEN[:25], *_EVEN[:25]],
        fps=None,
    ),
    Kind(
        "size_changes.ts",
        _joined(
            film(numbers=_HALVES[0], container={"output_ts_offset": "1"}),
            film(numbers=_HALVES[1], size=(96, 64), container={"output_ts_offset": "2"}),
        ),
    ),
    Kind("one_frame.ts", film(numbers=[9]), [9], seconds=[0], fps=None),
    Kind("sound.ts", film(after=sound()), seconds=[_AAC + t for t in _EVEN]),
    Kind("mpeg2.ts", film("mpeg2video", {"bf": "2"})),
    # Other containers and codecs.
    Kind("mpeg1.mpg", film("mpeg1video", {"bf": "2"})),
    Kind("mpeg2.mpg", film("mpeg2video", {"bf": "2"}, muxer="vob")),
    Kind("mpeg2_plain.mpg", film("mpeg2video", {"bf": "0"}, muxer="svcd")),
    Kind(
        "dvd.vob",
        film("mpeg2video", {"bf": "2"}, after=sound(codec="mp2")),
        seconds=[_MP2 + t for t in _EVEN],
    ),
    Kind("mpeg1.m1v", film("mpeg1video", {"bf": "2"}, muxer="mpeg1video")),
    Kind("wmv2.wmv", film("wmv2")),
    Kind("wmv1.asf", film("wmv1")),
    Kind("h263.3gp", film("h263", size=(128, 96))),
    Kind("flv1.flv", film("flv")),
    Kind("mpeg4.avi", film("mpeg4")),
    Kind("mpeg4_b.avi", film("mpeg4", {"bf": "2"})),
    Kind("packed_b.avi", _packed),
    Kind("mpeg4_b.mp4", film("mpeg4", {"bf": "2"})),
    Kind("mjpeg.avi", film("mjpeg", pix_fmt="yuvj420p")),
    Kind("raw.avi", film("rawvideo", pix_fmt="bgr24")),
    Kind("raw.mov", film("rawvideo", pix_fmt="uyvy422")),
    Kind("vp8.webm", film("libvpx")),
    Kind("vp8.ogv", film("libvpx", muxer="ogg")),
    Kind("vp9.webm", film("libvpx-vp9")),
    Kind("vp9_altref.webm", film("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16"})),
    Kind("vp9.ivf", film("libvpx-vp9")),
    Kind("live.webm", film("libvpx", container=_LIVE, is_piped=True)),
    Kind("hevc.mp4", x265("open-gop=0")),
    Kind("hevc_open.mp4", x265("open-gop=1")),
    Kind("hevc_open.ts", x265("open-gop=1")),
    Kind("hevc10.mp4", x265("open-gop=1", pix_fmt="yuv420p10le")),
    Kind("hevc.mkv", x265("open-gop=1")),
    Kind("av1.mp4", film("libsvtav1")),
    Kind("av1.webm", film("libsvtav1", muxer="webm")),
    Kind("prores.mov", film("prores_ks", pix_fmt="yuv422p10le")),
    Kind("prores_alpha.mov", film("prores_ks", pix_fmt="yuva444p10le", picture=_translucent)),
    Kind("qtrle.mov", film("qtrle", pix_fmt="rgb24")),
    Kind("png.mov", film("png", pix_fmt="rgb24")),
    Kind("ffv1.mkv", film("ffv1")),
    Kind("mpeg2.mxf", film("mpeg2video", {"bf": "2"})),
    Kind("hevc.hevc", x265("open-gop=1", muxer="hevc")),
    Kind("mpeg2.m2v", film("mpeg2video", {"bf": "2"}, muxer="mpeg2video")),
    Kind("mpeg4.m4v", film("mpeg4", {"bf": "2"}, muxer="m4v")),
    Kind("raw.y4m", film("wrapped_avframe", muxer="yuv4mpegpipe")),
    Kind("av1.obu", film("libsvtav1")),
    Kind("vp9.mp4", film("libvpx-vp9")),
    Kind("mpeg2.wtv", film("mpeg2video", {"bf": "2"}, muxer="wtv")),
    Kind("interlaced.mp4", x264("tff=1")),
    Kind("interlaced.ts", x264("tff=1")),
    # Groups of pictures.
    Kind("open_group.mp4", x264(_OPEN)),
    Kind("open_group.mkv", x264(_OPEN)),
    Kind("open_group.ts", x264(_OPEN)),
    Kind("intra_refresh.mp4", x264("intra-refresh=1:keyint=12:bframes=0")),
    Kind("intra_refresh.mkv", x264("intra-refresh=1:keyint=12:bframes=0")),
    Kind("pyramid.mp4", x264("bframes=7:b-pyramid=normal:b-adapt=0:keyint=30")),
    Kind(
        "long_group.mp4",
        film(options={"g": "1000"}, size=(32, 32), numbers=range(1000)),
        range(1000),
    ),
    Kind("no_b.mp4", film(options={"bf": "0"})),
    Kind("one_frame.mp4", film(numbers=[9]), [9]),
    Kind("one_frame.webm", film("libvpx", numbers=[9]), [9]),
    Kind("two_frames.mp4", film(numbers=[8, 9]), [8, 9]),
    # Pixels.
    Kind("yuv422.mp4", film(pix_fmt="yuv422p")),
    Kind("yuv444.mp4", film(pix_fmt="yuv444p")),
    Kind("yuv422_10.mp4", film(pix_fmt="yuv422p10le")),
    Kind("full_range.mp4", film(pix_fmt="yuvj420p", setup=_colours(color_range=2))),
    Kind("grey.mp4", film(pix_fmt="gray"), corners="rgby"),
    Kind("grey.mkv", film("ffv1", pix_fmt="gray"), corners="rgby"),
    Kind("grey16.mkv", film("ffv1", pix_fmt="gray16le"), corners="rgby"),
    Kind("rgb.mp4", film("libx264rgb", pix_fmt="rgb24")),
    Kind("odd.mp4", film(pix_fmt="yuv444p", size=(171, 95))),
    Kind("odd.webm", film("libvpx", size=(171, 95))),
    Kind("odd.avi", film("mpeg4", size=(171, 95))),
    Kind("tiny.mp4", film(options={"crf": "1"}, size=(16, 16))),
    Kind("wide.mp4", film(size=(4096, 64), numbers=[8, 9]), [8, 9]),
    Kind("tall.mp4", film(size=(64, 4096), numbers=[8, 9]), [8, 9]),
    Kind("alpha_vp9.webm", film("libvpx-vp9", pix_fmt="yuva420p", picture=_translucent)),
    Kind("alpha_qtrle.mov", film("qtrle", pix_fmt="argb", picture=_translucent)),
    # Times.
    Kind("fps_tenth.mp4", film(rate=Fraction(1, 10), numbers=range(12)), range(12), fps=0.1),
    Kind("fps_1.mp4", film(rate=1, numbers=range(12)), range(12), fps=1),
    Kind("fps_29.mp4", film(rate=Fraction(30_000, 1001)), fps=30_000 / 1001),
    Kind("fps_29.mkv", film(rate=Fraction(30_000, 1001)), fps=30_000 / 1001),
    Kind("fps_120.mp4", film(rate=120), fps=120),
    Kind("fps_240.mp4", film(rate=240), fps=240),
    Kind("gap.mp4", film(times=[round(RATE * t) for t in _GAP]), seconds=_GAP, fps=None, end=12),
    Kind("gap.mkv", film(times=[round(RATE * t) for t in _GAP]), seconds=_GAP, fps=None, end=12),
    Kind(
        "accelerates.mp4",
        film(times=[i * i for i in range(FRAMES)], clock=_clock(250)),
        seconds=[0.004 * i * i for i in range(FRAMES)],
        fps=None,
        end=9.644,
    ),
    Kind(
        "last_late.mp4",
        film(times=_LAST_LATE),
        seconds=[t / RATE for t in _LAST_LATE],
        fps=None,
        end=32,
    ),
    Kind("start10.mkv", film(times=range(250, 300))),
    Kind("start10.mp4", film(times=range(250, 300), container={"use_editlist": "0"})),
    Kind("hidden_start.mp4", hidden_start({"g": "50", "bf": "2"}, 20), range(20, 50)),
    Kind("hidden_start.mov", hidden_start({"g": "10"}, 23), range(23, 50)),
    Kind("hidden_open.mp4", hidden_start({"x264-params": _OPEN}, 23), range(23, 50)),
    Kind("hidden_ends.mp4", _hidden_ends, range(20, 35)),
    Kind(
        "late_start.mp4",
        film(times=range(75, 125), before=sound(6)),
        seconds=[3 + t for t in _EVEN],
    ),
    Kind(
        "late_start.mkv",
        film(times=range(75, 125), before=sound(6)),
        seconds=[3 + t for t in _EVEN],
    ),
    # Turned and mirrored.
    Kind("turned_90.mp4", _shown_by((0, 1, -1, 0))),
    Kind("turned_180.mp4", _shown_by((-1, 0, 0, -1))),
    Kind("turned_270.mp4", _shown_by((0, -1, 1, 0))),
    Kind("turned_90.mov", _shown_by((0, 1, -1, 0), "libx265", pix_fmt="yuv420p10le")),
    Kind("turned_90.mkv", _shown_by((0, 1, -1, 0))),
    Kind("mirrored_x.mp4", _shown_by((-1, 0, 0, 1))),
    Kind("mirrored_y.mp4", _shown_by((1, 0, 0, -1))),
    Kind("mirrored_main.mp4", _shown_by((0, 1, 1, 0))),
    Kind("mirrored_anti.mp4", _shown_by((0, -1, -1, 0))),
    # Several streams.
    Kind("sound_first.mp4", film(before=sound())),
    Kind("sound_first.mkv", film(before=sound())),
    Kind("sound_longer.mp4", film(after=sound(5))),
    Kind("cover_first.mp4", film(before=cover)),
    Kind("cover.mkv", film(after=cover)),
    Kind("second_is_default.mkv", film(before=_other_video, setup=_default)),
    Kind("subtitles.mkv", film(before=_subtitles, after=sound())),
)
KINDS = {kind.name: kind for kind in _TABLE}
assert len(KINDS) == len(_TABLE)

_folder = tempfile.TemporaryDirectory(prefix="vxl_jax_videos_")


@cache
def made(name: str) -> Path:
    """The file of a kind. It is made once, and no test may change it."""
    path = Path(_folder.name) / name
    KINDS[name].make(path)
    return path
