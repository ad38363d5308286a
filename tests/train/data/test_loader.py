"""The same batches whoever makes them and from wherever on, and what runs ahead of them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.data import about, as_bytes, load, open_files, write_records
from train.data.dataset import Dataset
from train.data.epochs import padded_share
from train.data.loader import Batch, Loader, Shards, _Budget
from train.errors import WorkerError

TILE = 56 * 56 * 3
LONG = 60.0
"""Seconds that are enough for anything that does not hang."""

# The same batches, whoever makes them.


@pytest.fixture(scope="module")
def records(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of demo records, some that cannot be decoded, some bad; next to `media`."""
    folder = tmp_path_factory.mktemp("records")
    media = shutil.copytree(demo_data / "media", folder / "media")
    every = json.loads((demo_data / "train.json").read_text())
    name = next(r["image"] for r in every if isinstance(r.get("image"), str))
    whole = (media / name).read_bytes()
    (media / "broken.png").write_bytes(whole[: len(whole) // 2])
    every += [{**about(["broken.png"]), "id": i} for i in range(3)] + ["bad", {}]
    return write_records(folder / "x.json", every)


def open_many(records: Path, tokenizer: Any, **data: Any) -> Dataset:
    options = {"batch_size": 5, "shapes": 3, "epochs": (2,), "frame_jitter": 0.5, **data}
    return open_files(records, records.parent / "media", tokenizer, **options)


@pytest.fixture(scope="module")
def expected(records: Path, demo_tokenizer: Any) -> list[tuple[Any, ...]]:
    """All batches of two epochs, made in this process."""
    with open_many(records, demo_tokenizer) as dataset:
        assert len(dataset.bad) == 2
        loader = load(dataset, epochs=(2,))
        batches = [*loader.batches()]
        assert len(batches) == len(loader.plans) > 20
        assert sum(len(batch.bad) for batch in batches) == 6
        kinds = {type(batch.pixels) for batch in batches}
        assert kinds == {np.ndarray, type(None)}
        return [as_bytes(batch) for batch in batches]


def test_batches_begin_anywhere(expected: list[Any], records: Path, demo_tokenizer: Any):
    assert len({repr(batch) for batch in expected}) == len(expected)
    with open_many(records, demo_tokenizer) as dataset:
        for start in range(len(expected)):
            with closing(load(dataset, epochs=(2,)).batches(start)) as batches:
                if start % 6:  # the next alone, as after every step of a run that is cut short
                    assert as_bytes(next(batches)) == expected[start]
                else:
                    assert [as_bytes(batch) for batch in batches] == expected[start:]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers_or_start(
    workers: int, expected: list[Any], records: Path, demo_tokenizer: Any
):
    with open_many(records, demo_tokenizer, workers=workers) as dataset:
        loader = load(dataset, epochs=(2,))
        starts = (0, 7, len(expected) - 1, len(expected)) if workers == 2 else (0,)
        for start in starts:
            found = [as_bytes(batch) for batch in loader.batches(start)]
            assert found == expected[start:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_changes_nothing(workers: int, records: Path, demo_tokenizer: Any):
    found = []
    for cache in (0, 1, 100):
        options: dict[str, Any] = {"cache_mb": cache, "frame_jitter": 0.0, "workers": workers}
        with open_many(records, demo_tokenizer, **options) as dataset:
            loader = load(dataset, epochs=(3,))
            found.append([as_bytes(batch) for batch in loader.batches()])
            assert loader.cache.used <= cache * 2**20
            assert bool(loader.cache.held) == bool(cache)
    assert found[0] == found[1] == found[2]


def test_workers_may_be_killed_at_any_time(expected: list[Any], records: Path, demo_tokenizer: Any):
    with open_many(records, demo_tokenizer, workers=2) as dataset:
        found = []
        for i, batch in enumerate(load(dataset, epochs=(2,)).batches()):
            found.append(as_bytes(batch))
            if i % 10 == 3:
                worker = dataset.pool._workers[i // 10 % 2]
                worker.kill()
    assert found == expected


def test_padding_is_what_is_reported(records: Path, demo_tokenizer: Any):
    with open_many(records, demo_tokenizer) as dataset:
        loader = load(dataset, random=False)
        batches = [*loader.batches()]
        bad = sum(len(batch.bad) for batch in batches)
        lost = dataset.lengths.tokens[-bad:].sum()  # the broken ones stand last
        held = sum(batch.tokens for batch in batches) + lost
        places = sum(batch.token_places for batch in batches)
        assert padded_share(dataset.lengths, loader.plans) == pytest.approx(1 - held / places)


# Several hosts.


def rows(batches: Sequence[Batch], count: int) -> list[tuple[Any, ...]]:
    """What stands in each of the first places of the batches of all hosts, one after the other."""
    found = []
    for batch in batches:
        for i, sample in enumerate(batch.samples):
            streams = [
                np.asarray(value)[:, i] if np.ndim(value) == 3 else np.asarray(value)[i]
                for value in vars(batch.streams).values()
                if np.ndim(value)
            ]
            pixels = None if batch.pixels is None else batch.pixels[i].tobytes()
            found.append((sample and sample.name, [s.tobytes() for s in streams], pixels))
    assert all(row[0] is None for row in found[count:])
    return found[:count]


def test_hosts_share_every_batch(records: Path, demo_tokenizer: Any):
    """Two hosts, then three, then one, changed in the middle of an epoch; five places a batch."""
    with open_many(records, demo_tokenizer) as dataset:
        alone = [*load(dataset, epochs=(2,)).batches()]
        total = len(alone)
        used: list[str] = []
        plan = [
            (0, 3, 2),
            (3, total // 2 + 2, 3),
            (total // 2 + 2, total - 4, 1),
            (total - 4, total, 7),
        ]
        for start, stop, count in plan:
            hosts = [
                load(dataset, epochs=(2,), shards=Shards((i,), count)).batches(start)
                for i in range(count)
            ]
            for number in range(start, stop):
                theirs, one = [next(host) for host in hosts], alone[number]
                places = len(one.samples)
                shapes = {batch.streams.kind.shape for batch in theirs}
                assert len(shapes) == 1  # or the hosts would run different programs
                assert len({None if b.pixels is None else b.pixels.shape for b in theirs}) == 1
                assert {len(batch.samples) for batch in theirs} == {-(-places // count)}
                assert rows(theirs, places) == rows([one], places)
                for name in ("frames", "tokens"):
                    assert sum(getattr(b, name) for b in theirs) == getattr(one, name)
                assert sorted(bad.name for b in theirs for bad in b.bad) == sorted(
                    bad.name for bad in one.bad
                )
                used += [s.name for b in theirs for s in b.samples if s]
                used += [bad.name for b in theirs for bad in b.bad]
            for host in hosts:
                host.close()
        every = Counter(dataset.name(i) for i in range(len(dataset)))
        assert Counter(used) == every + every


# What runs ahead.


@pytest.mark.parametrize("tiles", [100, 40, 11, 0])
def test_batches_that_are_ahead_are_bounded_in_bytes(
    tiles: int,
    expected: list[Any],
    records: Path,
    demo_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    """In a batch, up to 40 tiles."""
    entered: list[int] = []
    used: list[int] = []
    limit = tiles * TILE
    enter = _Budget.enter

    def noted(self: _Budget, number: int, size: int) -> None:
        enter(self, number, size)
        entered.append(size)
        used.append(self.used)
        # A batch that is too large has it alone.
        assert self.used <= limit or self.used == size

    monkeypatch.setattr(_Budget, "enter", noted)
    with open_many(records, demo_tokenizer, workers=2) as dataset:
        loader = load(dataset, epochs=(2,))
        loader.limit = limit
        found = []
        for batch in loader.batches():
            found.append(as_bytes(batch))
            if len(found) == 2:
                time.sleep(0.3)  # a slow step: as much as may be is prepared
                assert sum(entered[2:]) <= max(limit, *entered)
    assert found == expected
    assert len(entered) == len(expected)
    assert max(entered) == 40 * TILE
    assert max(used) == 40 * TILE if tiles <= 40 else 40 * TILE < max(used) <= limit


def test_the_room_of_a_batch_waits_for_its_turn():
    """Later ones do not take the room that an earlier one needs."""
    budget = _Budget(10, start=5)
    order: list[int] = []

    def enter(number: int, size: int) -> None:
        with contextlib.suppress(WorkerError):
            budget.enter(number, size)
            order.append(number)

    def entered() -> list[int]:
        time.sleep(0.1)  # for those that should wait
        return order

    threads = [
        threading.Thread(target=enter, args=item)
        for item in ((8, 99), (7, 4), (9, 0), (6, 6), (10, 0), (5, 4))
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: sorted(order) == [5, 6])  # 10 of 10
    assert sorted(entered()) == [5, 6]
    budget.leave(4)
    wait_for(lambda: sorted(order) == [5, 6, 7])
    budget.leave(6)
    assert sorted(entered()) == [5, 6, 7]  # 8 is over the limit: it waits until it is alone
    budget.leave(4)
    wait_for(lambda: sorted(order) == [5, 6, 7, 8])
    assert sorted(entered()) == [5, 6, 7, 8]
    budget.close()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    assert sorted(order) == [5, 6, 7, 8]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def helpers() -> list[str]:
    """Threads that prepare batches."""
    return [t.name for t in threading.enumerate() if t.name.startswith(("sample", "grain"))]


def wait_for_helpers() -> None:
    wait_for(lambda: not helpers())


@contextlib.contextmanager
def prompt() -> Iterator[None]:
    """Fails if the block waits for a worker that hangs: that would take 300 s."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 100


def test_all_ends_when_the_batches_are_closed(
    expected: list[Any], records: Path, demo_tokenizer: Any
):
    with open_many(records, demo_tokenizer, workers=2) as dataset:
        for taken in (0, 1, 4):
            batches = load(dataset, epochs=(2,)).batches()
            for i in range(taken):
                assert as_bytes(next(batches)) == expected[i]
            with prompt():
                batches.close()
            wait_for_helpers()
        # The workers are there for the next.
        assert as_bytes(next(load(dataset, epochs=(2,)).batches(5))) == expected[5]
        wait_for_helpers()  # also where it is forgotten instead
        processes = [worker.process for worker in dataset.pool._workers]
    assert all(process is None or process.returncode is not None for process in processes)


def test_closing_does_not_wait_for_a_worker_that_hangs(records: Path, demo_tokenizer: Any):
    with open_many(records, demo_tokenizer, workers=1, sample_seconds=30.0, buffer_mb=0) as dataset:
        batches = load(dataset, epochs=(2,)).batches()
        next(batches)
        (worker,) = dataset.pool._workers
        assert worker.process is not None
        os.kill(worker.process.pid, signal.SIGSTOP)
        time.sleep(0.1)
        with prompt():
            batches.close()


def test_an_error_in_any_thread_ends_the_batches(
    records: Path, demo_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    original = Loader._load

    def fails(self: Loader, plan: Any, threads: Any) -> Batch:
        if plan.seed[3] == 3:
            raise RuntimeError("not this one")
        return original(self, plan, threads)

    monkeypatch.setattr(Loader, "_load", fails)
    for workers in (0, 2):
        with open_many(records, demo_tokenizer, workers=workers) as dataset:
            batches = load(dataset).batches()
            for _ in range(3):
                next(batches)
            with prompt(), pytest.raises(RuntimeError, match="not this one"):
                next(batches)
            with pytest.raises(StopIteration):
                next(batches)
            wait_for_helpers()


def test_closing_the_pool_ends_the_batches(records: Path, demo_tokenizer: Any):
    with open_many(records, demo_tokenizer, workers=2, buffer_mb=0) as dataset:
        batches = load(dataset, epochs=(2,)).batches()
        next(batches)
        dataset.pool.close()
        with prompt(), pytest.raises(WorkerError, match="the data processes were ended"):
            for _ in batches:
                pass
        wait_for_helpers()


FORGETFUL = """
from types import SimpleNamespace
from train.data.loader import Loader, Shards

class Plans(list):
    def __getitem__(self, number):
        return SimpleNamespace(bucket=SimpleNamespace(places=1, frames=1))

loader = object.__new__(Loader)
loader.plans, loader.shards, loader.size, loader.limit = Plans([0] * 100), Shards(), 4, 0
loader.pool = SimpleNamespace(count=1, stop=lambda: None)
loader._load = lambda plan, threads: None
batches = loader.batches()
next(batches)
print("done", flush=True)
"""


def test_a_script_that_does_not_close_its_batches_ends():
    script = subprocess.Popen([sys.executable, "-c", FORGETFUL], stdout=subprocess.PIPE, text=True)
    try:
        assert script.stdout is not None
        assert script.stdout.readline() == "done\n"
        script.wait(3)
    finally:
        script.kill()
        script.communicate()
