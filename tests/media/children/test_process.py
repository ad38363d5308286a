"""Child processes of decoders: crashes and hangs become errors, and none leaves anything behind."""

import contextlib
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.clock import ChildClock
from tests.support.faults import HandlerThatCannotBeRead, answer, burn
from vxl_jax.errors import MediaError
from vxl_jax.media.children import process as module
from vxl_jax.media.children.process import (
    CannotStart,
    HandlerError,
    Hung,
    MediaProcess,
    ProcessDied,
    Stopped,
)

LONG = 30.0
"""Enough for anything that does not hang."""

HANDLER = pickle.dumps(answer)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Its first true value."""
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {LONG} s: {what}")


def state_of(process: int) -> str:
    """Its letter: T is stopped, Z is a zombie."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def opened() -> list[str]:
    """Memory files, sockets and deleted files that this process holds, and its children."""
    gc.collect()
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(path))
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [f"process {number}" for number in path.read_text().split()]
    return sorted(
        name
        for name in found
        if any(kind in name for kind in ("vxl-pixels", "socket", "deleted", "process"))
    )


# Answers.


def test_answers_and_pixels(child: MediaProcess):
    assert child.ask(("none",), LONG)
    for size in (0, 1, 100, 10):  # grows, and is used again
        out = np.full((size, 9, 9, 3), 255, np.uint8)
        assert child.ask(("fill", size), LONG, out) == out.shape
        assert (out == size).all()
    large = os.urandom(3_000_000)  # more than a socket holds
    assert child.ask(("echo", large), LONG) == large
    assert child.ask(("echo", None), LONG) is None
    part = np.zeros((4, 6, 3), np.uint8)
    child.ask(("fill", 5), LONG, part[::2, 1:3])  # not contiguous
    assert part.sum() == 5 * 2 * 2 * 3
    assert (part[::2, 1:3] == 5).all()


def test_the_state_of_a_child(child: MediaProcess):
    (theirs, ours), kept = os.pipe(), os.dup(0)
    try:
        os.dup2(theirs, 0)  # tests have no input
        state = child.ask(("state",), LONG)
    finally:
        os.dup2(kept, 0)
        for number in (theirs, ours, kept):
            os.close(number)
    assert child.process is not None
    assert state["session"] == child.process.pid
    assert state["input"] == os.devnull
    assert state["sigterm"] == signal.SIG_IGN
    assert module.KEEP_MEMORY.items() <= state["environment"].items()


def test_a_child_imports_nothing_heavy():
    code = "import sys, vxl_jax.media.children.process; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    names = {name.partition(".")[0] for name in result.stdout.split()}
    assert not names & {"jax", "flax", "torch", "transformers", "tokenizers", "train", "matplotlib"}


def test_memory_is_limited(child: MediaProcess):
    assert child.ask(("allocate", 2**20), LONG) == 2**20
    before = child.ask(("process",), LONG)
    with pytest.raises(HandlerError, match="MemoryError"):
        child.ask(("allocate", module.MEMORY_BYTES), LONG)
    assert child.ask(("process",), LONG) == before


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("media", "MediaError (a.mp4: is damaged; replace it)"),
        ("unpicklable", "ValueError (<tests.support.faults.Unpicklable"),
        ("unreadable", "Unreadable (one)"),
        ("speechless", "Speechless ()"),
        ("unknown", "KeyError ('unknown')"),
    ],
)
def test_an_exception_of_the_handler_arrives(error: str, text: str, child: MediaProcess):
    before = child.ask(("process",), LONG)
    out = np.full(3, 9, np.uint8) if error == "media" else None
    with pytest.raises(HandlerError) as caught:
        child.ask(("raise", error), LONG, out)
    assert str(caught.value).startswith(text)
    assert out is None or (out == 9).all()
    original = caught.value.original
    if error == "media":
        assert type(original) is MediaError
        assert str(original) == "a.mp4: is damaged; replace it"
    assert (original is None) == (error in ("unpicklable", "unreadable"))
    assert child.ask(("process",), LONG) == before


