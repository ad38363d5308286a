"""How pixels are made of images and videos: one description for training, asking and plans."""

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from PIL import Image

from vxl_jax.errors import ConfigError
from vxl_jax.media.frames import resize_and_crop
from vxl_jax.media.options import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.media.reader import FrameChoice
from vxl_jax.media.sampling import FrameSampling
from vxl_jax.media.tiles import Size, grid_pinpoints, tile_grid, tile_image

ImageMode = Literal["anyres", "square"]
"""An image becomes the tiles that suit its size, or the square in its centre."""


@cache
def tile_grids(min_tiles: int = 2, max_tiles: int = 49) -> tuple[Size, ...]:
    """List all grids (columns, rows) of min_tiles to max_tiles tiles, in the published order."""
    return grid_pinpoints(1, max_tiles, min_tiles)


@dataclass(frozen=True)
class Preprocessing:
    """Rules from files to pixels. A model is asked with the rules that it was trained with.

    They belong to a model's configuration and are written into every checkpoint. The defaults are
    those of the published Video-XL at inference. What the tower asks of pixels (its size, mean and
    standard deviation) is in `VisionConfig`.

    Raises:
      ConfigError: a field is out of range.
    """

    image_mode: ImageMode = "anyres"
    """Tiles of an image, see `ImageMode`."""
    grids: tuple[Size, ...] = tile_grids()
    """Grids (columns, rows) of tiles that an image may be cut into, in order of preference."""
    frame_sampling: FrameSampling = "uniform"
    """How the frames of a video are chosen, see `choose_frames`."""
    max_frames: int = 128
    """Most frames of one video."""
    video_fps: float = 1.0
    """Frames taken from one second of video, where `frame_sampling` is capped or fps."""
    time_prompt: bool = False
    """Whether the turn with the only video of a conversation says when its frames are shown."""
    options: MediaOptions = DEFAULT_OPTIONS
    """How the pixels of files are decoded."""

    def __post_init__(self) -> None:
        for name, allowed in (("image_mode", ImageMode), ("frame_sampling", FrameSampling)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ConfigError(
                    f"Preprocessing.{name} is {value!r}; use one of {', '.join(get_args(allowed))}"
                )
        if not self.grids or min(map(min, self.grids)) < 1:
            raise ConfigError(
                f"Preprocessing.grids is {self.grids}; it must have at least one grid of at least "
                "one column and one row"
            )
        if type(self.max_frames) is not int or not isinstance(self.video_fps, int | float):
            raise ConfigError(
                f"Preprocessing.max_frames is {self.max_frames!r}, video_fps {self.video_fps!r}; "
                "the first must be a whole number and the second a number"
            )
        if self.max_frames < 1 or not self.video_fps > 0:
            raise ConfigError(
                f"Preprocessing takes {self.video_fps} frames a second and at most "
                f"{self.max_frames}; both must be positive"
            )

    def count_tiles(self, size: Size, side: int) -> int:
        """Count the tiles of an image from its size alone.

        Args:
          size: (width, height) of the image in pixels.
          side: of a tile, in pixels.
        """
        if self.image_mode == "square":
            return 1
        columns, rows = tile_grid(size, self._pinpoints(side), side)
        return columns * rows

    def cut_tiles(self, image: Image.Image, side: int) -> np.ndarray:
        """Cut an image into tiles.

        Returns:
          uint8 [tiles, side, side, 3], as many as `count_tiles` says.
        """
        if self.image_mode == "square":
            return resize_and_crop(image, side)[None]
        return tile_image(image, self._pinpoints(side), side)

    def choose(self, start: float | None = None, end: float | None = None) -> FrameChoice:
        """Choose the frames of a video between two seconds; of all of it by default."""
        return FrameChoice(self.frame_sampling, self.max_frames, self.video_fps, start, end)

    def _pinpoints(self, side: int) -> list[Size]:
        return [(columns * side, rows * side) for columns, rows in self.grids]


DEFAULT_PREPROCESSING = Preprocessing()
