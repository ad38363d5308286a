"""Products of a few rows with a layer's kernel that is read where it lies, for decoding on GPUs.

A scan over layers gives each layer a slice of the stacked kernels. On a GPU, XLA copies that slice
before a matrix product reads it: decoding, which does nothing but read weights, would move three
times their bytes. Here the scan gives a layer the whole stack and its index (`LayerKernel`), and a
Pallas kernel, compiled by Triton, reads the layer in place. Kernels of int8 are widened in the
kernel, one tile at a time.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float, Int

from vxl_jax.nn.backend import PROGRAMS, gpu_capability
from vxl_jax.nn.scan import gradient_of_stack

MOST_ROWS = 16
"""Rows of a tile of the GPU's matrix unit: fewer cost as much."""

TILE_COLUMNS, TILE_ROWS = 64, 64
"""Columns of a program, and rows of the kernel that it loads at once."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerKernel:
    """The kernel of one layer, as the stack of all layers and an index."""

    stack: Float[Array, " L in out"]
    layer: Int[Array, ""] | int

    def __getitem__(self, index: Any) -> "LayerKernel":
        """Return itself for [...], by which `nnx.Param` reads its value."""
        if index is not Ellipsis:
            raise TypeError(f"a LayerKernel cannot be indexed with {index!r}")
        return self


def reads_in_place(x: Float[Array, "*batch D"]) -> bool:
    """Whether layers get their kernels as `LayerKernel`s for an input of this shape."""
    return (
        (gpu_capability() or (0, 0)) >= (8, 0)
        and math.prod(x.shape[:-1]) <= MOST_ROWS
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and jax.sharding.get_abstract_mesh().size <= 1
    )


def fits(stack: Array, dtype: Any) -> bool:
    """Whether a stack of kernels can be read in place, for inputs of a dtype."""
    if stack.ndim != 3 or stack.shape[1] % TILE_ROWS or stack.shape[2] % TILE_COLUMNS:
        return False
    # Triton counts elements in 32 bits where an array has less than 2**32 bytes.
    return stack.dtype == dtype or (stack.dtype == jnp.int8 and stack.size < 2**31)


def layer_in_place(params: Any, dtype: Any, layer: Int[Array, ""]) -> Any:
    """Take the parameters of one layer from a tree of stacked ones; kernels stay where they are, if
    they fit.
    """

    def take(path: tuple[Any, ...], x: Array) -> Any:
        is_kernel = any(getattr(key, "key", None) == "kernel" for key in path)
        if is_kernel and fits(x, dtype):
            return LayerKernel(x, layer)
        return lax.dynamic_index_in_dim(x, layer, keepdims=False)

    return jax.tree_util.tree_map_with_path(take, params)


def few_rows_product(
    x: Float[Array, "*batch in"], kernel: LayerKernel, *, interpret: bool = False
) -> Float[Array, "*batch out"]:
    """Multiply with a kernel that `fits`. Returns the float32 sums; differentiable in reverse mode.

    Raises: ValueError if x has more than `MOST_ROWS` rows in all, or the kernel does not fit.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > MOST_ROWS or not fits(kernel.stack, x.dtype):
        raise ValueError(
            f"few_rows_product: {x.dtype} {x.shape} with {kernel.stack.dtype} "
            f"{kernel.stack.shape}; at most {MOST_ROWS} rows and kernels that fit"
        )
    layer = jnp.asarray(kernel.layer, jnp.int32).reshape(1)
    return _multiply(interpret, rows, kernel.stack, layer).reshape(*x.shape[:-1], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(interpret: bool, rows: Array, stack: Array, layer: Array) -> Array:
    layers, inputs, outputs = stack.shape
    padded = jnp.pad(rows, ((0, MOST_ROWS - len(rows)), (0, 0)))
    parts = _parts(inputs // TILE_ROWS, outputs // TILE_COLUMNS)
    sums = pl.pallas_call(
        partial(_kernel, inputs // parts),
        grid=(outputs // TILE_COLUMNS, parts),
        in_specs=[
            pl.BlockSpec((1,), lambda j, part: (0,)),
            pl.BlockSpec((MOST_ROWS, inputs), lambda j, part: (0, 0)),
            pl.BlockSpec((layers, inputs, TILE_COLUMNS), lambda j, part: (0, 0, j)),
        ],
        out_specs=pl.BlockSpec((None, MOST_ROWS, TILE_COLUMNS), lambda j, part: (part, 0, j)),
        out_shape=jax.ShapeDtypeStruct((parts, MOST_ROWS, outputs), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="few_rows_product",
    )(layer, padded, stack)
    return sums.sum(0)[: len(rows)]


def _multiply_forward(
    interpret: bool, rows: Array, stack: Array, layer: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _multiply(interpret, rows, stack, layer), (rows, stack, layer)


def _multiply_backward(
    interpret: bool, residuals: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array | None, None]:
    rows, stack, layer = residuals
    gradient = gradient.astype(rows.dtype)
    kernel = lax.dynamic_index_in_dim(stack, layer[0], keepdims=False)
    of_rows = jnp.matmul(gradient, kernel.astype(rows.dtype).T)
    if stack.dtype == jnp.int8:
        return of_rows, None, None
    of_kernel = jnp.matmul(rows.T, gradient, preferred_element_type=jnp.float32)
    of_stack = gradient_of_stack(of_kernel.astype(stack.dtype), len(stack), layer[0])
    return of_rows, of_stack, None


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _parts(depths: int, columns: int) -> int:
    """Parts that the sum over rows of the kernel is divided into, for `PROGRAMS` in all: a divisor
    of its tiles.
    """
    enough = (d for d in range(1, depths + 1) if depths % d == 0 and columns * d >= PROGRAMS)
    return next(enough, depths)


def _kernel(span: int, layer_ref: Any, x_ref: Any, kernel_ref: Any, out_ref: Any) -> None:
    first, layer = pl.program_id(1) * span, layer_ref[0]

    def add_tile(index: Array, total: Array) -> Array:
        at = pl.ds(first + index * TILE_ROWS, TILE_ROWS)
        x = x_ref[:, at]
        return total + triton.dot(x, kernel_ref[layer, at, :].astype(x.dtype), allow_tf32=False)

    zero = jnp.zeros(out_ref.shape, jnp.float32)
    out_ref[...] = lax.fori_loop(0, span // TILE_ROWS, add_tile, zero)


def promote(arrays: tuple[Any, ...], *, dtype: Any) -> tuple[Any, ...]:
    """`promote_dtype` of a linear whose kernel may be a `LayerKernel`."""
    inputs, kernel, *rest = arrays
    if not isinstance(kernel, LayerKernel):
        return tuple(promote_dtype(arrays, dtype=dtype))
    inputs, *rest = promote_dtype((inputs, *rest), dtype=dtype)
    return (inputs, kernel, *rest)


def product(x: Array, kernel: Array | LayerKernel, *dimensions: Any, **options: Any) -> Array:
    """`dot_general` of a linear whose kernel may be a `LayerKernel`."""
    if isinstance(kernel, LayerKernel):
        return few_rows_product(x, kernel).astype(x.dtype)
    return lax.dot_general(x, kernel, *dimensions, **options)
