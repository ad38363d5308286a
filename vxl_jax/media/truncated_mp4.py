"""MP4 files that end early: a copy that says so, which decoders open.

Boxes and tables are those of ISO/IEC 14496-12. A file that was cut off promises frames that are not
there; FFmpeg then ends in an error, and decord does not even open it.
"""

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from vxl_jax.errors import MediaError

_AROUND = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
_TABLES = (b"hdlr", b"stsz", b"stsc", b"stco", b"co64")


MOST_BYTES = 2**28
"""Most bytes of tables that are read: a film of ten hours has some ten million."""


@contextmanager
def readable(path: Path) -> Iterator[tuple[Path, int | None]]:
    """A file that a decoder opens, and the frames that were promised if some of them are missing.

    The file itself; or, of an MP4 that ends early and has its tables in front, a copy in a
    temporary folder, without sound, whose tables end where the data does.

    Raises: MediaError if there is no room for the copy.
    """
    try:
        changes, promised = _mend(path) if path.is_file() else ({}, 0)
    except (OSError, ValueError, IndexError, KeyError, struct.error):
        changes = {}  # no MP4, or one whose fault is another: the decoder says what it is
    if not changes:
        yield path, None
        return
    with TemporaryDirectory(prefix="vxl-") as folder:
        copy = Path(folder) / path.name
        try:
            shutil.copyfile(path, copy)
            with copy.open("r+b") as file:
                for place, change in changes.items():
                    os.pwrite(file.fileno(), change, place)
        except OSError as error:
            raise MediaError(
                f"{path}: ends early, and cannot be copied to {folder} to be read "
                f"({error.strerror}); fetch it again, or set TMPDIR to a folder with room"
            ) from error
        yield copy, promised


def _mend(path: Path) -> tuple[dict[int, bytes], int]:
    """What to write where, so that an MP4 ends where its data does, and the frames it promises;
    nothing if it is whole, or no frame is there.
    """
    size = path.stat().st_size
    held, moov, start = b"", 0, 0
    with path.open("rb") as file:
        while start + 8 <= size:
            file.seek(start)
            length, kind, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            if start == 0 and kind != b"ftyp":
                raise ValueError("no MP4")
            length = large if length == 1 else length
            if kind == b"moov":
                if length > MOST_BYTES:
                    raise ValueError(f"tables of {length} bytes")
                file.seek(start)
                held, moov = file.read(length), start
            if length < 8:  # 0: to the end of the file
                break
            start += length
    if start <= size:
        return {}, 0
    changes: dict[int, bytes] = {}
    frames = 0
    for kind, first, end in _boxes(held, 8, len(held)):
        if kind != b"trak":
            continue
        tables = _tables(held, first, end)
        if held[tables[b"hdlr"] + 8 : tables[b"hdlr"] + 12] != b"vide":
            changes[moov + first - 4] = b"free"  # decoders pass over it
            continue
        promised, there = _samples(held, tables, size)
        changes[moov + tables[b"stsz"] + 8] = struct.pack(">I", there)
        frames = frames or (promised if there else 0)
    return (changes, frames) if frames else ({}, 0)


def _boxes(held: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, and where the content begins and ends, of the boxes in a range."""
    while start + 8 <= end:
        length, kind = struct.unpack_from(">I4s", held, start)
        if length < 8 or start + length > end:
            raise ValueError(f"a box of {length} bytes")
        yield kind, start + 8, start + length
        start += length


def _tables(held: bytes, start: int, end: int) -> dict[bytes, int]:
    """Where the content of a track's tables begins."""
    found: dict[bytes, int] = {}
    ranges = [(start, end)]
    for first, last in ranges:
        for kind, inside, behind in _boxes(held, first, last):
            if kind in _AROUND:
                ranges.append((inside, behind))
            elif kind in _TABLES:
                found.setdefault(kind, inside)
    return found


def _samples(held: bytes, tables: dict[bytes, int], size: int) -> tuple[int, int]:
    """Samples that a track promises, and those in front that a file of `size` bytes has."""

    def numbers(place: int, count: int, dtype: str) -> np.ndarray:
        return np.frombuffer(held, dtype, count, place).astype(np.int64)

    same, count = (int(x) for x in numbers(tables[b"stsz"] + 4, 2, ">u4"))
    if same:
        raise ValueError("frames of one size")
    upto = np.concatenate([[0], np.cumsum(numbers(tables[b"stsz"] + 12, count, ">u4"))])
    kind = b"stco" if b"stco" in tables else b"co64"
    chunks = int(numbers(tables[kind] + 4, 1, ">u4")[0])
    offsets = numbers(tables[kind] + 8, chunks, ">u4" if kind == b"stco" else ">u8")
    runs = int(numbers(tables[b"stsc"] + 4, 1, ">u4")[0])
    first_chunk, per_chunk, _ = numbers(tables[b"stsc"] + 8, 3 * runs, ">u4").reshape(-1, 3).T
    of_chunk = np.repeat(per_chunk, np.diff(first_chunk - 1, append=chunks))
    stop = np.minimum(np.cumsum(of_chunk), count)
    first = np.concatenate([[0], stop[:-1]])
    for chunk in np.flatnonzero(offsets + upto[stop] - upto[first] > size)[:1]:
        begin, room = int(first[chunk]), size - int(offsets[chunk])
        inside = upto[begin : stop[chunk] + 1] - upto[begin]
        return count, begin + max(0, int(np.searchsorted(inside, room, side="right")) - 1)
    return count, count
