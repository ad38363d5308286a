"""Data workers that hang, and the end of all of them."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.clock import ChildClock
from tests.support.data import TALK, read_from, write_media
from tests.support.faults import Answer, FakeReader, FaultyWork
from tests.support.pools import LONG, Pools, alive, children, read, started, wait_for
from tests.train.data.test_workers import is_reading
from train.data.records.sample import BadSample
from train.data.workers import RecordWork, WorkerPool
from train.errors import WorkerError
from vxl_jax.media import heartbeat
from vxl_jax.media.children.process import MediaProcess

HUNG = (
    "3.png: the process that read it {}; the file may make its decoder loop, or its disk may not "
    "answer: check both, or raise data.sample_seconds ({})"
)


def test_a_record_that_spins_is_bad(pools: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ChildClock(lambda process: is_reading(tmp_path, 3, process), cpu=1.0).set(monkeypatch)
    pool = pools(2, {3: "spin"}, 5.0)
    with ThreadPoolExecutor(2) as threads:
        answers = [*threads.map(lambda i: read(pool, i), range(8))]
    hung = BadSample("0[3]", HUNG.format("made no progress in 5 s of CPU time", 5))
    assert answers.pop(3) == hung
    assert [answer.record for answer in answers] == [0, 1, 2, 4, 5, 6, 7]
    wait_for(lambda: not alive(started(tmp_path, 3)), "the worker that hung is gone")
    found: list[Any] = [*pool.measure(0, [2, 3, 4])]
    assert found.pop(1) == hung
    assert [answer.record for answer in found] == [2, 4]


@pytest.mark.parametrize("action", ["sleep 100", "SIGSTOP"])
def test_a_record_that_waits_for_ever_is_bad(
    action: str, pools: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ChildClock(lambda process: is_reading(tmp_path, 3, process), wall=1.0).set(monkeypatch)
    pool = pools(1, {3: action}, 0.5)
    hung = BadSample("0[3]", HUNG.format("gave no sign of life for 5 s", 0.5))
    assert read(pool, 3) == hung
    wait_for(lambda: not alive(started(tmp_path, 3)), "the worker that hung is gone")
    assert isinstance(read(pool, 4), Answer)


@pytest.mark.parametrize(
    ("action", "times"), [("once spin", {"cpu": 1.0}), ("once SIGSTOP", {"wall": 1.0})]
)
def test_a_record_that_hangs_once_is_good(
    action: str,
    times: dict[str, float],
    pools: Pools,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    clock = ChildClock(lambda process: is_reading(tmp_path, 3, process), **times)
    clock.set(monkeypatch)
    answer = read(pools(1, {3: action}, 0.5), 3)
    assert isinstance(answer, Answer), answer
    assert answer.process != started(tmp_path, 3)


def test_measuring_beats_for_each_record(
    tmp_path: Path, demo_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    reader = read_from([{"conversations": TALK}] * 3, write_media(tmp_path), demo_tokenizer)
    beats: list[int] = []
    monkeypatch.setattr(heartbeat, "_listener", lambda: beats.append(1))
    RecordWork(reader, ()).measure(0, [0, 1, 2])
    assert len(beats) == 3


def test_resting_workers_are_started_again_when_they_are_needed(pools: Pools):
    before = children()
    pool = pools(2, {100: "sleep 0.2", 101: "sleep 0.2"})
    pool.rest()  # before any was started
    processes: set[int] = set()
    for _ in range(2):
        with ThreadPoolExecutor(2) as threads:
            answers = [*threads.map(lambda i: read(pool, i), (100, 101))]
        assert not processes & {answer.process for answer in answers}
        processes = {answer.process for answer in answers}
        pool.rest()
        assert children() == before
    assert isinstance(read(pool, 1), Answer)


def test_closing_ends_workers_that_are_busy(pools: Pools, tmp_path: Path):
    before = children()
    pool = pools(2, {0: "sleep 100", 1: "SIGSTOP"})
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(read, pool, i) for i in range(4)]  # two wait for a worker
        for i in (0, 1):
            started(tmp_path, i)
        pool.close()
        for answer in asked:
            with pytest.raises(WorkerError, match="the data processes were ended"):
                answer.result(LONG)
    assert children() == before
    with pytest.raises(WorkerError, match="the data processes were ended"):
        read(pool, 5)
    pool.close()
    pool.rest()


def test_closing_waits_for_the_end_of_busy_workers(pools: Pools, tmp_path: Path):
    before = children()
    pool = pools(2, {0: "sleep 100"})  # the other one is idle
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(read, pool, 0)
        started(tmp_path, 0)
        pool.close()
        assert children() == before
        with pytest.raises(WorkerError, match="the data processes were ended"):
            asked.result(LONG)


def test_stopping_gives_up_records_and_keeps_the_pool(pools: Pools, tmp_path: Path):
    pool = pools(1, {0: "sleep 100", 1: "sleep 100"})
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(read, pool, 0)]
        started(tmp_path, 0)
        asked.append(threads.submit(read, pool, 1))  # waits for the worker
        wait_for(lambda: pool._idle.not_empty._waiters, "the other thread waits")
        pool.stop()
        for answer in asked:
            with pytest.raises(WorkerError, match="the data processes were ended"):
                answer.result(LONG)
    assert not (tmp_path / "started-1").exists()
    assert isinstance(read(pool, 2), Answer)


def test_closing_that_was_interrupted_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As by the second of two Ctrl-C."""
    reader: Any = FakeReader({}, tmp_path)
    pool = WorkerPool(FaultyWork(reader, ()), 1, LONG)  # closed by no fixture, which might hang
    read(pool, 1)

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MediaProcess, "end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.close()
    again = threading.Thread(target=pool.close, daemon=True)
    again.start()
    again.join(LONG)
    assert not again.is_alive()


