"""Leaf modules that both towers use."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from vxl_jax.config import DTYPES, VideoXLConfig


class RMSNorm(nnx.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, width: int, eps: float, param_dtype: Any):
        self.scale = nnx.Param(jnp.ones(width, param_dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def make_linear(
    config: VideoXLConfig,
    rngs: nnx.Rngs,
    inputs: int,
    outputs: int,
    use_bias: bool = False,
    **options: Any,
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=DTYPES[config.dtype],
        param_dtype=DTYPES[config.param_dtype],
        rngs=rngs,
        **options,
    )


def linear_maker(config: VideoXLConfig, rngs: nnx.Rngs) -> Any:
    dtype, param_dtype = DTYPES[config.dtype], DTYPES[config.param_dtype]
    return partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
