"""Read a folder of image files as the frames of a video."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vxl_jax.errors import MediaError
from vxl_jax.media.frames import Resize, fit_square
from vxl_jax.media.heartbeat import beat
from vxl_jax.media.images.loading import load_image
from vxl_jax.media.options import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.media.paths import printable

PICTURES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif"),
)
"""Suffixes of image files, in lower case."""


class FrameFolder:
    """A video as a folder of image files, in the natural order of their names.

    Numbers in names are ordered by value. A dot between two numbers is a decimal point (0.25, 0.5,
    1.0), unless some name of the folder has a fraction of several digits that ends in 0: then they
    are counters (1.9, 1.10). Decimals that all have the same number of digits (0.50, 1.00) are in
    order both ways. Files with other suffixes than `PICTURES` and hidden files, whose
    names begin with a dot, are not frames.

    Attributes:
      path: the folder.
      frames: number of frames.
      fps: frames per second.
      seconds: time of each frame, float64 [frames]; the first is at 0.
      duration: seconds to the end of the last frame.
      truncated: None; a folder does not tell how many frames it should have.
    """

    truncated: str | None = None

    def __init__(
        self,
        path: str | Path,
        fps: float,
        follow_links: bool = True,
        options: MediaOptions = DEFAULT_OPTIONS,
    ):
        """List the folder; no picture is opened.

        Args:
          path: the folder.
          fps: frames per second of the recording.
          follow_links: read symbolic links; False leaves them out.
          options: how pixels are decoded.

        Raises:
          MediaError: the folder cannot be read or has no pictures, or a link is broken.
        """
        self.path, self.fps, self._options = Path(path), fps, options
        try:
            with os.scandir(path) as entries:
                found = [entry for entry in entries if _is_picture(entry.name)]
            links = [entry for entry in found if entry.is_symlink()]
            if follow_links:
                for entry in sorted(links, key=lambda entry: entry.name):
                    _check_link(entry)
            names = [entry.name for entry in found if entry.is_file(follow_symlinks=follow_links)]
        except OSError as error:
            raise MediaError(f"{printable(path)}: cannot be read ({error.strerror})") from error
        if not names:
            left_out = len(links) if not follow_links else 0
            advice = (
                f"{left_out} links were left out, set allow_outside_root to follow them"
                if left_out
                else f"put files into it that end in {', '.join(PICTURES)}"
            )
            raise MediaError(f"{printable(path)}: a folder without pictures; {advice}")
        self._names = natural_order(names)
        self.frames = len(names)
        self.seconds = np.arange(self.frames, dtype=np.float64) / fps
        self.duration = self.frames / fps

    def read(
        self,
        indices: Sequence[int],
        size: int,
        out: np.ndarray | None = None,
        resize: Resize = "crop",
    ) -> np.ndarray:
        """Decode frames, each through `fit_square`.

        Args:
          indices: frame numbers in any order, repeated ones too.
          size: side of the result in pixels.
          out: array for the result; None allocates one.
          resize: how a frame becomes a square.

        Returns:
          uint8 [F, size, size, 3].

        Raises:
          MediaError: a picture cannot be read, or an index is past the end.
        """
        result = frames_array(self.path, indices, self.frames, size, out)
        for i, index in enumerate(indices):
            picture = load_image(self.path / self._names[index], self._options)
            result[i] = fit_square(picture, size, resize)
            beat()
        return result


def frames_array(
    path: str | Path, indices: Sequence[int], frames: int, size: int, out: np.ndarray | None
) -> np.ndarray:
    """Check frame numbers and return the array that their pixels go to.

    Returns:
      `out`, or a new uint8 [F, size, size, 3] if that is None.

    Raises:
      MediaError: an index is not from 0 to `frames` - 1, or there are no indices.
    """
    if not len(indices):
        raise MediaError(f"{printable(path)}: no frames asked for; give at least one index")
    low, high = min(indices), max(indices)
    if low < 0 or high >= frames:
        raise MediaError(
            f"{printable(path)}: frames {low}..{high} asked for, but there are {frames} "
            f"(0..{frames - 1})"
        )
    return np.empty((len(indices), size, size, 3), np.uint8) if out is None else out


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in PICTURES


def _check_link(entry: os.DirEntry[str]) -> None:
    try:
        entry.stat()
    except OSError as error:
        target = printable(os.readlink(entry.path))
        raise MediaError(
            f"{printable(entry.path)}: is a broken link to {target} ({error.strerror}); fetch the "
            "file or remove the link"
        ) from error


def natural_order(names: Sequence[str]) -> list[str]:
    """Sort file names by the numbers in them, as `FrameFolder` says."""
    stems = [Path(name).stem for name in names]
    fractions = [
        run.partition(".")[2]
        for stem in stems
        for run in re.findall(_NUMBERS, stem)
        if run.count(".") == 1
    ]
    # Programs that write decimals of different lengths write no 0 at the end; of one length, both
    # orders are the same.
    counters = any(len(fraction) > 1 and fraction.endswith("0") for fraction in fractions)
    return sorted(names, key=lambda name: (_key(Path(name).stem, decimals=not counters), name))


_NUMBERS = r"\d+(?:\.\d+)*"
"""Numbers with dots between them. More than one dot: a date or a version, no decimal."""


def _key(stem: str, decimals: bool) -> list[tuple[int, str]]:
    """Sort key of a name: text as (-1, text), numbers as (value, digits of the fraction)."""
    parts: list[tuple[int, str]] = []
    for i, part in enumerate(re.split(f"({_NUMBERS})", stem)):
        if i % 2 == 0:
            parts.append((-1, part))
        elif decimals and part.count(".") == 1:
            whole, _, fraction = part.partition(".")
            parts.append((int(whole), fraction))
        else:
            for j, number in enumerate(part.split(".")):
                parts += [(-1, ".")] * (j > 0) + [(int(number), "")]
    return parts
