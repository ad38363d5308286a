"""Data workers: one that dies or hangs costs its record at most, and none outlives its pool."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train.records
from tests.clock import ChildClock
from tests.data import ASK, TALK, open_files, read_from, write_media, write_records
from tests.faults import SIDE, Answer, FakeReader, FaultyWork, WorkThatCannotBeRead, WorkThatTells
from tests.typos import ReaderWithATypo
from train.errors import WorkerError
from train.records import BadSample
from train.workers import Loaded, Measured, ProgramFault, Work, WorkerPool
from vxl_jax.media import heartbeat
from vxl_jax.media.process import MediaProcess

LONG = 30.0
"""Enough for anything that does not hang."""

Pools = Callable[..., WorkerPool]


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


def is_reading(folder: Path, record: int, process: int) -> bool:
    """Whether a process is the one that has begun with a record last."""
    path = folder / f"started-{record}"
    return path.exists() and path.read_text() == str(process)


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


# What they do.


@pytest.mark.parametrize("count", [0, 1, 3])
def test_all_threads_get_their_own_answers(count: int, pools: Pools):
    pool = pools(count)
    frames = [*np.random.default_rng(0).integers(0, 3000, 40)]  # up to 144 kB
    with ThreadPoolExecutor(5) as threads:
        answers = [
            *threads.map(lambda i: read(pool, i, int(frames[i]), (0, i)), range(len(frames)))
        ]
        measured: list[Any] = [*threads.map(lambda i: pool.measure(i, [i, i + 1]), range(20))]
    processes = {answer.process for answer in answers}
    assert 1 <= len(processes) <= max(1, count)
    assert (os.getpid() in processes) == (count == 0)
    for i, found in enumerate(measured):
        assert [answer.record for answer in found] == [i, i + 1]


def test_pixels_and_measures_are_those_of_this_process(tmp_path: Path, demo_tokenizer: Any):
    media = write_media(tmp_path)
    records = [
        {"conversations": TALK},
        {"image": "a.png", "conversations": ASK},
        {"video": "a.mp4", "conversations": ASK},
        {"image": "cut.png", "conversations": ASK},
        {"image": "gone.png", "conversations": ASK},
        {"video": "frames", "conversations": ASK},
    ]
    work = WorkThatTells(read_from(records, media, demo_tokenizer, frame_jitter=1.0), (2, 4))
    with WorkerPool(work, 1, LONG) as pool:
        everywhere = [*range(len(records))]
        measured = pool.measure(0, everywhere)
        assert measured == work.measure(0, everywhere)
        for i, lengths in enumerate(measured):
            if not isinstance(lengths, Measured):
                continue
            for seed in (None, (0, i)):
                theirs, ours = np.zeros((2, sum(lengths.frames), 56, 56, 3), np.uint8)
                found, expected = pool.load(0, i, seed, theirs), work.load(0, i, seed, ours)
                if isinstance(expected, BadSample):
                    assert found == expected
                    continue
                assert isinstance(found, Loaded)
                np.testing.assert_array_equal(theirs, ours)
                np.testing.assert_array_equal(found.sample.ids, expected.sample.ids)
                np.testing.assert_array_equal(found.stream.kind, expected.stream.kind)
                assert found.sample.blocks == expected.sample.blocks
        modules: Any = pool.measure(0, [-1])
    heavy = {"jax", "jaxlib", "flax", "torch", "transformers", "grain", "orbax", "tensorboardX"}
    assert not heavy & {*modules}
    assert {"train.workers", "tokenizers", "PIL"} <= {*modules}


def test_the_module_imports_nothing_heavy():
    code = "import sys, train.workers; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    heavy = {"jax", "torch", "transformers", "flax", "grain", "optax", "matplotlib"}
    assert not heavy & {*result.stdout.split()}


# Workers that die.


def test_a_worker_that_is_killed_while_it_waits(pools: Pools):
    pool = pools(1)
    for i in range(3):
        process = read(pool, i).process
        os.kill(process, signal.SIGKILL)
        if i:  # else it may be still there when the next request comes
            wait_for(lambda process=process: not alive(process), "the worker is dead")
        answer = read(pool, 10 + i)
        assert isinstance(answer, Answer), answer
        assert answer.process != process
    assert isinstance(pool.measure(0, [1, 2])[1], Answer)


def test_all_workers_are_killed_while_they_wait(pools: Pools):
    pool = pools(3, {i: "sleep 0.2" for i in range(100, 103)})
    with ThreadPoolExecutor(6) as threads:
        processes = {a.process for a in threads.map(lambda i: read(pool, i), range(100, 103))}
        for process in processes:
            os.kill(process, signal.SIGKILL)
        answers = [*threads.map(lambda i: read(pool, i), range(12))]
    assert [type(answer) for answer in answers] == [Answer] * 12
    assert not {answer.process for answer in answers} & processes


def test_a_worker_that_is_killed_while_it_reads(pools: Pools, tmp_path: Path):
    """As the system kills one when memory runs out: not the record's fault."""
    pool = pools(1, {5: "once sleep 100"})
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(read, pool, 5)
        process = started(tmp_path, 5)
        os.kill(process, signal.SIGKILL)
        answer = asked.result(LONG)
    assert isinstance(answer, Answer), answer
    assert answer.process != process


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("SIGKILL", "3.png: the process that read it died (signal SIGKILL)"),
        ("SIGSEGV", "3.png: the process that read it died (signal SIGSEGV)"),
        ("exit", "3.png: the process that read it died (exit status 7)"),
    ],
)
def test_a_record_that_kills_its_workers_is_bad(action: str, reason: str, pools: Pools):
    pool = pools(2, {3: action})
    with ThreadPoolExecutor(2) as threads:
        answers = [*threads.map(lambda i: read(pool, i), range(8))]
    assert answers.pop(3) == BadSample("0[3]", reason)
    assert [answer.record for answer in answers] == [0, 1, 2, 4, 5, 6, 7]
    found: list[Any] = [*pool.measure(0, [2, 3, 4])]
    assert found.pop(1) == BadSample("0[3]", reason)
    assert [answer.record for answer in found] == [2, 4]


