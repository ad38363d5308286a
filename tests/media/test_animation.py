"""Animated images as videos: which frames, when, and with what pixels."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.media.test_images import base, noise, swapped_profile
from vxl_jax.errors import MediaError
from vxl_jax.media import MediaOptions, heartbeat, images
from vxl_jax.media.animation import Animation, is_animation

SIDE = 4
"""Pixels of a side of most animations here; frames that are read with it are not resized."""

FORMATS = ("GIF", "PNG", "WEBP", "AVIF")


def animated(form: str, pictures: list[Image.Image], durations: list[int], **options: Any) -> bytes:
    """An animation by Pillow. durations: milliseconds."""
    buffer = io.BytesIO()
    options |= {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(form, {})
    durations = durations if len(pictures) > 1 else durations[0]  # type: ignore[assignment]
    pictures[0].save(
        buffer, form, save_all=True, append_images=pictures[1:], duration=durations, **options
    )
    return buffer.getvalue()


def greys(count: int, side: int = SIDE) -> list[Image.Image]:
    """Picture i is grey 10 * i."""
    return [Image.new("RGB", (side, side), (10 * i,) * 3) for i in range(count)]


def numbers(pixels: np.ndarray) -> list[int]:
    """Which of `greys` these are."""
    return np.rint(pixels.mean((1, 2, 3)) / 10).astype(int).tolist()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "animation.bin"


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """One entry for each frame decoded."""
    heard: list[None] = []
    heartbeat.set_listener(lambda: heard.append(None))
    yield heard
    heartbeat.set_listener(heartbeat._nobody)


# By hand: GIF (89a) and APNG.

TRANSPARENT = 3
PALETTE = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (9, 9, 9))
W = (255, 255, 255)
R, G, B, _ = PALETTE


@dataclass
class Part:
    """A picture on the canvas. pixels: indices of `PALETTE` (GIF) or RGBA (APNG), [H, W, ...]."""

    pixels: Any
    corner: tuple[int, int] = (0, 0)
    delay: int = 10  # hundredths of a second
    after: int = 0
    over: int = 0


def gif(parts: list[Part], side: int = SIDE, transparent: int | None = TRANSPARENT) -> bytes:
    data = (
        b"GIF89a" + struct.pack("<2H3B", side, side, 0x81, 0, 0) + bytes(np.ravel(PALETTE).tolist())
    )
    for part in parts:
        height, width = np.shape(part.pixels)
        flags = part.after << 2 | (transparent is not None)
        data += b"!\xf9\x04" + struct.pack("<BHBB", flags, part.delay, transparent or 0, 0)
        data += b"," + struct.pack("<4HB", *part.corner, width, height, 0)
        data += b"\x02" + lzw([*np.ravel(part.pixels)])
    return data + b";"


def lzw(indices: list[int]) -> bytes:
    """GIF data of colours 0 to 3: codes of 3 bits, the table cleared before it grows."""
    codes = [code for i in range(0, len(indices), 2) for code in (4, *indices[i : i + 2])] + [5]
    value = sum(int(code) << 3 * i for i, code in enumerate(codes))
    packed = value.to_bytes(-(-3 * len(codes) // 8), "little")
    blocks = [packed[i : i + 255] for i in range(0, len(packed), 255)]
    return b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def chunk(kind: bytes, body: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + check


def apng(parts: list[Part], side: int = SIDE, still: np.ndarray | None = None) -> bytes:
    """still: what other readers show, where it is not the first frame."""

    def compressed(pixels: np.ndarray) -> bytes:
        return zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", side, side, 8, 6, 0, 0, 0))
    data += chunk(b"acTL", struct.pack(">2I", len(parts), 0))
    if still is not None:
        data += chunk(b"IDAT", compressed(still))
    sequence = 0
    for i, part in enumerate(parts):
        pixels = np.asarray(part.pixels, np.uint8)
        place = struct.pack(">5I", sequence, pixels.shape[1], pixels.shape[0], *part.corner)
        rest = struct.pack(">2H2B", part.delay, 100, part.after, part.over)
        data += chunk(b"fcTL", place + rest)
        sequence += 1
        content = compressed(pixels)
        if i == 0 and still is None:
            data += chunk(b"IDAT", content)
            continue
        for half in (content[: len(content) // 2], content[len(content) // 2 :]):
            data += chunk(b"fdAT", struct.pack(">I", sequence) + half)
            sequence += 1
    return data + chunk(b"IEND", b"")


# Frames and times.


@pytest.mark.parametrize("form", FORMATS)
def test_frames_and_times(file: Path, form: str):
    file.write_bytes(animated(form, greys(5), [40, 80, 120, 40, 200]))
    video = Animation(file)
    assert (video.path, video.frames, video.truncated) == (file, 5, None)
    assert video.seconds.dtype == np.float64
    np.testing.assert_allclose(video.seconds, [0, 0.04, 0.12, 0.24, 0.28], atol=1e-9)
    assert video.duration == pytest.approx(0.48, abs=1e-9)
    assert video.fps == pytest.approx(5 / 0.48, abs=1e-6)
    pixels = video.read(range(5), 6)
    assert (pixels.shape, pixels.dtype) == ((5, 6, 6, 3), np.uint8)
    assert numbers(pixels) == [0, 1, 2, 3, 4]


def test_ten_frames_a_second_are_exactly_ten(file: Path):
    """Choices of frames round down what they compute from the rate."""
    for form in FORMATS:
        file.write_bytes(animated(form, greys(7), [100] * 7))
        assert Animation(file).fps == 10
        assert Animation(file).seconds.tolist() == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.parametrize("form", FORMATS)
def test_pixels_are_those_that_were_written(file: Path, form: str):
    arrays = [noise(9, 9, 3, seed=i) // 64 * 64 for i in range(3)]  # 64 colours, for GIF
    if form == "AVIF":  # stores colours at half the size
        arrays = [array[..., :1].repeat(3, axis=-1) for array in arrays]
    file.write_bytes(animated(form, [Image.fromarray(array) for array in arrays], [50] * 3))
    pixels = Animation(file).read([0, 1, 2], 9)
    np.testing.assert_allclose(pixels.astype(int), arrays, atol=4 if form == "AVIF" else 0)


@pytest.mark.parametrize("form", FORMATS)
def test_frames_in_any_order(file: Path, form: str):
    file.write_bytes(animated(form, greys(9), [50] * 9))
    video = Animation(file)
    for indices in ([8], [0], [3, 7, 3, 1, 8], [5, 5, 5], np.array([6, 2])):
        assert numbers(video.read(indices, SIDE)) == [*indices]
    out = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    assert video.read([7, 4], SIDE, out) is out
    assert numbers(out) == [7, 4]


@pytest.mark.parametrize("form", FORMATS)
def test_frames_are_decoded_once(file: Path, form: str, beats: list[None]):
    file.write_bytes(animated(form, greys(9), [50] * 9))
    video = Animation(file)
    assert len(beats) == 0
    for indices, decoded in (([3], 4), ([4, 6], 3), ([6, 6], 0), ([8, 7], 2), ([2, 0], 3)):
        beats.clear()
        video.read(indices, SIDE)
        assert len(beats) == decoded, indices


@pytest.mark.parametrize(
    ("delay", "expected"), [(0, 0.1), (1, 0.1), (2, 0.02), (3, 0.03), (10, 0.1), (700, 7.0)]
)
def test_short_delays(file: Path, delay: int, expected: float):
    """As in browsers; FFmpeg reads what is in a GIF, unless it is 0."""
    parts = [Part(np.full((4, 4), i), delay=delay) for i in range(2)]
    file.write_bytes(gif(parts))
    assert Animation(file).seconds[1] == pytest.approx(expected)
    with av.open(str(file)) as container:
        first, second = [packet for packet in container.demux(video=0) if packet.size]
        seconds = (second.pts - first.pts) * float(first.time_base)
    assert seconds == pytest.approx(expected if delay != 1 else 0.01)
    pixels = [np.full((4, 4, 4), 255)] * 2
    file.write_bytes(apng([Part(picture, delay=delay) for picture in pixels]))
    assert Animation(file).seconds[1] == pytest.approx(expected)
    for form in ("WEBP", "AVIF"):
        file.write_bytes(animated(form, greys(2), [10 * delay] * 2))
        assert Animation(file).seconds[1] == pytest.approx(expected)


def test_units_of_an_apng_delay(file: Path):
    part = Part(np.full((4, 4, 4), 255), delay=3)
    data = apng([part, part])
    unit = struct.pack(">2H", 3, 100)
    assert data.count(unit) == 2
    for written, expected in (((3, 0), 0.03), ((1, 30), 1 / 30), ((5, 2), 2.5)):
        file.write_bytes(with_checks(data.replace(unit, struct.pack(">2H", *written))))
        assert Animation(file).seconds[1] == pytest.approx(expected)


def with_checks(data: bytes) -> bytes:
    """A PNG whose checksums fit its chunks."""
    at, result = 8, data[:8]
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        result += chunk(data[at + 4 : at + 8], data[at + 8 : end])
        at = end + 4
    return result


# How frames are put together.


def colours(rows: list[str]) -> list[list[tuple[int, ...]]]:
    return [[{"R": R, "G": G, "B": B, ".": W}[letter] for letter in row] for row in rows]


def test_gif_frames_are_put_on_white(file: Path):
    """A part of the canvas is free, and a frame has holes; both show the page."""
    file.write_bytes(
        gif([Part([[0, 3], [0, 0]], (1, 1)), Part([[3, 1, 1]]), Part([[2]], (3, 3), after=2)])
    )
    expected = [
        ["....", ".R..", ".RR.", "...."],
        [".GG.", ".R..", ".RR.", "...."],
        [".GG.", ".R..", ".RR.", "...B"],
    ]
    pixels = Animation(file).read([0, 1, 2], SIDE)
    np.testing.assert_array_equal(pixels, [colours(rows) for rows in expected])


@pytest.mark.parametrize("transparent", [TRANSPARENT, None])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_gif_disposal(file: Path, after: int, transparent: int | None):
    """What becomes of a frame when the next one comes, whether it has transparent pixels or not."""
    parts = [
        Part(np.zeros((4, 4)).astype(int)),
        Part([[1, 1], [1, 1]], (1, 1), after=after),
        Part([[2]], (0, 0)),
        Part([[2]], (3, 3)),
    ]
    file.write_bytes(gif(parts, transparent=transparent))
    middle = {0: "GG", 1: "GG", 2: "..", 3: "RR"}[after]
    expected = [
        ["RRRR", "RRRR", "RRRR", "RRRR"],
        ["RRRR", "RGGR", "RGGR", "RRRR"],
        ["BRRR", f"R{middle}R", f"R{middle}R", "RRRR"],
        ["BRRR", f"R{middle}R", f"R{middle}R", "RRRB"],
    ]
    video = Animation(file)
    pixels = video.read([0, 1, 2, 3], SIDE)
    np.testing.assert_array_equal(pixels, [colours(rows) for rows in expected])
    np.testing.assert_array_equal(video.read([1], SIDE), pixels[1:2])  # after a new start


def test_a_gif_frame_without_a_control(file: Path):
    """Delay, transparent colour and disposal are those of one frame alone."""
    control = b"!\xf9\x04" + struct.pack("<BHBB", 2 << 2 | 1, 50, TRANSPARENT, 0)
    parts = [Part([[2]], delay=50, after=2), Part([[3]], (1, 1), 50, 2), Part([[1]], (2, 2))]
    data = gif(parts)
    last = data.rindex(control)
    file.write_bytes(data[:last] + data[last + len(control) :])
    video = Animation(file)
    assert video.seconds.tolist() == [0, 0.5, 0.6]
    np.testing.assert_array_equal(video.read([1], SIDE)[0, 1, 1], PALETTE[3])
    expected = colours(["....", "....", "..G.", "...."])
    expected[1][1] = PALETTE[3]
    np.testing.assert_array_equal(video.read([2], SIDE)[0], expected)


def test_parts_of_a_gif_outside_its_canvas(file: Path):
    file.write_bytes(
        gif([Part(np.zeros((4, 4)).astype(int)), Part([[1] * 9], (2, 3)), Part([[2]], (4, 9))])
    )
    expected = colours(["RRRR", "RRRR", "RRRR", "RRGG"])
    pixels = Animation(file).read([1, 2], SIDE)
    np.testing.assert_array_equal(pixels, [expected, expected])


def rgba(colour: tuple[int, ...], alpha: int, height: int = 4, width: int = 4) -> np.ndarray:
    return np.full((height, width, 4), (*colour, alpha), np.uint8)


def test_apng_blending(file: Path):
    """Over what is there, or in its place."""
    file.write_bytes(
        apng(
            [
                Part(rgba(R, 255)),
                Part(rgba(G, 51, 1, 2), (1, 1), over=1),
                Part(rgba(B, 51, 1, 2), (1, 2), over=0),
            ]
        )
    )
    first, second, third = Animation(file).read([0, 1, 2], SIDE).astype(int)
    assert (first == R).all()
    expected = np.full((4, 4, 3), R)
    expected[1, 1:3] = np.multiply(R, 0.8) + np.multiply(G, 0.2)
    np.testing.assert_allclose(second, expected, atol=1)
    expected[2, 1:3] = np.multiply(W, 0.8) + np.multiply(B, 0.2)
    np.testing.assert_allclose(third, expected, atol=1)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_apng_disposal(file: Path, after: int):
    parts = [
        Part(rgba(R, 255)),
        Part(rgba(G, 255, 2, 2), (1, 1), after=after),
        Part(rgba(B, 255, 1, 1), (0, 0)),
    ]
    file.write_bytes(apng(parts))
    middle = {0: "GG", 1: "..", 2: "RR"}[after]
    expected = colours(["BRRR", f"R{middle}R", f"R{middle}R", "RRRR"])
    np.testing.assert_array_equal(Animation(file).read([2], SIDE)[0], expected)


def test_the_still_image_of_an_apng_is_left_out(file: Path):
    parts = [Part(rgba(G, 51), over=1), Part(rgba(B, 255))]
    file.write_bytes(apng(parts, still=rgba(R, 255)))
    video = Animation(file)
    assert video.frames == 2
    green, blue = video.read([0, 1], SIDE).astype(int)
    np.testing.assert_allclose(
        green, np.broadcast_to(np.multiply(W, 0.8) + np.multiply(G, 0.2), (4, 4, 3)), atol=1
    )
    assert (blue == B).all()


def test_a_palette_with_a_transparent_colour(file: Path):
    pictures = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        picture = Image.fromarray(np.array([order] * 4, np.uint8), "P")
        picture.putpalette([*np.ravel(PALETTE)])
        pictures.append(picture)
    file.write_bytes(animated("PNG", pictures, [50, 50], transparency=3))
    pixels = Animation(file).read([0], SIDE)[0]
    np.testing.assert_array_equal(pixels, colours(["RGB."] * 4))


def test_webp_frames_are_on_white(file: Path):
    pictures = [Image.fromarray(rgba(R, alpha)) for alpha in (0, 51, 255)]
    file.write_bytes(animated("WEBP", pictures, [50] * 3))
    pixels = Animation(file).read([0, 1, 2], SIDE).astype(int)
    for frame, share in zip(pixels, (0, 0.2, 1), strict=True):
        expected = np.multiply(R, share) + np.multiply(W, 1 - share)
        np.testing.assert_allclose(frame, np.broadcast_to(expected, (4, 4, 3)), atol=2)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])  # Pillow 13 crashes when it writes such AVIFs
def test_animations_are_upright(file: Path, form: str):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = base(32, 32)
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    file.write_bytes(animated(form, [stored, Image.new("RGB", (32, 32))], [50, 50], exif=exif))
    difference = np.abs(Animation(file).read([0], 32)[0].astype(int) - upright)
    assert difference.mean() < 5


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_profiles_of_animations(file: Path, form: str):
    stored = Image.fromarray(base(32, 32)[..., [1, 0, 2]])
    pictures = [stored, Image.new("RGB", (32, 32))]
    file.write_bytes(animated(form, pictures, [50, 50], icc_profile=swapped_profile()))
    as_stored = Animation(file).read([0], 32)[0]
    np.testing.assert_array_equal(as_stored, np.asarray(stored))
    converted = Animation(file, MediaOptions(color_profile=True)).read([0], 32)[0]
    np.testing.assert_allclose(converted, base(32, 32), atol=2)


# One picture.


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "BMP", *FORMATS])
def test_one_picture_is_one_frame(file: Path, form: str):
    Image.new("RGB", (9, 9), (70, 70, 70)).save(file, form)
    video = Animation(file)
    assert (video.frames, video.fps, video.duration) == (1, 10, 0.1)
    assert video.seconds.tolist() == [0]
    assert numbers(video.read([0, 0], 5)) == [7, 7]


def test_one_picture_with_a_delay(file: Path):
    for data in (
        gif([Part(np.ones((4, 4)).astype(int), delay=250)]),
        apng([Part(rgba(G, 255), delay=250)]),
    ):
        file.write_bytes(data)
        video = Animation(file)
        assert (video.frames, video.duration, video.fps) == (1, 2.5, 0.4)
        assert (video.read([0], SIDE) == G).all()


# What is an animation.


def several(form: str) -> bytes:
    buffer = io.BytesIO()
    first, *others = greys(3)
    first.save(buffer, form, save_all=True, append_images=others)
    return buffer.getvalue()


def test_is_animation(file: Path):
    kinds: dict[bool, list[bytes]] = {
        True: [animated(form, greys(2), [50, 50]) for form in FORMATS],
        False: [
            *(animated(form, greys(1), [50]) for form in FORMATS),
            several("TIFF"),
            several("MPO"),
            apng([Part(rgba(G, 255))]),
            apng([Part(rgba(G, 255))], still=rgba(R, 255)),
            animated("GIF", greys(2), [50, 50])[:-10],  # the second one is cut off
            animated("WEBP", greys(2), [50, 50])[:40],
            b"text",
            b"",
            b"GIF89a",
            b"\x89PNG\r\n\x1a\n",
        ],
    }
    assert not is_animation(file)  # the file does not exist
    for expected, contents in kinds.items():
        for data in contents:
            file.write_bytes(data)
            assert is_animation(file) is expected, data[:20]


# Files that are cut off.


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animations_that_are_cut_off(file: Path, form: str):
    """Whole frames are there, with their times, and the end is not."""
    arrays = [noise(8, 8, 3, seed=i) for i in range(5)]
    pictures = [Image.fromarray(array).quantize(32) for array in arrays]
    data = animated(form, pictures, [50] * 5)
    file.write_bytes(data)
    expected = Animation(file).read(range(5), 8)
    found, refused = set(), list[str]()
    for length in range(20, len(data), 7):
        file.write_bytes(data[:length])
        try:
            video = Animation(file)
        except MediaError as error:
            refused.append(str(error))
            continue
        found.add(video.frames)
        assert video.duration == pytest.approx(0.05 * video.frames)
        np.testing.assert_array_equal(video.read(range(video.frames), 8), expected[: video.frames])
        text = "ends early"
        if form == "PNG" and video.frames < 5:
            text += f": {video.frames} of its 5 frames are there"
        assert video.truncated == text
    assert found >= {1, 2, 3, 4}
    assert refused
    assert all(error.startswith(f"{file}: ") for error in refused)
    assert all(error.endswith("; fetch it again") for error in refused), refused


def test_a_gif_without_its_end(file: Path):
    data = animated("GIF", greys(5), [50] * 5)
    assert data.endswith(b";")
    file.write_bytes(data[:-1])
    video = Animation(file)
    assert (video.frames, video.truncated) == (5, "ends early")
    assert numbers(video.read(range(5), SIDE)) == [0, 1, 2, 3, 4]


def test_an_avif_that_is_cut_off(file: Path):
    """Its decoder opens no part of it."""
    file.write_bytes(animated("AVIF", greys(5), [50] * 5)[:-10])
    with pytest.raises(MediaError) as caught:
        Animation(file)
    assert str(caught.value) == f"{file}: not a readable image (AVIF, cut off); fetch it again"


# Bad files and bad indices.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no such file"),
        (b"", "is empty; fetch it again"),
        (b"text", r"not a readable image \(it begins with 'text'\)"),
        (b"GIF89a" + bytes(20), r"cut off before its first frame ends\); fetch it again"),
        (gif([Part([[0]])])[:40], r"cut off before its first frame ends\); fetch it again"),
        (apng([Part(rgba(R, 255))])[:70], r"cut off before its first frame ends\); fetch it again"),
    ],
)
def test_files_that_are_not_opened(file: Path, data: bytes | None, message: str):
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(MediaError, match=message) as caught:
        Animation(file)
    assert str(caught.value).startswith(f"{file}: ")


def damaged(form: str) -> bytes:
    """An animation of four frames whose third one cannot be decoded."""
    pictures = [Image.fromarray(noise(64, 64, 3, seed=i)).quantize(128) for i in range(4)]
    if form == "GIF":
        data = gif([Part([[0, 1, 2, i]]) for i in range(4)], transparent=None)
        third = lzw([0, 1, 2, 2])
        return data.replace(third, third[:1] + b"\xff" * (len(third) - 2) + third[-1:])
    data = bytearray(animated(form, pictures, [50] * 4))
    if form == "PNG":
        starts = [i for i in range(len(data)) if data[i : i + 4] in (b"IDAT", b"fdAT")]
        data[starts[2] + 12 : starts[2] + 60] = bytes(48)
        return with_checks(bytes(data))
    if form == "WEBP":
        starts = [i for i in range(len(data)) if data[i : i + 4] == b"ANMF"]
        start, end = starts[2] + 60, starts[3] - 8
    else:
        with av.open(io.BytesIO(data)) as container:
            *_, track = container.streams.video  # before it: the first picture as a still image
            third = [packet for packet in container.demux(track) if packet.size][2]
            start, end = third.pos, third.pos + third.size
    data[start:end] = b"\xff" * (end - start)
    return bytes(data)


@pytest.mark.parametrize("form", FORMATS)
def test_a_frame_that_cannot_be_decoded_is_named(file: Path, form: str):
    file.write_bytes(damaged(form))
    video = Animation(file)
    assert (video.frames, video.truncated) == (4, None)
    assert len(video.read([0, 1], 16)) == 2
    messages = []
    for _ in range(2):  # and again, from a new start
        with pytest.raises(MediaError) as caught:
            video.read([3], 16)
        message = str(caught.value)
        assert message.startswith(f"{file}: frame 2 (of 0..3) cannot be decoded (")
        assert message.endswith("); replace the file")
        assert "\n" not in message
        messages.append(message)
    assert messages[0] == messages[1]
    assert len(video.read([1, 0], 16)) == 2


def test_fewer_frames_than_promised(file: Path, monkeypatch: pytest.MonkeyPatch):
    file.write_bytes(animated("GIF", greys(3), [50] * 3))
    video = Animation(file)
    monkeypatch.setattr("vxl_jax.media.animation._open", lambda *_: next(iter(())))
    with pytest.raises(MediaError, match=r"frame 0 \(of 0\.\.2\) cannot be decoded"):
        video.read([1], SIDE)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "no frames asked for; give at least one index"),
        ([0, 3], "frames 0..3 asked for, but there are 3 (0..2)"),
        ([-1], "frames -1..-1 asked for, but there are 3 (0..2)"),
    ],
)
def test_indices_must_be_in_the_animation(file: Path, indices: list[int], message: str):
    file.write_bytes(animated("GIF", greys(3), [50] * 3))
    with pytest.raises(MediaError) as caught:
        Animation(file).read(indices, SIDE)
    assert str(caught.value) == f"{file}: {message}"


@pytest.mark.parametrize("form", FORMATS)
def test_larger_animations_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch, form: str):
    file.write_bytes(animated(form, greys(3), [50] * 3))
    monkeypatch.setattr(images, "_MAX_PIXELS", SIDE * SIDE)
    Animation(file).read([0, 2], SIDE)
    monkeypatch.setattr(images, "_MAX_PIXELS", SIDE * SIDE - 1)
    with pytest.raises(MediaError, match=r"4 x 4 pixels are more than 15, .*; reduce the"):
        Animation(file)


def test_a_frame_that_is_larger_than_its_canvas_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its size says nothing of what it decompresses to."""
    file.write_bytes(gif([Part([[0]]), Part(np.zeros((99, 99)).astype(int))]))
    monkeypatch.setattr(images, "_MAX_PIXELS", 98 * 98)
    video = Animation(file)
    with pytest.raises(MediaError, match="99 x 99 pixels are more than 9,604"):
        video.read([1], SIDE)


def test_tables_of_an_avif_that_are_damaged(file: Path):
    """Times are then guessed, and the pixels are right."""
    data = bytearray(animated("AVIF", greys(3), [50] * 3))
    at = data.index(b"mdhd")
    data[at + 16 : at + 20] = bytes(4)  # the time scale, of version 0
    data[at + 24 : at + 28] = bytes(4)  # or of version 1
    file.write_bytes(data)
    try:
        video = Animation(file)
    except MediaError:
        return
    assert video.seconds.tolist() == [0, 0.1, 0.2]
