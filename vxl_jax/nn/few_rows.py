"""Products of a few rows with a layer's kernel that is read where it lies, for decoding on GPUs.

A scan over layers gives each layer a slice of the stacked kernels. On a GPU, XLA copies that slice
before a matrix product reads it: decoding, which does nothing but read weights, would move three
times their bytes. Here the scan gives a layer the whole stack and its index (`LayerKernel`), and a
Pallas kernel, compiled by Triton, reads the layer in place. Kernels of int8 are widened in the
kernel, one tile at a time.
"""

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

from vxl_jax.nn.backend import gpu_capability

MOST_ROWS = 16
"""Rows of a tile of the GPU's matrix unit: fewer cost as much."""

COLUMNS, DEPTH = 64, 64
"""Columns of a program, and rows of the kernel that it loads at once."""

PROGRAMS = 264
"""Programs that keep a GPU's memory busy: two for each multiprocessor of an H100. Where the columns
make fewer, the sum over rows of the kernel is divided over several."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerKernel:
    """The kernel of one layer, as the stack of all layers and an index."""

    stack: Float[Array, " L in out"]
    layer: Int[Array, ""] | int

    def __getitem__(self, _: Any) -> "LayerKernel":
        return self  # `nnx.Param` reads its value with [...]


def reads_in_place(x: Float[Array, "B T D"]) -> bool:
    """Whether layers get their kernels as `LayerKernel`s for an input of this shape."""
    rows = x.shape[0] * x.shape[1]
    return (
        (gpu_capability() or (0, 0)) >= (8, 0)
        and rows <= MOST_ROWS
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and jax.sharding.get_abstract_mesh().size <= 1
    )


def layer_in_place(params: Any, dtype: Any, layer: Int[Array, ""]) -> Any:
    """Take the parameters of one layer from a tree of stacked ones; large kernels stay where they
    are, if they are of `dtype` or int8.
    """

    def take(x: Array) -> Any:
        fits = x.ndim == 3 and x.shape[1] % DEPTH == x.shape[2] % COLUMNS == 0
        if fits and x.dtype in (dtype, jnp.int8):
            return LayerKernel(x, layer)
        return lax.dynamic_index_in_dim(x, layer, keepdims=False)

    return jax.tree.map(take, params)


def few_rows_product(
    x: Float[Array, "*batch in"], kernel: LayerKernel, *, interpret: bool = False
) -> Float[Array, "*batch out"]:
    """Multiply at most `MOST_ROWS` rows with a kernel in the dtype of x, or int8.

    Returns the float32 sums. It has no gradient.
    """
    inputs, outputs = kernel.stack.shape[1:]
    rows = x.reshape(-1, inputs)
    padded = jnp.pad(rows, ((0, MOST_ROWS - len(rows)), (0, 0)))
    parts = _parts(inputs // DEPTH, outputs // COLUMNS)
    sums = pl.pallas_call(
        partial(_kernel, inputs // parts),
        grid=(outputs // COLUMNS, parts),
        in_specs=[
            pl.BlockSpec((1,), lambda j, part: (0,)),
            pl.BlockSpec((MOST_ROWS, inputs), lambda j, part: (0, 0)),
            pl.BlockSpec((len(kernel.stack), inputs, COLUMNS), lambda j, part: (0, 0, j)),
        ],
        out_specs=pl.BlockSpec((None, MOST_ROWS, COLUMNS), lambda j, part: (part, 0, j)),
        out_shape=jax.ShapeDtypeStruct((parts, MOST_ROWS, outputs), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="few_rows_product",
    )(jnp.asarray(kernel.layer, jnp.int32).reshape(1), padded, kernel.stack)
    return sums.sum(0)[: len(rows)].reshape(*x.shape[:-1], outputs)


def _parts(depths: int, columns: int) -> int:
    """Parts that the sum is divided into: a divisor of its tiles, for `PROGRAMS` programs."""
    enough = (d for d in range(1, depths + 1) if depths % d == 0 and columns * d >= PROGRAMS)
    return next(enough, depths)


def _kernel(span: int, layer_ref: Any, x_ref: Any, kernel_ref: Any, out_ref: Any) -> None:
    first, layer = pl.program_id(1) * span, layer_ref[0]

    def add_tile(index: Array, total: Array) -> Array:
        at = pl.ds(first + index * DEPTH, DEPTH)
        x = x_ref[:, at]
        return total + triton.dot(x, kernel_ref[layer, at, :].astype(x.dtype), allow_tf32=False)

    zero = jnp.zeros(out_ref.shape, jnp.float32)
    out_ref[...] = lax.fori_loop(0, span // DEPTH, add_tile, zero)


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
