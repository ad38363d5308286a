"""MP4 files that end early: a copy that says so, which decoders open.

Boxes and tables are those of ISO/IEC 14496-12. A file that was cut off promises frames that are not
there; FFmpeg then ends in an error, and decord does not even open it.
"""

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

_AROUND = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
_TABLES = (b"hdlr", b"stsz", b"stsc", b"stco", b"co64")


@dataclass(frozen=True)
class _Track:
    """Samples that a track promises and that are there, and where in the file the number stands."""

    is_video: bool
    promised: int
    there: int
    place: int


@contextmanager
def readable(path: Path) -> Iterator[tuple[Path, int | None]]:
    """A file that a decoder opens, and the frames that were promised if some of them are missing.

    The file itself; or, of an MP4 that ends early and has its tables in front, a copy in a
    temporary folder whose tables end where the data does.
    """
    try:
        tracks = _tracks(path)
    except (OSError, ValueError, IndexError, struct.error):
        tracks = []  # no MP4, or one whose fault is another: the decoder says what it is
    videos = [track.promised for track in tracks if track.is_video and track.there]
    if not videos or all(track.there == track.promised for track in tracks):
        yield path, None
        return
    with TemporaryDirectory(prefix="vxl-") as folder:
        copy = Path(shutil.copyfile(path, Path(folder) / path.name))
        with copy.open("r+b") as file:
            for track in tracks:
                os.pwrite(file.fileno(), struct.pack(">I", track.there), track.place)
        yield copy, videos[0]


def _tracks(path: Path) -> list[_Track]:
    """The tracks of an MP4."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 0
        while start + 16 <= size:
            file.seek(start)
            length, kind, large = struct.unpack(">I4sQ", file.read(16))
            if start == 0 and kind != b"ftyp":
                raise ValueError("no MP4")
            length = large if length == 1 else length
            if kind == b"moov":
                file.seek(start)
                held = file.read(min(length, size - start))
                return [
                    _track(held, first, end, start, size)
                    for name, first, end in _boxes(held, 8, len(held))
                    if name == b"trak"
                ]
            if length < 8:
                break
            start += length
    raise ValueError("no tables before the end of the file")


def _boxes(held: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, and where the content begins and ends, of the boxes in a range."""
    while start + 8 <= end:
        length, kind = struct.unpack_from(">I4s", held, start)
        if length < 8 or start + length > end:
            raise ValueError(f"a box of {length} bytes")
        yield kind, start + 8, start + length
        start += length


def _track(held: bytes, start: int, end: int, moov: int, size: int) -> _Track:
    """What a track promises of a file of `size` bytes whose tables begin at `moov`."""
    found: dict[bytes, int] = {}
    ranges = [(start, end)]
    for first, last in ranges:
        for kind, inside, behind in _boxes(held, first, last):
            if kind in _AROUND:
                ranges.append((inside, behind))
            elif kind in _TABLES:
                found.setdefault(kind, inside)

    def numbers(place: int, count: int, dtype: str) -> np.ndarray:
        return np.frombuffer(held, dtype, count, place).astype(np.int64)

    place = found[b"stsz"]
    same, count = (int(x) for x in numbers(place + 4, 2, ">u4"))
    sizes = np.full(count, same) if same else numbers(place + 12, count, ">u4")
    kind = b"stco" if b"stco" in found else b"co64"
    chunks = int(numbers(found[kind] + 4, 1, ">u4")[0])
    offsets = numbers(found[kind] + 8, chunks, ">u4" if kind == b"stco" else ">u8")
    runs = int(numbers(found[b"stsc"] + 4, 1, ">u4")[0])
    first_chunk, per_chunk, _ = numbers(found[b"stsc"] + 8, 3 * runs, ">u4").reshape(-1, 3).T
    of_chunk = np.repeat(per_chunk, np.diff(first_chunk - 1, append=chunks))
    chunk = np.repeat(np.arange(chunks), of_chunk)[:count]
    before = np.cumsum(sizes) - sizes
    first = np.cumsum(of_chunk) - of_chunk  # sample of each chunk
    stop = offsets[chunk] + before - before[np.minimum(first, count - 1)][chunk] + sizes
    missing = np.flatnonzero(stop > size)
    return _Track(
        is_video=held[found[b"hdlr"] + 8 : found[b"hdlr"] + 12] == b"vide",
        promised=count,
        there=int(missing[0]) if len(missing) else count,
        place=moov + place + 8,
    )
