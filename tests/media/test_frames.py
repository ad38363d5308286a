"""Which frames of a video are taken, and how they move in time."""

import numpy as np
import pytest

from vxl_jax.errors import MediaError
from vxl_jax.media import Timeline, choose_frames, frame_indices, jitter_indices, uniform_indices
from vxl_jax.media.sampling import FrameSampling

TENTHS = Timeline.of_rate(50, 10.0)
"""Fifty frames, ten a second."""

SAMPLINGS: tuple[FrameSampling, ...] = ("capped", "uniform", "fps")

# Which frames.


@pytest.mark.parametrize(
    ("sampling", "most", "fps", "expected"),
    [
        ("capped", 9, 1.0, [0, 10, 20]),
        ("capped", 3, 1.0, [0, 10, 20]),
        ("capped", 2, 1.0, [0, 31]),
        ("capped", 1, 1.0, [0]),
        ("capped", 9, 2.0, [0, 5, 10, 15, 20, 25]),
        ("uniform", 4, 1.0, [0, 10, 20, 31]),
        ("uniform", 4, 99.0, [0, 10, 20, 31]),
        ("uniform", 99, 1.0, [*range(32)]),
        ("uniform", 1, 1.0, [0]),
        ("fps", 3, 1.0, [0, 10, 20]),
        ("fps", 32, 99.0, [*range(32)]),
        ("fps", 1, 0.001, [0]),
    ],
)
def test_literal_choices(sampling: FrameSampling, most: int, fps: float, expected: list[int]):
    """Of 32 frames at 10 a second."""
    assert choose_frames(Timeline.of_rate(32, 10.0), sampling, most, fps) == expected


def test_more_frames_a_second_than_are_allowed():
    with pytest.raises(
        MediaError,
        match=r"^3 frames at 1 a second are over max_frames 2; use a clip of it, or another sampl",
    ):
        choose_frames(Timeline.of_rate(32, 10.0), "fps", 2)


def test_a_whole_video_is_chosen_as_published():
    for frames in (1, 2, 7, 99, 1000):
        for fps in (0.5, 1.0, 23.976, 30.0):
            for most in (1, 2, 8, 64):
                capped = choose_frames(Timeline.of_rate(frames, fps), "capped", most, 1.0)
                assert capped == frame_indices(frames, fps, most, 1.0)
                uniform = choose_frames(Timeline.of_rate(frames, fps), "uniform", most)
                assert uniform == uniform_indices(frames, min(frames, most))


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, range(0, 50)),
        (0, 5, range(0, 50)),
        (0.0, None, range(0, 50)),
        (1, 2, range(10, 20)),
        (None, 1.2, range(0, 12)),
        (4.5, None, range(45, 50)),
        (4.5, 900, range(45, 50)),
        (0.04, 0.16, range(0, 2)),
        (1.0, 1.01, range(10, 11)),
        (0, 1e-9, range(0, 1)),
        (4.99, 5, range(49, 50)),
        (4.96, 4.97, range(49, 50)),
    ],
)
def test_clips(start: float | None, end: float | None, expected: range):
    """Of 50 frames at 10 a second: the frames that the clip covers, one at least."""
    for sampling in SAMPLINGS:
        assert choose_frames(TENTHS, sampling, 50, 10.0, start, end) == [*expected]
    assert choose_frames(TENTHS, "uniform", 1, 1.0, start, end) == [expected[0]]


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (2, 1, "the clip from 2 s to 1 s has no frames; fix start and end"),
        (1, 1, "the clip from 1 s to 1 s has no frames; fix start and end"),
        (None, 0, "the clip from 0 s to 0 s has no frames; fix start and end"),
        (-1, 1, "the clip from -1 s to 1 s has no frames; fix start and end"),
        (float("nan"), None, "has no frames; fix start and end"),
        (None, float("nan"), "has no frames; fix start and end"),
        (5, 6, "the clip starts at 5 s but the video is 5.00 s long; fix start and end"),
    ],
)
def test_clips_without_frames(start: float | None, end: float | None, message: str):
    with pytest.raises(MediaError) as caught:
        choose_frames(TENTHS, "capped", 8, 1.0, start, end)
    assert message in str(caught.value)


def test_any_choice_rises_within_its_clip():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        frames, most = (int(n) for n in rng.integers(1, 400, 2))
        fps, wanted = rng.uniform(0.1, 60, 2)
        start, end = (float(x) for x in np.sort(rng.uniform(0, frames / fps, 2)))
        if rng.random() < 0.1:
            end = start + rng.uniform(1e-6, 1 / fps)
        sampling = SAMPLINGS[int(rng.integers(3))]
        if sampling == "fps":
            most = frames
        chosen = choose_frames(Timeline.of_rate(frames, fps), sampling, most, wanted, start, end)
        case = (frames, fps, sampling, most, wanted, start, end, chosen)
        assert 1 <= len(chosen) <= most, case
        assert sorted({*chosen}) == chosen, case  # all of them differ
        first = min(round(start * fps), frames - 1)
        assert chosen[0] == first, case
        assert chosen[-1] < max(first + 1, min(frames, round(end * fps))), case


