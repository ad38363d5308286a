"""Damaged files, made by seed, and a run over them."""

import contextlib
import io
import os
import random
import re
import struct
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.config import DataSection
from train.data.dataset import Dataset
from train.data.epochs import plan_run
from train.data.loader import Loader
from train.demo.drawing import write_mp4

Cases = dict[str, bytes]
"""File names and what is in them."""


SIDE = 64


PICTURES = ("png", "jpg", "gif", "bmp", "webp")


ASK = {"image": "<image>\nwhat is the colour", "video": "<image>\nwhat is the colour"}


SAMPLE_SECONDS = 4.0


GONE = re.compile(r"the process that read it died|reading it took more than")
"""Reasons that cannot name the media file: the decoder did not come back."""


MEMORY_LIMIT = 500 * 2**20
"""Most a worker may hold: what it imports takes 150 MB, and the test's own files next to none."""


def truncated(content: bytes, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Cut off at lengths that are denser in the header."""
    for _ in range(count):
        size = int(len(content) * rng.random() ** 2)
        yield f"cut-{size}", content[:size]


def flipped(
    content: bytes, count: int, rng: random.Random, headers: range
) -> Iterator[tuple[str, bytes]]:
    """Some bits are wrong: of two files one in its headers alone, the other anywhere."""
    for i in range(count):
        damaged = bytearray(content)
        where = headers if i % 2 else range(len(content))
        places = [rng.choice(where) for _ in range(rng.choice((1, 1, 2, 8)))]
        for place in places:
            damaged[place] ^= 1 << rng.randrange(8)
        yield f"flip-{i}", bytes(damaged)


def overwritten(content: bytes, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """A stretch is zeros, noise, missing, or there twice."""
    for i in range(count):
        start = rng.randrange(len(content))
        stop = min(len(content), start + rng.choice((4, 16, 100, 1000)))
        middle = (
            bytes(stop - start),
            rng.randbytes(stop - start),
            b"",
            content[start:stop] * 2,
        )[i % 4]
        yield f"over-{i}", content[:start] + middle + content[stop:]


def png(width: int, height: int, pixels: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG with a header that declares a size, without regard to its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


def giant_pictures(pictures: Cases) -> Cases:
    """Pictures that declare far more pixels than they have (all over the limit)."""
    made: Cases = {}
    sizes = (
        (2**31 - 1, 2**31 - 1),
        (10**5, 10**5),
        (2**31 - 1, 1),
        (20_000, 20_000),
        (13_000, 13_000),
    )
    for width, height in sizes:
        made[f"giant-{width}x{height}.png"] = png(width, height)
        bmp = bytearray(pictures["bmp"])
        struct.pack_into("<ii", bmp, 18, width, height)
        made[f"giant-{width}x{height}.bmp"] = bytes(bmp)
    for side in (20_000, 65_500):
        jpg = bytearray(pictures["jpg"])
        struct.pack_into(">HH", jpg, jpg.index(b"\xff\xc0") + 5, side, side)
        made[f"giant-{side}.jpg"] = bytes(jpg)
        gif = bytearray(pictures["gif"])
        struct.pack_into("<HH", gif, 6, side, side)
        made[f"giant-{side}.gif"] = bytes(gif)
    made["giant.webp"] = (
        b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + b"\xff" * 14
    )
    # Compressed a thousandfold: all of it is there.
    made["bomb.png"] = png(20_000, 20_000, bytes(50_000_000))
    text = b"k\0\0" + zlib.compress(bytes(100_000_000))
    extra = struct.pack(">I", len(text)) + b"zTXt" + text
    extra += struct.pack(">I", zlib.crc32(b"zTXt" + text))
    made["bomb-text.png"] = png(8, 8, bytes(8 * 25), extra)
    made["bomb-rows.png"] = png(8, 8, bytes(100_000_000))
    return made


Box = tuple[str, int, int]
"""Name, first byte, bytes, of a part of an MP4 file."""


_PARENTS = {"moov", "trak", "mdia", "minf", "stbl"}


_COUNTED = {"stsz", "stts", "stsc", "stco", "stss", "ctts", "stsd", "dref", "elst"}


def boxes(
    content: bytes, start: int = 0, stop: int | None = None, deep: bool = True
) -> Iterator[Box]:
    """The boxes of a stretch, and those inside of them."""
    stop = len(content) if stop is None else stop
    while start + 8 <= stop:
        size = struct.unpack_from(">I", content, start)[0]
        name = content[start + 4 : start + 8].decode("latin-1")
        yield name, start, size
        if deep and name in _PARENTS:
            yield from boxes(content, start + 8, start + size)
        start += size


def strange_videos(video: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Boxes with wrong sizes, huge counts, times and pictures; boxes that are missing or moved."""

    def changed(place: int, value: int, form: str = ">I") -> bytes:
        damaged = bytearray(video)
        struct.pack_into(form, damaged, place, value)
        return bytes(damaged)

    number = Counter[str]()
    for name, start, size in list(boxes(video)):
        number[name] += 1
        label = f"{name}{number[name]}"
        for value in (0, 7, size - 1, size + 1, 2**31 - 1, 2**32 - 1):
            yield f"{label}-size-{value}", changed(start, value)
        yield f"{label}-renamed", changed(start + 4, 0x66726565)  # free
        yield f"{label}-missing", video[:start] + video[start + size :]
        if name in _COUNTED:
            for value in (0, 2**16, 2**31 - 1, 2**32 - 1):
                yield (
                    f"{label}-count-{value}",
                    changed(start + (16 if name == "stsz" else 12), value),
                )
        if name == "stsz":  # that many samples of one byte each
            yield f"{label}-all", changed(start + 12, 2**32 + 2**31 - 1, ">Q")
        if name == "stts":
            for value in (0, 2**31 - 1, 2**32 - 1):
                yield f"{label}-samples-{value}", changed(start + 16, value)
                yield f"{label}-step-{value}", changed(start + 20, value)
        if name in {"mvhd", "mdhd"}:
            for value in (0, 1, 2**32 - 1):
                yield f"{label}-scale-{value}", changed(start + 20, value)
                yield f"{label}-duration-{value}", changed(start + 24, value)
        if name == "tkhd":
            yield f"{label}-pixels", changed(start + 84, 2**64 - 1, ">Q")
        if name == "stsd":
            yield f"{label}-pixels", changed(start + 16 + 32, 0xFFFFFFFF)
    for parent in ("moov", "stbl"):
        start, size = next((start, size) for name, start, size in boxes(video) if name == parent)
        spans = list(boxes(video, start + 8, start + size, deep=False))
        children = [video[at : at + length] for _, at, length in spans]
        mixed = rng.sample(children, len(children))
        for i, order in enumerate((children[::-1], mixed, children * 2, children[:1] * 50)):
            body = b"".join(order)
            whole = struct.pack(">I4s", 8 + len(body), parent.encode()) + body
            yield f"{parent}-shuffled-{i}", video[:start] + whole + video[start + size :]
    nested = video[start : start + size]
    for _ in range(2000):
        nested = struct.pack(">I4s", 8 + len(nested), b"moov") + nested
    yield "moov-nested", video[: video.index(b"moov") - 4] + nested


def sound_files(folder: Path, rng: np.random.Generator) -> Cases:
    """One good file of each kind, by its suffix."""
    made: Cases = {}
    smooth = rng.integers(0, 256, (4, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    for kind in PICTURES:
        Image.fromarray(smooth[0]).save(folder / f"sound.{kind}")
        made[kind] = (folder / f"sound.{kind}").read_bytes()
    write_mp4(folder / "sound.mp4", list(smooth))
    made["mp4"] = (folder / "sound.mp4").read_bytes()
    for path in folder.glob("sound.*"):
        path.unlink()
    return made


def damaged_media(sound: Cases, seed: int) -> Cases:
    """More than 500 damaged files, by file name."""
    rng = random.Random(seed)
    made: Cases = {}
    for kind, content in sound.items():
        headers = range(min(64, len(content)))
        if kind == "mp4":
            start = content.index(b"moov")
            headers = range(start, len(content))
        elif kind == "jpg":
            headers = range(min(700, len(content)))  # with its tables
        many = 2 if kind == "mp4" else 1
        for name, damaged in (
            *truncated(content, 16 * many, rng),
            *flipped(content, 24 * many, rng, headers),
            *overwritten(content, 12 * many, rng),
        ):
            made[f"{name}.{kind}"] = damaged
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", sound["png"])
    contents = {
        **sound,
        "zip": archive.getvalue(),
        "text": b"no picture at all\n" * 20,
        "json": b'[{"id": 1}]',
        "zeros": bytes(4096),
        "noise": rng.randbytes(4096),
        "empty": b"",
        "byte": b"\x89",
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    }
    for kind, content in contents.items():
        for suffix in ("png", "jpg", "mp4"):
            if kind != suffix:
                made[f"as-{kind}.{suffix}"] = content
    made |= giant_pictures(sound)
    made |= {f"{name}.mp4": content for name, content in strange_videos(sound["mp4"], rng)}
    return made


def record(name: str, number: int) -> dict[str, Any]:
    """A record about one file, with an id that does not tell the file's name."""
    kind = "video" if name.endswith(".mp4") or "." not in name else "image"
    turns = [{"from": "human", "value": ASK[kind]}, {"from": "gpt", "value": "red"}]
    return {"id": f"n{number}", kind: name, "conversations": turns}


def data_section(media: Path, **changes: Any) -> DataSection:
    return replace(
        DataSection(train_json=("x",), media_root=str(media)),
        max_tiles=4,
        max_frames=4,
        batch_size=8,
        workers=2,
        sample_seconds=SAMPLE_SECONDS,
        **changes,
    )


def epoch(dataset: Dataset, data: DataSection) -> Loader:
    """A loader of one epoch over a data set."""
    return Loader(plan_run(dataset, data, 0), dataset)


class MemoryWatch:
    """The most memory that a worker of this process held meanwhile, in bytes."""

    def __init__(self) -> None:
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/status"):
                with contextlib.suppress(OSError, IndexError):
                    status = path.read_text()
                    ours = int(status.split("PPid:")[1].split()[0]) == os.getpid()
                    # Before it becomes a worker, a process shows the memory of this one.
                    if (
                        ours
                        and b"vxl_jax.media.children.process"
                        in path.with_name("cmdline").read_bytes()
                    ):
                        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
                        self.most = max(self.most, peak)


def account(dataset: Dataset, data: DataSection) -> tuple[dict[int, np.ndarray | None], Counter]:
    """Run an epoch: the pixels that each record was delivered with, and what was bad how often."""
    delivered: dict[int, np.ndarray | None] = {}
    bad = Counter((number_of(sample.name), sample.reason) for sample in dataset.bad)
    for batch in epoch(dataset, data).batches():
        for row, sample in enumerate(batch.samples):
            if sample is None:
                continue
            number = number_of(sample.name)
            assert number not in delivered, sample.name
            pixels = None if batch.pixels is None else batch.pixels[row, : sample.frames].copy()
            delivered[number] = pixels
        bad.update((number_of(sample.name), sample.reason) for sample in batch.bad)
    return delivered, bad


def number_of(name: str) -> int:
    """The record's number in `FILE[17] ID`."""
    match = re.search(r"\[(\d+)\]", name)
    assert match, name
    return int(match[1])