def test_closing_while_a_worker_starts_leaves_none(pools: Pools, monkeypatch: pytest.MonkeyPatch):
    starting, closing = threading.Event(), threading.Event()
    start = MediaProcess._start

    def slow(self: Any) -> None:
        starting.set()
        closing.wait(LONG)
        start(self)

    monkeypatch.setattr(MediaProcess, "_start", slow)
    before = children()
    pool = pools(1)
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(read, pool, 1)
        starting.wait(LONG)
        closed = threads.submit(pool.close)
        wait_for(lambda: pool.closed, "the pool closes")
        closing.set()
        closed.result(LONG)
        with pytest.raises(WorkerError, match="the data processes were ended"):
            asked.result(LONG)
    assert children() == before


def test_pools_that_were_closed_leave_nothing_open(pools: Pools):
    def opened() -> list[str]:
        gc.collect()
        found = []
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(os.readlink(path))
        return sorted(name for name in found if "vxl-pixels" in name or "socket" in name)

    before, threads = opened(), threading.active_count()
    for _ in range(2):
        pool = pools(2, {100: "sleep 0.2", 101: "sleep 0.2"})
        with ThreadPoolExecutor(2) as executor:
            [*executor.map(lambda i, pool=pool: read(pool, i), (100, 101))]
        pool.close()
    wait_for(lambda: threading.active_count() == threads, "no thread is left")
    assert opened() == before


PARENT = """
import sys, threading, time
from pathlib import Path
import numpy as np
from tests.support.faults import SIDE, FakeReader, FaultyWork
from train.data.workers import WorkerPool

actions = {1: "sleep 100", 2: "sleep 0.5"}
pool = WorkerPool(FaultyWork(FakeReader(actions, Path(sys.argv[1])), ()), 2, 100)
def read(record):
    return pool.load(0, record, None, np.zeros((1, SIDE, SIDE, 3), np.uint8))
threading.Thread(target=read, args=(1,)).start()
print(read(2).process, flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(how: signal.Signals, tmp_path: Path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        idle = int(parent.stdout.readline())
        busy = started(tmp_path, 1)
        assert idle != busy
        assert alive(idle)
        assert alive(busy)
    finally:
        parent.send_signal(how)
        parent.wait(LONG)
        parent.communicate()
    for process in (idle, busy):
        wait_for(lambda process=process: not alive(process), "the worker is gone")
