"""Pixels of a batch with its visual tokens: of which patches each is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Num

from vxl_jax.media.layout import VisualLayout, VisualTokens
from vxl_jax.typing import AnyArray


@dataclass(frozen=True)
class VisualInput:
    """What the vision side of a model takes, for B samples of V visual tokens.

    `batch_visual` makes NumPy arrays; inside of jit they are JAX's (`vxl_jax.nn.projector`
    registers the class as a pytree).

    Attributes:
      pixels: frames and tiles of all blocks of a sample, one after another.
      patch, weight, is_max: see `VisualTokens`; patches are counted through all frames of a sample.
        is_max is None where no token of the model is a maximum.
    """

    pixels: Num[AnyArray, "B F S S 3"]
    patch: Int32[AnyArray, "B V K"]
    weight: Float32[AnyArray, "B V K"]
    is_max: Bool[AnyArray, "B V"] | None


Pixels = Num[AnyArray, "B F S S 3"] | VisualInput
"""Frames and tiles for `VideoXL.encode`: uint8 RGB, or floats that are already normalised. Pixels
alone are enough for a model whose layout `is_uniform`; others need a `VisualInput`."""


def batch_visual(
    layout: VisualLayout,
    pixels: Num[AnyArray, "B F S S 3"],
    tokens: Sequence[VisualTokens | None],
    length: int | None = None,
) -> VisualInput:
    """Pad the visual tokens of some samples into one batch.

    Args:
      layout: of the model.
      pixels: of all samples.
      tokens: of each sample; None of one that has none.
      length: visual tokens of a sample, with padding; by default the most that one has.

    Raises:
      ValueError: a sample has more tokens than `length`.
    """
    most = max((len(some) for some in tokens if some is not None), default=0)
    length = most if length is None else length
    if most > length:
        raise ValueError(f"a sample has {most} visual tokens, more than the batch's {length}")
    shape = (len(tokens), length, layout.taps)
    patch, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    is_max = np.zeros(shape[:2], bool)
    for i, some in enumerate(tokens):
        if some is not None:
            count, taps = some.patch.shape
            patch[i, :count, :taps], weight[i, :count, :taps] = some.patch, some.weight
            is_max[i, :count] = some.is_max
    return VisualInput(pixels, patch, weight, is_max if layout.pool_mode == "max" else None)


def video_shapes(layout: VisualLayout, pixels: Any) -> Any:
    """Describe the shapes of what `VideoXL.encode` takes for one video a sample.

    Args:
      layout: of the model.
      pixels: shape and dtype of the pixels (`jax.ShapeDtypeStruct`), [B, F, S, S, 3].
    """
    if layout.is_uniform:
        return pixels
    batch, frames = pixels.shape[:2]
    shape = (batch, layout.video_count(frames))

    def struct(shape: tuple[int, ...], dtype: Any) -> Any:
        return type(pixels)(shape, dtype)

    return VisualInput(
        pixels,
        struct((*shape, layout.taps), np.int32),
        struct((*shape, layout.taps), np.float32),
        struct(shape, np.bool_) if layout.pool_mode == "max" else None,
    )
