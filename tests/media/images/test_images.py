"""Images as a viewer shows them: orientation, transparency, depth, profiles, kinds, bad files.

Files are made by Pillow or by hand; what they should look like is written out or computed with
NumPy from the format's rules.
"""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.media.pictures import (
    OPAQUE,
    assert_like,
    base,
    chunk,
    encoded,
    linear_grey_profile,
    noise,
    on_white,
    pixels,
    png,
    swapped_profile,
    tiff,
    with_orientation,
)
from vxl_jax.media import MediaOptions
from vxl_jax.media.images import loading as images
from vxl_jax.media.images.loading import image_size

# Orientation.


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_images_are_upright(file: Path, form: str, value: int):
    upright = noise(5, 7, 3)
    options = {"WEBP": {"lossless": True}}.get(form, {})
    file.write_bytes(with_orientation(upright, value, form, **options))
    np.testing.assert_array_equal(pixels(file), upright)
    assert image_size(file) == (7, 5)


@pytest.mark.parametrize("form", ["JPEG", "AVIF"])
@pytest.mark.parametrize("value", [3, 5, 6, 8])
def test_lossy_images_are_upright(file: Path, form: str, value: int):
    file.write_bytes(with_orientation(base(), value, form, quality=95))
    assert_like(file, base())


def test_orientation_behind_the_pixels_of_a_png(file: Path):
    data = with_orientation(base(), 6, "PNG")
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    file.write_bytes(data[:start] + data[end:last] + data[start:end] + data[last:])
    np.testing.assert_array_equal(pixels(file), base())


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\x01\0"])
def test_damaged_exif_is_ignored(file: Path, exif: bytes):
    file.write_bytes(encoded(Image.fromarray(base()), "PNG", exif=exif))
    np.testing.assert_array_equal(pixels(file), base())


@pytest.mark.parametrize("value", [0, 9, 300])
def test_orientations_that_do_not_exist_are_ignored(file: Path, value: int):
    exif = Image.Exif()
    exif[0x0112] = value
    file.write_bytes(encoded(Image.fromarray(base()), "PNG", exif=exif))
    np.testing.assert_array_equal(pixels(file), base())


# Transparency.


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_rgba_is_composed_on_white(file: Path, form: str):
    rgba = noise(6, 8, 4)
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    file.write_bytes(encoded(Image.fromarray(rgba), form, **options))
    np.testing.assert_allclose(pixels(file), on_white(rgba[..., :3], rgba[..., 3]), atol=1)


def test_la_is_composed_on_white(file: Path):
    la = noise(6, 8, 2)
    file.write_bytes(encoded(Image.fromarray(la, "LA"), "PNG"))
    expected = on_white(la[..., :1].repeat(3, axis=-1), la[..., 1])
    np.testing.assert_allclose(pixels(file), expected, atol=1)


