"""Convert a decoded PyAV frame to upright RGB pixels."""

import struct
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image

from vxl_jax.media.options import MediaOptions
from vxl_jax.media.video.tone_map import tone_map

_TRANSFERS: dict[int, Literal["pq", "hlg"]] = {16: "pq", 18: "hlg"}
"""HDR transfer functions, by their number in ITU-T H.273."""
_FULL_RANGE, _LIMITED_WHITE = 2, 65283
"""Color range of frames that use all values, and what swscale makes of white in the others."""


class FrameToPixels:
    """Convert the frames of one stream to RGB."""

    def __init__(self, options: MediaOptions):
        from av.video.reformatter import VideoReformatter

        self.options = options
        self._reformatter = VideoReformatter()  # keeps its tables from frame to frame
        self._matrix: tuple[int, ...] | None = None

    def __call__(self, frame: Any, stream: Any) -> np.ndarray:
        """Return a frame as uint8 [H, W, 3]."""
        transfer = _TRANSFERS.get(int(frame.color_trc)) if self.options.tone_map else None
        if transfer is None:
            # With more threads than one, swscale is slower by far.
            pixels = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        else:
            deep = self._reformatter.reformat(frame, format="rgb48le", threads=1).to_ndarray()
            white = 65535 if frame.color_range == _FULL_RANGE else _LIMITED_WHITE
            pixels = tone_map(deep * np.float32(1 / white), transfer)
        if self._matrix is None:  # once: asking a frame for its side data keeps it from being freed
            self._matrix = _display_matrix(frame)
        if self.options.square_pixels:
            pixels = _with_square_pixels(pixels, _pixel_aspect(stream))
        return np.ascontiguousarray(_UPRIGHT.get(self._matrix, _as_it_is)(pixels))


def _display_matrix(frame: Any) -> tuple[int, ...]:
    """Signs of the four numbers that turn and mirror a frame."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack("<5i", bytes(data)[:20])
            return tuple(int(np.sign(x)) for x in (a, b, c, d))
    return 1, 0, 0, 1


def _as_it_is(pixels: np.ndarray) -> np.ndarray:
    return pixels


_UPRIGHT: dict[tuple[int, ...], Callable[[np.ndarray], np.ndarray]] = {
    (-1, 0, 0, -1): lambda x: x[::-1, ::-1],
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1),
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: np.rot90(x, 2).swapaxes(0, 1),
}
"""Turns and mirror images, by the signs of the display matrix."""


def _with_square_pixels(pixels: np.ndarray, aspect: float) -> np.ndarray:
    if abs(aspect - 1) < 1e-3 or not 1 / 32 < aspect < 32:
        return pixels
    height, width, _ = pixels.shape
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(
        image.resize((max(1, round(width * aspect)), height), Image.Resampling.BICUBIC)
    )


def _pixel_aspect(stream: Any) -> float:
    """Width of a stored pixel by its height."""
    ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    return float(ratio) if ratio else 1.0
