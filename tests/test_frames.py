"""Which frames of a video are taken, how they move in time, and folders of frames."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data import frame_numbers
from vxl_jax.media import (
    PICTURES,
    FrameFolder,
    MediaError,
    Sampling,
    choose_frames,
    frame_indices,
    jitter_indices,
    uniform_indices,
)

SAMPLINGS: tuple[Sampling, ...] = ("capped", "uniform", "fps")

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
def test_literal_choices(sampling: Sampling, most: int, fps: float, expected: list[int]):
    """Of 32 frames at 10 a second."""
    assert choose_frames(32, 10.0, sampling, most, fps) == expected


def test_more_frames_a_second_than_are_allowed():
    with pytest.raises(
        MediaError,
        match=r"^3 frames at 1 a second are over max_frames 2; use a clip of it, or another sampl",
    ):
        choose_frames(32, 10.0, "fps", 2)


def test_a_whole_video_is_chosen_as_published():
    for frames in (1, 2, 7, 99, 1000):
        for fps in (0.5, 1.0, 23.976, 30.0):
            for most in (1, 2, 8, 64):
                capped = choose_frames(frames, fps, "capped", most, 1.0)
                assert capped == frame_indices(frames, fps, most, 1.0)
                uniform = choose_frames(frames, fps, "uniform", most)
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
        assert choose_frames(50, 10.0, sampling, 50, 10.0, start, end) == [*expected]
    assert choose_frames(50, 10.0, "uniform", 1, 1.0, start, end) == [expected[0]]


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (2, 1, "a clip from 2 s to 1 s has no frames; mend start and end"),
        (1, 1, "a clip from 1 s to 1 s has no frames; mend start and end"),
        (None, 0, "a clip from 0 s to 0 s has no frames; mend start and end"),
        (-1, 1, "a clip from -1 s to 1 s has no frames; mend start and end"),
        (float("nan"), None, "has no frames; mend start and end"),
        (None, float("nan"), "has no frames; mend start and end"),
        (5, 6, "a clip from 5 s on, but the video has 5.00 s; mend start and end"),
    ],
)
def test_clips_without_frames(start: float | None, end: float | None, message: str):
    with pytest.raises(MediaError) as caught:
        choose_frames(50, 10.0, "capped", 8, 1.0, start, end)
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
        chosen = choose_frames(frames, fps, sampling, most, wanted, start, end)
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


# Folders of frames.


def write_frames(folder: Path, names: list[str]) -> FrameFolder:
    """A folder whose picture i is grey 10 * i."""
    folder.mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", (60, 90), (10 * i,) * 3).save(folder / name)
    return FrameFolder(folder, 2.0)


@pytest.mark.parametrize(
    "names",
    [
        [f"{i}.png" for i in range(12)],
        [f"{i:05}.jpg" for i in range(12)],
        ["f1.png", "f2.jpeg", "f9.PNG", "f10.webp", "f10a.bmp", "f11.Jpg"],
        ["1.png", "1.5.png", "1.10.png", "2.png", "a.png", "b.png", "b2.png"],
        ["scene 2 - 1.png", "scene 2 - 10.png", "scene 10 - 2.png"],
    ],
)
def test_frames_stand_in_the_order_of_their_names(names: list[str], tmp_path: Path):
    video = write_frames(tmp_path / "frames", names)
    assert (video.frames, video.fps) == (len(names), 2.0)
    pixels = video.read(range(len(names)), 56)
    assert pixels.shape == (len(names), 56, 56, 3)
    assert pixels.dtype == np.uint8
    assert frame_numbers(pixels) == [*range(len(names))]
    out = np.zeros((3, 56, 56, 3), np.uint8)
    assert video.read([2, 0, 2], 56, out) is out
    assert frame_numbers(out) == [2, 0, 2]


def test_names_that_differ_in_zeros_alone_have_an_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the order in which the file system lists them."""
    import os

    write_frames(tmp_path / "frames", ["1.png", "01.png", "001.png"])
    scan, orders = os.scandir, []
    for backwards in (False, True):
        monkeypatch.setattr(
            os,
            "scandir",
            lambda path, backwards=backwards: sorted(
                scan(path), key=lambda entry: entry.name, reverse=backwards
            ),
        )
        orders.append(FrameFolder(tmp_path / "frames", 1.0)._names)
    assert orders[0] == orders[1]


def test_only_pictures_of_the_folder_itself_are_frames(tmp_path: Path):
    video = write_frames(tmp_path / "frames", ["1.png", "2.png"])
    (video.path / "notes.txt").write_text("no frame")
    (video.path / "0").write_text("no frame")
    (video.path / "3.png").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (video.path / "4.png").symlink_to(tmp_path / "outside.png")
    (video.path / "5.png").symlink_to(video.path / "1.png")
    assert FrameFolder(video.path, 1.0).frames == 2


@pytest.mark.parametrize("content", [None, "notes.txt", "link.png"])
def test_a_folder_without_pictures(content: str | None, tmp_path: Path):
    folder = tmp_path / "frames"
    folder.mkdir()
    if content == "link.png":
        (folder / content).symlink_to("/etc/passwd")
    elif content:
        (folder / content).touch()
    expected = f"{folder}: a folder without pictures ({', '.join(PICTURES)}; links are not"
    with pytest.raises(MediaError) as caught:
        FrameFolder(folder, 1.0)
    assert str(caught.value).startswith(expected)


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(MediaError, match=r"gone: cannot be read \(No such file or directory\)"):
        FrameFolder(tmp_path / "gone", 1.0)


def test_a_damaged_frame_is_named(tmp_path: Path):
    video = write_frames(tmp_path / "frames", ["1.png", "2.png", "3.png"])
    (video.path / "2.png").write_text("no picture")
    assert len(video.read([0, 2], 56)) == 2
    with pytest.raises(MediaError, match=r"frames/2\.png: not a readable image"):
        video.read([0, 1, 2], 56)
    (video.path / "3.png").unlink()
    with pytest.raises(MediaError, match=r"frames/3\.png: no such file"):
        video.read([0, 2], 56)


def test_frames_of_other_sizes_become_squares(tmp_path: Path):
    sizes: list[Any] = [(56, 56), (200, 40), (1, 9)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (10 * i,) * 3).save(tmp_path / f"{i}.png")
    assert frame_numbers(FrameFolder(tmp_path, 1.0).read([0, 1, 2], 56)) == [0, 1, 2]


@pytest.mark.parametrize(("fps", "wanted"), [(24, 10), (30, 20), (25, 4), (29.97, 3), (10, 25)])
def test_fixed_sampling_keeps_its_rate(fps: float, wanted: float):
    """Not only where the rates divide each other."""
    chosen = choose_frames(round(60 * fps), fps, "fps", 10_000, wanted)
    assert len(chosen) == pytest.approx(60 * min(fps, wanted), abs=1)
    assert sorted({*chosen}) == chosen
    seconds = np.array(chosen) / fps
    np.testing.assert_allclose(seconds, np.arange(len(chosen)) / min(fps, wanted), atol=1 / fps)
