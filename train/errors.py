"""Errors of training and its data that a user can correct."""

from pathlib import Path

from vxl_jax.errors import MediaError, VxlError


class DataError(VxlError):
    """Training data cannot be used; the message names file and record."""


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a data file that cannot be opened or read."""
    return DataError(f"{path}: cannot be read ({error.strerror}); check the path")


class MediaChanged(MediaError):
    """Media have changed since their data file was measured."""


class TooManyBadSamples(VxlError):
    """There are more bad samples than the configuration allows."""


class TrainingError(VxlError):
    """Training cannot go on."""


class WorkerError(VxlError):
    """Data processes cannot be started, or were ended."""
