"""Pools of workers."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import FakeReader, FaultyWork
from tests.support.pools import LONG, Pools
from train.data.workers import WorkerPool


@pytest.fixture
def pools(tmp_path: Path) -> Iterator[Pools]:
    """Makes pools of `count` workers that do `actions` on records, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(
            count: int, actions: dict[int, str] | None = None, seconds: float = LONG
        ) -> WorkerPool:
            reader: Any = FakeReader(actions or {}, tmp_path)
            work = FaultyWork(reader, ())
            return stack.enter_context(WorkerPool(work, count, seconds))

        yield make
