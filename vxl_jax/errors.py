"""Errors that a user can correct, each with one message that names the fault and the remedy.

A command line prints a `VxlError` as one line. Any other exception is a fault of the program, and
keeps its traceback.
"""

from typing import Any


class VxlError(ValueError):
    """Base class of all errors that a user can correct."""


class ArgumentError(VxlError):
    """An argument of a public function cannot be used; the message names it."""


class CheckpointError(VxlError):
    """A checkpoint cannot be read or written; the message names file and tensors."""


class ConfigError(VxlError):
    """A configuration cannot work; the message names the field."""


class ConversationError(VxlError):
    """A conversation cannot be used; the message names the turn."""


class MediaError(VxlError):
    """A media file cannot be used; the message names the file."""


class PartlyWatched(MediaError):
    """A video ended early or is damaged. `memory`, a VisualMemory, holds the frames before."""

    def __init__(self, message: str, memory: Any):
        super().__init__(message)
        self.memory = memory


class VisualMemoryError(VxlError):
    """A memory cannot be used, or has no room; the message says why.

    `memory`, a VisualMemory, has what was watched before, where the message says so.
    """

    def __init__(self, message: str, memory: Any = None):
        super().__init__(message)
        self.memory = memory


def is_file_fault(error: Exception) -> bool:
    """Return whether a library's exception is caused by the files it reads or writes.

    Orbax, TensorStore, transformers and tokenizers raise OSError and ValueError for damaged files,
    but also AttributeError, KeyError, IndexError, TypeError and plain Exception inside their own
    code. Where this package's code raises one of those (a wrong call of the library, for example),
    and for all other types, it is a fault of the program.
    """
    if isinstance(error, OSError | ValueError) or type(error) is Exception:
        return True
    return isinstance(error, AttributeError | LookupError | TypeError) and not _is_own(error)


def _is_own(error: Exception) -> bool:
    """Return whether a function of this package raised it: the last frame of its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == __package__
