"""Data workers: one that dies or hangs costs its record at most, and none outlives its pool."""

import os
import signal
import subprocess
import sys
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train.data.records.reader
import train.data.records.shapes
from tests.support.clock import ChildClock
from tests.support.data import ASK, TALK, open_files, read_from, write_media, write_records
from tests.support.faults import Answer, FakeReader, WorkThatCannotBeRead, WorkThatTells
from tests.support.pools import LONG, Pools, alive, read, started, wait_for
from tests.support.typos import ReaderWithATypo
from train.data.records.sample import BadSample
from train.data.workers import LoadedSample, Measured, ProgramFault, RecordWork, WorkerPool
from train.errors import WorkerError


def is_reading(folder: Path, record: int, process: int) -> bool:
    """Whether a process is the one that has begun with a record last."""
    path = folder / f"started-{record}"
    return path.exists() and path.read_text() == str(process)


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
                assert isinstance(found, LoadedSample)
                np.testing.assert_array_equal(theirs, ours)
                np.testing.assert_array_equal(found.sample.ids, expected.sample.ids)
                np.testing.assert_array_equal(found.stream.kind, expected.stream.kind)
                assert found.sample.blocks == expected.sample.blocks
        modules: Any = pool.measure(0, [-1])
    heavy = {"jax", "jaxlib", "flax", "torch", "transformers", "grain", "orbax", "tensorboardX"}
    assert not heavy & {*modules}
    assert {"train.data.workers", "tokenizers", "PIL"} <= {*modules}


def test_the_module_imports_nothing_heavy():
    code = "import sys, train.data.workers; print(*sys.modules)"
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
        ("unpicklable", "ValueError (<tests.support.faults.Unpicklable"),
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
    with WorkerPool(RecordWork(reader, ()), count, LONG) as pool:
        assert isinstance(pool.load(0, 0, None, out), LoadedSample)
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

    monkeypatch.setattr(train.data.records.shapes, "_choices", typo)
    path = write_records(tmp_path / "x.json", [{"conversations": TALK}] * 3)
    with pytest.raises(ProgramFault, match=r"x\.json\[0\]: KeyError: 'typo'"):
        open_files(path, tmp_path, demo_tokenizer, max_bad_share=1.0)


def test_workers_that_cannot_start_are_an_error(tmp_path: Path):
    reader: Any = FakeReader({}, tmp_path)

    def read_some(pool: WorkerPool) -> None:
        for record in range(4):  # not all of them
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
