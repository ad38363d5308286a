"""Thousands of damaged videos of all containers: each is read or refused; nothing leaks."""

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.media.video_kinds import made
from tests.support.damage import GONE, MemoryWatch, flipped, overwritten, truncated
from tests.support.data import ASK, read_from
from train.data.records.sample import BadSample
from train.data.workers import LoadedSample, Measured, RecordWork, WorkerPool

KINDS = (
    *("plain.mp4", "fragmented.mp4", "hidden_start.mp4", "plain.mov", "plain.mkv", "live.webm"),
    *("vp9.webm", "av1.mp4", "hevc_open.mp4", "plain.ts", "joined.ts", "mpeg2.mpg", "dvd.vob"),
    *("mpeg4_b.avi", "packed_b.avi", "h264.avi", "pipe.flv", "wmv2.wmv", "plain.h264", "vp8.ogv"),
)
EACH = 100
"""Damaged files of each kind."""
MEMORY_LIMIT = 600 * 2**20
INTERNALS = re.compile(r"avcodec|Invalid data found|moov atom|\[Errno|returned -?\d|<av\.")
"""What FFmpeg and PyAV say."""


def damaged(name: str) -> Iterator[tuple[str, bytes]]:
    """Damaged copies of a file, by what was done."""
    content = made(name).read_bytes()
    draw = random.Random(name)
    yield from truncated(content, EACH * 3 // 10, draw)
    yield from flipped(content, EACH * 4 // 10, draw, range(min(2000, len(content))))
    yield from overwritten(content, EACH * 3 // 10, draw)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All damaged files, and a sound one of each kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in KINDS:
        os.link(made(name), folder / f"sound-{name}")
        for what, content in damaged(name):
            (folder / f"{what}-{name}").write_bytes(content)
    return folder


def test_damaged_videos_are_read_or_refused_and_nothing_leaks(files: Path, demo_tokenizer: Any):
    names = sorted(path.name for path in files.iterdir())
    assert len(names) > 1900
    records = [{"video": name, "conversations": ASK} for name in names]
    work = RecordWork(read_from(records, files, demo_tokenizer, max_frames=4), ())
    refused: dict[str, str] = {}
    out = np.zeros((4, 56, 56, 3), np.uint8)
    before = _readers()  # of films that other tests have watched
    with MemoryWatch() as memory, WorkerPool(work, 1, 20.0) as pool:
        for record, name in enumerate(names):
            (found,) = pool.measure(0, [record])
            if isinstance(found, Measured):
                answer = pool.load(0, record, None, out[: sum(found.frames)])
                assert isinstance(answer, LoadedSample | BadSample)
                found = answer if isinstance(answer, BadSample) else found
            if isinstance(found, BadSample):
                refused[name] = found.reason
        (reader,) = _readers() - before
        open_files = len(os.listdir(f"/proc/{reader}/fd"))
    for name, reason in refused.items():
        assert not name.startswith("sound-"), reason
        if not GONE.search(reason):
            assert reason.count(name) == 1, reason
            assert "\n" not in reason
            assert not INTERNALS.search(reason), reason
    hung = [reason for reason in refused.values() if GONE.search(reason)]
    assert len(hung) < len(names) / 200, hung
    assert len(refused) > len(names) / 3  # or nothing was damaged
    assert 0 < memory.most < MEMORY_LIMIT
    assert open_files < 20


def _readers() -> set[int]:
    """Processes that read media for this one."""
    found: set[int] = set()
    for path in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            if b"vxl_jax.media.children.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.add(child)
    return found
