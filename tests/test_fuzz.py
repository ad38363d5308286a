"""Hundreds of damaged files, made by seed: each costs its own sample at most, and none is lost.

What a damaged file becomes is not fixed (some still decode); that it is accounted for once, that
its neighbours are untouched, and that nothing stops, hangs or fills the memory, is.
"""

import contextlib
import datetime
import io
import json
import os
import random
import re
import signal
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
import pytest
from PIL import Image

from train.batches import Loader
from train.config import DataSection
from train.dataset import Dataset, open_dataset
from train.demo_drawing import write_mp4
from train.errors import DataError
from train.plan import plan_run
from vxl_jax.config import tiny
from vxl_jax.media import VideoFile, grid_pinpoints, load_image, tile_image

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


# Damage.


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
    """A PNG with a header that declares a size, whatever its pixels are."""

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


# A run over them.


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
                    if ours and b"vxl_jax.media.process" in path.with_name("cmdline").read_bytes():
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


def expected_pixels(path: Path) -> np.ndarray:
    """What a good file is to become."""
    size = tiny().vision.image_size
    if path.suffix == ".mp4":
        return VideoFile(path).read(range(4), size)
    return tile_image(load_image(path), grid_pinpoints(size, 4, 2), size)


def test_damaged_media_cost_their_own_samples_alone(tmp_path: Path, demo_tokenizer: Any):
    media = tmp_path / "media"
    media.mkdir()
    sound = sound_files(tmp_path, np.random.default_rng(0))
    damaged = damaged_media(sound, seed=0)
    assert len(damaged) >= 500
    names: list[str] = []
    good: dict[int, Path] = {}
    for i, (name, content) in enumerate(damaged.items()):
        if i % 6 == 0:  # good ones in between
            kind = list(sound)[i // 6 % len(sound)]
            good[len(names)] = media / f"good-{i}.{kind}"
            good[len(names)].write_bytes(sound[kind])
            names.append(f"good-{i}.{kind}")
        if i % 40 == 0 and not name.endswith(".mp4"):  # a folder of frames
            folder = media / f"folder-{i}"
            folder.mkdir()
            for frame in ("1.png", name, "z.png"):
                (folder / frame).write_bytes(content if frame == name else sound["png"])
            names.append(folder.name)
        (media / name).write_bytes(content)
        names.append(name)
    path = tmp_path / "all.json"
    path.write_text(json.dumps([record(name, i) for i, name in enumerate(names)]))
    data = data_section(media)
    with (
        MemoryWatch() as memory,
        open_dataset((str(path),), data, tiny(), demo_tokenizer) as dataset,
    ):
        delivered, bad = account(dataset, data)
    left_out = [number for number, _ in bad]
    assert sorted([*delivered, *left_out]) == list(range(len(names)))  # once, and not both
    for number, reason in bad:
        assert names[number] in reason or GONE.search(reason), (names[number], reason)
    for number, file in good.items():
        np.testing.assert_array_equal(delivered[number], expected_pixels(file), err_msg=str(file))
    assert len(left_out) > len(damaged) / 2  # or the damage is none
    assert 0 < memory.most < MEMORY_LIMIT


# Annotation files.

TALK = [{"from": "human", "value": "what is the colour"}, {"from": "gpt", "value": "red"}]
SOUND = [
    {"id": f"n{i}", "conversations": TALK} | ({"image": "a.png"} if i % 2 else {}) for i in range(6)
]
for _record in SOUND[1::2]:
    _record["conversations"] = [{**TALK[0], "value": ASK["image"]}, TALK[1]]

STRANGE: tuple[str, ...] = (
    *("null", "true", "0", "-1", "3.5", "1e308", "1e400", "-0.0", "NaN", "Infinity", "1" * 400),
    *("1" * 5000, '""', '" "', '"a.png"', '"<image>"', '"\\u0000"', '"\\ud83d"', '"\\udc00x"'),
    *("[]", "{}", "[[]]", "[{}]", "[null]", '["a.png"]', '["a.png", null]', "[1, 2]", '[""]'),
    *(
        '{"a": 1}',
        '"..\u002f..\u002fetc"',
        '"/etc/passwd"',
        '"' + "x" * 5000 + '"',
        "[" * 900 + "]" * 900,
    ),
    *(
        '[["a.png"]]',
        '{"from": "human"}',
        '"a.png\\u0000b"',
        '"."',
        '"~"',
        "[true]",
        "[-1]",
        "[1e308]",
    ),
)
"""JSON values for fields that want another."""


def wrong_records() -> list[str]:
    """Records of which one field is another type or a strange value, as JSON."""
    made = []
    plain = {
        "id": '"x"',
        "image": '"a.png"',
        "conversations": json.dumps(SOUND[1]["conversations"]),
    }
    film = {**plain, "video": '"a.mp4"'}
    del film["image"]
    fields: list[tuple[dict[str, str], str]] = [
        *((plain, name) for name in (*plain, "video", "start", "question_type", "choices")),
        *((film, name) for name in ("video", "start", "end", "fps")),
    ]
    for base, field in fields:
        for value in STRANGE:
            texts = {**base, field: value}
            made.append("{" + ", ".join(f'"{k}": {v}' for k, v in texts.items()) + "}")
    for value in STRANGE:
        made.append(value)  # the whole record
        for turns in (
            '[{"from": %s, "value": "a"}, {"from": "gpt", "value": "b"}]',
            '[{"from": "human", "value": %s}, {"from": "gpt", "value": "b"}]',
            '[{"from": "human", "value": "a"}, {"from": "gpt", "value": %s}]',
            '[{"from": "human", "value": "a"}, %s]',
        ):
            made.append('{"conversations": ' + turns % value + "}")
    return made


@pytest.fixture(scope="module")
def small_media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.png and a.mp4."""
    folder = tmp_path_factory.mktemp("media")
    sound = sound_files(folder, np.random.default_rng(1))
    for kind in ("png", "mp4"):
        (folder / f"a.{kind}").write_bytes(sound[kind])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_wrong_fields_cost_their_own_records_alone(
    workers: int, tmp_path: Path, small_media: Path, demo_tokenizer: Any
):
    records = wrong_records()
    assert len(records) > 500
    records = [text for i in records for text in (i, json.dumps(SOUND[0]))]
    path = tmp_path / "all.json"
    path.write_text("[" + ",\n".join(records) + "]")
    data = replace(data_section(small_media), workers=workers)
    with at_most(60), open_dataset((str(path),), data, tiny(), demo_tokenizer) as dataset:
        delivered, bad = account(dataset, data)
    assert sorted([*delivered, *(number for number, _ in bad)]) == list(range(len(records)))
    assert set(range(1, len(records), 2)) <= delivered.keys()
    # Each is refused in words, not by what happened to fail.
    assert not [reason for _, reason in bad if re.match(r"\w+(Error|Exception) \(", reason)]
    assert not [reason for _, reason in bad if GONE.search(reason)]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """A table."""
    import pyarrow
    from pyarrow.parquet import write_table

    file = io.BytesIO()
    write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def damaged_annotations(seed: int) -> Cases:
    """Damaged annotation files, by file name."""
    rng = random.Random(seed)
    texts = {
        "json": json.dumps(SOUND, indent=1).encode(),
        "jsonl": b"".join(json.dumps(record).encode() + b"\n" for record in SOUND),
        "parquet": parquet([{"image": None, **record} for record in SOUND]),
    }
    made: Cases = {}
    for kind, content in texts.items():
        for name, damaged in (
            *truncated(content, 30, rng),
            *flipped(content, 60, rng, range(max(0, len(content) - 800), len(content))),
            *overwritten(content, 30, rng),
        ):
            made[f"{name}.{kind}"] = damaged
        for other, damaged in texts.items():
            if other != kind:
                made[f"as-{other}.{kind}"] = damaged
    one = json.dumps(SOUND[0])
    whole = {
        **{f"strange-{i}": value.encode() for i, value in enumerate(STRANGE)},
        **{f"list-of-{i}": f"[{value}]".encode() for i, value in enumerate(STRANGE)},
        **{f"beside-{i}": f"[{one},\n{value}]".encode() for i, value in enumerate(STRANGE)},
        "empty": b"",
        "space": b" \n\t\n ",
        "nul": bytes(1000),
        "nul-inside": f"[{one}, ".encode() + b'"\0"' + b"]",
        "nul-between": f"[{one}\0,{one}]".encode(),
        "latin-1": b'[{"id": "caf\xe9"}]',
        "utf-16": f"[{one}]".encode("utf-16"),
        "utf-32": f"[{one}]".encode("utf-32"),
        "mark": b"\xef\xbb\xbf" + f"[{one}]".encode(),
        "half-mark": b"\xef\xbb" + f"[{one}]".encode(),
        "surrogate": b'["\xed\xa0\x80"]',
        "deep": b"[" * 200_000,
        "deep-closed": b"[" * 200_000 + b"]" * 200_000,
        "deep-record": b"[" + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]",
        "deep-beside": f"[{one}, ".encode() + b"[" * 100_000 + b"]" * 100_000 + b"]",
        "long-string": f'[{one}, "{"x" * 20_000_000}"]'.encode(),
        "long-escapes": f"[{one}, ".encode() + b'"' + b"\\\\" * 5_000_000 + b'"]',
        "long-open": f'[{one}, "{"x" * 20_000_000}'.encode(),
        "long-number": f"[{one}, {'1' * 5_000_000}]".encode(),
        "long-space": b"[" + b" " * 20_000_000 + f"{one}]".encode(),
        "quotes": b'["' * 100_000,
        "commas": b"[" + b"," * 100_000 + b"]",
        "noise": rng.randbytes(100_000),
        "zip": b"PK\3\4" + rng.randbytes(1000),
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    }
    for name, content in whole.items():
        made |= {f"{name}.{kind}": content for kind in ("json", "jsonl")}
    tables: dict[str, list[dict[str, Any]]] = {
        "numbers": [{"conversations": 1}],
        "texts": [{"conversations": "what"}],
        "bytes": [{"conversations": TALK, "image": {"bytes": b"x", "path": "a.png"}}],
        "nothing": [{"conversations": None}],
        "huge": [{"id": 2**63 - 1, "conversations": TALK}],
        "times": [{"id": datetime.datetime(2020, 1, 1), "conversations": TALK}],
        "floats": [{"id": float("nan"), "conversations": TALK, "start": float("inf")}],
        "no-columns": [{}],
    }
    made |= {f"table-{name}.parquet": parquet(rows) for name, rows in tables.items()}
    return made


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail where the time is over."""

    def stop(*_: object) -> None:
        raise AssertionError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_damaged_annotations_are_refused_or_used(
    tmp_path: Path, small_media: Path, demo_tokenizer: Any
):
    cases = damaged_annotations(seed=0)
    assert len(cases) >= 500
    data = replace(data_section(small_media), workers=0, cache_dir=str(tmp_path / "cache"))
    refused = 0
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with at_most(20):
            try:
                dataset = open_dataset((str(path),), data, tiny(), demo_tokenizer)
            except DataError as error:
                shown = str(error)
                assert str(path) in shown, (name, shown)
                str(error).encode()  # it can be printed
                refused += 1
                continue
            with dataset:
                delivered, bad = account(dataset, data)
        numbers = sorted([*delivered, *(number for number, _ in bad)])
        assert numbers == list(range(dataset.counts[0].records)), name
        assert delivered, name
        path.unlink()
    assert len(cases) / 5 < refused < len(cases) * 4 / 5, refused
