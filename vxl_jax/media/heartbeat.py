"""Report the progress of a decoder to the process that waits for it.

Readers call `beat` for every packet and frame. In a process that can be ended (`process`), the
parent sees the beats and ends a decoder that gives none for too long; elsewhere they do nothing.
"""

from collections.abc import Callable


def _nobody() -> None:
    pass


_listener: Callable[[], None] = _nobody


def beat() -> None:
    """Report that decoding makes progress."""
    _listener()


def set_listener(listener: Callable[[], None]) -> None:
    """Set the function that each `beat` of this process calls."""
    global _listener
    _listener = listener
