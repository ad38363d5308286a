"""Pixels of videos: aspect, colours, HDR."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.media.video_kinds import made, open_kind, pictures
from tests.media.videos import RATE, corners_of, draw, encode, number_of
from vxl_jax.media import MediaOptions, VideoFile
from vxl_jax.media.open import Video, open_film


def block(picture: np.ndarray) -> tuple[int, int]:
    """Width and height of the code of number 65535, which is all white."""
    white = (picture.min(-1) > 160).nonzero()
    return tuple(int(np.ptp(places)) + 1 for places in white[::-1])  # type: ignore[return-value]


def _setup_aspect(
    ratio: Fraction, matrix: tuple[int, ...] | None = None
) -> Callable[[Any, Any], None]:
    def setup(stream: Any, output: Any) -> None:
        stream.codec_context.sample_aspect_ratio = ratio
        if matrix is not None:
            stream.set_display_matrix([65536 * value for value in matrix[:8]] + [1 << 30])

    return setup


@pytest.mark.parametrize(
    ("name", "codec", "aspect", "matrix", "shape", "stretched"),
    [
        ("wide.mp4", "libx264", (4, 3), None, (48, 48), (64, 48)),
        ("wide.mkv", "libx264", (4, 3), None, (48, 48), (64, 48)),
        ("wide.mov", "qtrle", (4, 3), None, (48, 48), (64, 48)),  # in the container alone
        ("narrow.mp4", "libx264", (1, 2), None, (48, 48), (24, 48)),
        ("square.mp4", "libx264", (1, 1), None, (48, 48), (48, 48)),
        ("dvd.vob", "mpeg2video", (4, 3), None, (48, 48), (64, 48)),
        ("turned.mp4", "libx264", (4, 3), (0, 1, 0, -1, 0, 0, 0, 0), (48, 48), (48, 64)),
        ("mirrored.mp4", "libx264", (4, 3), (-1, 0, 0, 0, 1, 0, 0, 0), (48, 48), (64, 48)),
    ],
)
def test_pixel_aspect_is_applied_on_request(
    tmp_path: Path,
    name: str,
    codec: str,
    aspect: tuple[int, int],
    matrix: tuple[int, ...] | None,
    shape: tuple[int, int],
    stretched: tuple[int, int],
):
    path = tmp_path / name
    setup = _setup_aspect(Fraction(*aspect), matrix)
    pix_fmt = "rgb24" if codec == "qtrle" else "yuv420p"
    encode(path, codec, numbers=[65535] * 3, size=(96, 96), setup=setup, pix_fmt=pix_fmt)
    for options, expected in (
        (MediaOptions(), shape),
        (MediaOptions(square_pixels=True), stretched),
    ):
        for picture in pictures(VideoFile(path, options=options)):
            assert picture.shape == (2 * expected[1], 2 * expected[0], 3)
            assert np.abs(np.subtract(block(picture), expected)).max() <= 2


def test_pixel_aspect_reaches_films(tmp_path: Path):
    path = encode(
        tmp_path / "a.mp4",
        numbers=[65535] * 2,
        size=(96, 96),
        setup=_setup_aspect(Fraction(4, 3)),
    )
    for options, expected in ((MediaOptions(), (48, 48)), (MediaOptions(square_pixels=True), None)):
        film = open_film(Video(path, frames=1, options=options), 96)
        ((pixels, _),) = film.chunks(8)
        assert np.abs(np.subtract(block(pixels[0]), expected or (64, 48))).max() <= 2


BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)
"""Weights of red and blue in the luma."""


def yuv_frame(
    rgb: np.ndarray, weights: tuple[float, float], bits: int = 8, is_full: bool = False
) -> av.VideoFrame:
    """4:4:4 of non-linear RGB [H, W, 3] on the scale 0..1."""
    red, blue = weights
    luma = rgb @ (red, 1 - red - blue, blue)
    chroma = [(rgb[..., 2] - luma) / (2 - 2 * blue), (rgb[..., 0] - luma) / (2 - 2 * red)]
    scale, last = 1 << (bits - 8), (1 << bits) - 1
    if is_full:
        planes = [luma * last, *(c * last + 128 * scale for c in chroma)]
    else:
        planes = [(219 * luma + 16) * scale, *((224 * c + 128) * scale for c in chroma)]
    kind = "yuv444p" if bits == 8 else f"yuv444p{bits}le"
    frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], kind)
    for plane, values in zip(frame.planes, planes, strict=True):
        dtype = np.uint8 if bits == 8 else np.dtype("<u2")
        rows = np.zeros((plane.height, plane.line_size // np.dtype(dtype).itemsize), dtype)
        rows[:, : plane.width] = np.clip(np.round(values), 0, last)
        plane.update(rows)
    return frame


def write_frames(path: Path, frames: Sequence[av.VideoFrame], **colours: int) -> Path:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=RATE, options={"qp": "1"})
        stream.width, stream.height = frames[0].width, frames[0].height
        stream.pix_fmt = frames[0].format.name
        for name, value in colours.items():
            setattr(stream.codec_context, name, value)
        for i, frame in enumerate(frames):
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("weights", "bits", "is_full", "colours"),
    [
        (BT601, 8, False, {}),
        (BT601, 8, False, {"colorspace": 6}),
        (BT601, 8, True, {"colorspace": 6, "color_range": 2}),
        (BT709, 8, False, {"colorspace": 1}),
        (BT709, 8, True, {"colorspace": 1, "color_range": 2}),
        (BT2020, 8, False, {"colorspace": 9}),
        (BT2020, 10, False, {"colorspace": 9}),
        (BT709, 10, False, {"colorspace": 1}),
    ],
)
def test_colours_follow_the_tags(
    tmp_path: Path,
    weights: tuple[float, float],
    bits: int,
    is_full: bool,
    colours: dict[str, int],
):
    frames = [yuv_frame(draw(i) / 255, weights, bits, is_full) for i in range(3)]
    path = write_frames(tmp_path / "a.mp4", frames, **colours)
    for i, picture in enumerate(pictures(VideoFile(path))):
        assert np.abs(picture.astype(int) - draw(i)).max() <= 4


REFERENCE_WHITE = 203
"""cd/m² of white (ITU-R BT.2408)."""


TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def pq(light: np.ndarray) -> np.ndarray:
    """Code of light in cd/m² (SMPTE ST 2084)."""
    power = (light / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(light: np.ndarray) -> np.ndarray:
    """Code of light in cd/m² on a display of 1000 cd/m² (ITU-R BT.2100)."""
    light = light / 1000
    luma = (light @ (0.2627, 0.6780, 0.0593))[..., None]
    scene = light * luma ** (1 / 1.2 - 1)
    low = np.sqrt(3 * scene)
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, low, high)


@pytest.mark.parametrize(("code", "number"), [(pq, 16), (hlg, 18)])
def test_hdr_is_mapped_on_request(
    tmp_path: Path, code: Callable[[np.ndarray], np.ndarray], number: int
):
    light = (draw(5) / 255) ** 2.4 @ TO_2020.T * REFERENCE_WHITE
    stored = code(light)
    path = write_frames(
        tmp_path / "hdr.mp4",
        [yuv_frame(stored, BT2020, 10)],
        color_trc=number,
        color_primaries=9,
        colorspace=9,
    )
    (as_stored,) = pictures(VideoFile(path))
    assert np.abs(as_stored - 255 * stored).max() <= 4
    (mapped,) = pictures(VideoFile(path, options=MediaOptions(tone_map=True)))
    assert corners_of(mapped) == "RGBY"
    assert number_of(mapped) == 5


def test_ordinary_video_is_not_tone_mapped():
    (stored,) = pictures(open_kind("plain.mp4"), [3])
    (mapped,) = pictures(VideoFile(made("plain.mp4"), options=MediaOptions(tone_map=True)), [3])
    np.testing.assert_array_equal(mapped, stored)
