"""The end of child processes, and of their parents."""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.media.children.test_process import HANDLER, LONG, opened
from vxl_jax.media.children import process as module
from vxl_jax.media.children.process import MediaProcess


def test_nothing_is_left(tmp_path: Path):
    before, threads = opened(), threading.active_count()
    for kill in (False, True):
        child = MediaProcess(HANDLER, "test process")
        assert child.end() == "not started"
        child.ask(("fill", 1), LONG, np.zeros((50, 9, 9, 3), np.uint8))
        assert len(opened()) > len(before)
        if kill:
            child.kill()
        assert child.end() == ("signal SIGKILL" if kill else "exit status 0")
        assert opened() == before
        assert child.end() == "not started"
    assert threading.active_count() == threads


def test_a_child_that_cannot_be_killed_is_abandoned(
    child: MediaProcess, monkeypatch: pytest.MonkeyPatch
):
    """As one that waits in the kernel for a dead disk."""
    number = child.ask(("process",), LONG)
    os.kill(number, signal.SIGSTOP)
    abandoned = child.process
    assert abandoned is not None
    try:
        with monkeypatch.context() as patch:
            patch.setattr(subprocess.Popen, "kill", lambda self: None)
            patch.setattr(module, "END_SECONDS", 0.1)
            child.end()
        assert abandoned.poll() is None
        assert child.ask(("process",), LONG) != number
    finally:
        abandoned.kill()
        abandoned.wait(LONG)


def test_systems_without_memory_files(child: MediaProcess, monkeypatch: pytest.MonkeyPatch):
    """As macOS."""
    monkeypatch.delattr(os, "memfd_create")
    before = opened()
    out = np.zeros((30, 9, 9, 3), np.uint8)
    child.ask(("fill", 4), LONG, out)
    assert (out == 4).all()
    child.end()
    assert opened() == before


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_a_child_whose_parent_is_gone_ends_without_output(sent: int):
    """It was killed before it sent the handler, after it, or after the first request."""
    messages = [HANDLER, pickle.dumps((("none",), None))]
    ours, theirs = socket.socketpair()
    with theirs, module._memory_file() as memory, ours:
        passed = theirs.fileno(), memory.fileno()
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vxl_jax.media.children.process",
                *map(str, (*passed, os.getpid())),
            ],
            pass_fds=passed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for message in messages[:sent]:
            module._send(ours, message)
    assert child.communicate(timeout=LONG) == (b"", None)
    assert child.returncode == 0


def test_a_busy_child_whose_parent_was_gone_before_it_started_ends():
    """It has another parent from its beginning on, and a handler that never returns."""
    ours, theirs = socket.socketpair()
    with ours, theirs, module._memory_file() as memory:
        passed = theirs.fileno(), memory.fileno()
        nobody = subprocess.Popen([sys.executable, "-c", ""])
        nobody.wait()
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vxl_jax.media.children.process",
                *map(str, (*passed, nobody.pid)),
            ],
            pass_fds=passed,
        )
        for message in (HANDLER, pickle.dumps((("burn", LONG * 10), None))):
            with contextlib.suppress(ConnectionError):  # it may be gone already
                module._send(ours, message)
        assert child.wait(LONG) == 1
