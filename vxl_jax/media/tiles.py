"""One image as square tiles (`anyres`), as the published Video-XL data code cuts it.

Sizes are (width, height) in pixels, as in Pillow.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

Size = tuple[int, int]


def grid_pinpoints(tile: int, max_tiles: int = 49, min_tiles: int = 2) -> tuple[Size, ...]:
    """Returns the resolutions that an image may be tiled at, in the published order.

    Args:
      tile: side of a tile in pixels (336).
      max_tiles: most tiles an image may have (49 as published).
      min_tiles: fewest tiles (2 as published: even a small image gets two).

    Returns:
      All (width, height) in pixels that are multiples of `tile` with min_tiles..max_tiles tiles,
      by width, then height.
    """
    return tuple(
        (columns * tile, rows * tile)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    )


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """Returns the pinpoint that keeps most of an image's pixels, then wastes least.

    The effective area is that of the image fitted into the pinpoint with its aspect ratio kept
    (sides truncated to integers), but not more than the image has: enlarging adds nothing. The
    first of equals wins.

    Args:
      size: (width, height) of the image, both at least 1.
      pinpoints: resolutions to choose from, as `grid_pinpoints` gives them.

    Raises:
      ValueError: `pinpoints` is empty or `size` is not positive.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"an image size must be positive, got {width} x {height}")

    def gain(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[0] / width, pinpoint[1] / height)
        # At least one pixel: the published code truncates to 0 and then finds no resolution for
        # images like 1 x 20000.
        fitted = max(1, int(width * scale)) * max(1, int(height * scale))
        effective = min(fitted, width * height)
        return effective, effective - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=gain)


def tile_grid(size: Size, pinpoints: Sequence[Size], tile: int) -> Size:
    """Returns (columns, rows) of the tiles of an image, from its size alone.

    Raises:
      ValueError: `size` is not positive, or the chosen pinpoint is not a multiple of `tile`.
    """
    width, height = best_resolution(size, pinpoints)
    if width % tile or height % tile:
        raise ValueError(f"pinpoint {width} x {height} is not a multiple of the tile, {tile} px")
    return width // tile, height // tile


def tile_image(image: Image.Image, pinpoints: Sequence[Size], tile: int) -> np.ndarray:
    """Cuts an image into square tiles (`anyres`).

    The image is resized (bicubic) into its best resolution with its aspect ratio kept, centred
    on black, and cut row by row. A tile has the input size of the vision tower, so that CLIP's
    own resize and crop leave it as it is.

    Returns:
      uint8 [tiles, tile, tile, 3]; tiles row-major over the grid that `tile_grid` gives.

    Raises:
      ValueError: as `tile_grid`.
    """
    columns, rows = tile_grid(image.size, pinpoints, tile)
    width, height = image.size
    scale_x, scale_y = columns * tile / width, rows * tile / height
    # Rounded up (and so never 0), where `best_resolution` rounds down: both as published.
    if scale_x < scale_y:
        fitted = (columns * tile, min(math.ceil(height * scale_x), rows * tile))
    else:
        fitted = (min(math.ceil(width * scale_y), columns * tile), rows * tile)
    canvas = Image.new("RGB", (columns * tile, rows * tile))
    corner = ((canvas.width - fitted[0]) // 2, (canvas.height - fitted[1]) // 2)
    canvas.paste(image.convert("RGB").resize(fitted, Image.Resampling.BICUBIC), corner)
    pixels = np.asarray(canvas).reshape(rows, tile, columns, tile, 3)
    return np.ascontiguousarray(pixels.swapaxes(1, 2)).reshape(-1, tile, tile, 3)
