"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank updates of the language model's linears.

A linear with an update keeps its kernel and bias under their names, and adds `lora_a` and `lora_b`.
r is the rank; stacked layers have a leading layer axis everywhere.
"""

import zlib
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from vxl_jax.checkpoint import ParamPath, Shapes
from vxl_jax.config import LoRAConfig, LoRATarget
from vxl_jax.model import VideoXL

LORA_NAMES = ("lora_a", "lora_b")


def lora_path(target: str) -> ParamPath:
    """Where a target's linear stands in the model."""
    block = "mlp" if target in ("gate", "up", "down") else "attention"
    return ("language", "layers", block, target)


class LoRALinear(nnx.Linear):
    """x kernel + bias + (alpha / r) x lora_a lora_b, in the compute dtype of the linear.

    lora_a [L, in, r] float32 starts uniform within ±1/√in (Kaiming, as in the paper's code), lora_b
    [L, r, out] float32 as zeros: at first the outputs are those of the linear it is made from.
    """

    def __init__(self, linear: nnx.Linear, config: LoRAConfig, key: Array):
        super().__init__(**_arguments(linear, linear.kernel[...]))
        *layers, inputs, outputs = linear.kernel.shape
        bound = inputs**-0.5
        shape = (*layers, inputs, config.rank)
        self.lora_a = nnx.LoRAParam(jax.random.uniform(key, shape, jnp.float32, -bound, bound))
        self.lora_b = nnx.LoRAParam(jnp.zeros((*layers, config.rank, outputs), jnp.float32))
        self.scale = config.scale

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """[..., in] -> [..., out]."""
        y = super().__call__(inputs, out_sharding)
        arrays = (inputs, self.lora_a[...], self.lora_b[...])
        x, a, b = self.promote_dtype(arrays, dtype=self.dtype)
        return y + jnp.matmul(x @ a * self.scale, b, out_sharding=out_sharding)


def _arguments(linear: nnx.Linear, kernel: Array) -> dict[str, Any]:
    """What makes a linear like this one, with its bias, around a kernel."""
    names = (
        *("in_features", "out_features", "use_bias", "dtype", "param_dtype", "precision"),
        *("dot_general", "promote_dtype", "preferred_element_type"),
    )
    return {
        **{name: getattr(linear, name) for name in names},
        "kernel_init": lambda *_: kernel,
        "bias_init": lambda *_: linear.bias[...],  # type: ignore[index]
        "rngs": nnx.Rngs(0),
    }


def add_lora(model: VideoXL, config: LoRAConfig, seed: int) -> None:
    """Give the target linears of all layers their updates, in place.

    What a target's update starts from follows from seed and name, whatever the other targets are.
    Works on a model with weights, and where one is traced (jit, eval_shape). Nothing is done at
    rank 0.

    Raises: ValueError if a target has an update already.
    """
    if config.rank == 0:
        return
    for target in config.targets:
        block, linear = _find(model, target)
        if isinstance(linear, LoRALinear):
            raise ValueError(f"{target} has an update already; merge_lora it first")
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(target.encode()))
        setattr(block, target, LoRALinear(linear, config, key))


def merge_lora(model: VideoXL) -> None:
    """Fold all updates into the kernels, in place: the linears are plain ones again.

    In float32, a layer at a time, rounded to the kernel's dtype.
    """

    def merge_layer(arrays: tuple[Array, Array, Array], scale: float) -> Array:
        return merge_kernel(*arrays, scale).astype(arrays[0].dtype)

    for target in get_args(LoRATarget):
        block, linear = _find(model, target)
        if isinstance(linear, LoRALinear):
            arrays = (linear.kernel[...], linear.lora_a[...], linear.lora_b[...])
            with jax.default_matmul_precision("highest"):
                kernel = lax.map(partial(merge_layer, scale=linear.scale), arrays)
            setattr(block, target, nnx.Linear(**_arguments(linear, kernel)))


def merge_kernel(kernel: Any, lora_a: Any, lora_b: Any, scale: float) -> Any:
    """kernel [..., in, out] + scale * lora_a [..., in, r] lora_b [..., r, out], float32.

    NumPy's arrays or JAX's; for part of a kernel, rows of lora_a and columns of lora_b.
    """
    return kernel.astype(np.float32) + scale * (lora_a @ lora_b)


def lora_shapes(shapes: Shapes, config: LoRAConfig) -> Shapes:
    """Shapes of the parameters that `add_lora` adds, by path, from those of the plain model."""
    found = {}
    for path in map(lora_path, config.targets if config.rank else ()):
        *layers, inputs, outputs = shapes[*path, "kernel"].shape
        a, b = (*layers, inputs, config.rank), (*layers, config.rank, outputs)
        for name, shape in zip(LORA_NAMES, (a, b), strict=True):
            found[*path, name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return found


def _find(model: VideoXL, target: str) -> tuple[nnx.Module, nnx.Linear]:
    block = getattr(model.language.layers, lora_path(target)[-2])
    return block, getattr(block, target)
