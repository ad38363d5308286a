"""Small images of all kinds, by Pillow or by hand."""

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from vxl_jax.media import MediaOptions
from vxl_jax.media.images.loading import image_size, load_image

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


def pixels(path: Path, options: MediaOptions = MediaOptions()) -> np.ndarray:  # noqa: B008
    """Pixels of a file, which are RGB and of the size that the header promised."""
    image = load_image(path, options)
    assert image.mode == "RGB"
    assert image.size == image_size(path)
    return np.asarray(image)


def assert_like(path: Path, expected: np.ndarray) -> None:
    """Up to what a lossy encoder changes; another orientation or a swap of colours is over 50."""
    assert np.abs(pixels(path).astype(int) - expected).mean() < 5


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


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


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


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def brands(major: bytes, *compatible: bytes) -> bytes:
    return box(b"ftyp", major + bytes(4) + b"".join(compatible)) + box(b"mdat", bytes(99))
