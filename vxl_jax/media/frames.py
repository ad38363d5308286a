"""One frame as the square that the vision tower takes, and its normalisation."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from vxl_jax.media.tiles import Size

# Mean and standard deviation of CLIP's RGB input, on the scale 0..1 (openai/CLIP).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Images longer than this many times their width are cut before they are resized: the centre crop
# takes 1/32 of the rest, and a 1 x 10000 image would otherwise become 4 GB.
_MAX_ASPECT = 32


Resize = Literal["crop", "stretch"]
"""How a frame becomes a square. crop: the short side is resized and the centre cut out (CLIP);
stretch: both sides are resized, and the aspect ratio is lost (SigLIP)."""


def fit_square(frame: Image.Image | np.ndarray, size: int, resize: Resize = "crop") -> np.ndarray:
    """Make a frame a square of `size` pixels (bicubic): uint8 [size, size, 3]."""
    if resize == "crop":
        return resize_and_crop(frame, size)
    image = frame if isinstance(frame, Image.Image) else Image.fromarray(frame)
    return np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def fill_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Put an image in the middle of a square of its longer side, on a background."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return square


def resize_and_crop(frame: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """Resizes the short side to `size` (bicubic) and crops the centre: CLIP preprocessing.

    Equal, byte for byte, to transformers' CLIP image processor before rescaling (the long side is
    truncated, the crop offset rounded down) for aspect ratios up to 32; beyond that only the
    centre of the image is resized.

    Args:
      frame: an image, or uint8 [H, W, 3].
      size: side of the result in pixels.

    Returns:
      uint8 [size, size, 3].
    """
    image = frame if isinstance(frame, Image.Image) else Image.fromarray(frame)
    image = image.convert("RGB")
    short = min(image.size)
    longest = _MAX_ASPECT * short
    if max(image.size) > longest:
        image = _centre_crop(image, (min(image.width, longest), min(image.height, longest)))
    resized = (size * image.width // short, size * image.height // short)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    return np.array(_centre_crop(image, (size, size)))


def _centre_crop(image: Image.Image, size: Size) -> Image.Image:
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def normalize(
    pixels: np.ndarray,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> np.ndarray:
    """Returns (pixels / 255 - mean) / std as float32, for uint8 pixels [..., 3]."""
    scaled = pixels.astype(np.float32) / np.float32(255)
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
