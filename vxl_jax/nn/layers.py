"""Leaf modules that the vision tower, the projector and the language model share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.nn.backend import on_cpu
from vxl_jax.nn.few_rows import product, promote

ModuleState = nnx.State[Any, Any]
"""Arrays of a module: the second half of `nnx.split(module)`."""


class RMSNorm(nnx.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, width: int, eps: float, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(width, param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalise the last axis; the result has the dtype of x."""
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def make_linear(
    config: VideoXLConfig, rngs: nnx.Rngs, inputs: int, outputs: int, **options: Any
) -> nnx.Linear:
    """Make a linear layer in the dtypes of the configuration.

    options: further arguments of `nnx.Linear`; there is a bias unless `use_bias=False`.
    """
    options = {"dot_general": product, "promote_dtype": promote, **options}
    dtype, param_dtype = DTYPES[config.dtype], DTYPES[config.param_dtype]
    return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **options)


def product_in_float32(
    x: Float[Array, "*batch D"], kernel: Float[Array, "D V"]
) -> Float[Array, "*batch V"]:
    """Multiply and return the float32 sums, without rounding to the dtype of x.

    In float32 every mode of differentiation applies. In bfloat16, gradients are products in
    bfloat16, rounded to it, and forward mode raises TypeError.
    """
    if x.dtype == kernel.dtype == jnp.float32:
        return jnp.matmul(x, kernel)
    if on_cpu() or x.ndim != 2 or len(x) >= _LEAST_ROWS:
        return _rounded_gradients(x, kernel)
    # For one row, XLA makes a float32 copy of the whole kernel on a GPU.
    padded = jnp.pad(x, ((0, _LEAST_ROWS - len(x)), (0, 0)))
    return _rounded_gradients(padded, kernel)[: len(x)]


_LEAST_ROWS = 8


@jax.custom_vjp
def _rounded_gradients(x: Array, kernel: Array) -> Array:
    """The product, with gradients in the dtype of x: JAX's own rule makes a float32 kernel."""
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32), (x, kernel)


def _product_backward(factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = factors
    gradient = gradient.astype(x.dtype)
    return jnp.matmul(gradient, kernel.T), jnp.einsum("...D,...V->DV", x, gradient)


_rounded_gradients.defvjp(_product_forward, _product_backward)


def dot_in_float32(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """`product_in_float32` with the arguments of `nnx.Linear.dot_general`."""
    return product_in_float32(x, kernel)
