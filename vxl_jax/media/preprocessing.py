"""How pixels are made of images and videos: one description for training, asking and plans."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from PIL import Image

from vxl_jax.errors import ConfigError
from vxl_jax.media.frames import Resize, fill_square, fit_square
from vxl_jax.media.options import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.media.reader import FrameChoice
from vxl_jax.media.sampling import FrameSampling
from vxl_jax.media.tiles import Size, grid_pinpoints, tile_grid, tile_image

ImageMode = Literal["anyres", "square", "pad"]
"""An image becomes the tiles that suit its size, or one: as a frame of a video becomes a square, or
in the middle of a square with a background."""


@dataclass(frozen=True)
class ImageTiles:
    """How an image is cut.

    Attributes:
      tiles: how many.
      grid: (columns, rows) of the tiles, or of those after the first if the first shows the whole
        image; None of one tile.
      size: (width, height) of the image in pixels.
    """

    tiles: int
    grid: Size | None = None
    size: Size | None = None


PINPOINT_RANGE = re.compile(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)")
"""Grids of tiles as the published scripts of LLaVA-Video name them."""


def parse_grids(text: str) -> tuple[Size, ...] | None:
    """Read `(1x1),...,(6x6)` as all grids (columns, rows) in between, in the published order.

    Returns:
      None if the text is something else.
    """
    ends = PINPOINT_RANGE.fullmatch(text.replace(" ", ""))
    if ends is None:
        return None
    first_column, first_row, last_column, last_row = map(int, ends.groups())
    return tuple(
        (columns, rows)
        for columns in range(first_column, last_column + 1)
        for rows in range(first_row, last_row + 1)
    )


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
    resize: Resize = "crop"
    """How a frame becomes a square."""
    base_tile: bool = False
    """Whether the tiles of an image come after one that shows the whole image as a square."""
    pad_several: bool = False
    """Whether each of several images that come together is one tile, as in mode `pad`."""
    background: tuple[int, int, int] = (127, 127, 127)
    """RGB around an image in mode `pad`; by custom the tower's mean."""
    options: MediaOptions = DEFAULT_OPTIONS
    """How the pixels of files are decoded."""

    def __post_init__(self) -> None:
        kinds = (
            *(("image_mode", ImageMode), ("frame_sampling", FrameSampling)),
            ("resize", Resize),
        )
        for name, allowed in kinds:
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
        bad = [value for value in self.background if type(value) is not int or not 0 <= value < 256]
        if bad or len(self.background) != 3:
            raise ConfigError(
                f"Preprocessing.background is {self.background!r}; it must be three whole numbers "
                "from 0 to 255"
            )
        if self.max_frames < 1 or not self.video_fps > 0:
            raise ConfigError(
                f"Preprocessing takes {self.video_fps} frames a second and at most "
                f"{self.max_frames}; both must be positive"
            )

    def tiles_of(self, size: Size, side: int, several: bool = False) -> ImageTiles:
        """Tell from the size of an image how it is cut.

        Args:
          size: (width, height) of the image in pixels.
          side: of a tile, in pixels.
          several: whether it is one of several images that come together.
        """
        if self._mode(several) != "anyres":
            return ImageTiles(1, None, size)
        columns, rows = tile_grid(size, self._pinpoints(side), side)
        return ImageTiles(columns * rows + self.base_tile, (columns, rows), size)

    def cut_tiles(self, image: Image.Image, side: int, several: bool = False) -> np.ndarray:
        """Cut an image into tiles; arguments as for `tiles_of`.

        Returns:
          uint8 [tiles, side, side, 3].
        """
        mode = self._mode(several)
        if mode == "pad":
            image = fill_square(image, self.background)
        if mode != "anyres":
            return fit_square(image, side, self.resize)[None]
        tiles = tile_image(image, self._pinpoints(side), side)
        if not self.base_tile:
            return tiles
        return np.concatenate([fit_square(image, side, "stretch")[None], tiles])

    def _mode(self, several: bool) -> ImageMode:
        return "pad" if several and self.pad_several else self.image_mode

    def choose(self, start: float | None = None, end: float | None = None) -> FrameChoice:
        """Choose the frames of a video between two seconds; of all of it by default."""
        return FrameChoice(self.frame_sampling, self.max_frames, self.video_fps, start, end)

    def _pinpoints(self, side: int) -> list[Size]:
        return [(columns * side, rows * side) for columns, rows in self.grids]


DEFAULT_PREPROCESSING = Preprocessing()


def llava_preprocessing(
    stretch: bool = True, mean: Sequence[float] = (0.5, 0.5, 0.5), max_frames: int = 64
) -> Preprocessing:
    """Rules of the published LLaVA-Video: a whole picture before the tiles, repeated frames.

    Args:
      stretch: whether frames are stretched to a square, as for SigLIP; else cropped, as for CLIP.
      mean: of the tower's RGB in [0, 1].
      max_frames: frames of one video.
    """
    red, green, blue = (int(255 * value) for value in mean)
    return Preprocessing(
        grids=tuple((columns, rows) for columns in range(1, 7) for rows in range(1, 7)),
        frame_sampling="forced",
        max_frames=max_frames,
        time_prompt=True,
        resize="stretch" if stretch else "crop",
        base_tile=True,
        pad_several=True,
        background=(red, green, blue),
    )