@pytest.mark.parametrize(("action", "status"), [("interrupt", "signal SIGINT"), ("leave", "3")])
def test_a_worker_that_ends_by_itself_is_named_by_its_status(
    action: str, status: str, pools: Pools
):
    bad = read(pools(1, {3: action}), 3)
    assert isinstance(bad, BadSample)
    assert status in bad.reason


@pytest.mark.parametrize(
    ("action", "reason"),
    [("memory", "MemoryError ("), ("system", "OSError ([Errno 5] Input/output error)")],
)
def test_failures_of_the_machine_cost_their_record_alone(action: str, reason: str, pools: Pools):
    pool = pools(1, {3: action})
    before = read(pool, 1)
    bad = read(pool, 3)
    assert isinstance(bad, BadSample)
    assert bad.name == "0[3]"
    assert bad.reason.startswith(f"3.png: {reason}")
    found = pool.measure(0, [2, 3, 4])
    assert [type(answer) for answer in found] == [Answer, BadSample, Answer]
    assert read(pool, 5).process == before.process  # the worker is as good as before


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("deep", "RecursionError (maximum recursion depth"),
        ("missing", "KeyError ('x')"),
        ("unpicklable", "ValueError (<tests.faults.Unpicklable"),
        ("odd", "ValueError (odd)"),
    ],
)
def test_any_other_exception_is_a_fault_of_the_program(action: str, reason: str, pools: Pools):
    pool = pools(1, {3: action})
    before = read(pool, 1)
    start = "fault of this program, not of the data, at 0[3]: "
    with pytest.raises(ProgramFault) as caught:
        read(pool, 3)
    assert str(caught.value).startswith(start + reason)
    with pytest.raises(ProgramFault, match=r"at 0\[2\] to 0\[4\]: "):
        pool.measure(0, [2, 3, 4])
    assert read(pool, 5).process == before.process