def test_a_black_logo_on_nothing_is_on_white(file: Path):
    rgba = np.zeros((10, 10, 4), np.uint8)
    rgba[3:7, 3:7, 3] = 255
    file.write_bytes(encoded(Image.fromarray(rgba), "PNG"))
    expected = np.full((10, 10, 3), 255)
    expected[3:7, 3:7] = 0
    np.testing.assert_array_equal(pixels(file), expected)


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_is_white(file: Path, form: str):
    image = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    file.write_bytes(encoded(image, form, transparency=1))
    row = [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
    np.testing.assert_array_equal(pixels(file), [row, row[::-1]])


def test_a_palette_with_alpha(file: Path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    file.write_bytes(encoded(image, "PNG", transparency=bytes([255, 0, 51])))
    expected = [[[10, 20, 30], [255, 255, 255], [218, 220, 222]]]  # 255 - 0.2 * (255 - c)
    np.testing.assert_allclose(pixels(file), expected, atol=1)


@pytest.mark.parametrize(
    ("rows", "colour_type", "depth", "transparent", "expected"),
    [
        ([[9, 8, 7, 1, 2, 3]], 2, 8, (9, 8, 7), [[255] * 3, [1, 2, 3]]),
        ([[9, 5, 9]], 0, 8, (9,), [[255] * 3, [5] * 3, [255] * 3]),
        ([[0b10100000]], 0, 1, (0,), [[255] * 3] * 8),
        ([[0b01011111]], 0, 1, (1,), [[0] * 3, [255] * 3, [0] * 3] + [[255] * 3] * 5),
        # 16 bits: 0x1234 is transparent, 0x1235 is not.
        ([[0x12, 0x34, 0x12, 0x35]], 0, 16, (0x1234,), [[255] * 3, [0x12] * 3]),
        (
            [[9, 99, 8, 88, 7, 77, 1, 0, 2, 0, 3, 0]],
            *(2, 16, (9 * 256 + 99, 8 * 256 + 88, 7 * 256 + 77)),
            [[255] * 3, [1, 2, 3]],
        ),
    ],
    ids=["rgb", "grey", "black of 1 bit", "white of 1 bit", "16-bit grey", "16-bit rgb"],
)
def test_a_transparent_colour(
    file: Path,
    rows: list[list[int]],
    colour_type: int,
    depth: int,
    transparent: tuple[int, ...],
    expected: list[list[int]],
):
    trns = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    file.write_bytes(png(np.array(rows, np.uint8), colour_type, depth, trns))
    np.testing.assert_array_equal(pixels(file)[0], expected)


@pytest.mark.parametrize(("extra", "red"), [(2, 100 * 128 / 255 + 127), (1, 100 + 127)])
def test_alpha_that_colours_are_multiplied_with(file: Path, extra: int, red: float):
    """TIFF extra sample 1: the colours have been multiplied with alpha; 2: they have not."""
    pixel = bytes([100, 50, 0, 128])
    file.write_bytes(tiff(1, 1, pixel, bits=[8] * 4, photometric=2, samples=4, extra=extra))
    np.testing.assert_allclose(pixels(file)[0, 0, 0], red, atol=1)
    assert pixels(file)[0, 0, 2] == 127
    file.write_bytes(
        tiff(1, 1, bytes([100, 50, 0, 255]), bits=[8] * 4, photometric=2, samples=4, extra=extra)
    )
    assert pixels(file)[0, 0].tolist() == [100, 50, 0]


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA"])
@pytest.mark.parametrize("alpha", [51, 255])
def test_modes_that_no_format_is_stored_in(mode: str, alpha: int):
    if mode == "PA":
        image = Image.new("P", (2, 2))
        image.putpalette([100] * 3)
        image.putalpha(alpha)
    else:
        image = Image.new("LA", (2, 2), (100, alpha))
        image = (image if mode == "La" else image.convert("RGBA")).convert(mode)
    assert image.mode == mode
    expected = 255 + (100 - 255) * alpha / 255
    np.testing.assert_allclose(np.asarray(images.flatten(image)), expected, atol=2)


@pytest.mark.parametrize("kind", OPAQUE)
def test_opaque_images_are_converted_and_no_more(file: Path, kind: str):
    file.write_bytes(OPAQUE[kind])
    with Image.open(file) as image:
        np.testing.assert_array_equal(pixels(file), np.asarray(image.convert("RGB")))


# Depth.


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "pgm"])
def test_16_bit_grey_is_scaled(file: Path, kind: str):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    data = {
        "png": lambda: png(grey.astype(">u2").view(np.uint8), 0, 16),
        "tiff": lambda: tiff(16, 16, grey.astype("<u2").tobytes(), bits=16, photometric=1),
        "big-endian tiff": lambda: encoded(Image.fromarray(grey.astype(">u2")), "TIFF"),
        "pgm": lambda: b"P5 16 16 65535\n" + grey.astype(">u2").tobytes(),
    }[kind]()
    file.write_bytes(data)
    expected = np.arange(256).reshape(16, 16, 1).repeat(3, axis=-1)
    np.testing.assert_array_equal(pixels(file), expected)


def test_16_bit_grey_is_rounded(file: Path):
    file.write_bytes(png(np.array([[0, 128, 0, 129, 255, 255]], np.uint8), 0, 16))
    assert pixels(file)[0, :, 0].tolist() == [0, 1, 255]  # 128 / 257 = 0.498


def test_16_bit_grey_that_is_dark(file: Path):
    file.write_bytes(b"P5 3 1 65535\n" + np.array([0, 128, 255], ">u2").tobytes())
    assert pixels(file)[0, :, 0].tolist() == [0, 0, 1]


def test_grey_whose_white_is_0(file: Path):
    values = np.array([0, 257, 65535], "<u2")
    file.write_bytes(tiff(3, 1, values.tobytes(), bits=16, photometric=0))
    assert pixels(file)[0, :, 0].tolist() == [255, 254, 0]


