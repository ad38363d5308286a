"""Files that were cut off: the frames that are there are right, and it is said that more are not.

Where a file may be cut, and what is then in it, is told by the places of the packets in the whole
file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.media.video_kinds import KINDS, made
from tests.media.video_makers import Maker, film, sound, x264, x265
from tests.media.videos import FRAMES, RATE, Packet, draw, numbers_of, packets_of
from tests.support.data import ASK, check, pixels_of
from train.data.records.sample import BadSample, Sample
from vxl_jax.errors import MediaError
from vxl_jax.media import VideoFile, open_video
from vxl_jax.media.open import Video, open_film


def grainy(number: int, width: int, height: int) -> np.ndarray:
    """A picture with noise: its packets are long, as those of real films are."""
    noise = np.random.default_rng(number).integers(-25, 26, (height, width, 1))
    return np.clip(draw(number, width, height) + noise, 0, 255).astype(np.uint8)


def _film(codec: str = "libx264", options: dict[str, str] | None = None, **how: Any) -> Maker:
    return film(codec, options, picture=grainy, **how)


FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
FILES: dict[str, Maker] = {
    "faststart.mp4": _film(container={"movflags": "faststart"}),
    "faststart.mov": _film("mpeg4", {"bf": "2"}, container={"movflags": "faststart"}),
    "faststart_sound.mp4": _film(container={"movflags": "faststart"}, after=sound()),
    "fragmented.mp4": _film(container=FRAGMENTS),
    "fragmented_dash.mp4": _film(container={"movflags": "dash+global_sidx+frag_keyframe"}),
    "fragment_each.mp4": _film(container={"movflags": "frag_every_frame+empty_moov"}),
    "whole.mkv": _film(),
    "pipe.mkv": _film(is_piped=True),
    "vp9.webm": _film("libvpx-vp9"),
    "live.webm": _film("libvpx", container={"live": "1"}, is_piped=True),
    "h264.ts": _film(),
    "hevc.ts": x265("open-gop=1", picture=grainy),
    "open_group.ts": x264("open-gop=1:keyint=12:bframes=3:b-adapt=0", picture=grainy),
    "camera.m2ts": _film(container={"mpegts_m2ts_mode": "1"}),
    "mpeg1.mpg": _film("mpeg1video", {"bf": "2"}),
    "mpeg2.vob": _film("mpeg2video", {"bf": "2"}),
    "mpeg4.avi": _film("mpeg4"),
    "mpeg4_b.avi": _film("mpeg4", {"bf": "2"}),
    "h264.avi": _film(),
    "mjpeg.avi": _film("mjpeg", pix_fmt="yuvj420p"),
    "h264.flv": _film(),
    "pipe.flv": _film(is_piped=True),
    "wmv2.wmv": _film("wmv2"),
    "vp8.ogv": _film("libvpx", muxer="ogg"),
    "vp9.ivf": _film("libvpx-vp9"),
}
"""Files whose cut is seen wherever it is made inside a packet."""

PLACES = (0.3, 0.5, 0.7, 0.9)

INDEXED = ("faststart.mp4", "faststart.mov", "faststart_sound.mp4")
"""Files whose tables list all frames."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of `FILES`, whole."""
    folder = tmp_path_factory.mktemp("whole")
    for name, make in FILES.items():
        make(folder / name)
    return folder


@dataclass(frozen=True)
class Cut:
    """A file that was cut off inside a packet.

    there: how many of its frames are there, in the order in which they are stored: at least and
    at most. promised: how many its tables list; 0 without tables.
    """

    path: Path
    numbers: list[int]
    there: tuple[int, int]
    promised: int

    def stored(self, frames: int) -> list[int]:
        """Numbers of the first frames that are stored, in the order in which they are shown."""
        return sorted(self.numbers[:frames])


def cut(folder: Path, name: str, place: float, target: Path) -> Cut:
    """Cuts a file off. place: which share of its bytes is left."""
    whole = folder / name
    packets = packets_of(whole)
    size = round(place * whole.stat().st_size)
    while not all(size % unit for unit in (188, 192, 2048)):  # such a file is whole
        size += 1
    path = target / name
    path.write_bytes(whole.read_bytes()[:size])
    begun = [packet for packet in packets if packet.start < size]
    last = max(packet.start for packet in begun)
    # Where the demuxer leaves out a torn frame without a word, the one before may go as well.
    certain = sum(packet.start < last for packet in begun)
    there = certain - name.endswith((".ts", ".m2ts", ".mpg", ".vob", ".wmv")), len(begun)
    promised = 0
    if name.startswith("fragment"):
        each = name.startswith("fragment_each")
        later = [i for i, p in enumerate(packets) if p.start > size and (each or p.is_key)]
        promised = later[0] if later else FRAMES
    if name.endswith((".mp4", ".mov")):
        there = (sum(packet.start + packet.size <= size for packet in packets),) * 2
        promised = promised or FRAMES
    return Cut(path, _numbers(folder, name, packets), there, promised)


