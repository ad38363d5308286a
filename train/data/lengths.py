"""Lengths and kinds of samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ("text", "image", "images", "video", "videos")
"""Kinds of samples: no media, one image, several, one video, several."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of samples; one row a sample.

    text, labels: token ids without marks, and labelled ones, int32 [N]. frames: frames or tiles,
    int32 [N]. visual, beacons: tokens that these become under the lowest ratio, int32 [N].
    """

    text: np.ndarray
    labels: np.ndarray
    frames: np.ndarray
    visual: np.ndarray
    beacons: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each stream, int32 [N]."""
        return self.text + self.visual + self.beacons

    @property
    def memory(self) -> np.ndarray:
        """Memory entries of each stream, int32 [N]; see `compressed`."""
        return self.text + np.where(self.beacons > 0, self.beacons, self.visual)


def kinds_of(blocks: np.ndarray, is_video: np.ndarray) -> np.ndarray:
    """Places in `KINDS`, uint8 [N], of samples with a number of blocks that may be videos."""
    return np.where(blocks == 0, 0, np.minimum(blocks, 2) + 2 * is_video).astype(np.uint8)


def count_beacons(tokens: np.ndarray, window: int, ratios: Sequence[int]) -> np.ndarray:
    """Beacons of visual blocks of some tokens under the lowest ratio, which no draw exceeds."""
    if not ratios:
        return np.zeros_like(tokens)

    def of_window(count: Any) -> Any:
        # As in `draw_ratio`, a window with fewer tokens than the ratio keeps one beacon.
        return count // np.minimum(min(ratios), np.maximum(count, 1))

    return tokens // window * of_window(window) + of_window(tokens % window)
