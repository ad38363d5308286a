"""Tokens of frames: counted, and found again."""

import numpy as np
import pytest

from vxl_jax.media.layout import VisualLayout


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


@pytest.mark.parametrize("layout", [VisualLayout(4, 2), Varied(4, 2)])
def test_blocks_are_counted_at_once(layout: VisualLayout):
    frames = np.array([3, 0, 1, 17, 3], np.uint32)
    assert layout.counts(frames).tolist() == [layout.count(int(count)) for count in frames]
    assert layout.counts(np.zeros(0, np.uint32)).tolist() == []
