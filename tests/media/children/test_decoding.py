"""Files read in a child process: a decoder that hangs or crashes is ended, and Ctrl-C is heard."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support import faults
from tests.support.clock import ChildClock
from tests.support.data import frame_numbers, write_video
from vxl_jax.errors import MediaError
from vxl_jax.media import grid_pinpoints, load_image, tile_image
from vxl_jax.media.children import decoding, process
from vxl_jax.media.open import Picture, Video, open_film
from vxl_jax.media.prefetch import ahead

SIDE = 32


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("decoding") / "a.mp4", 24, fps=4)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Decoders that do something else on their second read of frames, and are soon ended."""
    monkeypatch.setattr(decoding, "_idle", [])
    monkeypatch.setattr(decoding, "SECONDS", 0.5)

    def use(action: str) -> None:
        monkeypatch.setattr(decoding, "DecodeHandler", lambda: faults.FaultyHandler(action))

    yield use
    for decoder in decoding._idle:
        decoder.process.kill()
        decoder.process.end()


def children() -> set[int]:
    """Decoding processes of this one that are alive."""
    return {d.process.process.pid for d in decoding._idle if d.process.process is not None}


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("spin", r"a\.mp4: its decoder made no progress in 0\.5 s of CPU time and was ended"),
        ("sleep 100", r"a\.mp4: its decoder gave no sign of life for 5 s and was ended"),
        ("SIGSEGV", r"a\.mp4: its decoder crashed \(signal SIGSEGV\); the file is damaged"),
        ("exit", r"a\.mp4: its decoder crashed \(exit status 7\); the file is damaged"),
        ("memory", r"a\.mp4: needs more memory than a decoder may have"),
    ],
)
def test_decoder_that_fails_is_ended_and_frames_before_are_kept(
    action: str, message: str, video: Path, faulty: Any, monkeypatch: pytest.MonkeyPatch
):
    faulty(action)
    found: list[np.ndarray] = []
    if "sleep" in action:  # wall time passes, 1 s at each look, when the first frames are there
        ChildClock(lambda _: bool(found), wall=1.0).set(monkeypatch)
    else:
        monkeypatch.setattr(process, "WAIT", 1000.0)
    with pytest.raises(MediaError, match=message):
        found.extend(pixels for pixels, _ in open_film(Video(video), SIDE).chunks(10))
    assert frame_numbers(np.concatenate(found)) == [*range(10)]


def test_fault_of_the_program_is_not_blamed_on_the_file(video: Path, faulty: Any):
    faulty("missing")
    with pytest.raises(RuntimeError, match=r"a fault of this program, not the file: KeyError"):
        list(open_film(Video(video), SIDE).chunks(10))


def test_interrupt_is_heard_while_the_decoder_hangs(
    video: Path, faulty: Any, heard_interrupts: None, monkeypatch: pytest.MonkeyPatch
):
    faulty("spin")
    monkeypatch.setattr(decoding, "SECONDS", 1000.0)
    chunks = open_film(Video(video), SIDE).chunks(10)
    interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), closing(ahead(chunks)) as decoded:  # noqa: PT012
        assert len(next(decoded)[0]) == 10
        interrupt.start()
        next(decoded)
    for thread in threading.enumerate():  # that of `ahead`: it ends the hung process
        if thread.daemon and thread is not threading.main_thread():
            thread.join(10)
    assert not children()


def test_interrupt_while_a_film_is_opened_ends_its_decoder(
    video: Path, faulty: Any, heard_interrupts: None, monkeypatch: pytest.MonkeyPatch
):
    faulty("spin at once")
    monkeypatch.setattr(decoding, "SECONDS", 1000.0)
    interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        open_film(Video(video), SIDE)
    assert not children()


def test_films_in_several_threads_do_not_disturb_each_other(tmp_path: Path):
    paths = [write_video(tmp_path / f"{i}.mp4", 12 + i) for i in range(4)]

    def numbers(path: Path) -> list[int]:
        chunks = open_film(Video(path), SIDE).chunks(3)
        return frame_numbers(np.concatenate([pixels for pixels, _ in chunks]))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(numbers, paths))
    assert found == [[*range(12 + i)] for i in range(4)]
    assert len(decoding._idle) <= 1  # one is kept


def test_pictures_have_the_pixels_of_this_process(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    film = open_film(Picture(tmp_path / "a.png"), SIDE)
    tiles = np.concatenate([pixels for pixels, _ in film.chunks(2)])
    expected = tile_image(load_image(tmp_path / "a.png"), grid_pinpoints(SIDE), SIDE)
    np.testing.assert_array_equal(tiles, expected)


def test_a_file_that_changes_after_opening_is_named(tmp_path: Path):
    path = write_video(tmp_path / "a.mp4", 24)
    film = open_film(Video(path), SIDE)
    next(iter(open_film(Video(write_video(tmp_path / "b.mp4", 3)), SIDE).chunks(1)))
    path.unlink()
    with pytest.raises(MediaError, match=r"a\.mp4: no such file"):
        list(film.chunks(10))
