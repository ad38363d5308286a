"""Images as a viewer shows them: orientation, transparency, depth, profiles, kinds, bad files.

Files are made by Pillow or by hand; what they should look like is written out or computed with
NumPy from the format's rules.
"""

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from vxl_jax.errors import MediaError
from vxl_jax.media import MediaOptions, images
from vxl_jax.media.images import image_size, load_image
from vxl_jax.media.kinds import image_format

QUADRANTS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40))


def base(width: int = 48, height: int = 32) -> np.ndarray:
    """Red and green above blue and yellow, uint8 [H, W, 3]."""
    colours = np.array(QUADRANTS, np.uint8).reshape(2, 2, 3)
    return colours.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


def noise(*shape: int, seed: int = 0, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + check


def png(rows: np.ndarray, colour_type: int, depth: int, *chunks: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write. rows: uint8 [H, bytes of a row]."""
    height, width = (
        len(rows),
        rows.shape[1] * 8 // depth // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type],
    )
    header = struct.pack(">2I5B", width, height, depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    body = chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(width: int, height: int, data: bytes, **tags: int | Sequence[int]) -> bytes:
    """A little-endian TIFF of one strip by hand."""
    names = {"bits": 258, "photometric": 262, "samples": 277, "extra": 338, "format": 339}
    entries = {256: width, 257: height, 259: 1, 273: 8, 278: height, 279: len(data)}
    entries |= {names[name]: value for name, value in tags.items()}
    directory = struct.pack("<H", len(entries))
    more, place = b"", 8 + len(data) + 2 + 12 * len(entries) + 4
    for tag, value in sorted(entries.items()):
        values = [value] if isinstance(value, int) else [*value]
        kind, letter = (4, "I") if tag in (256, 257, 273, 279) else (3, "H")
        packed = struct.pack(f"<{len(values)}{letter}", *values)
        if len(packed) > 4:
            more, packed = more + packed, struct.pack("<I", place + len(more))
        directory += struct.pack("<2HI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4) + more


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a test writes its image; the name says nothing about its kind."""
    return tmp_path / "image.bin"


def pixels(path: Path, options: MediaOptions = MediaOptions()) -> np.ndarray:  # noqa: B008
    """Pixels of a file, which are RGB and of the size that the header promised."""
    image = load_image(path, options)
    assert image.mode == "RGB"
    assert image.size == image_size(path)
    return np.asarray(image)


def assert_like(path: Path, expected: np.ndarray) -> None:
    """Up to what a lossy encoder changes; another orientation or a swap of colours is over 50."""
    assert np.abs(pixels(path).astype(int) - expected).mean() < 5


# Orientation.

STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),  # a viewer turns it clockwise
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
"""How a picture is stored with an EXIF orientation (EXIF 2.32, tag 0x0112)."""


def with_orientation(upright: np.ndarray, value: int, form: str, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    stored = np.ascontiguousarray(STORED[value](upright))
    return encoded(Image.fromarray(stored), form, exif=exif, **options)


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


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


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


def opaque_files() -> dict[str, bytes]:
    rgb = Image.fromarray(noise(9, 11, 3))
    alpha = rgb.copy()
    alpha.putalpha(255)
    unused = Image.fromarray(np.array([[0, 1, 0]], np.uint8), "P")
    unused.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return {
        "rgb": encoded(rgb, "PNG"),
        "rgba": encoded(alpha, "PNG"),
        "la": encoded(alpha.convert("LA"), "PNG"),
        "palette": encoded(rgb.quantize(), "PNG"),
        "unused transparent colour": encoded(unused, "PNG", transparency=2),
        "grey": encoded(rgb.convert("L"), "PNG"),
        "1 bit": encoded(rgb.convert("1"), "PNG"),
        "16-bit rgb": png(noise(4, 3 * 6), 2, 16),
        "gif": encoded(rgb, "GIF"),
        "jpeg": encoded(rgb, "JPEG"),
        "progressive": encoded(rgb, "JPEG", progressive=True),
        "grey jpeg": encoded(rgb.convert("L"), "JPEG"),
        "cmyk jpeg": encoded(rgb.convert("CMYK"), "JPEG"),
        "cmyk tiff": encoded(rgb.convert("CMYK"), "TIFF"),
        "lzw tiff": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "jpeg tiff": encoded(rgb, "TIFF", compression="jpeg"),
        "bmp": encoded(rgb, "BMP"),
        "ppm": encoded(rgb, "PPM"),
        "pgm": encoded(rgb.convert("L"), "PPM"),
        "pbm": encoded(rgb.convert("1"), "PPM"),
        "webp": encoded(rgb, "WEBP"),
        "webp rgba": encoded(alpha, "WEBP", lossless=True),
        "avif": encoded(rgb, "AVIF"),
        "one pixel": encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"),
    }


OPAQUE = opaque_files()


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


def swapped_profile(name: bytes = b"test") -> bytes:
    """sRGB with the primaries red and green exchanged, under another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(int.from_bytes(data[128:132], "big")):
        at = 132 + 12 * i
        other = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(bytes(data[at : at + 4]))
        data[at : at + 4] = other or data[at : at + 4]
    old, new = ("".join(chr(c) for c in text).encode("utf-16-be") for text in (b"sRGB", name))
    assert old in data
    return bytes(data).replace(old, new)


def linear_grey_profile() -> bytes:
    """An ICC profile of grey without gamma (ICC.1:2001-04)."""
    text = b"grey\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061),
        b"kTRC": b"curv" + bytes(4) + struct.pack(">I", 0),
        b"cprt": b"text" + bytes(4) + b"none\0",
    }
    table, body = struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        table += tag + struct.pack(">2I", 132 + 12 * len(tags) + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    kind = struct.pack(">4sI", b"none", 0x02100000) + b"mntrGRAYXYZ "
    rest = bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    head = struct.pack(">I", 128 + len(table) + len(body)) + (kind + rest)
    return head.ljust(128, b"\0") + table + body


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


# Kinds of files.


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def brands(major: bytes, *compatible: bytes) -> bytes:
    return box(b"ftyp", major + bytes(4) + b"".join(compatible)) + box(b"mdat", bytes(99))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        *((OPAQUE[kind], "JPEG") for kind in ("jpeg", "progressive", "cmyk jpeg")),
        *((OPAQUE[kind], "PPM") for kind in ("ppm", "pgm", "pbm")),
        (OPAQUE["rgb"], "PNG"),
        (OPAQUE["gif"], "GIF"),
        (OPAQUE["webp"], "WEBP"),
        (OPAQUE["webp rgba"], "WEBP"),
        (OPAQUE["avif"], "AVIF"),
        (OPAQUE["lzw tiff"], "TIFF"),
        (encoded(Image.new("I;16B", (2, 2)), "TIFF"), "TIFF"),
        (encoded(Image.new("L", (2, 2)), "TIFF", big_tiff=True), "TIFF"),
        (OPAQUE["bmp"], "BMP"),
        (brands(b"avis", b"msf1"), "AVIF"),
        (brands(b"mif1", b"mif1", b"avif"), "AVIF"),
        (brands(b"msf1", b"avis"), "AVIF"),
        (brands(b"heic", b"mif1", b"heic"), "HEIC"),
        (brands(b"heix"), "HEIC"),
        (brands(b"hevc", b"msf1"), "HEIC"),
        (brands(b"mif1", b"heic"), "HEIC"),
        (brands(b"mif1"), "HEIC"),
        (brands(b"isom", b"iso2", b"mp41"), None),
        (brands(b"qt  ", b"qt  "), None),
        (box(b"ftyp", b"mif1" + bytes(4) + b"heic") + b"avif" * 9, "HEIC"),  # not among the brands
        (b"RIFF\x24\0\0\0AVI LIST", None),
        (b"BMW is not a bitmap", None),
        (b"P5atience", None),
        (b"GIF88a", None),
        (b"text", None),
        (b"", None),
    ],
)
def test_image_format(file: Path, data: bytes, expected: str | None):
    file.write_bytes(data)
    assert image_format(file) == expected


def test_image_format_of_a_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(MediaError, match=r"gone: cannot be read \(No such file or directory\)"):
        image_format(tmp_path / "gone")


@pytest.mark.parametrize("name", ["a.png", "a.jfif", "a.mp4", "a"])
def test_names_do_not_matter(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(encoded(Image.fromarray(base()), "JPEG", quality=95))
    assert_like(tmp_path / name, base())


def test_avif_is_read(file: Path):
    file.write_bytes(encoded(Image.fromarray(base()), "AVIF", quality=90))
    assert_like(file, base())


def test_heic_without_its_reader(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # an import of it fails
    file.write_bytes(brands(b"heic", b"mif1", b"heic"))
    for read in (load_image, image_size):
        with pytest.raises(MediaError) as caught:
            read(file)
        assert str(caught.value) == (
            f"{file}: is a HEIC image; pip install 'vxl-jax[heic]' reads it, or convert it to JPEG"
        )


@pytest.mark.parametrize("value", [1, 6])
def test_heic_is_read(file: Path, value: int):
    heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = value
    stored = Image.fromarray(np.ascontiguousarray(STORED[value](base(96, 64))))
    heif.from_pillow(stored).save(file, quality=95, exif=exif.tobytes())
    assert_like(file, base(96, 64))
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(MediaError, match=r"\(HEIC, cut off\); fetch it again"):
        load_image(file)


def test_the_first_of_several_pictures(file: Path):
    first, second = Image.fromarray(base()), Image.new("RGB", (48, 32))
    for form, options in {"TIFF": {}, "MPO": {"quality": 95}, "GIF": {}}.items():
        several = {"save_all": True, "append_images": [second, second]}
        file.write_bytes(encoded(first, form, **several, **options))
        assert_like(file, base())


# Large images.


def test_a_huge_jpeg_is_reduced_in_little_memory(file: Path):
    """108 million pixels at 1/2, as phones make them."""
    Image.new("L", (12000, 9000), 77).save(file, "JPEG")
    script = (
        "import resource, sys\n"
        "from vxl_jax.media.images import image_size, load_image\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "load_image(sys.argv[2])\n"
        "before = peak()\n"
        "size = image_size(sys.argv[1])\n"
        "image = load_image(sys.argv[1])\n"
        "assert size == image.size == (6000, 4500), (size, image.size)\n"
        "assert image.getextrema() == ((77, 77),) * 3\n"
        "print((peak() - before) // 1024)\n"
    )
    small = file.with_name("small")
    Image.new("RGB", (8, 8)).save(small, "JPEG")
    command = [sys.executable, "-c", script, str(file), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # 27 million pixels: 27 MB of grey and 108 MB of RGB. All of it would be 540 MB.
    assert int(done.stdout) < 180


@pytest.mark.parametrize(
    ("limit", "size"), [(48 * 32, (48, 32)), (48 * 32 - 1, (24, 16)), (24 * 16 - 1, (12, 8))]
)
@pytest.mark.parametrize("value", [1, 6])
def test_a_reduced_jpeg_is_upright_and_the_same(
    file: Path, monkeypatch: pytest.MonkeyPatch, limit: int, size: tuple[int, int], value: int
):
    monkeypatch.setattr(images, "_MAX_PIXELS", limit)
    file.write_bytes(with_orientation(base(), value, "JPEG", quality=95))
    assert image_size(file) == size
    assert_like(file, base(*size))


def test_odd_sizes_are_rounded_up(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "_MAX_PIXELS", 33 * 21 - 1)
    file.write_bytes(encoded(Image.new("RGB", (33, 21)), "JPEG"))
    assert pixels(file).shape == (11, 17, 3)


@pytest.mark.parametrize(
    ("form", "options", "limit"),
    [
        ("PNG", {}, "_MAX_PIXELS"),
        ("TIFF", {}, "_MAX_PIXELS"),
        ("JPEG", {}, "_MAX_JPEG_PIXELS"),
        ("JPEG", {"progressive": True}, "_MAX_PROGRESSIVE_PIXELS"),
    ],
)
def test_larger_images_are_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, form: str, options: dict[str, Any], limit: str
):
    file.write_bytes(encoded(Image.fromarray(base()), form, **options))
    monkeypatch.setattr(images, limit, 48 * 32)
    assert pixels(file).shape == (32, 48, 3)
    monkeypatch.setattr(images, limit, 48 * 32 - 1)
    for read in (load_image, image_size):
        with pytest.raises(MediaError) as caught:
            read(file)
        assert str(caught.value) == (
            f"{file}: 48 x 32 pixels are more than 1,535, it may be a decompression bomb; reduce "
            "the image"
        )


def test_headers_that_ask_for_any_number_of_pixels(file: Path):
    header = struct.pack(">2I5B", 2**30, 2**30, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    for read in (load_image, image_size):
        with pytest.raises(MediaError, match=r"more than 67,108,864 pixels.*reduce the image$"):
            read(file)
    jpeg = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff" * 4  # 65535 x 65535
    file.write_bytes(jpeg)
    with pytest.raises(MediaError, match=r"65535 x 65535 pixels are more than 536,870,912, "):
        load_image(file)


# Bad files.


def zero_sized_png() -> bytes:
    data = bytearray(OPAQUE["rgb"])
    data[16:24] = bytes(8)  # width and height
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def damaged(data: bytes, start: int) -> bytes:
    return data[:start] + bytes(len(data) - start - 12) + data[-12:]


LARGE = Image.fromarray(noise(64, 64, 3))
GIVE_IT = "; give it as a video"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no such file; check the sample and the media folder"),
        (b"", "is empty; fetch it again"),
        (
            b"text" * 9,
            "not a readable image (it begins with 'texttexttexttexttexttext'); replace it",
        ),
        (b"\x01\x02\n\xff", r"not a readable image (it begins with '\x01\x02\n\xff'); replace it"),
        (
            b"\n<!DOCTYPE html>\n<html>",
            "not a readable image (it is a web page); fetch the file itself",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "not a readable image (it is a Git LFS pointer); run git lfs pull",
        ),
        (bytes(5000), "not a readable image (it is all zeros at its beginning); fetch it again"),
        (
            b"<?xml version='1.0'?>\n<svg>",
            "not a readable image (it is an SVG drawing); convert it to PNG",
        ),
        (b"%PDF-1.5", "not a readable image (it is a PDF document); convert its pages to PNG"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "not a readable image (it is a PostScript file); convert it to PNG",
        ),
        (brands(b"isom", b"mp41"), f"not a readable image (it is a video){GIVE_IT}"),
        (box(b"moov", b""), f"not a readable image (it is a video){GIVE_IT}"),
        (b"\x1aE\xdf\xa3\x01", f"not a readable image (it is a video){GIVE_IT}"),
        (b"RIFF\x0a\x0a\0\0AVI LIST", f"not a readable image (it is a video){GIVE_IT}"),
        ((b"G" + bytes(187)) * 5, f"not a readable image (it is a video){GIVE_IT}"),
        ((b"\0\0\0\0G" + bytes(187)) * 5, f"not a readable image (it is a video){GIVE_IT}"),
        (
            zero_sized_png(),
            "not a readable image (PNG); it is damaged or of an unknown kind, replace it",
        ),
        (
            damaged(encoded(LARGE, "PNG"), 300),
            "image cannot be decoded (PNG, broken data stream when reading image file); it is "
            "damaged or of an unknown kind, replace it",
        ),
    ],
)
def test_files_that_are_not_images(file: Path, data: bytes | None, message: str):
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(MediaError) as caught:
        load_image(file)
    assert str(caught.value) == f"{file}: {message}"


@pytest.mark.parametrize(
    ("form", "options"),
    [
        *((form, {}) for form in ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF")),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("JPEG", {"progressive": True}),
    ],
)
def test_images_that_are_cut_off(file: Path, form: str, options: dict[str, Any]):
    data = encoded(LARGE, form, **options)
    for length in (40, len(data) // 4, len(data) // 2, len(data) - 100):
        file.write_bytes(data[:length])
        with pytest.raises(MediaError) as caught:
            load_image(file)
        message = str(caught.value)
        assert message.startswith((f"{file}: not a readable", f"{file}: image cannot be decoded"))
        assert message.endswith(f" ({form}, cut off); fetch it again"), message


def test_other_errors_of_readers_are_one_line(file: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Any, *args: Any) -> None:
        raise OSError(f"cannot identify\nimage file {str(file)!r} <_io.BytesIO object at 0x7f00>")

    file.write_bytes(OPAQUE["rgb"])
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(MediaError) as caught:
        load_image(file)
    assert str(caught.value) == (
        f"{file}: image cannot be decoded (PNG); it is damaged or of an unknown kind, replace it"
    )


def test_warnings_of_readers_are_not_shown(file: Path):
    """Damaged tags of a TIFF, a size that Pillow takes for a decompression bomb."""
    script = (
        "import sys\nfrom vxl_jax.media.images import load_image\n"
        "try: load_image(sys.argv[1])\nexcept Exception: pass"
    )
    data = encoded(Image.fromarray(base()), "TIFF")
    file.write_bytes(data[: int.from_bytes(data[4:8], "little") + 30])
    command = [sys.executable, "-c", script, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_files_are_closed(file: Path):
    file.write_bytes(OPAQUE["rgb"])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        load_image(file)
        image_size(file)
        image_format(file)
    assert len(os.listdir("/proc/self/fd")) <= before
