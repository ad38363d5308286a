"""Work for data workers that goes wrong as it is told. Workers import this module: little else."""

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

from train.workers import Work

SIDE = 4
"""Side of the frames here."""


@dataclass
class FakeReader:
    """As much of a reader as a pool asks for, and what is to happen on which record."""

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
    """What became of a record, and in which process."""

    record: int
    process: int
    seed: Any = None


class Unpicklable:
    """Cannot be sent."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot be sent")


class FaultyWork(Work):
    """Does what the reader says on each record; on all others, fills pixels with its number."""

    reader: Any

    def measure(self, source: int, records: Sequence[int]) -> list[Any]:
        """Answers for records."""
        return [self.do(record) for record in records]

    def load(self, source: int, record: int, seed: Any, out: np.ndarray) -> Any:
        """An answer; its pixels are the record's number and the place."""
        if out.size:
            out[...] = record % 256
            out[:, 0, 0, 0] = np.arange(len(out)) % 256
        return self.do(record, seed)

    def do(self, record: int, seed: Any = None) -> Any:
        """Whatever is to happen."""
        action = self.reader.actions.get(record, "")
        if action.startswith("once "):
            action = action.removeprefix("once ")
            try:
                (self.reader.folder / f"did-{record}").touch(exist_ok=False)
            except FileExistsError:
                action = ""
        if action:
            (self.reader.folder / f"started-{record}").write_text(str(os.getpid()))
        self.act(action)
        return Answer(record, os.getpid(), seed)

    def act(self, action: str) -> None:
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
        elif action.startswith("sleep "):
            time.sleep(float(action.removeprefix("sleep ")))
        elif action == "memory":
            raise MemoryError
        elif action == "deep":
            self.act(action)
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


class WorkThatTells(Work):
    """Work that says which modules its process has imported, as the measure of record -1."""

    def measure(self, source: int, records: Sequence[int]) -> list[Any]:
        """As `Work.measure`."""
        if list(records) == [-1]:
            return sorted(sys.modules)
        return super().measure(source, records)
