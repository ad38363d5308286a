"""Tone-map HDR video (PQ and HLG) to SDR pixels.

Sources:
- PQ: SMPTE ST 2084, equations of ITU-R BT.2100, Table 4.
- HLG: ARIB STD-B67; inverse OETF and OOTF of ITU-R BT.2100, Table 5, for a display of 1000 cd/m².
- Reference white is 203 cd/m²: ITU-R BT.2408, section 2.1.
- Primaries: the matrix of ITU-R BT.2407, section 2, computed to six digits.
- SDR encoding: the inverse of ITU-R BT.1886 (gamma 2.4, black 0).
- Highlights: the curve x / (1 + x) of Reinhard et al., "Photographic tone reproduction for digital
  images", SIGGRAPH 2002, equation 3, applied to the part above `KNEE`.
"""

from functools import cache
from typing import Literal

import numpy as np

Transfer = Literal["pq", "hlg"]
"""HDR transfer functions: SMPTE ST 2084 and ARIB STD-B67."""

KNEE = 0.8
"""Luminance above which highlights are compressed; reference white is 1."""

_WHITE = 203.0
_PQ_PEAK = 10000.0
_HLG_PEAK = 1000.0
_HLG_GAMMA = 1.2
_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
_TO_709 = np.array(
    [
        [1.660491, -0.587641, -0.072850],
        [-0.124550, 1.132900, -0.008349],
        [-0.018151, -0.100579, 1.118730],
    ],
    np.float32,
)
_LAST_CODE = 65535


def tone_map(rgb: np.ndarray, transfer: Transfer) -> np.ndarray:
    """Convert an HDR picture to SDR.

    Light up to `KNEE` does not change, so SDR graphics in an HDR video get their original values.
    Brighter pixels are compressed and keep their hue: reference white becomes 244, and white of
    1000 cd/m² becomes 254. Colours outside BT.709 are clipped.

    Args:
      rgb: float32 [H, W, 3], non-linear BT.2020 RGB on the scale 0..1 (full range). Values outside
        the scale are clipped.
      transfer: how `rgb` is encoded.

    Returns:
      uint8 [H, W, 3], BT.709.
    """
    codes = (np.clip(rgb, 0, 1).reshape(-1, 3) * _LAST_CODE + np.float32(0.5)).astype(np.uint16)
    if transfer == "pq":
        light = _pq_light()[codes]
    else:
        scene = _hlg_scene_light()[codes]
        luma = (scene @ _LUMA_2020)[:, None]
        light = scene * (luma ** (_HLG_GAMMA - 1) * (_HLG_PEAK / _WHITE))
    light = _compress_highlights(light @ _TO_709.T)
    roots = np.sqrt(np.clip(light, 0, 1, out=light), out=light)
    return _sdr_codes()[(roots * _LAST_CODE).astype(np.uint16)].reshape(rgb.shape)


@cache
def _pq_light() -> np.ndarray:
    """Display light of every 16-bit PQ code, float32 [65536]; reference white is 1."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = np.linspace(0, 1, _LAST_CODE + 1) ** (1 / m2)
    light = (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    return (light * (_PQ_PEAK / _WHITE)).astype(np.float32)


@cache
def _hlg_scene_light() -> np.ndarray:
    """Scene light on the scale 0..1 of every 16-bit HLG code, float32 [65536]."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    code = np.linspace(0, 1, _LAST_CODE + 1)
    light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    return light.astype(np.float32)


@cache
def _sdr_codes() -> np.ndarray:
    """SDR value of light, uint8 [65536], by its square root: light itself is too coarse near 0."""
    light = np.linspace(0, 1, _LAST_CODE + 1) ** 2
    return np.rint(255 * light ** (1 / 2.4)).astype(np.uint8)


def _compress_highlights(light: np.ndarray) -> np.ndarray:
    """Scales pixels [N, 3] whose largest channel is above `KNEE`, so that it stays below 1."""
    largest = np.maximum(np.maximum(light[:, 0], light[:, 1]), light[:, 2])
    largest = np.maximum(largest, np.float32(KNEE))
    above = (largest - KNEE) / (1 - KNEE)
    return light * ((KNEE + (1 - KNEE) * above / (1 + above)) / largest)[:, None]
