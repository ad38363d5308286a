"""How many visual tokens the frames and tiles of a block give, in stream order."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class VisualLayout:
    """Count the visual tokens of frames and tiles.

    Video-XL averages the patches of each frame over squares, and puts nothing between them: every
    frame and every tile gives as many tokens. Everything that plans, batches or cuts visual tokens
    asks here, frame by frame.
    """

    grid: int
    """Patches along one side of a frame."""
    pool_stride: int
    """Patches are averaged over pool_stride x pool_stride; patches left over are dropped."""

    def frame_tokens(self, frames: int, first: int = 0) -> npt.NDArray[np.int64]:
        """Count the tokens of each of `frames` frames or tiles, from frame `first` of a block on.

        Returns:
          int64 [frames].
        """
        return np.full(frames, (self.grid // self.pool_stride) ** 2)

    def count(self, frames: int, first: int = 0) -> int:
        """Count the tokens of `frames` frames or tiles, from frame `first` of a block on."""
        return int(self.frame_tokens(frames, first).sum())

    def counts(self, frames: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Count the tokens of whole blocks, given the number of frames of each."""
        ends = np.append(0, np.cumsum(self.frame_tokens(int(frames.max(initial=0)))))
        return ends[frames]

    def frames_of(self, tokens: int, first: int = 0) -> int:
        """Count the frames, from `first` on, that the next `tokens` tokens begin or complete."""
        frames = 1
        while self.count(frames, first) < tokens:
            frames *= 2
        return int(np.searchsorted(np.cumsum(self.frame_tokens(frames, first)), tokens)) + (
            tokens > 0
        )

    def frame_at(
        self, tokens: npt.NDArray[np.integer], frames: int, first: int = 0
    ) -> npt.NDArray[np.intp]:
        """Find which of `frames` frames, counted from `first`, the token at each place belongs to.

        Args:
          tokens: places of tokens, counted from the first token of frame `first`.
          frames: how many frames there are.
          first: place in its block of the first of them.
        """
        ends = np.cumsum(self.frame_tokens(frames, first))
        return np.searchsorted(ends, tokens, side="right")
