"""Animation files: which are animations, which are damaged."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.media.animations import (
    FORMATS,
    SIDE,
    G,
    Part,
    R,
    animated,
    apng,
    gif,
    greys,
    lzw,
    numbers,
    rgba,
    with_checks,
)
from tests.media.pictures import noise
from vxl_jax.errors import MediaError
from vxl_jax.media.images import loading as images
from vxl_jax.media.images.animation import Animation, is_animation


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "BMP", *FORMATS])
def test_one_picture_is_one_frame(file: Path, form: str):
    Image.new("RGB", (9, 9), (70, 70, 70)).save(file, form)
    video = Animation(file)
    assert (video.frames, video.fps, video.duration) == (1, 10, 0.1)
    assert video.seconds.tolist() == [0]
    assert numbers(video.read([0, 0], 5)) == [7, 7]


def test_one_picture_with_a_delay(file: Path):
    for data in (
        gif([Part(np.ones((4, 4)).astype(int), delay=250)]),
        apng([Part(rgba(G, 255), delay=250)]),
    ):
        file.write_bytes(data)
        video = Animation(file)
        assert (video.frames, video.duration, video.fps) == (1, 2.5, 0.4)
        assert (video.read([0], SIDE) == G).all()


def several(form: str) -> bytes:
    buffer = io.BytesIO()
    first, *others = greys(3)
    first.save(buffer, form, save_all=True, append_images=others)
    return buffer.getvalue()


def test_is_animation(file: Path):
    kinds: dict[bool, list[bytes]] = {
        True: [animated(form, greys(2), [50, 50]) for form in FORMATS],
        False: [
            *(animated(form, greys(1), [50]) for form in FORMATS),
            several("TIFF"),
            several("MPO"),
            apng([Part(rgba(G, 255))]),
            apng([Part(rgba(G, 255))], still=rgba(R, 255)),
            animated("GIF", greys(2), [50, 50])[:-10],  # the second one is cut off
            animated("WEBP", greys(2), [50, 50])[:40],
            b"text",
            b"",
            b"GIF89a",
            b"\x89PNG\r\n\x1a\n",
        ],
    }
    assert not is_animation(file)  # the file does not exist
    for expected, contents in kinds.items():
        for data in contents:
            file.write_bytes(data)
            assert is_animation(file) is expected, data[:20]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animations_that_are_cut_off(file: Path, form: str):
    """Whole frames are there, with their times, and the end is not."""
    arrays = [noise(8, 8, 3, seed=i) for i in range(5)]
    pictures = [Image.fromarray(array).quantize(32) for array in arrays]
    data = animated(form, pictures, [50] * 5)
    file.write_bytes(data)
    expected = Animation(file).read(range(5), 8)
    found, refused = set(), list[str]()
    for length in range(20, len(data), 7):
        file.write_bytes(data[:length])
        try:
            video = Animation(file)
        except MediaError as error:
            refused.append(str(error))
            continue
        found.add(video.frames)
        assert video.duration == pytest.approx(0.05 * video.frames)
        np.testing.assert_array_equal(video.read(range(video.frames), 8), expected[: video.frames])
        text = "ends early"
        if form == "PNG" and video.frames < 5:
            text += f": {video.frames} of its 5 frames are there"
        assert video.truncated == text
    assert found >= {1, 2, 3, 4}
    assert refused
    assert all(error.startswith(f"{file}: ") for error in refused)
    assert all(error.endswith("; fetch it again") for error in refused), refused


def test_a_gif_without_its_end(file: Path):
    data = animated("GIF", greys(5), [50] * 5)
    assert data.endswith(b";")
    file.write_bytes(data[:-1])
    video = Animation(file)
    assert (video.frames, video.truncated) == (5, "ends early")
    assert numbers(video.read(range(5), SIDE)) == [0, 1, 2, 3, 4]


def test_an_avif_that_is_cut_off(file: Path):
    """Its decoder opens no part of it."""
    file.write_bytes(animated("AVIF", greys(5), [50] * 5)[:-10])
    with pytest.raises(MediaError) as caught:
        Animation(file)
    assert str(caught.value) == f"{file}: not a readable image (AVIF, cut off); fetch it again"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no such file"),
        (b"", "is empty; fetch it again"),
        (b"text", r"not a readable image \(it begins with 'text'\)"),
        (b"GIF89a" + bytes(20), r"cut off before its first frame ends\); fetch it again"),
        (gif([Part([[0]])])[:40], r"cut off before its first frame ends\); fetch it again"),
        (apng([Part(rgba(R, 255))])[:70], r"cut off before its first frame ends\); fetch it again"),
    ],
)
def test_files_that_are_not_opened(file: Path, data: bytes | None, message: str):
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(MediaError, match=message) as caught:
        Animation(file)
    assert str(caught.value).startswith(f"{file}: ")


def damaged(form: str) -> bytes:
    """An animation of four frames whose third one cannot be decoded."""
    pictures = [Image.fromarray(noise(64, 64, 3, seed=i)).quantize(128) for i in range(4)]
    if form == "GIF":
        data = gif([Part([[0, 1, 2, i]]) for i in range(4)], transparent=None)
        third = lzw([0, 1, 2, 2])
        return data.replace(third, third[:1] + b"\xff" * (len(third) - 2) + third[-1:])
    data = bytearray(animated(form, pictures, [50] * 4))
    if form == "PNG":
        starts = [i for i in range(len(data)) if data[i : i + 4] in (b"IDAT", b"fdAT")]
        data[starts[2] + 12 : starts[2] + 60] = bytes(48)
        return with_checks(bytes(data))
    if form == "WEBP":
        starts = [i for i in range(len(data)) if data[i : i + 4] == b"ANMF"]
        start, end = starts[2] + 60, starts[3] - 8
    else:
        with av.open(io.BytesIO(data)) as container:
            *_, track = container.streams.video  # before it: the first picture as a still image
            third = [packet for packet in container.demux(track) if packet.size][2]
            start, end = third.pos, third.pos + third.size
    data[start:end] = b"\xff" * (end - start)
    return bytes(data)


@pytest.mark.parametrize("form", FORMATS)
def test_a_frame_that_cannot_be_decoded_is_named(file: Path, form: str):
    file.write_bytes(damaged(form))
    video = Animation(file)
    assert (video.frames, video.truncated) == (4, None)
    assert len(video.read([0, 1], 16)) == 2
    messages = []
    for _ in range(2):  # and again, from a new start
        with pytest.raises(MediaError) as caught:
            video.read([3], 16)
        message = str(caught.value)
        assert message.startswith(f"{file}: frame 2 (of 0..3) cannot be decoded (")
        assert message.endswith("); replace the file")
        assert "\n" not in message
        messages.append(message)
    assert messages[0] == messages[1]
    assert len(video.read([1, 0], 16)) == 2


def test_fewer_frames_than_promised(file: Path, monkeypatch: pytest.MonkeyPatch):
    file.write_bytes(animated("GIF", greys(3), [50] * 3))
    video = Animation(file)
    monkeypatch.setattr("vxl_jax.media.images.animation._open", lambda *_: next(iter(())))
    with pytest.raises(MediaError, match=r"frame 0 \(of 0\.\.2\) cannot be decoded"):
        video.read([1], SIDE)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "no frames asked for; give at least one index"),
        ([0, 3], "frames 0..3 asked for, but there are 3 (0..2)"),
        ([-1], "frames -1..-1 asked for, but there are 3 (0..2)"),
    ],
)
def test_indices_must_be_in_the_animation(file: Path, indices: list[int], message: str):
    file.write_bytes(animated("GIF", greys(3), [50] * 3))
    with pytest.raises(MediaError) as caught:
        Animation(file).read(indices, SIDE)
    assert str(caught.value) == f"{file}: {message}"


@pytest.mark.parametrize("form", FORMATS)
def test_larger_animations_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch, form: str):
    file.write_bytes(animated(form, greys(3), [50] * 3))
    monkeypatch.setattr(images, "_MAX_PIXELS", SIDE * SIDE)
    Animation(file).read([0, 2], SIDE)
    monkeypatch.setattr(images, "_MAX_PIXELS", SIDE * SIDE - 1)
    with pytest.raises(MediaError, match=r"4 x 4 pixels are more than 15, .*; reduce the"):
        Animation(file)


def test_a_frame_that_is_larger_than_its_canvas_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its size says nothing of what it decompresses to."""
    file.write_bytes(gif([Part([[0]]), Part(np.zeros((99, 99)).astype(int))]))
    monkeypatch.setattr(images, "_MAX_PIXELS", 98 * 98)
    video = Animation(file)
    with pytest.raises(MediaError, match="99 x 99 pixels are more than 9,604"):
        video.read([1], SIDE)


def test_tables_of_an_avif_that_are_damaged(file: Path):
    """Times are then guessed, and the pixels are right."""
    data = bytearray(animated("AVIF", greys(3), [50] * 3))
    at = data.index(b"mdhd")
    data[at + 16 : at + 20] = bytes(4)  # the time scale, of version 0
    data[at + 24 : at + 28] = bytes(4)  # or of version 1
    file.write_bytes(data)
    try:
        video = Animation(file)
    except MediaError:
        return
    assert video.seconds.tolist() == [0, 0.1, 0.2]
