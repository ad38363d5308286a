"""Animated images as videos: which frames, when, and with what pixels."""

import struct
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.media.animations import (
    FORMATS,
    PALETTE,
    SIDE,
    TRANSPARENT,
    B,
    G,
    Part,
    R,
    W,
    animated,
    apng,
    colours,
    gif,
    greys,
    numbers,
    rgba,
    with_checks,
)
from tests.media.pictures import base, noise, swapped_profile
from vxl_jax.media import MediaOptions, heartbeat
from vxl_jax.media.images.animation import Animation


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """One entry for each frame decoded."""
    heard: list[None] = []
    heartbeat.set_listener(lambda: heard.append(None))
    yield heard
    heartbeat.set_listener(heartbeat._nobody)


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


# How frames are put together.


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


def test_apng_blending(file: Path):
    """Over the picture before, or in its place."""
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
