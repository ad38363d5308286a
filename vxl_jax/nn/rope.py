"""Rotary position embedding."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int, UInt32

Angles = tuple[Float[Array, "*batch T 1 H/2"], Float[Array, "*batch T 1 H/2"]]
"""Cosine and sine of the rotation of each pair of features, float32."""


def rope_angles(positions: Int[Array, "*batch T"], head_size: int, theta: float) -> Angles:
    """Compute cosine and sine of rotary embedding at non-negative int32 positions.

    Both are within 5e-7 of the exact values at every position: position times frequency, in turns,
    is computed in fixed point, where whole turns drop out, and then rounded to float32. (A float32
    product is off by 1e-3 at position 74,240 and by 3e-2 at 1,180,160.)
    """
    position = jnp.asarray(positions)[..., None, None].astype(jnp.uint32)
    high, low = position >> 16, position & 0xFFFF
    f0, f1, f2 = _frequencies(head_size, theta)
    # In units of 2**-32 turns; uint32 arithmetic is modulo one turn, int32 is half a turn each way.
    turns = position * f0 + high * f1 + (low * f1 >> 16) + (high * f2 >> 16)
    angle = lax.bitcast_convert_type(turns, jnp.int32).astype(jnp.float32) * (math.pi / 2**31)
    return jnp.cos(angle), jnp.sin(angle)


def _frequencies(head_size: int, theta: float) -> list[UInt32[np.ndarray, " H/2"]]:
    """RoPE frequencies in turns a position, as f0 / 2**32 + f1 / 2**48 + f2 / 2**64."""
    fraction = float(theta) ** (-np.arange(0, head_size, 2) / head_size) / (2 * np.pi)
    digits = []
    for bits in (32, 16, 16):
        fraction, digit = np.modf(fraction * 2**bits)
        digits.append(digit.astype(np.uint32))
    return digits


def rotate(
    x: Float[Array, "*batch T heads H"], angles: Angles, scale: float = 1.0
) -> Float[Array, "*batch T heads H"]:
    """Apply rotary embedding in halves (not interleaved), and multiply by `scale`.

    Computed in float32, and rounded once to the dtype of x.
    """
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return (rotated * scale).astype(x.dtype)
