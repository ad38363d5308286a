"""Image files: kinds, large ones, damaged ones."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.media.pictures import (
    OPAQUE,
    STORED,
    assert_like,
    base,
    box,
    brands,
    chunk,
    encoded,
    noise,
    pixels,
    with_orientation,
)
from vxl_jax.errors import MediaError
from vxl_jax.media.images import loading as images
from vxl_jax.media.images.loading import image_size, load_image
from vxl_jax.media.kinds import image_format


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


def test_a_huge_jpeg_is_reduced_in_little_memory(file: Path):
    """108 million pixels at 1/2, as phones make them."""
    Image.new("L", (12000, 9000), 77).save(file, "JPEG")
    script = (
        "import resource, sys\n"
        "from vxl_jax.media.images.loading import image_size, load_image\n"
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
        "import sys\nfrom vxl_jax.media.images.loading import load_image\n"
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