def _numbers(folder: Path, name: str, packets: list[Packet]) -> list[int]:
    if name != "h264.avi":  # an AVI does not store the order in which frames are shown
        return [packet.number for packet in packets]
    twin = folder / "twin.mp4"
    if not twin.exists():
        FILES[name](twin)
    return [packet.number for packet in packets_of(twin)]


CASES = [pytest.param(name, place, id=f"{name}-{place}") for name in FILES for place in PLACES]


@pytest.mark.parametrize("name", KINDS)
def test_whole_file_is_not_called_cut(name: str):
    assert open_video(made(name)).truncated is None


@pytest.mark.parametrize("name", ["plain.mp4", "faststart.mp4", "plain.mkv", "mpeg4.avi"])
@pytest.mark.parametrize("behind", [bytes(1000), b"TAG" + bytes(125)], ids=["zeros", "tag"])
def test_bytes_behind_a_whole_file_do_not_make_it_cut(tmp_path: Path, name: str, behind: bytes):
    path = tmp_path / name
    path.write_bytes(made(name).read_bytes() + behind)
    video = open_video(path)
    assert (video.frames, video.truncated) == (FRAMES, None)


@pytest.mark.parametrize("name", FILES)
def test_whole_grainy_file_is_read(folder: Path, name: str):
    video = VideoFile(folder / name)
    assert video.truncated is None
    assert numbers_of(picture for _, picture in video.decode(range(FRAMES))) == [*range(FRAMES)]


@pytest.mark.parametrize(("name", "place"), CASES)
def test_cut_file_has_the_frames_before_the_cut(
    folder: Path, tmp_path: Path, name: str, place: float
):
    file = cut(folder, name, place, tmp_path)
    video = open_video(file.path)
    assert isinstance(video, VideoFile)
    assert video.truncated is not None
    assert video.truncated.startswith("ends early, ")
    assert file.there[0] <= video.frames <= file.there[1] < FRAMES
    stored = file.stored(video.frames)
    found = numbers_of(picture for _, picture in video.decode(range(video.frames)))
    assert found == stored
    assert numbers_of(video.read([video.frames - 1, 0], 64)) == [stored[-1], 0]
    for threads in (1, 2, 2, 4, 4):
        assert VideoFile(file.path, threads).frames == video.frames


@pytest.mark.parametrize(("name", "place"), CASES)
def test_cut_file_has_the_times_of_its_frames(
    folder: Path, tmp_path: Path, name: str, place: float
):
    file = cut(folder, name, place, tmp_path)
    video = VideoFile(file.path)
    stored = file.stored(video.frames)
    if name.endswith(".avi"):  # it stores no times: those of frames in a row
        stored = [*range(len(stored))]
    times = video.seconds[: video.frames]
    np.testing.assert_allclose(times, np.array(stored) / RATE, rtol=0, atol=0.002)
    if file.promised:
        assert video.promised == len(video.seconds) == file.promised
        assert video.truncated == (
            f"ends early, {video.frames} of its {file.promised} frames are there"
        )
        assert video.duration == pytest.approx(file.promised / RATE, abs=0.002)
    else:
        assert video.promised == len(video.seconds) == video.frames
        assert video.truncated is not None
        assert f"at {video.duration:.2f} s" in video.truncated
        assert video.duration == pytest.approx(times[-1] + 1 / RATE, abs=0.002)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_film_of_a_cut_file_gives_its_frames_and_says_so(
    folder: Path, tmp_path: Path, name: str, place: float
):
    file = cut(folder, name, place, tmp_path)
    stored = file.stored(VideoFile(file.path).frames)
    wanted = np.linspace(0, (file.promised or len(stored)) - 1, 8).astype(int)
    found, message = watch(Video(file.path, frames=8))
    assert found == [stored[index] for index in wanted if index < len(stored)]
    assert message is not None
    assert message.startswith(f"{file.path}: ends early, ")
    assert message.endswith("; fetch it again")
    assert message.count(name) == 1
    assert "\n" not in message


