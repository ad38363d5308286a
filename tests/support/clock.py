"""Clocks that tests set, in place of those of the machine."""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from vxl_jax.media.children import process


class Clock:
    """Stands in for the module `time`: time passes when a test says so, and `tick` at each look."""

    def __init__(self, tick: float = 0.0):
        self.now, self.tick = 0.0, tick

    def perf_counter(self) -> float:
        """Seconds since the clock was made."""
        self.now += self.tick
        return self.now


class ChildClock:
    """Wall time and the CPU time of child processes, as `MediaProcess` reads them.

    Whenever it looks at a child of which `busy` is true, `wall` and `cpu` seconds have passed.
    """

    def __init__(self, busy: Callable[[int], bool], wall: float = 0.0, cpu: float = 0.0):
        self.busy, self.wall, self.cpu = busy, wall, cpu
        self.now, self.used = 0.0, Counter[int]()

    def set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make it the clock of `MediaProcess`."""
        monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(process, "_cpu_seconds", self.cpu_seconds)

    def cpu_seconds(self, child: int) -> float:
        """CPU time of a process."""
        if self.busy(child):
            self.now += self.wall
            self.used[child] += self.cpu  # type: ignore[assignment]
        return self.used[child]
