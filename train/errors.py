"""What goes wrong with training and its data."""

from pathlib import Path


class DataError(ValueError):
    """Training data that cannot be used; the message names file, record and what to do."""


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a data file that cannot be opened or read."""
    return DataError(f"{path}: cannot be read ({error.strerror}); check the path")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""
