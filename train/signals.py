"""What signals do to a run while it trains."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that SIGINT (Ctrl-C) or SIGTERM sets; a second one raises KeyboardInterrupt.

    The loop asks for it between steps. An exception out of nowhere would be lost where Python
    ignores exceptions: in JAX's hook of the garbage collector, for one.
    """
    requested = threading.Event()

    def request(*_: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
