"""Draw the pictures of the demo data set: one bright shape, or nothing, on a dark noisy tile.

A picture is a row-major grid of square tiles; a video is a sequence of them. Sizes, brightness and
jitter are what a small vision tower can learn to read in half a minute on two cores: shapes fill
most of the tile, and colours are far from the background and from each other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

TILE = 56
"""Side of a tile and of a video frame, in pixels."""
RADIUS = (18.0, 22.0)
"""Smallest and largest radius of a shape, in pixels."""
JITTER = 3.0
"""A shape's centre is at most this many pixels from the tile's, along each axis."""
BACKGROUND = 0.15
"""Mean brightness of the background, 0..1."""
NOISE = 0.05
"""Standard deviation of the noise added to every channel of every pixel."""
VIDEO_OPTIONS = {"qp": "10", "preset": "veryfast", "threads": "1"}
"""Options of libx264: high quality and reproducible bytes. With an adaptive quantizer (`crf`) the
same frames gave different files."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.85, 0.15),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (1.0, 0.95, 0.1),
    "orange": (1.0, 0.55, 0.05),
    "cyan": (0.1, 0.9, 0.95),
    "pink": (1.0, 0.3, 0.85),
    "white": (0.97, 0.97, 0.97),
}
"""Name of a colour to its RGB in 0..1."""


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (y <= 0.8) & (y >= 1.8 * np.abs(x) - 1.0)


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) <= 1.0,
    "triangle": _triangle,
    "cross": lambda x, y: (
        (np.minimum(np.abs(x), np.abs(y)) <= 0.3) & (np.maximum(np.abs(x), np.abs(y)) <= 1.0)
    ),
    "bar": lambda x, y: (np.abs(x) <= 1.0) & (np.abs(y) <= 0.35),
}
"""Name of a shape to whether a point is inside it; x right and y down, in units of its radius."""


class Thing(NamedTuple):
    """The content of one tile."""

    colour: str
    shape: str


def draw_tile(rng: np.random.Generator, thing: Thing | None) -> np.ndarray:
    """Draw a shape, or only noise, on a tile: uint8 [TILE, TILE, 3]."""
    picture = np.full((TILE, TILE, 3), BACKGROUND)
    if thing is not None:
        radius = rng.uniform(*RADIUS)
        across, down = TILE / 2 + rng.uniform(-JITTER, JITTER, 2)
        brightness = rng.uniform(0.9, 1.0)
        # Four samples a pixel along each axis make smooth edges.
        points = (np.arange(4 * TILE) + 0.5) / 4
        inside = SHAPES[thing.shape](
            (points[None, :] - across) / radius, (points[:, None] - down) / radius
        )
        cover = inside.reshape(TILE, 4, TILE, 4).mean((1, 3))[..., None]
        picture += cover * (brightness * np.array(COLOURS[thing.colour]) - BACKGROUND)
    picture += rng.normal(0.0, NOISE, picture.shape)
    return np.round(255 * picture.clip(0.0, 1.0)).astype(np.uint8)


def write_png(path: Path, tiles: list[np.ndarray], columns: int) -> None:
    """Write tiles as one picture, `columns` in a row."""
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    Image.fromarray(np.vstack(rows)).save(path)


def write_mp4(path: Path, frames: list[np.ndarray]) -> None:
    """Write frames as H.264 at one frame a second, with colours at full resolution.

    Raises: ModuleNotFoundError if PyAV is not installed.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options=VIDEO_OPTIONS)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
