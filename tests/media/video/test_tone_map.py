"""HDR to SDR, against the formulas of the standards in float64 and against zimg (ffmpeg's zscale).

The formulas here go the other way, from SDR to HDR, and their matrices come from the chromaticities
in ITU-R BT.709 and BT.2020.
"""

import shutil
import subprocess

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from vxl_jax.media.video.tone_map import KNEE, Transfer, tone_map

TRANSFERS: tuple[Transfer, ...] = ("pq", "hlg")
WHITE = 203.0
RED, GREEN, BLUE, YELLOW = (200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40)
GRAPHICS = np.array([RED, GREEN, BLUE, YELLOW, (0, 0, 0), (30, 30, 30), (225, 225, 225)], np.uint8)
D65 = (0.3127, 0.3290)
BT709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
BT2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
LUMA_2020 = np.array([0.2627, 0.6780, 0.0593])
RGB48_WHITE = 65283
"""White of a limited-range frame that swscale converts to 16 bits; it is not 65535."""


def to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    x, y = D65
    return columns * np.linalg.solve(columns, [x / y, 1, (1 - x - y) / y])


def pq_encode(nits: np.ndarray) -> np.ndarray:
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = (nits / 10000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


def hlg_encode(nits: np.ndarray) -> np.ndarray:
    """Inverse OOTF and OETF of BT.2100 for a display of 1000 cd/m²."""
    display = nits / 1000
    luma = np.maximum(display @ LUMA_2020, 1e-12)[..., None]
    scene = display * luma ** ((1 - 1.2) / 1.2)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    logarithm = a * np.log(np.maximum(12 * scene - b, 1e-12)) + c
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithm)


ENCODERS = {"pq": pq_encode, "hlg": hlg_encode}


def to_hdr(sdr: np.ndarray, transfer: Transfer) -> np.ndarray:
    """SDR uint8 [..., 3], seen on a display of BT.1886 whose white is 203 cd/m², as HDR."""
    nits = (sdr / 255) ** 2.4 * WHITE
    wide = nits @ (np.linalg.inv(to_xyz(BT2020)) @ to_xyz(BT709)).T
    return ENCODERS[transfer](np.maximum(wide, 0)).astype(np.float32)


