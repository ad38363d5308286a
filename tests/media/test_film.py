"""Chunks of pixels: all frames, in order, a few at a time, also where a film breaks off."""

import queue
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.support.data import write_video
from vxl_jax.errors import MediaError
from vxl_jax.media import MediaOptions, load_video_frames, prefetch, uniform_indices
from vxl_jax.media.open import AT_ONCE, Picture, Video, as_media, open_film
from vxl_jax.media.prefetch import ahead

SIDE = 32
LONG = 30.0
"""Seconds that are enough for anything that does not hang."""


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("film") / "a.mp4", 90, fps=10)


@pytest.mark.parametrize("count", [1, 7, 16, 500])
@pytest.mark.parametrize("frames", [1, 33, 90, 128, None])
def test_all_frames_of_a_file_in_chunks(video: Path, count: int, frames: int | None):
    opened = open_film(Video(video, frames), SIDE)
    expected = uniform_indices(90, min(frames or 90, 90))
    chunks = list(opened.chunks(count))
    assert max(len(pixels) for pixels, _ in chunks) <= count
    assert np.concatenate([s for _, s in chunks]).tolist() == [i / 10 for i in expected]
    assert opened.seconds is not None
    assert opened.seconds.tolist() == [i / 10 for i in expected]
    pixels = np.concatenate([pixels for pixels, _ in chunks])
    assert np.array_equal(pixels, load_video_frames(video, expected, SIDE))


def test_part_of_a_file_at_a_rate(video: Path):
    opened = open_film(Video(video, sample_fps=2, start=3, end=5), SIDE)
    assert opened.seconds is not None
    assert opened.seconds.tolist() == [3.0, 3.5, 4.0, 4.5]


def test_a_folder_of_pictures(tmp_path: Path):
    for i in range(12):
        Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    opened = open_film(Video(tmp_path, fps=2), SIDE)
    pixels, seconds = next(opened.chunks(99))
    assert pixels[:, 0, 0, 0].tolist() == [20 * i for i in range(12)]
    assert seconds.tolist() == [i / 2 for i in range(12)]


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("share", [0.5, 0.66, 0.9])
def test_of_a_file_that_ends_early_all_frames_that_are_there(
    codec: str, share: float, tmp_path: Path
):
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    moving_picture(whole, codec, 90)
    data = whole.read_bytes()
    cut.write_bytes(data[: int(len(data) * share)])
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    there = sum(packet.pos + packet.size <= len(data) * share for packet in packets)
    assert len(packets) == 90
    expected = load_video_frames(whole, range(90), SIDE)
    opened = open_film(Video(cut, None), SIDE)
    assert opened.seconds is not None
    assert len(opened.seconds) == 90
    found: list[np.ndarray] = []
    chunks = opened.chunks(16)
    with pytest.raises(MediaError, match=r"cut\.mp4: ends early, \d+ of its 90 frames are there"):
        found.extend(pixels for pixels, _ in chunks)
    pixels = np.concatenate(found)
    assert len(pixels) == there > 10
    # Frames in order of display: a few that others were to help to decode may look otherwise.
    same = [np.array_equal(*pair) for pair in zip(pixels, expected, strict=False)]
    assert all(same[:-4])