def watch(video: Video) -> tuple[list[int], str | None]:
    """Numbers of the frames that a film gives, and the error after them."""
    found: list[int] = []
    try:
        for pixels, _ in open_film(video, 64).chunks(3):
            found += numbers_of(pixels)
    except MediaError as error:
        return found, str(error)
    return found, None


@pytest.mark.parametrize("name", ["whole.mkv", "vp9.webm", "vp9.ivf", "mpeg4.avi"])
def test_cut_file_says_where_it_ends_and_how_long_it_should_be(
    folder: Path, tmp_path: Path, name: str
):
    video = VideoFile(cut(folder, name, 0.5, tmp_path).path)
    assert video.truncated == f"ends early, at {video.duration:.2f} s of 2.00 s"


@pytest.mark.parametrize("name", ["plain.mp4", "hybrid.mp4", "plain.mov"])
@pytest.mark.parametrize("place", PLACES)
def test_mp4_without_its_index_is_refused(tmp_path: Path, name: str, place: float):
    whole = made(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(whole[: round(place * whole.rindex(b"moov"))])
    with pytest.raises(MediaError) as caught:
        open_video(path)
    assert str(caught.value) == (
        f"{path}: has no index (moov box): it was cut off, or its recording never finished; "
        "fetch it again"
    )


@pytest.mark.parametrize("name", [*INDEXED, "whole.mkv", "vp9.webm", "mpeg4.avi", "mjpeg.avi"])
def test_cut_between_packets_is_seen(folder: Path, tmp_path: Path, name: str):
    packets = packets_of(folder / name)
    places = [place for place, packet in enumerate(packets) if packet.is_key]
    path = tmp_path / name
    path.write_bytes((folder / name).read_bytes()[: packets[places[2]].start])
    video = VideoFile(path)
    assert video.truncated is not None
    assert video.frames == places[2]
    found = numbers_of(picture for _, picture in video.decode(range(video.frames)))
    assert found == sorted(packet.number for packet in packets[: video.frames])


@pytest.mark.parametrize("name", FILES)
def test_header_alone_is_refused(folder: Path, tmp_path: Path, name: str):
    first = packets_of(folder / name)[0]
    path = tmp_path / name
    path.write_bytes((folder / name).read_bytes()[: first.start + min(3, first.size)])
    with pytest.raises(MediaError) as caught:
        open_video(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "fetch" in str(caught.value)


# Clips.


@pytest.mark.parametrize("name", FILES)
def test_clip_that_ends_before_the_cut_is_whole(folder: Path, tmp_path: Path, name: str):
    file = cut(folder, name, 0.7, tmp_path)
    assert watch(Video(file.path, frames=None, end=0.4)) == ([*range(10)], None)


@pytest.mark.parametrize("name", FILES)
def test_clip_that_ends_after_the_cut_says_so(folder: Path, tmp_path: Path, name: str):
    file = cut(folder, name, 0.7, tmp_path)
    found, message = watch(Video(file.path, frames=None, start=0.4, end=1.9))
    assert found[:10] == [*range(10, 20)]
    assert message is not None
    assert message.startswith(f"{file.path}: ends early, ")
    assert message.endswith("; fetch it again")


# Training.


@pytest.mark.parametrize("name", FILES)
def test_cut_file_is_a_bad_sample_that_says_so(
    folder: Path, tmp_path: Path, demo_tokenizer: Any, name: str
):
    cut(folder, name, 0.7, tmp_path)
    record = {"video": name, "conversations": ASK}
    sample = check(record, tmp_path, demo_tokenizer)
    assert isinstance(sample, BadSample)
    assert "ends early" in sample.reason
    assert sample.reason.endswith("fetch it again")
    assert name in sample.reason


@pytest.mark.parametrize("name", ["faststart.mp4", "h264.ts", "live.webm"])
def test_clip_before_the_cut_is_trained_on(
    folder: Path, tmp_path: Path, demo_tokenizer: Any, name: str
):
    cut(folder, name, 0.7, tmp_path)
    record = {"video": name, "end": 0.4, "conversations": ASK}
    assert isinstance(check(record, tmp_path, demo_tokenizer), Sample)
    pixels = pixels_of(record, tmp_path, demo_tokenizer, video_fps=25)
    assert isinstance(pixels, np.ndarray)
    assert numbers_of(pixels) == [*range(10)]
