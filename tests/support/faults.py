"""Work for child processes that fails as it is told. They import this module and little else."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from train.data.workers import RecordWork
from vxl_jax.errors import MediaError
from vxl_jax.media.children.decoding import DecodeHandler
from vxl_jax.media.heartbeat import beat

SIDE = 4
"""Side of the frames here."""


@dataclass
class FakeReader:
    """The part of a reader that a pool uses, and the action of each record."""

    actions: dict[int, str]
    folder: Path

    @property
    def preparer(self) -> Any:
        """Sizes of frames."""
        return SimpleNamespace(size=SIDE)

    def name(self, source: int, record: int) -> str:
        """A record's name."""
        return f"{source}[{record}]"

    def files(self, source: int, record: int) -> str:
        """A record's media."""
        return f"{record}.png"


@dataclass(frozen=True)
class Answer:
    """A record, and the process that read it."""

    record: int
    process: int
    seed: Any = None


def wait_for(path: Path) -> None:
    """Wait until there is a file."""
    while not path.exists():
        time.sleep(0.01)


def burn(seconds: float, every: float = float("inf")) -> None:
    """Use CPU time, with a beat every `every` seconds of it."""
    began, beats = time.process_time(), 0
    while (used := time.process_time() - began) < seconds:
        if used // every > beats:
            beats += 1
            beat()


def answer(request: tuple[Any, ...], out: np.ndarray | None) -> Any:
    """Handler of a `MediaProcess`: calls the function of that name below."""
    name, *arguments = request
    return REQUESTS[name](out, *arguments)


def _fill(out: np.ndarray, value: int) -> tuple[int, ...]:
    out[...] = value
    return out.shape


def _raise(out: None, error: str) -> None:
    raise {
        "media": MediaError("a.mp4: is damaged; replace it"),
        "unpicklable": ValueError(Unpicklable()),
        "unreadable": Unreadable("one", "two"),
        "speechless": Speechless(),
    }[error]


def _steps(out: None, folder: Path, times: int) -> str:
    """Beats; each waits for a file."""
    for i in range(times):
        (folder / f"begun-{i}").touch()
        wait_for(folder / f"go-{i}")
        beat()
    return "done"


def _begin(out: np.ndarray | None, path: Path, seconds: float) -> str:
    if out is not None:
        out[...] = 7
    path.write_text(str(os.getpid()))
    time.sleep(seconds)
    return "done"


def _state(out: None) -> dict[str, Any]:
    return {
        "session": os.getsid(0),
        "environment": dict(os.environ),
        "input": os.readlink("/proc/self/fd/0"),
        "modules": sorted(sys.modules),
        "sigterm": signal.getsignal(signal.SIGTERM),
    }


REQUESTS: dict[str, Any] = {
    "process": lambda out: os.getpid(),
    "echo": lambda out, value: value,
    "none": lambda out: out is None,
    "fill": _fill,
    "raise": _raise,
    "allocate": lambda out, size: len(bytearray(size)),
    "function": lambda out: lambda: None,  # does not pickle
    "burn": lambda out, *arguments: burn(*arguments),
    "steps": _steps,
    "begin": _begin,
    "kill": lambda out: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda out, code: os._exit(code),
    "state": _state,
}


class Unreadable(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, one: str, two: str):
        super().__init__(one)


class Speechless(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise ValueError


class HandlerThatCannotBeRead:
    """Ends the process that reads it."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


class Unpicklable:
    """Cannot be sent."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot be sent")


class FaultyWork(RecordWork):
    """Does what the reader says on each record; on all others, fills pixels with its number."""

    reader: Any

    def measure(self, source: int, records: Sequence[int]) -> list[Any]:
        """Answers for records."""
        answers = []
        for record in records:
            beat()  # as in Work.measure
            answers.append(self.do(record))
        return answers

    def load(self, source: int, record: int, seed: Any, out: np.ndarray) -> Any:
        """An answer; its pixels are the record's number and the place."""
        if out.size:
            out[...] = record % 256
            out[:, 0, 0, 0] = np.arange(len(out)) % 256
        return self.do(record, seed)

    def do(self, record: int, seed: Any = None) -> Any:
        """Do the action of a record."""
        action = self.reader.actions.get(record, "")
        if action.startswith("once "):
            action = action.removeprefix("once ")
            try:
                (self.reader.folder / f"did-{record}").touch(exist_ok=False)
            except FileExistsError:
                action = ""
        if action:
            (self.reader.folder / f"started-{record}").write_text(str(os.getpid()))
        perform(action)
        return Answer(record, os.getpid(), seed)


def perform(action: str) -> None:
    """One action."""
    if action.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[action])
        time.sleep(60)
    elif action == "exit":
        os._exit(7)
    elif action == "interrupt":
        raise KeyboardInterrupt
    elif action == "leave":
        sys.exit(3)
    elif action.startswith("until "):
        wait_for(Path(action.removeprefix("until ")))
    elif action.startswith("sleep "):
        time.sleep(float(action.removeprefix("sleep ")))
    elif action.startswith("burn "):
        burn(float(action.removeprefix("burn ")))
    elif action == "spin":
        burn(float("inf"))
    elif action == "memory":
        raise MemoryError
    elif action == "deep":
        perform(action)
    elif action == "missing":
        raise KeyError("x")
    elif action == "unpicklable":
        raise ValueError(Unpicklable())
    elif action == "system":
        raise OSError(5, "Input/output error")
    elif action:
        raise ValueError(action)


class WorkThatCannotBeRead(FaultyWork):
    """Ends the process that reads it."""

    def __setstate__(self, state: Any) -> None:
        os._exit(7)


class WorkThatTells(RecordWork):
    """Work that says which modules its process has imported, as the measure of record -1."""

    def measure(self, source: int, records: Sequence[int]) -> list[Any]:
        """As `RecordWork.measure`."""
        if list(records) == [-1]:
            return sorted(sys.modules)
        return super().measure(source, records)


class FaultyHandler(DecodeHandler):
    """Reads films; for frames from 10 on, or at once, it does something else."""

    def __init__(self, action: str):
        super().__init__()
        self.action = action

    def __call__(self, request: Any, out: np.ndarray | None) -> Any:
        """As `DecodeHandler`."""
        _, frames = request
        if self.action.endswith(" at once"):
            perform(self.action.removesuffix(" at once"))
        elif frames and frames[0] >= 10:
            perform(self.action)
        return super().__call__(request, out)