def test_sound_is_left_out_of_what_is_cut(tmp_path: Path):
    """FFmpeg finds PCM by another table, past the end of the file."""
    whole, cut = tmp_path / "whole.mov", tmp_path / "cut.mov"
    with av.open(str(whole), "w", options={"movflags": "faststart"}) as container:
        picture = container.add_stream("mpeg4", rate=10, options={"g": "5"})
        picture.width = picture.height = 64
        picture.pix_fmt = "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=8000)
        sound.layout = "mono"
        for i in range(50):
            grey = np.full((64, 64, 3), 4 * i, np.uint8)
            container.mux(picture.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
            quiet = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
            quiet.rate = 8000
            container.mux(sound.encode(quiet))
        for stream in (picture, sound):
            container.mux(stream.encode(None))
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) * 2 // 3])
    with av.open(str(whole)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    there = sum(packet.pos + packet.size <= len(data) * 2 // 3 for packet in packets)
    found: list[np.ndarray] = []
    chunks = open_film(Video(cut, None), SIDE).chunks(16)
    with pytest.raises(MediaError, match=rf"{there} of its 50 frames are there"):
        found.extend(pixels for pixels, _ in chunks)
    assert len(np.concatenate(found)) == there


def test_frames_before_the_damage_come_first(tmp_path: Path):
    """A chunk that fails is read frame by frame; what comes before the damage is there."""
    path = moving_picture(tmp_path / "film.mp4", "libx264", 400)
    expected = load_video_frames(path, range(400), SIDE)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    begin, end = len(data) * 7 // 10, len(data) * 9 // 10
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    sound = sorted(p.pts for p in packets if p.pos + p.size <= begin)
    found: list[np.ndarray] = []
    seconds: list[float] = []
    message = (
        r"film\.mp4: video cannot be decoded at frame \d+ \(\d+\.\d\d s\), it is damaged there"
    )
    with pytest.raises(MediaError, match=message):  # noqa: PT012
        for pixels, at in open_film(Video(path, None), SIDE).chunks(32):
            found.append(pixels)
            seconds += at.tolist()
    assert seconds == [i / 10 for i in range(len(seconds))]
    assert len(sound) - 4 <= len(seconds) <= len(sound) + 1
    assert np.array_equal(np.concatenate(found)[:-4], expected[: len(seconds) - 4])


def moving_picture(path: Path, codec: str, frames: int) -> Path:
    """Noise that moves, 10 frames a second, a key frame every 20, tables in front."""
    draw = np.random.default_rng(0)
    wide = draw.integers(0, 256, (8, 64, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=10, options={"g": "20"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            pixels = np.ascontiguousarray(wide[:, i : i + 64])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_pictures_one_by_one_are_taken_when_they_are_needed():
    taken = []

    def camera() -> Generator[Any, None, None]:
        for i in range(10):
            taken.append(i)
            yield Image.new("RGB", (50, 40), (i, 0, 0)) if i % 2 else np.full((40, 50, 3), i, "u1")

    opened = open_film(Video(camera(), fps=4), SIDE)
    assert opened.seconds is None
    chunks = opened.chunks(3)
    pixels, seconds = next(chunks)
    assert taken == [0, 1, 2]
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert [seconds.tolist(), *(s.tolist() for _, s in chunks)] == [
        [0, 0.25, 0.5],
        [0.75, 1, 1.25],
        [1.5, 1.75, 2],
        [2.25],
    ]


def test_what_is_a_picture_and_what_a_video():
    for picture in ("a.jpg", Path("b.PNG"), Image.new("RGB", (2, 2)), Picture("c.mp4")):
        assert isinstance(as_media(picture), Picture)
    for video in ("a.mp4", "folder", np.zeros((1, 2, 2, 3), np.uint8), iter([])):
        assert as_media(video, frames=7) == Video(video, 7)
    assert as_media(Video("a.mp4", 3), frames="model") == Video("a.mp4", 3)
    pixels = MediaOptions(square_pixels=True)
    assert as_media("a.mp4", options=pixels) == Video("a.mp4", options=pixels)
    assert as_media("a.jpg", options=pixels, frames=7) == Picture("a.jpg", pixels)
    with pytest.raises(ValueError, match="frames, end: a Video has its own"):
        as_media(Video("a.mp4", 3), frames=7, end=2.0)


def test_files_are_pictures_or_videos_by_their_content(tmp_path: Path, video: Path):
    still, moving = tmp_path / "still.mp4", tmp_path / "moving.png"
    Image.new("RGB", (9, 9)).save(still, "PNG")
    frames = [Image.new("RGB", (9, 9), (i, 0, 0)) for i in (0, 200)]
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    assert isinstance(as_media(still), Picture)
    assert isinstance(as_media(moving), Video)
    no_picture = tmp_path / "film.jpg"
    no_picture.symlink_to(video)
    assert isinstance(as_media(no_picture), Video)
    assert len(np.concatenate([p for p, _ in open_film(as_media(moving), SIDE).chunks(9)])) == 2


@pytest.mark.parametrize("depth", [1, 3])
def test_items_are_made_ahead_but_not_far(depth: int, monkeypatch: pytest.MonkeyPatch):
    """Of 5 items that are taken, `depth` more are in the queue and one waits for room in it."""
    made: list[int] = []
    threads: list[threading.Thread] = []
    expected = 5 + depth + 1
    enough, waits = threading.Event(), threading.Event()

    class Watched(queue.Queue):
        def put(self, *item: Any, **how: Any) -> None:
            try:
                super().put(*item, **how)
            except queue.Full:
                waits.set()
                raise

    def items() -> Generator[int, None, None]:
        threads.append(threading.current_thread())
        for i in range(100):
            made.append(i)
            if len(made) == expected:
                enough.set()
            yield i

    monkeypatch.setattr(prefetch.queue, "Queue", Watched)
    got = ahead(items(), depth)
    assert [next(got) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert enough.wait(LONG)
    for _ in range(2):  # the first may be of the item before
        waits.clear()
        assert waits.wait(LONG), "the thread does not wait for room"
    assert len(made) == expected
    got.close()
    threads[0].join(LONG)
    assert not threads[0].is_alive()
    assert len(made) == expected


def test_all_items_come_and_their_thread_ends():
    before = {*threading.enumerate()}
    assert list(ahead(iter_of(3))) == [0, 1, 2]
    assert list(ahead(iter_of(0))) == []
    for thread in {*threading.enumerate()} - before:
        thread.join(LONG)
        assert not thread.is_alive()


def iter_of(count: int) -> Generator[int, None, None]:
    yield from range(count)


@pytest.mark.parametrize("error", [MediaError, KeyboardInterrupt, MemoryError])
def test_an_error_comes_after_the_items_before_it(error: type[BaseException]):
    def items() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise error

    got: list[int] = []
    with pytest.raises(error):
        got.extend(ahead(items()))
    assert got == [1, 2]


WATCH = """
import resource, sys
from dataclasses import replace
from flax import nnx
from vxl_jax import Model, VideoXL, VisualMemory
from vxl_jax.presets import demo

path, side, *films = sys.argv[1:]
vision = replace(demo().vision, image_size=int(side), patch_size=int(side) // 4)
model = Model(VideoXL(demo(vision=vision), rngs=nnx.Rngs(0)), None)
for frames in map(int, films):
    memory = VisualMemory([1, 2, 3])
    memory.attach(model)
    memory.extend(path, frames=frames, ratio=8)
    assert memory.watched[0].frames == frames
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_host_memory_does_not_grow_with_the_film(tmp_path: Path):
    """A few chunks of pixels are in memory, however many a film has: here 8 and 16 of 39 MB."""
    side, chunks = 224, (8, 16)
    films = [str(count * AT_ONCE) for count in chunks]
    path = write_video(tmp_path / "long.mp4", chunks[1] * AT_ONCE, fps=10)
    command = [sys.executable, "-c", WATCH, str(path), str(side), *films]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    shorter, longer = map(int, done.stdout.split())
    chunk = AT_ONCE * side * side * 3
    assert longer < shorter + 4 * chunk, (shorter, longer)  # at least 8 more, if all were kept
