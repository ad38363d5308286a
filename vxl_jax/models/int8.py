"""Weight-only int8 for the language model: half the bytes of bfloat16, for inference.

Each column of a kernel is a float32 scale times integers from -127 to 127, rounded to nearest
(symmetric, per output channel; Dettmers et al. 2022, arXiv 2208.07339, section 2.1). Activations
and products keep the compute dtype, logits are float32. Embeddings, norms, biases, the vision tower
and the projector are not quantized.
"""

from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int8

from vxl_jax.config import LoRATarget, VideoXLConfig
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn.few_rows import LayerKernel, few_rows_product, fits, reads_in_place
from vxl_jax.typing import ParamPath, Params

INT8_LINEARS = get_args(LoRATarget)
"""Names of the linears of a layer of the language model."""


class Int8Linear(nnx.Module):
    """x kernel * scale + bias, summed in float32.

    kernel int8 [L, in, out], scale float32 [L, out]; without L inside a layer. The result has the
    linear's `preferred_element_type` if it has one (the head: float32), else its compute dtype.
    """

    def __init__(self, linear: nnx.Linear):
        kernel, scale = quantize_kernel(linear.kernel[...])
        self.kernel, self.scale = nnx.Param(kernel), nnx.Param(scale)
        self.bias = linear.bias
        self.dtype, self.out_features = linear.dtype, linear.out_features
        self.out_dtype = linear.preferred_element_type or linear.dtype

    def __call__(self, inputs: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Multiply with the kernel, and scale."""
        x = inputs.astype(self.dtype)
        kernel: Array | LayerKernel = self.kernel[...]
        if (
            not isinstance(kernel, LayerKernel)
            and reads_in_place(x)
            and fits(kernel[None], x.dtype)
        ):
            kernel = LayerKernel(kernel[None], 0)
        if isinstance(kernel, LayerKernel):
            y = few_rows_product(x, kernel)
        else:
            last = (((x.ndim - 1,), (0,)), ((), ()))
            wide = kernel.astype(self.dtype)  # exact
            y = lax.dot_general(x, wide, last, preferred_element_type=jnp.float32)
        y = y * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(self.out_dtype)


def quantize(model: VideoXL) -> None:
    """Quantize the language model's linears and its head to int8, in place.

    model: with weights, or traced (jit, eval_shape).
    """
    language = model.language
    for block in (language.layers.attention, language.layers.mlp, language):
        for name in (*INT8_LINEARS, "head"):
            linear = getattr(block, name, None)
            if isinstance(linear, nnx.Linear):
                setattr(block, name, Int8Linear(linear))


def new_network(config: VideoXLConfig, weights: str | None = None) -> VideoXL:
    """Build a network with random weights (under `nnx.eval_shape`, its shapes).

    weights: as for `load_network`.
    """
    model = VideoXL(config, rngs=nnx.Rngs(0))
    if weights == "int8":
        quantize(model)
    return model


def is_quantized(path: ParamPath) -> bool:
    """Tell whether `quantize` turns the parameter at a path into int8."""
    return path[0] == "language" and path[-1] == "kernel"


@jax.jit
def quantize_kernel(
    kernel: Float[Array, "*L in out"],
) -> tuple[Int8[Array, "*L in out"], Float[Array, "*L out"]]:
    """Round a kernel to int8, with a float32 scale for each column."""

    def one(kernel: Array) -> tuple[Array, Array]:
        wide = kernel.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(wide).max(0), jnp.finfo(jnp.float32).tiny) / 127
        return jnp.round(wide / scale).astype(jnp.int8), scale

    return one(kernel) if kernel.ndim == 2 else lax.map(one, kernel)


def quantized(path: ParamPath, array: Array) -> Params:
    """Compute the parameters that replace the one at a path: int8 kernel and scale, or itself."""
    if not is_quantized(path):
        return {path: array}
    kernel, scale = quantize_kernel(array)
    return {path: kernel, (*path[:-1], "scale"): scale}
