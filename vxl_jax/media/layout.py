"""Which visual tokens the frames and tiles of a block give, in stream order.

Two layouts have the same interface: `VisualLayout`, of a model and its videos, and `ImageLayout`,
of one image. Everything that plans, batches or cuts visual tokens asks them, frame by frame. A
token is a weighted mean of patches, the largest of some patches, or a learned vector;
`VisualTokens` says of which patches each is made, and the network (`vxl_jax.nn.projector`) does as
it says.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float32, Int32

from vxl_jax.errors import ConfigError
from vxl_jax.media.tiles import Size

PoolMode = Literal["average", "bilinear", "max"]
"""How the patches of a frame become fewer: the mean or the largest of squares (patches left over
are dropped), or bilinear interpolation without antialiasing to a grid that is rounded up."""

Newline = Literal["none", "grid", "frame", "one_token"]
"""Where a video has the learned newline token: nowhere, after every row of every frame, after every
frame, or once at its end."""

ImageTokens = Literal["pooled", "flat", "unpad"]
"""Tokens of an image. pooled: each tile is pooled as a frame of a video. flat: all patches of all
tiles, one tile after the other. unpad: all patches of the first tile; then those of the other tiles
as one grid without the rows or columns of padding, each row with a newline. A single tile is
followed by one newline."""

NEWLINE, FASTER = -1, -2
"""In place of a patch: the learned newline vector, and the one that ends every frame of some
SlowFast models."""

LARGEST_SHARE = 1.1
"""An image is downscaled where it has more rows than the limit by this factor (and columns,
too)."""


@dataclass(frozen=True)
class VisualTokens:
    """Of which patches each of V visual tokens is made, from up to K patches.

    Attributes:
      patch: patch of the block, counted frame by frame, or `NEWLINE` or `FASTER`.
      weight: of the patch in the sum; 0 for places that are not used.
      is_max: whether the token is, in each feature, the largest of its patches instead.
    """

    patch: Int32[np.ndarray, "V K"]
    weight: Float32[np.ndarray, "V K"]
    is_max: Bool[np.ndarray, " V"]

    def __len__(self) -> int:
        return len(self.patch)

    def moved(self, patches: int) -> "VisualTokens":
        """Count patches from `patches` on: of a block that follows others in a sample."""
        return replace(self, patch=np.where(self.patch < 0, self.patch, self.patch + patches))


def join_tokens(parts: list[VisualTokens]) -> VisualTokens:
    """Put tokens one after another."""
    widest = max((part.patch.shape[1] for part in parts), default=1)

    def joined(name: Literal["patch", "weight"]) -> npt.NDArray[Any]:
        arrays = [getattr(part, name) for part in parts]
        padded = [np.pad(x, ((0, 0), (0, widest - x.shape[1]))) for x in arrays]
        return np.concatenate(padded) if padded else np.zeros((0, widest))

    is_max = np.concatenate([np.zeros(0, bool), *(part.is_max for part in parts)])
    return VisualTokens(
        joined("patch").astype(np.int32), joined("weight").astype(np.float32), is_max
    )


class FrameCounts:
    """Count the visual tokens of the frames or tiles of one block; subclasses say of each."""

    @property
    def end_tokens(self) -> int:
        """Tokens at the end of the block that belong to no frame."""
        return 0

    def frame_tokens(self, frames: int, first: int = 0) -> npt.NDArray[np.int64]:
        """Count the tokens of each of `frames` frames or tiles, from frame `first` of a block on.

        Returns:
          int64 [frames].
        """
        raise NotImplementedError

    def count(self, frames: int, first: int = 0) -> int:
        """Count the tokens of `frames` frames or tiles, from frame `first` of a block on."""
        return int(self.frame_tokens(frames, first).sum())

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


@dataclass(frozen=True)
class VisualLayout(FrameCounts):
    """Visual tokens of a model; as `FrameCounts`, those of a video.

    Raises:
      ConfigError: a field is out of range.
    """

    grid: int
    """Patches along one side of a frame."""
    pool_stride: int
    """Patches of a frame become fewer by this factor along each side."""
    pool_mode: PoolMode = "average"
    newline: Newline = "none"
    slow_every: int = 1
    """Every such frame of a video is slow; the others are fast, and pooled by twice the stride
    (SlowFast, arXiv 2410.02713). 1: all are slow."""
    faster_token: bool = False
    """Whether a learned token follows every frame of a video."""
    images: ImageTokens = "pooled"
    max_tiles: int | None = None
    """An unpadded image with more patches than this many tiles have is downscaled to about as many.
    None: no limit."""

    def __post_init__(self) -> None:
        for name, kind in (("pool_mode", PoolMode), ("newline", Newline), ("images", ImageTokens)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"VisualLayout.{name} is {getattr(self, name)!r}; use one of "
                    f"{', '.join(get_args(kind))}"
                )
        for name in ("pool_stride", "slow_every", "max_tiles"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"VisualLayout.{name} is {value!r}; it must be at least 1")
        if self.pool_mode != "bilinear" and self._coarsest > self.grid:
            raise ConfigError(
                f"VisualLayout: frames are pooled by {self._coarsest}, which is larger than the "
                f"tower's grid of {self.grid} patches"
            )

    @property
    def is_uniform(self) -> bool:
        """Whether every frame and tile gives the means of equal squares and nothing else.

        The network then pools by itself, without `VisualTokens`.
        """
        plain = VisualLayout(self.grid, self.pool_stride, max_tiles=self.max_tiles)
        return self == plain

    @property
    def has_newline(self) -> bool:
        """Whether the model has the learned newline vector."""
        return self.newline != "none" or self.images == "unpad"

    @property
    def taps(self) -> int:
        """Most patches that a token is made of (K of `VisualTokens`)."""
        of_frame = 4 if self.pool_mode == "bilinear" else self._coarsest**2
        return max(of_frame, 4 if self.images == "unpad" and self.max_tiles is not None else 1)

    @property
    def end_tokens(self) -> int:
        """Tokens at the end of a video that belong to no frame."""
        return int(self.newline == "one_token")

    def frame_tokens(self, frames: int, first: int = 0) -> npt.NDArray[np.int64]:
        """As `FrameCounts.frame_tokens`, of a video."""
        slow, fast = (self._tokens_of(kind) for kind in (True, False))
        return np.where(self._is_slow(frames, first), slow, fast)

    def video_count(self, frames: int) -> int:
        """Count the tokens of a whole video."""
        return self.count(frames) + self.end_tokens

    def video_tokens(self, frames: int, first: int = 0, ends: bool = True) -> VisualTokens:
        """Make the tokens of frames of a video; patches are counted from frame `first` on.

        Args:
          frames: how many.
          first: place in the video of the first of them.
          ends: whether the video ends with the last.
        """
        parts = [
            _frame(self, bool(is_slow)).moved(i * self.grid**2)
            for i, is_slow in enumerate(self._is_slow(frames, first))
        ]
        if ends and self.end_tokens:
            parts.append(_learned(NEWLINE))
        return join_tokens(parts)

    def join_blocks(self, blocks: Iterable[tuple[VisualTokens, int]]) -> VisualTokens:
        """Put the blocks of a sample one after another; patches are counted through all of them.

        blocks: tokens of each, and how many frames or tiles they are made of.
        """
        patches, parts = 0, []
        for tokens, frames in blocks:
            parts.append(tokens.moved(patches))
            patches += frames * self.grid**2
        return join_tokens(parts)

    def image(
        self, tiles: int, grid: Size | None = None, size: Size | None = None
    ) -> "ImageLayout":
        """Lay out the tokens of one image.

        Args:
          tiles: tiles that the tower encodes.
          grid: (columns, rows) of the tiles after the first; None of a single tile.
          size: (width, height) of the image in pixels, where there is a grid.
        """
        return ImageLayout(self, tiles, grid, size)

    def _is_slow(self, frames: int, first: int) -> npt.NDArray[np.bool_]:
        return (first + np.arange(frames)) % self.slow_every == 0

    def _tokens_of(self, is_slow: bool) -> int:
        side = self._side(is_slow)
        newlines = {"grid": side, "frame": 1}.get(self.newline, 0)
        return side**2 + newlines + self.faster_token

    def _side(self, is_slow: bool) -> int:
        stride = self._stride(is_slow)
        return -(-self.grid // stride) if self.pool_mode == "bilinear" else self.grid // stride

    @property
    def _coarsest(self) -> int:
        """Stride of the frames that are pooled most."""
        return self._stride(is_slow=self.slow_every == 1)

    def _stride(self, is_slow: bool) -> int:
        return self.pool_stride if is_slow else 2 * self.pool_stride


@dataclass(frozen=True)
class ImageLayout(FrameCounts):
    """Visual tokens of one image; see `VisualLayout.image`."""

    model: VisualLayout
    tiles: int
    grid: Size | None
    size: Size | None

    def frame_tokens(self, frames: int, first: int = 0) -> npt.NDArray[np.int64]:
        """As `FrameCounts.frame_tokens`; all tokens are those of the last tile, but where each tile
        is pooled by itself.
        """
        if self.model.images == "pooled":
            return np.full(frames, self._of_tile.count(1))
        return np.where(first + np.arange(frames) == self.tiles - 1, self.total, 0)

    def frames_of(self, tokens: int, first: int = 0) -> int:
        """As `FrameCounts.frames_of`; tokens that are made of all tiles begin with all of them."""
        if self.model.images == "pooled":
            return super().frames_of(tokens, first)
        return self.tiles - first if tokens else 0

    @property
    def total(self) -> int:
        """Tokens of the whole image."""
        if self.model.images == "pooled":
            return self._of_tile.count(self.tiles)
        of_tile = self.model.grid**2
        if self.model.images == "flat":
            return self.tiles * of_tile
        if self.grid is None:
            return of_tile + 1
        rows, columns = self._shape()
        return of_tile + rows * (columns + 1)

    def tokens(self) -> VisualTokens:
        """Make the tokens of all tiles."""
        if self.model.images == "pooled":
            return self._of_tile.video_tokens(self.tiles)
        return _image(self)

    @property
    def _of_tile(self) -> VisualLayout:
        """Tiles as frames of a video without learned tokens."""
        return replace(self.model, newline="none", slow_every=1, faster_token=False)

    def _shape(self) -> tuple[int, int]:
        """Rows and columns of tokens that an unpadded image has after its first tile."""
        inside = self._unpadded()
        shape = inside[0].stop - inside[0].start, inside[1].stop - inside[1].start
        if self.model.max_tiles is None:
            return shape
        times = math.sqrt(shape[0] * shape[1] / (self.model.max_tiles * self.model.grid**2))
        if times <= LARGEST_SHARE:
            return shape
        return int(shape[0] // times), int(shape[1] // times)

    def _unpadded(self) -> tuple[slice, slice]:
        """Rows and columns of patches that show the image, which was fitted into the tiles with its
        aspect ratio kept, and not padding.

        As published, also in its rounding: half of the padding is cut on each side, rounded down.
        """
        assert self.grid is not None
        assert self.size is not None
        (width, height), side = self.size, self.model.grid
        columns, rows = (tiles * side for tiles in self.grid)
        if width / height > columns / rows:
            cut = (rows - int(height * (columns / width))) // 2
            return slice(cut, rows - cut), slice(0, columns)
        cut = (columns - int(width * (rows / height))) // 2
        return slice(0, rows), slice(cut, columns - cut)


# --- Tokens of one frame or image ---------------------------------------------------------------


def _learned(vector: int) -> VisualTokens:
    return VisualTokens(
        np.full((1, 1), vector, np.int32), np.ones((1, 1), np.float32), np.zeros(1, bool)
    )


def _of_patches(
    patch: npt.NDArray[Any], weight: npt.NDArray[Any], is_max: bool = False
) -> VisualTokens:
    """Tokens from [..., K] patches and weights, in row-major order."""
    taps = patch.shape[-1]
    patch = patch.reshape(-1, taps).astype(np.int32)
    weight = weight.reshape(-1, taps).astype(np.float32)
    return VisualTokens(patch, weight, np.full(len(patch), is_max))


def _in_rows(tokens: VisualTokens, columns: int) -> VisualTokens:
    """Put a newline after every row of `columns` tokens."""
    rows = len(tokens) // columns

    def with_last(x: npt.NDArray[Any], last: npt.NDArray[Any]) -> npt.NDArray[Any]:
        x = x.reshape(rows, columns, *x.shape[1:])
        ends = np.broadcast_to(last, (rows, 1, *x.shape[2:]))
        return np.concatenate([x, ends], axis=1).reshape(rows * (columns + 1), *x.shape[2:])

    one = np.eye(1, tokens.patch.shape[1], dtype=np.float32)[0]
    return VisualTokens(
        with_last(tokens.patch, np.where(one, NEWLINE, 0).astype(np.int32)),
        with_last(tokens.weight, one),
        with_last(tokens.is_max, np.zeros((), bool)),
    )


@cache
def _frame(layout: VisualLayout, is_slow: bool) -> VisualTokens:
    """Tokens of one frame of a video."""
    side, stride = layout._side(is_slow), layout._stride(is_slow)
    patches = np.arange(layout.grid**2).reshape(layout.grid, layout.grid)
    if layout.pool_mode == "bilinear":
        tokens = _resized(patches, (side, side))
    else:
        cells = patches[: side * stride, : side * stride].reshape(side, stride, side, stride)
        squares = cells.swapaxes(1, 2).reshape(side, side, stride**2)
        is_max = layout.pool_mode == "max"
        weight = np.full(squares.shape, 1.0 if is_max else 1 / stride**2)
        tokens = _of_patches(squares, weight, is_max)
    if layout.newline == "grid":
        tokens = _in_rows(tokens, side)
    elif layout.newline == "frame":
        tokens = join_tokens([tokens, _learned(NEWLINE)])
    return join_tokens([tokens, _learned(FASTER)]) if layout.faster_token else tokens


@lru_cache(maxsize=64)
def _image(image: ImageLayout) -> VisualTokens:
    """Tokens of one image."""
    side = image.model.grid
    flat = np.arange(image.tiles * side**2)[:, None]
    if image.model.images == "flat":
        return _of_patches(flat, np.ones(flat.shape))
    base = _of_patches(flat[: side**2], np.ones((side**2, 1)))
    if image.grid is None:
        return join_tokens([base, _learned(NEWLINE)])
    columns, rows = image.grid
    tiles = flat[side**2 :].reshape(rows, columns, side, side).swapaxes(1, 2)
    patches = tiles.reshape(rows * side, columns * side)[image._unpadded()]
    shape = image._shape()
    if shape == patches.shape:
        tokens = _of_patches(patches[..., None], np.ones((*shape, 1)))
    else:
        tokens = _resized(patches, shape)
    return join_tokens([base, _in_rows(tokens, shape[1])])


def _resized(patches: npt.NDArray[Any], shape: tuple[int, int]) -> VisualTokens:
    """Tokens of a grid of patches after bilinear interpolation to `shape` rows and columns."""
    (top, bottom, down), (left, right, across) = (
        _interpolated(old, new) for old, new in zip(patches.shape, shape, strict=True)
    )
    corners = [(r, c) for r in (top, bottom) for c in (left, right)]
    shares = [np.outer(r, c) for r in (1 - down, down) for c in (1 - across, across)]
    found = [patches[np.ix_(rows, columns)] for rows, columns in corners]
    return _of_patches(np.stack(found, axis=-1), np.stack(shares, axis=-1))


def _interpolated(
    old: int, new: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Where each of `new` points lies among `old`: the two nearest, and the share of the second.

    Half-pixel centres, clamped at the edges, no antialiasing (PyTorch's `align_corners=False`).
    """
    at = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    low = np.minimum(at.astype(int), old - 1)
    return low, np.minimum(low + 1, old - 1), at - low