def test_an_answer_that_does_not_pickle_is_an_error(child: MediaProcess):
    with pytest.raises(HandlerError, match="pickle"):
        child.ask(("function",), LONG)
    assert child.ask(("none",), LONG)


# Death.


def test_a_child_that_dies_is_replaced(child: MediaProcess):
    before = child.ask(("process",), LONG)
    with pytest.raises(ProcessDied, match=r"^signal SIGSEGV$"):
        child.ask(("kill",), LONG)
    with pytest.raises(ProcessDied, match=r"^exit status 7$"):
        child.ask(("exit", 7), LONG)
    assert child.process is None
    assert child.ask(("process",), LONG) != before


def test_a_child_that_dies_before_it_begins_is_replaced(child: MediaProcess):
    before = child.ask(("process",), LONG)
    child.kill()
    after = child.ask(("process",), LONG)
    assert after != before
    child.kill()
    wait_for(lambda: state_of(after) == "Z", "the child is dead")
    assert child.ask(("process",), LONG) != after


def test_a_child_that_hangs_before_it_begins_is_replaced(
    child: MediaProcess, monkeypatch: pytest.MonkeyPatch
):
    before = child.ask(("process",), LONG)
    os.kill(before, signal.SIGSTOP)
    wait_for(lambda: state_of(before) == "T", "the child is stopped")
    start = MediaProcess._start

    def slowly(self: MediaProcess) -> None:
        module.START_SECONDS = LONG
        start(self)

    monkeypatch.setattr(module, "START_SECONDS", 0.05)  # of the child that is there
    monkeypatch.setattr(MediaProcess, "_start", slowly)
    assert child.ask(("process",), LONG) != before


def test_another_thread_may_kill_the_child(child: MediaProcess, tmp_path: Path):
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(child.ask, ("begin", tmp_path / "begun", 100), LONG)
        wait_for((tmp_path / "begun").exists, "the request begins")
        child.kill()
        with pytest.raises(ProcessDied, match="signal SIGKILL"):
            asked.result(LONG)


def test_a_child_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch):
    before = opened()
    starts: list[int] = []
    start = MediaProcess._start

    def counted(self: MediaProcess) -> None:
        starts.append(1)
        start(self)

    monkeypatch.setattr(MediaProcess, "_start", counted)
    child = MediaProcess(pickle.dumps(HandlerThatCannotBeRead()), "test process")
    text = r"^a test process ended 3 times as it started \(exit status 7\)$"
    with pytest.raises(CannotStart, match=text):
        child.ask(("none",), LONG)
    assert len(starts) == 3
    with pytest.raises(CannotStart, match=text):
        child.ask(("none",), LONG)
    assert len(starts) == 4
    assert opened() == before


def test_only_starts_that_fail_in_a_row_count(child: MediaProcess, monkeypatch: pytest.MonkeyPatch):
    fails = [True, True, False] * 2
    start, python = MediaProcess._start, sys.executable

    def sometimes(self: MediaProcess) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false" if fails.pop(0) else python)
        start(self)

    monkeypatch.setattr(MediaProcess, "_start", sometimes)
    for _ in range(2):
        assert child.ask(("none",), LONG)
        child.end()
    assert not fails