def grey(nits: np.ndarray, transfer: Transfer) -> np.ndarray:
    """The SDR value of grey pixels of some luminances, int [N]."""
    light = np.repeat(np.asarray(nits, float)[None, :, None], 3, axis=2)
    pixels = tone_map(ENCODERS[transfer](light).astype(np.float32), transfer)[0].astype(int)
    assert np.ptp(pixels, axis=1).max() <= 1, "grey became colored"
    return pixels[:, 1]


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_sdr_graphics_in_hdr_keep_their_values(transfer: Transfer) -> None:
    picture = GRAPHICS[None]
    found = tone_map(to_hdr(picture, transfer), transfer)
    assert found.dtype == np.uint8
    assert found.shape == picture.shape
    np.testing.assert_allclose(found.astype(int), picture, atol=1)


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_all_sdr_colors_below_the_knee_keep_their_values(transfer: Transfer) -> None:
    below = int(255 * KNEE ** (1 / 2.4))
    levels = np.arange(0, below + 1, 8, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    found = tone_map(to_hdr(colors, transfer), transfer)
    level = np.abs(found.astype(int) - colors)
    light = np.abs((found / 255) ** 2.4 - (colors / 255) ** 2.4)
    # A channel near 0 next to a bright one is the difference of large numbers.
    assert ((level <= 1) | (light < 1e-4)).all()


@pytest.mark.parametrize(("transfer", "code"), [("pq", 0.58), ("hlg", 0.75)])
def test_reference_white_has_the_code_of_bt2408(transfer: Transfer, code: float) -> None:
    """BT.2408 gives white as 58 % (PQ) and 75 % (HLG); both are 203 cd/m²."""
    found = tone_map(np.full((1, 1, 3), code, np.float32), transfer)
    np.testing.assert_allclose(found.astype(int), 244, atol=1)
    np.testing.assert_array_equal(grey(np.array([WHITE]), transfer), [244])


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_highlights_rise_smoothly_below_255(transfer: Transfer) -> None:
    nits = np.linspace(0, 1000, 20001)
    values = grey(nits, transfer)
    assert (np.diff(values) >= 0).all()
    assert values[0] == 0
    assert values[-1] == 254
    bright = values[nits > KNEE * WHITE]
    assert set(bright) >= set(range(234, 255)), "a level is left out"


def test_pq_peak_is_white() -> None:
    assert (tone_map(np.ones((2, 2, 3), np.float32), "pq") == 255).all()


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_highlights_keep_their_hue(transfer: Transfer) -> None:
    dim = np.array([[[150.0, 60.0, 60.0]]])
    dimmed, bright = (
        (tone_map(ENCODERS[transfer](nits).astype(np.float32), transfer)[0, 0] / 255) ** 2.4
        for nits in (dim, 5 * dim)
    )
    np.testing.assert_allclose(bright[1] / bright[0], dimmed[1] / dimmed[0], atol=0.01)
    assert bright[0] > dimmed[0]


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_colors_outside_bt709_are_clipped(transfer: Transfer) -> None:
    green = ENCODERS[transfer](np.array([[[0.0, 100.0, 0.0]]])).astype(np.float32)
    found = tone_map(green, transfer)[0, 0]
    assert found[0] == found[2] == 0
    assert found[1] > 150


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_values_outside_the_scale_are_clipped(transfer: Transfer) -> None:
    outside = np.array([[[-0.5, -0.5, -0.5], [1.5, 1.5, 1.5]]], np.float32)
    expected = tone_map(np.array([[[0, 0, 0], [1, 1, 1]]], np.float32), transfer)
    np.testing.assert_array_equal(tone_map(outside, transfer), expected)


@pytest.mark.parametrize("pixel_format", ["yuv444p10le", "yuv420p10le", "yuv420p12le"])
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_frame_of_pyav_becomes_sdr(transfer: Transfer, pixel_format: str) -> None:
    """A BT.2020 frame goes through swscale to 16-bit RGB and comes out within 2 levels."""
    bits = int(pixel_format[-4:-2])
    for color in (RED, GREEN, BLUE, YELLOW):
        r, g, b = to_hdr(np.array(color), transfer).astype(float)
        luma = np.array([r, g, b]) @ LUMA_2020
        parts = (luma, (b - luma) / 1.8814, (r - luma) / 1.4746)
        frame = av.VideoFrame(64, 64, pixel_format)
        frame.colorspace, frame.color_range = 9, 1  # BT.2020 non-constant luminance, limited
        for plane, part, low, span in zip(
            frame.planes, parts, (16, 128, 128), (219, 224, 224), strict=True
        ):
            code = round((low + span * part) * 2 ** (bits - 8))
            plane.update(np.full(plane.buffer_size // 2, code, "<u2").tobytes())
        deep = VideoReformatter().reformat(frame, format="rgb48le", threads=1).to_ndarray()
        found = tone_map(deep / np.float32(RGB48_WHITE), transfer)
        assert np.abs(found[20:40, 20:40].astype(int) - color).max() <= 2


def ffmpeg_with_zscale() -> bool:
    if shutil.which("ffmpeg") is None:
        return False
    listed = subprocess.run(["ffmpeg", "-v", "error", "-filters"], capture_output=True, text=True)
    return " zscale " in listed.stdout


@pytest.mark.skipif(not ffmpeg_with_zscale(), reason="needs an ffmpeg with zscale")
@pytest.mark.parametrize(("transfer", "name"), [("pq", "smpte2084"), ("hlg", "arib-std-b67")])
def test_tone_map_inverts_zscale(transfer: Transfer, name: str) -> None:
    """agamma=false: zimg otherwise replaces the OOTF of HLG by a gamma of each channel."""
    picture = GRAPHICS.reshape(1, -1, 3).repeat(4, 0).repeat(4, 1)
    height, width, _ = picture.shape
    steps = (
        "format=gbrp,setparams=colorspace=gbr:color_primaries=bt709:color_trc=bt709:range=pc,"
        "zscale=t=linear:npl=203,format=gbrpf32le,"
        f"zscale=p=bt2020:t={name}:npl=203:agamma=false,format=gbrpf32le"
    )
    raw = ["-f", "rawvideo", "-pix_fmt"]
    given = [*raw, "rgb24", "-s", f"{width}x{height}", "-i", "-"]
    run = subprocess.run(
        ["ffmpeg", "-v", "error", *given, "-vf", steps, *raw, "gbrpf32le", "-"],
        input=picture.tobytes(),
        capture_output=True,
        check=True,
    )
    green, blue, red = np.frombuffer(run.stdout, "<f4").reshape(3, height, width)
    found = tone_map(np.stack([red, green, blue], -1), transfer).astype(int)
    np.testing.assert_allclose(found, picture, atol=1)
