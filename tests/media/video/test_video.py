"""Videos of all kinds: which frames, in which order, when, and with what pixels."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from tests.media.video_kinds import KINDS, made, open_kind, pictures
from tests.media.videos import (
    SIDE,
    corners_of,
    draw,
    number_of,
    numbers_of,
    stored_turned,
)
from vxl_jax.errors import MediaError
from vxl_jax.media import VideoFile, open_video
from vxl_jax.media.open import Video, open_film

FILMS = (
    "plain.mp4",
    "fragmented.mp4",
    "plain.mkv",
    "live.webm",
    "pipe.flv",
    "h264.avi",
    "packed_b.avi",
    "plain.ts",
    "wrap.ts",
    "long_group.ts",
    "cut_start.ts",
    "joined.ts",
    "size_changes.ts",
    "one_frame.ts",
    "mpeg2.mpg",
    "dvd.vob",
    "wmv2.wmv",
    "plain.h264",
    "hevc_open.mp4",
    "av1.mp4",
    "open_group.mp4",
    "intra_refresh.mp4",
    "gap.mp4",
    "accelerates.mp4",
    "hidden_start.mp4",
    "hidden_ends.mp4",
    "late_start.mp4",
    "turned_90.mp4",
    "mirrored_anti.mp4",
    "cover_first.mp4",
    "second_is_default.mkv",
    "wrong_mp4.jpg",
    "tall.mp4",
)
"""Kinds that are also read in a child process, as inference does."""

THREADS = (1, 4)


# The code in the pictures.


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (171, 95), (64, 300)])
@pytest.mark.parametrize("number", [0, 1, 6, 999, 0b1010_0101_1100_0011, 65535])
def test_drawn_number_is_read(number: int, size: tuple[int, int]):
    assert number_of(draw(number, *size)) == number


def test_drawn_corners_are_read():
    picture = draw(5)
    assert corners_of(picture) == "RGBY"
    assert corners_of(picture[::-1, ::-1]) == "YBGR"
    assert corners_of(picture[:, ::-1]) == "GRYB"
    assert corners_of(255 - picture) == "????"


def test_stored_turned_is_undone_by_the_matrix():
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    # A quarter turn to the right puts what is stored lowest on the left.
    stored = stored_turned(upright, (0, 1, -1, 0))
    assert stored[..., 0].tolist() == [[2, 5], [1, 4], [0, 3]]
    assert stored_turned(upright, (-1, 0, 0, 1))[..., 0].tolist() == [[2, 1, 0], [5, 4, 3]]


# All kinds.


@pytest.mark.parametrize("name", KINDS)
def test_frames_and_times_are_those_encoded(name: str):
    kind, video = KINDS[name], open_kind(name)
    assert video.frames == video.promised == len(kind.numbers)
    np.testing.assert_allclose(video.seconds, kind.times, rtol=0, atol=0.002)
    if kind.fps is not None:
        assert video.fps == pytest.approx(kind.fps, rel=0.002)
    if kind.duration is not None:
        assert video.duration == pytest.approx(kind.duration, abs=0.002)
    assert video.duration > video.seconds.max()


@pytest.mark.parametrize("name", KINDS)
def test_frames_in_order_are_those_encoded(name: str):
    kind, video = KINDS[name], open_kind(name)
    found = pictures(video)
    assert numbers_of(found) == [*kind.numbers]
    assert {corners_of(frame) for frame in found} == {kind.corners}


def jumps(frames: int, seed: int) -> list[list[int]]:
    """Reads of one to four frames: on, back, again, near, far, and out of order."""
    rng, at, reads = np.random.default_rng(seed), 0, []
    for move in rng.permutation([0, 1, -1, 2, -3, 9, -9, 30, -30, None, None, None]):
        at = int(rng.integers(frames)) if move is None else min(max(at + move, 0), frames - 1)
        some = at + np.concatenate([[0], rng.integers(-12, 12, rng.integers(4))])
        reads.append([int(index) for index in np.clip(some, 0, frames - 1)])
    return reads


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", KINDS)
def test_frames_at_random_are_those_encoded(name: str, seed: int):
    kind, video = KINDS[name], open_kind(name, THREADS[seed])
    for done, indices in enumerate(jumps(video.frames, seed)):
        found = numbers_of(video.read(indices, SIDE))
        expected = [kind.numbers[index] for index in indices]
        assert found == expected, f"read {done}: {indices}"


@pytest.mark.parametrize("name", FILMS)
def test_film_gives_eight_frames_evenly(name: str):
    kind = KINDS[name]
    count = len(kind.numbers)
    indices = np.linspace(0, count - 1, min(8, count)).astype(int)
    film = open_film(Video(made(name), frames=8), 56)
    assert film.seconds is not None
    chunks = list(film.chunks(3))
    seconds = np.concatenate([seconds for _, seconds in chunks])
    found = np.concatenate([pixels for pixels, _ in chunks])
    assert numbers_of(found) == [kind.numbers[index] for index in indices]
    assert {corners_of(frame) for frame in found} == {kind.corners}
    np.testing.assert_allclose(seconds, kind.times[indices], rtol=0, atol=0.002)
    np.testing.assert_array_equal(seconds, film.seconds)


# Clips go by time, not by the average rate.


@pytest.mark.parametrize(
    ("name", "start", "end", "expected"),
    [
        ("plain.mp4", 0.4, 0.8, range(10, 20)),
        ("plain.ts", 0.4, 0.8, range(10, 20)),
        ("mpeg2.mpg", 0.4, 0.8, range(10, 20)),
        ("gap.mp4", 11, 11.2, range(25, 30)),
        ("gap.mkv", 11, 11.2, range(25, 30)),
        ("gap.mkv", 5, 6, [24]),
        ("accelerates.mp4", 4.9, 6.4, range(35, 40)),
        ("hidden_start.mp4", 0.4, 0.8, range(30, 40)),
        ("late_start.mp4", 3.4, 3.8, range(10, 20)),
        ("last_late.mp4", 31, None, [48, 49]),
    ],
)
def test_clip_holds_the_frames_of_its_seconds(
    name: str, start: float, end: float | None, expected: Sequence[int]
):
    film = open_film(Video(made(name), frames=None, start=start, end=end), 56)
    found = np.concatenate([pixels for pixels, _ in film.chunks(64)])
    assert numbers_of(found) == [*expected]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain.mp4", [*range(0, 50, 5)]),
        ("gap.mp4", [0, 5, 10, 15, 20, 24, 25, 30, 35, 40, 45]),
        ("hidden_start.mp4", [20, 25, 30, 35, 40, 45]),
    ],
)
def test_sample_fps_goes_by_time(name: str, expected: list[int]):
    film = open_film(Video(made(name), frames=64, sample_fps=5), 56)
    assert numbers_of(np.concatenate([pixels for pixels, _ in film.chunks(64)])) == expected


# An open file.


@pytest.mark.parametrize("threads", THREADS)
def test_frame_asked_for_twice_is_given_twice(threads: int):
    video = open_kind("open_group.mp4", threads)
    assert numbers_of(video.read([30, 7, 30, 7, 8], SIDE)) == [30, 7, 30, 7, 8]


def test_frames_are_written_where_they_are_wanted():
    video, out = open_kind("plain.mp4"), np.zeros((3, SIDE, SIDE, 3), np.uint8)
    assert video.read([40, 2], SIDE, out[1:]) is not None
    assert numbers_of(out) == [0, 40, 2]
    assert not out[0].any()


@pytest.mark.parametrize("names", [("open_group.mp4", "open_group.mp4"), ("plain.ts", "gap.mkv")])
@pytest.mark.parametrize("threads", THREADS)
def test_readers_do_not_disturb_each_other(names: tuple[str, str], threads: int):
    first, second = (open_kind(name, threads) for name in names)
    for there in range(0, 50, 7):
        back = 49 - there
        assert numbers_of(first.read([there], SIDE)) == [there]
        assert numbers_of(second.read([back, there], SIDE)) == [back, there]


def test_decoding_left_halfway_can_be_begun_elsewhere():
    video = open_kind("pyramid.mp4")
    frames = video.decode(range(5, 40))
    for wanted, (index, picture) in zip((5, 6, 7), frames, strict=False):
        assert (index, number_of(picture)) == (wanted, wanted)
    frames.close()  # type: ignore[attr-defined]
    for index in (8, 6, 41, 9):
        assert numbers_of(video.read([index], SIDE)) == [index]


@pytest.mark.parametrize("name", ["plain.mp4", "plain.ts", "joined.ts", "h264.avi"])
@pytest.mark.parametrize("indices", [[50], [3, -1], []], ids=["behind", "negative", "none"])
def test_reads_go_on_after_a_wrong_index(name: str, indices: list[int]):
    video = open_kind(name)
    assert numbers_of(video.read([20, 21], SIDE)) == [20, 21]
    with pytest.raises(MediaError, match=r"no frames asked for|but the video has 50 "):
        video.read(indices, SIDE)
    assert numbers_of(video.read([22, 5], SIDE)) == [22, 5]


def damaged(path: Path, name: str, numbers: Sequence[int]) -> Path:
    """A copy in which the packets of some frames, all of them key frames, are zeros."""
    data = bytearray(made(name).read_bytes())
    with av.open(str(made(name))) as file:
        for number, packet in enumerate(p for p in file.demux(video=0) if p.size):
            if number in numbers:
                assert packet.is_keyframe
                assert packet.pos is not None
                data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("threads", THREADS)
def test_frames_around_damage_are_those_encoded(tmp_path: Path, threads: int):
    video = VideoFile(damaged(tmp_path / "damaged.mov", "png.mov", [20, 21]), threads)
    assert video.frames == 50
    out = np.zeros((4, SIDE, SIDE, 3), np.uint8)
    with pytest.raises(MediaError, match=r"damaged\.mov: .* frame 20 \(0\.80 s\)") as caught:
        video.read([18, 19, 20, 22], SIDE, out)
    assert "\n" not in str(caught.value)
    assert numbers_of(out[:2]) == [18, 19]
    for index in (22, 19, 49, 0):
        assert numbers_of(video.read([index], SIDE)) == [index]
    with pytest.raises(MediaError, match="frame 21"):
        video.read([21], SIDE)
    assert numbers_of(video.read([19, 22, 23], SIDE)) == [19, 22, 23]


# Names.


NAMES = (
    "10:30:15.mp4",
    "2024-05-01T10:30.mp4",
    "two words  and more.mp4",
    "%03d.mp4",
    "%03d.jpg",
    "100%.mp4",
    "фильм 映画 🎬.mp4",
    "-dash.mp4",
    "--help",
    "a\nb.mp4",
    "a\tb.mp4",
    'it\'s "quoted".mp4',
    "a?b#c[1]*|{x}.mp4",
    "http:example.mp4",
    "concat:a.mp4|b.mp4",
    "x" * 240 + ".mp4",
    "UPPER.MP4",
    os.fsdecode(b"caf\xe9.mp4"),
    os.fsdecode(b"\xff\xfe.mp4"),
)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("is_relative", [True, False], ids=["relative", "absolute"])
def test_name_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_relative: bool
):
    os.link(made("plain.mp4"), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    path = name if is_relative else tmp_path / name
    assert numbers_of(open_video(path).read([31, 4], SIDE)) == [31, 4]
    film = open_film(Video(path, frames=2), 56)
    assert [number for pixels, _ in film.chunks(1) for number in numbers_of(pixels)] == [0, 49]


def test_links_are_followed(tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / "0f3a"  # a Hugging Face cache has such names
    os.link(made("plain.mkv"), blob)
    (tmp_path / "near.mkv").symlink_to("blobs/0f3a")
    (tmp_path / "far.avi").symlink_to(tmp_path / "near.mkv")
    for name in ("near.mkv", "far.avi"):
        assert numbers_of(open_video(tmp_path / name).read([31], SIDE)) == [31]


def test_reading_leaves_no_open_files(tmp_path: Path):
    def opened() -> int:
        count = 0
        for entry in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                count += os.readlink(f"/proc/self/fd/{entry}").startswith(str(tmp_path))
        return count

    names = ["plain.mp4", os.fsdecode(b"\xff.mp4")]
    for name in names:
        os.link(made("plain.mp4"), tmp_path / name)
        for _ in range(3):
            video = open_video(tmp_path / name)
            video.read([40, 3, 20], SIDE)
            assert opened() <= 1
            del video
        assert opened() == 0
