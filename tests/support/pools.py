"""Pools of workers that fail as they are told."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.faults import SIDE, Answer
from train.data.workers import WorkerPool

LONG = 30.0
"""Enough for anything that does not hang."""


Pools = Callable[..., WorkerPool]


def read(pool: WorkerPool, record: int, frames: int = 2, seed: Any = None) -> Any:
    """The answer for a record, whose pixels are checked."""
    out = np.full((frames, SIDE, SIDE, 3), 255, np.uint8)
    answer: Any = pool.load(0, record, seed, out)
    if isinstance(answer, Answer):
        assert (answer.record, answer.seed) == (record, seed)
        assert (out[:, 1:] == record % 256).all()
        assert out[:, 0, 0, 0].tolist() == [i % 256 for i in range(frames)]
    return answer


def wait_for(condition: Callable[[], Any], what: str, seconds: float = LONG) -> Any:
    """Its first true value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {what}")


def started(folder: Path, record: int) -> int:
    """The process that has begun with a record."""
    path = folder / f"started-{record}"
    return int(wait_for(lambda: path.exists() and path.read_text(), f"record {record} begins"))


def alive(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children() -> set[int]:
    """Processes that this one has started and not cleared away."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found |= {*map(int, path.read_text().split())}
    return found
