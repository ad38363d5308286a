"""Makers of the kinds of video files."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from tests.media.videos import (
    FRAMES,
    ONE_THREAD,
    RATE,
    SIDE,
    X265,
    Matrix,
    draw,
    encode,
    packets_of,
    remux,
    stored_turned,
)

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
    return film("libx265", {"x265-params": f"{X265}:{parameters}"}, **how)


def time_base(ticks: int) -> Fraction:
    return Fraction(1, ticks)


def joined(*parts: Maker) -> Maker:
    """Files written one behind the other."""

    def make(path: Path) -> None:
        data = b""
        for part in parts:
            part(path)
            data += path.read_bytes()
        path.write_bytes(data)

    return make


_CUT_AT = 7


def cut_start(path: Path, before: int = 0) -> None:
    """A transport stream recorded from the middle of a group of pictures on."""
    encode(path, options={"g": "20", "bf": "0"})
    data = path.read_bytes()
    path.write_bytes(data[packets_of(path)[_CUT_AT].start - before :])


def hevc_cut_start(path: Path) -> None:
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


def hidden_ends(path: Path) -> None:
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
                frame.sample_rate, frame.pts, frame.time_base = 16_000, 1000 * i, time_base(16_000)
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


def other_video(output: Any) -> Callable[[], None]:
    """Adds a film that is not the default one."""
    stream = output.add_stream("libx264", rate=RATE, options=ONE_THREAD)
    stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
    stream.disposition = 0

    def fill() -> None:
        for i in range(FRAMES):
            frame = _frame(draw(65535, 48, 48), "yuv420p")
            frame.pts, frame.time_base = i, time_base(RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))

    return fill


def subtitles(output: Any) -> Callable[[], None]:
    """Adds subtitles that begin before the film and end after it."""
    stream = output.add_mux_stream("subrip")

    def fill() -> None:
        for i in range(5):
            packet = av.Packet(b"so it goes")
            packet.stream, packet.time_base = stream, time_base(1000)
            packet.pts = packet.dts = 1000 * i
            packet.duration = 900
            output.mux(packet)

    return fill


def _frame(pixels: np.ndarray, pix_fmt: str) -> Any:
    return av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)


def default(stream: Any, output: Any) -> None:
    stream.disposition = Disposition.default


def shown_by(matrix: Matrix, codec: str = "libx264", **how: Any) -> Maker:
    """Stored turned or mirrored, with the display matrix that undoes it."""
    a, b, c, d = (65536 * value for value in matrix)

    def setup(stream: Any, output: Any) -> None:
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])

    def picture(number: int, width: int, height: int) -> np.ndarray:
        upright = (width, height) if matrix[0] else (height, width)
        return stored_turned(draw(number, *upright), matrix)

    return film(codec, size=(80, 64), picture=picture, setup=setup, **how)


def translucent(number: int, width: int, height: int) -> np.ndarray:
    """The left half is transparent."""
    alpha = np.full((height, width, 1), 255, np.uint8)
    alpha[:, : width // 2] = 0
    return np.concatenate([draw(number, width, height), alpha], -1)


def _aspect(ratio: Fraction) -> Callable[[Any, Any], None]:
    def setup(stream: Any, output: Any) -> None:
        stream.codec_context.sample_aspect_ratio = ratio

    return setup


def with_colours(**values: int) -> Callable[[Any, Any], None]:
    def setup(stream: Any, output: Any) -> None:
        for name, value in values.items():
            setattr(stream.codec_context, name, value)

    return setup


HALVES = range(25), range(25, 50)


_DIVX = b"\0\0\1\xb2DivX503b1393p\0"


def packed(path: Path) -> None:
    """As early encoders of DivX and Xvid wrote B frames: in the packet of the frame before.

    A packet that says that no frame follows stands where the B frame would have been.
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
        stream.time_base = time_base(RATE)
        for i, data in enumerate(stored):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.duration = stream, time_base(RATE), 1
            packet.pts = packet.dts = i
            packet.is_keyframe = packets[i][1]
            output.mux(packet)
