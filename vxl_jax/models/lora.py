"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank updates of the language model's linears.

A linear with an update keeps its kernel and bias under their names, and adds `lora_a` and `lora_b`.
r is the rank; all arrays of stacked layers have a leading layer axis.
"""

import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from vxl_jax.config import LoRAConfig, LoRATarget
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.typing import ParamPath, Params, Placement, Shapes

LORA_NAMES = ("lora_a", "lora_b")

ArrayT = TypeVar("ArrayT", np.ndarray, Array)


def lora_path(target: str) -> ParamPath:
    """Find the path of a target's linear in the model."""
    block = "mlp" if target in ("gate", "up", "down") else "attention"
    return ("language", "layers", block, target)


class LoRALinear(nnx.Linear):
    """x kernel + bias + scale (x lora_a) lora_b, in the compute dtype of the linear.

    lora_a [L, in, r], lora_b [L, r, out]; without L inside a layer.
    """

    def __init__(self, linear: nnx.Linear, lora_a: Array, lora_b: Array, scale: float):
        super().__init__(**_arguments(linear, linear.kernel[...]))
        self.lora_a = nnx.LoRAParam(lora_a)
        self.lora_b = nnx.LoRAParam(lora_b)
        self.scale = scale

    def __call__(
        self, inputs: Float[Array, "*batch in"], out_sharding: Any = None
    ) -> Float[Array, "*batch out"]:
        """Multiply with the kernel and add the update."""
        y = super().__call__(inputs, out_sharding)
        arrays = (inputs, self.lora_a[...], self.lora_b[...])
        x, a, b = self.promote_dtype(arrays, dtype=self.dtype)
        return y + jnp.matmul(x @ a * self.scale, b, out_sharding=out_sharding)


def _arguments(linear: nnx.Linear, kernel: Array) -> dict[str, Any]:
    """Arguments of a linear like this one, with its bias and another kernel."""
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


def add_lora(
    model: VideoXL, config: LoRAConfig, seed: int, placement: Placement | None = None
) -> None:
    """Add low-rank updates to the target linears of all layers, in place; nothing at rank 0.

    lora_a starts uniform within ±1/√in (Kaiming, as in the paper's code), and depends on seed and
    target alone. lora_b starts as zeros, so that the model's output is unchanged. Both are float32.

    Args:
        model: with weights, or traced (jit, eval_shape).
        config: rank, alpha and targets.
        seed: of lora_a.
        placement: as for `load_network`.

    Raises:
        ValueError: a target has an update already.
    """
    if config.rank == 0:
        return
    linears = {target: _find_linear(model, target)[1] for target in config.targets}
    if taken := [name for name, linear in linears.items() if isinstance(linear, LoRALinear)]:
        raise ValueError(f"{', '.join(taken)} have updates already; merge_lora them first")
    kernels = {(*lora_path(target), "kernel"): x.kernel for target, x in linears.items()}
    shapes = lora_shapes(kernels, config)

    def start() -> Params:
        return {path: _start(path, struct, seed) for path, struct in shapes.items()}

    where = None if placement is None else {p: placement(p, x.shape) for p, x in shapes.items()}
    arrays = jax.jit(start, out_shardings=where)()
    for target, linear in linears.items():
        a, b = (arrays[*lora_path(target), name] for name in LORA_NAMES)
        setattr(_find_linear(model, target)[0], target, LoRALinear(linear, a, b, config.scale))


def _start(path: ParamPath, struct: jax.ShapeDtypeStruct, seed: int) -> Array:
    *_, target, name = path
    if name == "lora_b":
        return jnp.zeros(struct.shape, struct.dtype)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(target.encode()))
    bound = struct.shape[-2] ** -0.5
    return jax.random.uniform(key, struct.shape, struct.dtype, -bound, bound)


def merge_lora(model: VideoXL) -> None:
    """Merge all updates into the kernels, in place: the linears become plain ones.

    Computed in float32, one layer at a time, and rounded to the kernel's dtype.
    """

    def merge_layer(arrays: tuple[Array, Array, Array], scale: float) -> Array:
        return merge_kernel(*arrays, scale).astype(arrays[0].dtype)

    for target in get_args(LoRATarget):
        block, linear = _find_linear(model, target)
        if isinstance(linear, LoRALinear):
            arrays = (linear.kernel[...], linear.lora_a[...], linear.lora_b[...])
            with jax.default_matmul_precision("highest"):
                kernel = lax.map(partial(merge_layer, scale=linear.scale), arrays)
            setattr(block, target, nnx.Linear(**_arguments(linear, kernel)))


def merge_kernel(
    kernel: Float[ArrayT, "*L in out"],
    lora_a: Float[ArrayT, "*L in r"],
    lora_b: Float[ArrayT, "*L r out"],
    scale: float,
) -> Float[ArrayT, "*L in out"]:
    """Compute kernel + scale * lora_a lora_b in float32.

    Arrays of NumPy or JAX, of any floating dtype. For part of a kernel, give the matching rows of
    lora_a and columns of lora_b.
    """
    kernel, a, b = (x.astype(np.float32) for x in (kernel, lora_a, lora_b))
    return kernel + scale * (a @ b)


def lora_shapes(shapes: Mapping[ParamPath, Any], config: LoRAConfig) -> Shapes:
    """Compute the shapes of what `add_lora` adds, by path.

    shapes: at least the targets' kernels, as arrays or shapes.
    """
    found = {}
    for path in map(lora_path, config.targets if config.rank else ()):
        *layers, inputs, outputs = shapes[*path, "kernel"].shape
        a, b = (*layers, inputs, config.rank), (*layers, config.rank, outputs)
        for name, shape in zip(LORA_NAMES, (a, b), strict=True):
            found[*path, name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return found


def _find_linear(model: VideoXL, target: str) -> tuple[nnx.Module, nnx.Linear]:
    block = getattr(model.language.layers, lora_path(target)[-2])
    return block, getattr(block, target)
