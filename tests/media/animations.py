"""Small animations, by Pillow or by hand."""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

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


def with_checks(data: bytes) -> bytes:
    """A PNG whose checksums fit its chunks."""
    at, result = 8, data[:8]
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        result += chunk(data[at + 4 : at + 8], data[at + 8 : end])
        at = end + 4
    return result


def colours(rows: list[str]) -> list[list[tuple[int, ...]]]:
    return [[{"R": R, "G": G, "B": B, ".": W}[letter] for letter in row] for row in rows]


def rgba(colour: tuple[int, ...], alpha: int, height: int = 4, width: int = 4) -> np.ndarray:
    return np.full((height, width, 4), (*colour, alpha), np.uint8)
