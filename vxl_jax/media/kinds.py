"""Detect file formats from the first bytes, never from the file name."""

import os
import re
from pathlib import Path
from typing import BinaryIO, Literal

from vxl_jax.errors import MediaError
from vxl_jax.media.paths import printable

# Enough for the list of brands of an ISO file and for three packets of an MPEG transport stream.
_BEGINNING = 1024

_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
# Image files whose codec the compatible brands tell.
_HEIF_BRANDS = {b"mif1", b"msf1"}
# First bytes of files that are often given as an image, what to call them and what to do.
_OTHERS = (
    (
        rb"\x1aE\xdf\xa3|FLV\x01|\x00\x00\x01[\xba\xb3]|OggS|0&\xb2u",
        "a video",
        "give it as a video",
    ),
    (rb"(?s:RIFF....AVI |....(moov|mdat|wide|free|skip))", "a video", "give it as a video"),
    (rb"(?s:.{4})?G(?s:.{187}|.{191})G", "a video", "give it as a video"),
    (rb"version https://git-lfs", "a Git LFS pointer", "run git lfs pull"),
    (rb"(?i:\s*(<!doctype html|<html|<head|<body))", "a web page", "fetch the file itself"),
    (rb"(?s:\s*(<\?xml.*)?<svg)", "an SVG drawing", "convert it to PNG"),
    (rb"%PDF", "a PDF document", "convert its pages to PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file", "convert it to PNG"),
    (rb"8BPS", "a Photoshop file", "convert it to PNG"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image", "convert it to JPEG"),
    (rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ", "a JPEG 2000 image", "convert it to JPEG"),
    (rb"\0+$", "all zeros at its beginning", "fetch it again"),
)


def image_format(path: str | Path) -> str | None:
    """Return the image format of a file by its first bytes, None if it is not an image.

    The formats are those that `load_image` reads: JPEG, PNG, GIF, WEBP, AVIF, HEIC (all of HEIF),
    TIFF, BMP and PPM (also PGM and PBM). Videos (MP4, MOV, ...) give None.

    Raises:
      MediaError: the file cannot be read.
    """
    return format_of(first_bytes(path))


def first_bytes(path: str | Path) -> bytes:
    """Read the first KB of a file. Raises: MediaError: it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(_BEGINNING)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "unusable name"
        raise MediaError(f"{printable(path)}: cannot be read ({reason})") from error


def format_of(beginning: bytes) -> str | None:
    """Return the image format as `image_format` does, from the first KB of a file."""
    start = beginning
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "WEBP"
    if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    # The size of the second header, since two letters are too few to go by.
    if start.startswith(b"BM") and start[14:18] in (bytes([n, 0, 0, 0]) for n in _BMP_HEADERS):
        return "BMP"
    if re.match(rb"P[1-6][\s#]", start):
        return "PPM"
    if start[4:8] == b"ftyp":
        return _format_of_brands(start)
    return None


_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)


def _format_of_brands(start: bytes) -> str | None:
    """Format of an ISO base media file, from its file type box (ISO/IEC 14496-12, 23008-12)."""
    major = start[8:12]
    compatible = start[16 : int.from_bytes(start[:4], "big")]
    brands = {compatible[i : i + 4] for i in range(0, len(compatible), 4)}
    if major in _AVIF_BRANDS or (major in _HEIF_BRANDS and brands & _AVIF_BRANDS):
        return "AVIF"
    if major in _HEIC_BRANDS | _HEIF_BRANDS:
        return "HEIC"
    return None


def describe_format(beginning: bytes) -> tuple[str, str]:
    """Describe a file that is not an image, and the remedy, from its first KB."""
    if beginning[4:8] == b"ftyp":
        return "it is a video", "give it as a video"
    for pattern, kind, advice in _OTHERS:
        if re.match(pattern, beginning):
            return f"it is {kind}", advice
    return f"it begins with {repr(beginning[:24])[1:]}", "replace it"


def ends_early(path: str | Path, form: str) -> bool:
    """Return whether the container shows that an image file is truncated.

    Use it only for files that cannot be decoded. Bytes after the end of an image are allowed, so
    the result may be False for a truncated file.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(16)
            if form == "WEBP":
                return size < 8 + int.from_bytes(head[4:8], "little")
            if form == "BMP":
                return size < int.from_bytes(head[2:6], "little")
            if form == "TIFF" and head[2:4] in (b"*\0", b"\0*"):
                order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
                directory = int.from_bytes(head[4:8], order)
                file.seek(directory)
                tags = int.from_bytes(file.read(2), order)
                return len(head) < 8 or size < directory + 2 + 12 * max(tags, 1)
            if form in ("AVIF", "HEIC"):
                return _box_past_end(file, size)
            file.seek(max(0, size - 64))
            tail = file.read()
    except OSError:
        return False
    ends = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}
    return form in ends and ends[form] not in tail


def _box_past_end(file: BinaryIO, size: int) -> bool:
    start = 0
    while start + 8 <= size:
        file.seek(start)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0: the box goes to the end of the file
            return False
        start += length
    return start != size
