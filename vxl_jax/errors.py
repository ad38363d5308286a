"""Errors of the library, each with one message that names the fault and the remedy."""


class MediaError(ValueError):
    """A media file cannot be used. The message names the file, the fault and the remedy."""
