"""Delay Ctrl-C and SIGTERM until the program is in a consistent state."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Delay Ctrl-C until the block ends or the yielded function is called.

    A second Ctrl-C is not delayed. An interrupt between a call with donated arrays and the
    assignment of its result would lose the arrays.
    """
    before: Any = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None
        return
    held: list[tuple[Any, Any]] = []

    def hold(number: Any, frame: Any) -> None:
        if held:
            held.clear()
            before(number, frame)
        held.append((number, frame))

    def let_go() -> None:
        if held:
            before(*held.pop())

    signal.signal(signal.SIGINT, hold)
    try:
        yield let_go
    except KeyboardInterrupt:
        held.clear()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        let_go()  # also after another error


class StopRequest:
    """The signal that asked the run to stop, if any."""

    signal: int | None = None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Record SIGTERM and SIGINT (Ctrl-C); a second SIGINT raises KeyboardInterrupt.

    The training loop checks the record between steps. An asynchronous
    exception would be lost where Python ignores exceptions: in JAX's hook of the garbage collector,
    for one. A second SIGTERM changes nothing: schedulers send several, and the checkpoint is being
    written.
    """
    request = StopRequest()

    def note(number: int, _: Any) -> None:
        if number == signal.SIGINT and request.signal is not None:
            raise KeyboardInterrupt
        request.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sure_interrupt() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt; a moment later where it would be lost, as above."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
