"""Signs of life of a decoder, for whoever waits for it.

Readers call `beat` for every packet and frame. In a process that can be ended (`process`), the
parent sees the beats and ends a decoder that gives none for too long; elsewhere they do nothing.
"""

from collections.abc import Callable


def _nobody() -> None:
    pass


_listener: Callable[[], None] = _nobody


def beat() -> None:
    """Tell whoever waits that decoding goes on."""
    _listener()


def set_listener(listener: Callable[[], None]) -> None:
    """Call `listener` at every beat, from now on; for the process that decodes."""
    global _listener
    _listener = listener