@pytest.mark.parametrize("count", [0, 1])
def test_a_typo_in_the_reader_names_the_record_and_its_line(
    count: int, tmp_path: Path, demo_tokenizer: Any
):
    records = [{"id": "one", "conversations": TALK}] * 3
    plain = read_from(records, write_media(tmp_path), demo_tokenizer)
    reader = ReaderWithATypo(plain.sources, plain.indices, plain.preparer, plain.tokenizer)
    out = np.zeros((0, 56, 56, 3), np.uint8)
    message = "fault of this program, not of the data, at x.json[1] one: KeyError: 'wrong'"
    with WorkerPool(Work(reader, ()), count, LONG) as pool:
        assert isinstance(pool.load(0, 0, None, out), Loaded)
        for ask in (lambda: pool.measure(0, [0, 1, 2]), lambda: pool.load(0, 1, None, out)):
            with pytest.raises(ProgramFault) as caught:
                ask()
            assert str(caught.value) == message
            shown = "".join(traceback.format_exception(caught.value))
            assert 'return {"right": 1}["wrong"]' in shown
            assert "typos.py" in shown
        assert isinstance(pool.measure(0, [2])[0], Measured)


def test_a_typo_ends_a_run_over_all_records(
    tmp_path: Path, demo_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    def typo(record: Any) -> None:
        raise KeyError("typo")

    monkeypatch.setattr(train.records, "_choices", typo)
    path = write_records(tmp_path / "x.json", [{"conversations": TALK}] * 3)
    with pytest.raises(ProgramFault, match=r"x\.json\[0\]: KeyError: 'typo'"):
        open_files(path, tmp_path, demo_tokenizer, max_bad_share=1.0)


def test_workers_that_cannot_start_are_an_error(tmp_path: Path):
    reader: Any = FakeReader({}, tmp_path)

    def read_some(pool: WorkerPool) -> None:
        for record in range(4):  # not all that there are
            read(pool, record)

    with (
        WorkerPool(WorkThatCannotBeRead(reader, ()), 1, LONG) as pool,
        pytest.raises(WorkerError, match=r"ended 3 times as it started \(exit status 7\)"),
    ):
        read_some(pool)


def test_a_system_without_room_for_a_worker_is_an_error(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object) -> None:
        raise OSError(24, "Too many open files")

    pool = pools(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", fails)
        with pytest.raises(WorkerError, match="Too many open files"):
            read(pool, 1)
    assert isinstance(read(pool, 1), Answer)


# Workers that hang. Time passes, 1 s at each look, in a worker that reads record 3.

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


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        ({"wall": 1.0}, 0.5),  # up to 0.5 s of CPU time, or 5 s of wall time
        ({"cpu": 1.0}, 5.0),
    ],
)
@pytest.mark.parametrize("ask", ["load", "measure"])
def test_only_time_of_one_record_counts(
    ask: str,
    times: dict[str, float],
    seconds: float,
    pools: Pools,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Each of three takes 4 s: together they take more than one may."""
    looks: Counter[int] = Counter()

    def busy(process: int) -> bool:
        for record in range(3):
            end = tmp_path / f"go-{record}"
            if is_reading(tmp_path, record, process) and not end.exists():
                looks[record] += 1
                if looks[record] == 4:
                    end.touch()
                return True
        return False

    clock = ChildClock(busy, **times)
    clock.set(monkeypatch)
    pool = pools(1, {i: f"until {tmp_path}/go-{i}" for i in range(3)}, seconds)
    if ask == "measure":
        found: list[Any] = [*pool.measure(0, range(3))]
    else:
        with ThreadPoolExecutor(3) as threads:  # two wait for the worker
            found = [*threads.map(lambda i: read(pool, i), range(3))]
    assert [type(answer) for answer in found] == [Answer] * 3
    assert len({answer.process for answer in found}) == 1
    assert clock.now + clock.used[found[0].process] == 12


def test_measuring_beats_for_each_record(
    tmp_path: Path, demo_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    reader = read_from([{"conversations": TALK}] * 3, write_media(tmp_path), demo_tokenizer)
    beats: list[int] = []
    monkeypatch.setattr(heartbeat, "_listener", lambda: beats.append(1))
    Work(reader, ()).measure(0, [0, 1, 2])
    assert len(beats) == 3


# Their end.


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
from tests.faults import SIDE, FakeReader, FaultyWork
from train.workers import WorkerPool

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
