"""Tokens of frames: counted, and found again."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from vxl_jax.errors import ConfigError
from vxl_jax.media.layout import NEWLINE, VisualLayout, join_tokens
from vxl_jax.media.tiles import tile_grid


class Varied(VisualLayout):
    """Frames of 4, 1 and 1 tokens by turns, as fast and slow frames have."""

    def frame_tokens(self, frames: int, first: int = 0) -> np.ndarray:
        return np.where((first + np.arange(frames)) % 3 == 0, 4, 1)


def test_patches_left_over_are_dropped():
    assert VisualLayout(24, 2).frame_tokens(3).tolist() == [144] * 3
    assert VisualLayout(5, 2).count(2) == 8
    assert VisualLayout(5, 1).count(1) == 25


@pytest.mark.parametrize("layout", [VisualLayout(4, 2), Varied(4, 2)])
@pytest.mark.parametrize("first", [0, 1, 2, 7])
def test_frames_and_tokens_are_counted_as_one_by_one(layout: VisualLayout, first: int):
    each = layout.frame_tokens(40, first).tolist()
    owner = [frame for frame, tokens in enumerate(each) for _ in range(tokens)]
    for frames in range(40):
        assert layout.count(frames, first) == sum(each[:frames])
    for tokens in range(1, len(owner)):
        assert layout.frames_of(tokens, first) == owner[tokens - 1] + 1
    assert layout.frames_of(0, first) == 0
    places = np.arange(len(owner))
    assert layout.frame_at(places, 40, first).tolist() == owner


# LLaVA-Video: 27 x 27 patches, and the numbers of its published code.

SIGLIP = partial(VisualLayout, 27, 2, pool_mode="bilinear", images="unpad", max_tiles=9)
GRIDS = [(384 * columns, 384 * rows) for columns in range(1, 7) for rows in range(1, 7)]


@pytest.mark.parametrize(
    ("newline", "bilinear", "average"),
    [
        ("grid", 13440, 11648),
        ("frame", 12608, 10880),
        ("one_token", 12545, 10817),
        ("none", 12544, 10816),
    ],
)
def test_tokens_of_64_frames(newline: Any, bilinear: int, average: int):
    assert SIGLIP(newline=newline).video_count(64) == bilinear
    assert SIGLIP(newline=newline, pool_mode="average").video_count(64) == average
    assert SIGLIP(newline=newline, pool_mode="max").video_count(64) == average


def test_slow_and_fast_frames():
    slow_fast = SIGLIP(newline="grid", slow_every=3)
    assert slow_fast.frame_tokens(7).tolist() == [210, 56, 56, 210, 56, 56, 210]
    assert slow_fast.frame_tokens(3, first=2).tolist() == [56, 210, 56]
    assert slow_fast.video_count(64) == 6972
    assert replace(slow_fast, faster_token=True).video_count(64) == 7036
    assert replace(slow_fast, pool_mode="average").video_count(64) == 5768


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((640, 480), 2929),
        ((1920, 1080), 7269),
        ((300, 1200), 3753),
        ((50, 50), 1485),
        ((4000, 3000), 7309),
        ((8000, 400), 2196),
        ((1476, 820), 729 + 59 * 109),  # exact arithmetic would keep 61 rows
    ],
)
def test_tokens_of_an_image(size: tuple[int, int], tokens: int):
    grid = tile_grid(size, GRIDS, 384)
    tiles = 1 + grid[0] * grid[1]
    image = SIGLIP().image(tiles, grid, size)
    assert image.total == image.count(tiles) == len(image.tokens()) == tokens
    # The tokens are there when the last tile is.
    assert image.frame_tokens(tiles).tolist() == [0] * (tiles - 1) + [tokens]
    assert [image.frames_of(n) for n in (1, tokens)] == [tiles, tiles]


def test_one_tile_is_followed_by_a_newline():
    tokens = SIGLIP().image(1).tokens()
    assert tokens.patch[:, 0].tolist() == [*range(729), NEWLINE]
    assert VisualLayout(4, 2, images="flat").image(3).total == 48
    assert VisualLayout(4, 2).image(3).total == 12


@pytest.mark.parametrize("mode", ["average", "bilinear", "max"])
@pytest.mark.parametrize("newline", ["none", "grid", "frame", "one_token"])
@pytest.mark.parametrize("slow_every", [1, 2, 3])
def test_a_video_in_pieces_has_the_tokens_of_the_whole(mode: Any, newline: Any, slow_every: int):
    layout = VisualLayout(9, 2, mode, newline, slow_every, newline == "grid")
    whole = layout.video_tokens(7)
    pieces = [
        layout.video_tokens(count, first, ends=first + count == 7).moved(first * 81)
        for first, count in ((0, 2), (2, 1), (3, 4))
    ]
    joined = join_tokens(pieces)
    np.testing.assert_array_equal(joined.weight, whole.weight)
    np.testing.assert_array_equal(joined.is_max, whole.is_max)
    used = whole.weight > 0
    np.testing.assert_array_equal(joined.patch[used], whole.patch[used])
    assert len(whole) == layout.video_count(7)
    assert whole.patch.shape[1] <= layout.taps
    mean = whole.weight[~whole.is_max].sum(1)
    np.testing.assert_allclose(mean, 1, rtol=1e-6)


def test_unusable_layouts_are_refused():
    for changes, message in (
        ({"slow_every": 0}, "slow_every is 0"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"pool_mode": "mean"}, "pool_mode is 'mean'"),
        ({"newline": "row"}, "newline is 'row'"),
        ({"images": "tiled"}, "images is 'tiled'"),
        ({"slow_every": 2, "pool_stride": 3}, "pooled by 6"),
    ):
        with pytest.raises(ConfigError, match=message):
            VisualLayout(**{"grid": 5, "pool_stride": 2} | changes)
