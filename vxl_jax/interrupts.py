"""Ctrl-C at moments when nothing is half done."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits until the block ends, or the function that it gives is called; a second one does
    not wait. Arrays that a program takes over (donated) would be lost between its call and the
    assignment of its result.
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
