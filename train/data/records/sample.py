"""A sample, and a record that is not one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.errors import DataError
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import ConversationError, MediaError
from vxl_jax.media.layout import ImageLayout, VisualLayout, VisualTokens
from vxl_jax.media.preprocessing import ImageTiles
from vxl_jax.stream.plan import Ratio, Stream, plan_stream
from vxl_jax.text.template import IGNORE

BAD = (ConversationError, MediaError, DataError)
"""What a record that cannot be used raises."""


RECORDS_VERSION = 3
"""Part of the key of cached lengths: raise it when a record becomes another sample."""


@dataclass(frozen=True)
class VisualBlock:
    """One visual block: an image cut into tiles, or a video's frames.

    image: how an image is cut, where the layout of the model asks for it.
    """

    path: Path
    frames: int
    is_video: bool = False
    image: ImageTiles | None = None

    def count(self, layout: VisualLayout) -> int:
        """Visual tokens."""
        if self.is_video:
            return layout.video_count(self.frames)
        return self._image(layout).count(self.frames)

    def tokens(self, layout: VisualLayout) -> VisualTokens:
        """Of which patches each visual token is made."""
        if self.is_video:
            return layout.video_tokens(self.frames)
        return self._image(layout).tokens()

    def _image(self, layout: VisualLayout) -> ImageLayout:
        image = self.image or ImageTiles(self.frames)
        return layout.image(self.frames, image.grid, image.size)


@dataclass(frozen=True)
class Sample:
    """A record that passed all checks.

    ids and labels as in `vxl_jax.text.chat.EncodedText`; the last question (without marks), its
    answer, question_type, and among how many equally likely answers it is, if known, for
    evaluation.
    """

    name: str
    ids: np.ndarray
    labels: np.ndarray
    blocks: tuple[VisualBlock, ...]
    question: str
    answer: str
    question_type: str
    choices: int | None = None

    @property
    def frames(self) -> int:
        """Frames and tiles of all blocks."""
        return sum(block.frames for block in self.blocks)

    @property
    def text(self) -> int:
        """Token ids without the marks of blocks."""
        return len(self.ids) - len(self.blocks)

    @property
    def labelled(self) -> int:
        """Token ids that carry loss."""
        return int((self.labels != IGNORE).sum())

    def visual_tokens(self, model: VideoXLConfig) -> list[int]:
        """Visual tokens of each block."""
        return [block.count(model.layout) for block in self.blocks]

    def tokens(self, model: VideoXLConfig) -> VisualTokens:
        """Of which patches each visual token is made, counted through all blocks."""
        layout = model.layout
        return layout.join_blocks((block.tokens(layout), block.frames) for block in self.blocks)

    def plan(self, model: VideoXLConfig, ratio: Ratio) -> Stream:
        """The sample's stream under a ratio."""
        tokens = self.visual_tokens(model)
        return plan_stream(self.ids, tokens, window=model.window, ratio=ratio, labels=self.labels)


@dataclass(frozen=True)
class BadSample:
    """A record that is left out, and why; whether that is because its media were changed."""

    name: str
    reason: str
    changed: bool = False


@dataclass(frozen=True)
class Clip:
    """Seconds of a video that are taken, and the frames a second of a folder of frames."""

    start: float | None = None
    end: float | None = None
    fps: float | None = None
