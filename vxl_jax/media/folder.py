"""A video as a folder of pictures."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vxl_jax.errors import MediaError
from vxl_jax.media.frames import resize_and_crop
from vxl_jax.media.images import load_image


class FrameFolder:
    """A video as a folder of pictures in the order of their names, as `VideoFile` otherwise."""

    def __init__(self, path: str | Path, fps: float):
        """fps: frames a second that they were taken at. Raises: MediaError: none there."""
        self.path, self.fps = Path(path), fps
        try:
            names = [
                entry.name for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)
            ]
        except OSError as error:
            raise MediaError(f"{path}: cannot be read ({error.strerror})") from error
        names = [name for name in names if Path(name).suffix.lower() in PICTURES]
        if not names:
            raise MediaError(
                f"{path}: a folder without pictures ({', '.join(PICTURES)}; links are not followed)"
            )
        self._names = sorted(names, key=lambda name: (_natural(Path(name).stem), name))
        self.frames = len(names)

    def read(self, indices: Sequence[int], size: int, out: np.ndarray | None = None) -> np.ndarray:
        """As `load_video_frames`; into `out` if it is given."""
        result = np.empty((len(indices), size, size, 3), np.uint8) if out is None else out
        for i, index in enumerate(indices):
            result[i] = resize_and_crop(load_image(self.path / self._names[index]), size)
        return result


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Suffixes of the pictures in a folder of frames."""


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which 10.png comes after 9.png."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]
