"""decord, the decoder of the published code: equal to PyAV on plain H.264, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest

from tests.media.video_kinds import KINDS, made
from tests.media.videos import SIDE, numbers_of
from vxl_jax.errors import MediaError
from vxl_jax.media import MediaOptions, open_video
from vxl_jax.media.open import Video, open_film
from vxl_jax.media.video.decord_video import DecordVideo

pytest.importorskip("decord", reason="there is no decord for this platform")

DECORD = MediaOptions(decoder="decord")

PLAIN = (
    "plain.mp4",
    "faststart.mp4",
    "plain.mov",
    "plain.mkv",
    "fragmented.mp4",
    "pyramid.mp4",
    "no_b.mp4",
    "long_group.mp4",
    "fps_1.mp4",
    "fps_29.mp4",
    "fps_240.mp4",
    "one_frame.mp4",
    "two_frames.mp4",
    "tiny.mp4",
    "wide.mp4",
    "full_range.mp4",
    "yuv422.mp4",
    "turned_90.mp4",
    "turned_180.mp4",
    "turned_270.mp4",
    "sound_first.mp4",
    "cover_first.mp4",
)
"""H.264 that both decoders read."""

REFUSED = {
    "MPEG transport stream": ("plain.ts", "camera.m2ts", "wrong_ts.mp4", "hevc_open.ts"),
    "MPEG program stream": ("mpeg1.mpg", "mpeg2.mpg", "dvd.vob"),
    "Windows Media file": ("wmv2.wmv", "wmv1.asf"),
    "edit list": ("hidden_start.mp4", "hidden_start.mov", "hidden_open.mp4", "hidden_ends.mp4"),
    "": (
        "packed_b.avi",
        "mpeg4_b.avi",
        "h264.avi",
        "av1.mp4",
        "live.webm",
        "vp8.ogv",
    ),
}
"""Why kinds are refused of which decord gives wrong frames or times, or none."""


def check_hint(message: str, path: Path, why: str) -> None:
    assert message.startswith(f"{path}: ")
    assert why in message
    assert "use the decoder pyav" in message
    assert "\n" not in message
    assert message.count(path.name) == 1


@pytest.mark.parametrize("name", PLAIN)
def test_both_decoders_give_equal_bytes_and_times(name: str):
    ours, theirs = open_video(made(name)), open_video(made(name), options=DECORD)
    assert isinstance(theirs, DecordVideo)
    assert ours.frames == theirs.frames == len(KINDS[name].numbers)
    np.testing.assert_allclose(theirs.seconds, ours.seconds, rtol=0, atol=0.002)
    assert theirs.fps == pytest.approx(ours.fps, rel=0.002)
    assert theirs.duration == pytest.approx(ours.duration, abs=0.002)
    assert theirs.truncated is None
    indices = [*range(min(ours.frames, 60))]
    np.testing.assert_array_equal(theirs.read(indices, SIDE), ours.read(indices, SIDE))


@pytest.mark.parametrize("name", ["plain.mp4", "pyramid.mp4", "plain.mkv", "turned_90.mp4"])
@pytest.mark.parametrize("seed", [0, 1])
def test_both_decoders_give_equal_bytes_at_random(name: str, seed: int):
    rng = np.random.default_rng(seed)
    ours = open_video(made(name))
    theirs = open_video(made(name), num_threads=1 + seed, options=DECORD)
    for _ in range(6):
        indices = rng.integers(0, ours.frames, 4).tolist()
        found = theirs.read(indices, SIDE)
        assert numbers_of(found) == [KINDS[name].numbers[index] for index in indices]
        np.testing.assert_array_equal(found, ours.read(indices, SIDE))


@pytest.mark.parametrize("name", ["gap.mp4", "gap.mkv", "accelerates.mp4", "last_late.mp4"])
def test_times_of_a_variable_rate_are_those_encoded(name: str):
    video = open_video(made(name), options=DECORD)
    np.testing.assert_allclose(video.seconds, KINDS[name].times, rtol=0, atol=0.002)


def test_films_are_equal():
    films = [
        open_film(Video(made("plain.mp4"), frames=8, options=options), 56)
        for options in (MediaOptions(), DECORD)
    ]
    (first, first_seconds), (second, second_seconds) = (next(film.chunks(8)) for film in films)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first_seconds, second_seconds, rtol=0, atol=0.002)


@pytest.mark.parametrize(
    ("name", "why"),
    [pytest.param(name, why, id=name) for why, names in REFUSED.items() for name in names],
)
def test_kind_that_decord_gets_wrong_is_refused(name: str, why: str):
    with pytest.raises(MediaError) as caught:
        open_video(made(name), options=DECORD)
    check_hint(str(caught.value), made(name), why)


@pytest.mark.parametrize("name", ["faststart.mp4", "fragmented.mp4", "plain.mkv", "mpeg4.avi"])
def test_cut_file_is_refused(tmp_path: Path, name: str):
    whole = made(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(whole[: len(whole) * 8 // 10])
    assert open_video(path).truncated is not None
    with pytest.raises(MediaError) as caught:
        open_video(path, options=DECORD)
    check_hint(str(caught.value), path, "ends early")


@pytest.mark.parametrize("name", ["plain.ts", "hidden_start.mp4"])
def test_refusal_reaches_films(name: str):
    with pytest.raises(MediaError) as caught:
        open_film(Video(made(name), options=DECORD), 56)
    check_hint(str(caught.value), made(name), "decord gives wrong frames")
