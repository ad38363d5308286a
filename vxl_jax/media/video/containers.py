"""Detect the container of a video file, why it cannot be read, and whether it is truncated.

Layouts are those of
ISO/IEC 14496-12 (MP4), RFC 9559 (Matroska), ISO/IEC 13818-1 (transport and program streams), the
RIFF, FLV and ASF specifications, and RFC 3533 (Ogg).
"""

import mmap
import struct
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from vxl_jax.errors import MediaError
from vxl_jax.media.kinds import first_bytes, image_format
from vxl_jax.media.paths import check_file, printable

FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,obu,ivf,flv,asf,ogg,rm,nut,"
    "mxf,dv,yuv4mpegpipe,wtv,vc1,h263,mp3,wav,flac,aac,aiff"
)
"""Containers that FFmpeg may open, by its names: none that refers to other files, and no text.
Those of sound are opened to say that they have no video."""

ENCODE_AGAIN = "encode it again (ffmpeg -i IN -c:v libx264 OUT.mp4)"

_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_BOXES = {
    b"ftyp",
    b"moov",
    b"mdat",
    b"free",
    b"wide",
    b"skip",
    b"styp",
    b"moof",
    b"pnot",
    b"uuid",
    b"sidx",
    b"mfra",
}
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]", b"<MPD", b"v=0\n", b"v=0\r", b"[Reference]")
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<smil", b"<asx", b"{", b"[")


def check_video(path: str | Path) -> None:
    """Refuse files that are not videos before a decoder opens them.

    Raises: MediaError: missing, empty, a playlist, a web page, or a picture.
    """
    check_file(path)
    name = printable(path)
    beginning = first_bytes(path)
    if container_of(beginning) is not None:
        return
    beginning = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
    if beginning.startswith(_PLAYLISTS) or (b"<MPD" in beginning and beginning.startswith(b"<")):
        raise MediaError(f"{name}: is a playlist of other files, not a video; give those files")
    if beginning.lower().startswith(_MARKUP):
        raise MediaError(f"{name}: is text, such as an error page, not a video; fetch it again")
    picture = image_format(path)
    if picture is not None:
        raise MediaError(f"{name}: is a picture ({picture}), not a video; give it as an image")


def container_of(beginning: bytes) -> str | None:
    """The kind of container that a file begins with, or None: `mp4`, `matroska`, `avi`, `flv`,
    `asf`, `ogg`, `ts`, `ps`.
    """
    if beginning[4:8] in _BOXES:
        return "mp4"
    if beginning.startswith(b"RIFF") and beginning[8:11] == b"AVI":
        return "avi"
    for start, kind in (
        (b"\x1a\x45\xdf\xa3", "matroska"),
        (b"FLV\x01", "flv"),
        (_ASF, "asf"),
        (b"OggS", "ogg"),
        (b"\0\0\1\xba", "ps"),
    ):
        if beginning.startswith(start):
            return kind
    return "ts" if _ts_packet(beginning) else None


def _ts_packet(beginning: bytes) -> int | None:
    """Bytes of a transport stream's packets: 188, with a time code in front 192, or 204."""
    for size, first in ((188, 0), (192, 4), (204, 0)):
        places = range(first, min(len(beginning), first + 4 * size), size)
        if len(beginning) > first + size and all(beginning[i] == 0x47 for i in places):
            return size
    return None


def why_unreadable(path: str | Path, error: Exception) -> str:
    """Return why a decoder cannot open or read a file, and the remedy."""
    if isinstance(error, MemoryError):
        return f"needs more memory than a decoder may have; {ENCODE_AGAIN}"
    if isinstance(error, OSError) and error.errno in {5, 13, 23, 24}:
        return f"cannot be read ({error.strerror})"
    beginning = first_bytes(path)
    kind = container_of(beginning)
    if kind == "mp4" and not _has_index(path):
        return (
            "has no index (moov box): it was cut off, or its recording never finished; "
            "fetch it again"
        )
    if kind is not None:
        return f"is damaged or cut off at its beginning ({kind}); fetch it again"
    shown = beginning[:16]
    if shown and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in shown):
        return f"is not a video: it begins with the text {shown.decode()!r}; fetch it again"
    if not any(beginning):
        return "is not a video: it begins with zeros; fetch it again"
    return (
        f"is not a video in a container known here (it begins with {shown.hex(' ', 4)}); fetch it "
        "again, or convert it (ffmpeg -i IN -c:v libx264 OUT.mp4)"
    )


def cut_off(path: str | Path) -> bool:
    """Return whether a file is truncated: ends inside its structure."""
    check = _CUT.get(container_of(first_bytes(path)) or "")
    if check is None:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return check(data)
        except (struct.error, IndexError):
            return True


def boxes(
    data: mmap.mmap, start: int = 0, end: int | None = None
) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each box of an MP4 in a range, where its content begins and where it ends.

    The end may lie behind that of the file.
    """
    end = len(data) if end is None else end
    while start + 8 <= end:
        length, kind, large = struct.unpack(">I4sQ", data[start : start + 16].ljust(16, b"\0"))
        head = 16 if length == 1 else 8
        length = large if length == 1 else length or end - start
        if length < head:
            return
        yield kind, start + head, start + length
        start += length


def _has_index(path: str | Path) -> bool:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(kind == b"moov" and end <= len(data) for kind, _, end in boxes(data))


def _mp4_cut(data: mmap.mmap) -> bool:
    kind, _, end = deque([(b"", 0, 0), *boxes(data)], maxlen=1)[0]
    # Bytes behind the last box, such as a tag, are not a box.
    return (kind in _BOXES and end > len(data)) or kind == b"moof"


def _matroska_cut(data: mmap.mmap) -> bool:
    _, first, size = _element(data, 0)
    kind, begin, size = _element(data, first + (size or 0))
    if kind != 0x18538067:  # Segment
        return False
    if size is not None:
        return begin + size > len(data)
    # A live recording: clusters and their children, one after the other.
    inside = {0x18538067, 0x1F43B675}
    while begin < len(data):
        kind, first, size = _element(data, begin)
        if kind in inside and size is None:
            begin = first
            continue
        if size is None:
            return False
        begin = first + size
    return begin > len(data)


def _element(data: mmap.mmap, start: int) -> tuple[int, int, int | None]:
    """Identifier of a Matroska element, where its content begins, and its size if it is known."""
    width = 9 - data[start].bit_length()
    kind = int.from_bytes(data[start : start + width])
    start += width
    width = 9 - data[start].bit_length()
    size = int.from_bytes(data[start : start + width]) & (1 << 7 * width) - 1
    return kind, start + width, None if size == (1 << 7 * width) - 1 else size


def _avi_cut(data: mmap.mmap) -> bool:
    start = 0
    while start + 8 <= len(data) and data[start : start + 4] == b"RIFF":
        size = struct.unpack("<I", data[start + 4 : start + 8])[0]
        if not size:  # never finished
            return True
        start += 8 + size + size % 2
    return start - 1 > len(data)  # the last byte of padding may be missing


def _flv_cut(data: mmap.mmap) -> bool:
    before = struct.unpack(">I", data[-4:])[0]
    start = len(data) - 4 - before
    if before < 11 or start < 13:
        return True
    return int.from_bytes(data[start + 1 : start + 4]) + 11 != before


def _asf_cut(data: mmap.mmap) -> bool:
    place = data.find(_ASF_FILE, 0, 2**16)
    if place < 0:
        return True
    (size,) = struct.unpack("<Q", data[place + 40 : place + 48])
    live = data[place + 88] & 1
    return not live and size > len(data)


def _ogg_cut(data: mmap.mmap) -> bool:
    place = data.rfind(b"OggS", max(0, len(data) - 2**17))
    if place < 0:
        return True
    segments = data[place + 26]
    end = place + 27 + segments + sum(data[place + 27 : place + 27 + segments])
    return end != len(data)


def _ts_cut(data: mmap.mmap) -> bool:
    size = _ts_packet(data[:1024])
    return size is not None and len(data) % size != 0


def _ps_cut(data: mmap.mmap) -> bool:
    """Whether the last packet of a program stream is longer than the file."""
    start = data.rfind(b"\0\0\1\xba", max(0, len(data) - 2**18))
    if start < 0:
        return True
    while start + 4 <= len(data):
        if data[start : start + 3] != b"\0\0\1":
            return any(data[start:])  # padding at the end may be zeros
        kind = data[start + 3]
        if kind == 0xB9:  # the end
            return False
        if kind == 0xBA:
            mpeg2 = data[start + 4] >> 6 == 1
            start += 14 + (data[start + 13] & 7) if mpeg2 else 12
        else:
            start += 6 + int.from_bytes(data[start + 4 : start + 6])
    return start != len(data)


_CUT: dict[str, Callable[[mmap.mmap], bool]] = {
    "mp4": _mp4_cut,
    "matroska": _matroska_cut,
    "avi": _avi_cut,
    "flv": _flv_cut,
    "asf": _asf_cut,
    "ogg": _ogg_cut,
    "ts": _ts_cut,
    "ps": _ps_cut,
}