# Moving them.


def test_frames_move_towards_the_next_one():
    rng = np.random.default_rng(0)
    drawn = np.array([jitter_indices([0, 4, 5, 25], 30, 1.0, rng) for _ in range(1000)])
    # The last has as much room as the one before it, up to the end.
    for column, expected in zip(
        drawn.T, [range(4), range(4, 5), range(5, 25), range(25, 30)], strict=True
    ):
        assert {*column.tolist()} == {*expected}
    room = np.array([jitter_indices([0, 4], 30, 1.0, rng) for _ in range(200)])
    assert {*room[:, 1].tolist()} == {4, 5, 6, 7}
    half = np.array([jitter_indices([0, 10], 20, 0.5, rng) for _ in range(200)])
    assert {*half[:, 0].tolist()} == {0, 1, 2, 3, 4}


def test_one_frame_moves_to_the_end():
    rng = np.random.default_rng(0)
    drawn = {jitter_indices([3], 8, 1.0, rng)[0] for _ in range(200)}
    assert drawn == {3, 4, 5, 6, 7}


def test_moved_frames_of_any_choice_stay_in_order_and_in_the_video():
    rng = np.random.default_rng(1)
    for _ in range(2000):
        end = int(rng.integers(1, 300))
        count = int(rng.integers(1, end + 1))
        indices = np.sort(rng.choice(end, count, replace=bool(rng.random() < 0.2))).tolist()
        share = float(rng.choice([0.0, 0.3, 1.0]))
        moved = jitter_indices(indices, end, share, rng)
        assert all(type(i) is int for i in moved)
        assert len(moved) == len(indices)
        assert moved == sorted(moved), (indices, moved)
        assert all(i <= j < end for i, j in zip(indices, moved, strict=True)), (indices, moved)
        assert len({*moved}) >= len({*indices})  # what differed still does
        assert share or moved == indices


def test_moves_follow_from_the_seed():
    def moved(seed: int) -> list[int]:
        return jitter_indices([*range(0, 1000, 50)], 1000, 1.0, np.random.default_rng(seed))

    assert moved(0) == moved(0) != moved(1)


@pytest.mark.parametrize(("fps", "wanted"), [(24, 10), (30, 20), (25, 4), (29.97, 3), (10, 25)])
def test_fixed_sampling_keeps_its_rate(fps: float, wanted: float):
    """Not only where the rates divide each other."""
    chosen = choose_frames(Timeline.of_rate(round(60 * fps), fps), "fps", 10_000, wanted)
    assert len(chosen) == pytest.approx(60 * min(fps, wanted), abs=1)
    assert sorted({*chosen}) == chosen
    seconds = np.array(chosen) / fps
    np.testing.assert_allclose(seconds, np.arange(len(chosen)) / min(fps, wanted), atol=1 / fps)


# Rates that vary.

GAP = Timeline(np.r_[np.arange(25) / 25, 11 + np.arange(25) / 25], 12.0, 25.0)
"""A second of 25 frames, ten seconds in which the last one stays, and another second."""


@pytest.mark.parametrize(
    ("fps", "start", "end", "expected"),
    [
        (1.0, None, None, [0, 24, 25]),
        (2.0, None, None, [0, 12, 24, 25, 37]),
        (1.0, 5, None, [24, 25]),
        (2.0, 5, 11.2, [24, 25]),
        (1.0, 5, 9, [24]),
        (1.0, 11.4, None, [35]),
        (100.0, None, None, [*range(50)]),
        (1e-6, None, None, [0]),
    ],
)
def test_frames_on_the_screen_at_a_rate(
    fps: float, start: float | None, end: float | None, expected: list[int]
):
    for sampling in ("capped", "fps"):
        assert choose_frames(GAP, sampling, 50, fps, start, end) == expected


def test_too_many_at_a_rate_are_thinned_out_evenly():
    assert choose_frames(GAP, "capped", 3, 2.0) == [0, 24, 37]


def test_each_part_of_a_joined_file_is_gone_through():
    twice = Timeline(np.tile(np.arange(25) / 25, 2), 1.0, 25.0)
    assert choose_frames(twice, "fps", 50, 5.0) == [*range(0, 50, 5)]
    assert choose_frames(twice, "uniform", 3) == [0, 24, 49]


def test_one_absurd_time_costs_no_memory():
    far = Timeline(np.array([0.0, 0.04, 2e17]), 2e17 + 0.04, 1e-17)
    assert choose_frames(far, "capped", 50, 5.0) == [0, 1]