def test_12_bit_grey_is_scaled(file: Path):
    file.write_bytes(tiff(2, 1, bytes.fromhex("fff800"), bits=12, photometric=1))
    assert pixels(file)[0, :, 0].tolist() == [255, 128]  # 0xfff and 0x800 = 2048 of 4095


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 0.2, 1], np.float32), [0, 51, 255]),
        (np.array([0, 1.5, 254.6], np.float32), [0, 2, 255]),
        (np.array([0, 257, 65535], np.float32), [0, 1, 255]),
        (np.array([0, 3, 255], np.int32), [0, 3, 255]),
        (np.array([0, 514, 40000], np.int32), [0, 2, 156]),
        (np.array([0, 20000, 100000], np.int32), [0, 51, 255]),
        (np.array([-10, 0, 40], np.int32), [0, 51, 255]),
        (np.array([-10, 0, 40], np.int16), [0, 51, 255]),
        (np.array([-1, 0, 4], np.float32), [0, 51, 255]),
        (np.array([np.nan, 0.2, np.inf], np.float32), [0, 51, 0]),
        (np.array([np.nan, np.nan, -np.inf], np.float32), [0, 0, 0]),
        (np.array([-3, -3, -3], np.int32), [0, 0, 0]),
    ],
)
def test_integers_and_floats_of_32_bits(file: Path, values: np.ndarray, expected: list[int]):
    form = 3 if values.dtype == np.float32 else 2
    bits = 8 * values.itemsize
    file.write_bytes(tiff(3, 1, values.tobytes(), bits=bits, photometric=1, format=form))
    assert pixels(file)[0].tolist() == [[value] * 3 for value in expected]


def test_32_bits_are_scaled_in_blocks(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "_BLOCK", 7)
    values = np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 6)
    file.write_bytes(encoded(Image.fromarray(values), "TIFF"))
    np.testing.assert_allclose(pixels(file)[..., 0], 255 * (values + 1) / 2, atol=0.51)


# ICC profiles.


def test_profiles_are_converted_where_asked_for(file: Path):
    stored = Image.fromarray(base()[..., [1, 0, 2]])
    file.write_bytes(encoded(stored, "PNG", icc_profile=swapped_profile()))
    np.testing.assert_array_equal(pixels(file), np.asarray(stored))
    converted = pixels(file, MediaOptions(color_profile=True))
    np.testing.assert_allclose(converted, base(), atol=2)


def test_a_profile_applies_below_transparency(file: Path):
    rgba = np.dstack([base()[..., [1, 0, 2]], np.full((32, 48), 51, np.uint8)])
    file.write_bytes(encoded(Image.fromarray(rgba), "PNG", icc_profile=swapped_profile()))
    converted = pixels(file, MediaOptions(color_profile=True))
    np.testing.assert_allclose(converted, on_white(base(), rgba[..., 3]), atol=2)


def test_a_grey_profile(file: Path):
    grey = Image.new("L", (3, 2), 55)  # 0.2157 without gamma is 0.5019 in sRGB
    file.write_bytes(encoded(grey, "PNG", icc_profile=linear_grey_profile()))
    assert pixels(file)[0, 0].tolist() == [55, 55, 55]
    converted = pixels(file, MediaOptions(color_profile=True))
    np.testing.assert_allclose(converted, 128, atol=1)
    for alpha, expected in ((255, 128), (51, 0.2 * 128 + 0.8 * 255)):
        grey.putalpha(alpha)
        file.write_bytes(encoded(grey, "PNG", icc_profile=linear_grey_profile()))
        converted = pixels(file, MediaOptions(color_profile=True))
        np.testing.assert_allclose(converted, expected, atol=1)


@pytest.mark.parametrize("profile", ["sRGB", "grey", "nonsense"])
def test_profiles_that_are_ignored(file: Path, profile: str):
    data = {
        "sRGB": swapped_profile(b"sRGB"),  # its name says sRGB: what it holds is not looked at
        "grey": linear_grey_profile(),  # of a picture in colour
        "nonsense": b"nonsense",
    }[profile]
    file.write_bytes(encoded(Image.fromarray(base()), "PNG", icc_profile=data))
    np.testing.assert_array_equal(pixels(file, MediaOptions(color_profile=True)), base())


def test_a_profile_of_other_channels_is_ignored(file: Path):
    cmyk = Image.fromarray(base()).convert("CMYK")
    file.write_bytes(encoded(cmyk, "TIFF", icc_profile=swapped_profile()))
    expected = np.asarray(cmyk.convert("RGB"))
    np.testing.assert_array_equal(pixels(file, MediaOptions(color_profile=True)), expected)