@pytest.mark.parametrize("fails", ["memfd_create", "socketpair", "Popen"])
def test_a_system_without_room_is_an_error(fails: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    before = opened()
    child = MediaProcess(HANDLER, "test process")
    with monkeypatch.context() as patch:
        holder: Any = {"memfd_create": os, "socketpair": socket, "Popen": subprocess}[fails]
        patch.setattr(holder, fails, fail)
        with pytest.raises(CannotStart, match=r"cannot be started .*Too many open files"):
            child.ask(("none",), LONG)
    assert child.ask(("none",), LONG)
    child.end()
    assert opened() == before


def test_pixels_without_room_are_an_error(child: MediaProcess):
    huge = np.broadcast_to(np.uint8(0), 2**62)
    with pytest.raises(CannotStart, match=f"cannot share {2**62} bytes"):
        child.ask(("fill", 1), LONG, huge)
    assert child.ask(("none",), LONG)


# Hanging.


def test_cpu_time_without_a_beat_is_limited(child: MediaProcess):
    child.ask(("burn", 0.2), 0.6)
    with pytest.raises(Hung, match=r"^made no progress in 0.6 s of CPU time$"):
        child.ask(("burn", 100), 0.6)
    assert child.process is None
    child.ask(("burn", 1.5, 0.25), 0.6)


def test_wall_time_without_a_beat_is_limited(
    child: MediaProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """4 s pass before each beat: each at one look of the parent."""
    looks: Counter[int] = Counter()

    def busy(process: int) -> bool:
        step = len([*tmp_path.glob("begun-*")]) - 1
        if step < 0 or (tmp_path / f"go-{step}").exists():
            return False
        looks[step] += 1
        if looks[step] == 4:
            (tmp_path / f"go-{step}").touch()
        return True

    clock = ChildClock(busy, wall=1.0)
    clock.set(monkeypatch)
    assert child.ask(("steps", tmp_path, 3), 0.5) == "done"  # up to 5 s for each
    assert clock.now == 12
    begun = tmp_path / "begun"
    ChildClock(lambda _: begun.exists(), wall=1.0).set(monkeypatch)
    with pytest.raises(Hung, match=r"^gave no sign of life for 5 s$"):
        child.ask(("begin", begun, 100), 0.5)
    assert child.process is None


def test_time_while_the_parent_was_stopped_does_not_count(
    child: MediaProcess, monkeypatch: pytest.MonkeyPatch
):
    child.ask(("none",), LONG)
    check, now = child._limit(10.0, lambda: False), time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now + 1000)
        check()


def test_cpu_time_of_a_process(monkeypatch: pytest.MonkeyPatch):
    burn(0.1)
    before = time.process_time()
    first = module._cpu_seconds(os.getpid())
    burn(0.1)

    def fails(clock: int) -> float:
        raise OSError

    assert before <= first <= time.process_time() - 0.1
    monkeypatch.setattr(time, "clock_gettime", fails)
    second = module._cpu_seconds(os.getpid())
    assert first < second <= time.process_time() + 0.02  # clock ticks are of 0.01 s
    assert module._cpu_seconds(2**30) == 0.0


def test_a_request_is_given_up(child: MediaProcess, tmp_path: Path):
    begun = tmp_path / "begun"
    out = np.zeros((1, 2, 2, 3), np.uint8)
    with pytest.raises(Stopped):
        child.ask(("begin", begun, 100), LONG, out, stopped=begun.exists)
    assert child.process is None
    assert not out.any()
    begun.unlink()
    idle = child.ask(("process",), LONG)
    with pytest.raises(Stopped):
        child.ask(("begin", begun, 100), LONG, stopped=lambda: True)
    assert not begun.exists()
    assert child.ask(("process",), LONG) == idle


def test_an_interrupt_loses_no_answer(child: MediaProcess, tmp_path: Path):
    """As by Ctrl-C: the next request must not get the answer of this one."""
    begun = tmp_path / "begun"

    def interrupt() -> bool:
        if begun.exists():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        child.ask(("begin", begun, 0.2), LONG, stopped=interrupt)
    assert child.process is None
    assert child.ask(("echo", 1), LONG) == 1


def test_no_part_of_a_message_blocks():
    """A child may be stopped while it sends an answer, or before it reads a request."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.01)

        def stop() -> None:
            raise Stopped

        theirs.send((100).to_bytes(8, "little") + b"part")
        with pytest.raises(Stopped):
            module._receive(ours, stop)
        with pytest.raises(Stopped):
            module._send(ours, bytes(10_000_000), stop)
