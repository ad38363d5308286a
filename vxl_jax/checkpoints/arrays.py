"""Check a checkpoint's tensors and read slices of the model's parameters from them."""

import itertools
import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vxl_jax.checkpoints.names import LINEAR, SAME, NameRow, first_layer, is_unused, name_rows
from vxl_jax.checkpoints.tensors import NUMPY, STORED, Tensor, check_finite, in_threads
from vxl_jax.config import DTYPES, VideoXLConfig


def check_tensors(
    tensors: dict[str, Tensor],
    config: VideoXLConfig,
    shapes: Mapping[tuple[str, ...], Any],
    dtype: str | None,
) -> list[str]:
    """List tensors that are missing, unexpected, or of the wrong shape or dtype.

    Args:
      tensors: tensors of the checkpoint, by published name.
      config: the model.
      shapes: shape of each parameter of the JAX model, by path.
      dtype: dtype that weights are converted to. None keeps the stored dtype, which must then be
        the same for all weights.

    Returns:
      one message for each problem.
    """
    problems = []
    expected = {}
    for row in name_rows(config):
        shape = row.published_shape(shapes[row.ours].shape)
        expected.update(dict.fromkeys(row.names(), shape))
    stored = stored_dtype({name: tensors[name] for name in expected if name in tensors})
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"missing tensor {name}")
            continue
        tensor = tensors[name]
        if tensor.shape != shape:
            problems.append(f"tensor {name} has shape {tensor.shape}, config.json asks for {shape}")
        if tensor.dtype not in STORED:
            problems.append(f"tensor {name} has dtype {tensor.dtype}, which is not one of weights")
        elif dtype is None and STORED[tensor.dtype] != stored:
            problems.append(
                f"tensor {name} has dtype {tensor.dtype}, not {stored}; say which dtype to load as"
            )
    for name in sorted(set(tensors) - set(expected)):
        tensor = tensors[name]
        if not is_unused(name, config):
            problems.append(f"unexpected tensor {name} in {tensor.file.name}")
        elif tensor.dtype not in NUMPY:
            problems.append(f"tensor {name} has dtype {tensor.dtype}, which is not supported")
        elif (shape := expected.get(first_layer(name), tensor.shape)) != tensor.shape:
            problems.append(f"tensor {name} has shape {tensor.shape}, config.json asks for {shape}")
    return problems


def stored_dtype(tensors: dict[str, Tensor]) -> str:
    """Return the most frequent supported weight dtype; float32 if no tensor has one."""
    counts = Counter(STORED.get(tensor.dtype) for tensor in tensors.values())
    return max(DTYPES, key=lambda dtype: counts[dtype])


def unused_tensors(tensors: dict[str, Tensor], config: VideoXLConfig) -> dict[str, Tensor]:
    """Return the tensors that the network never reads."""
    used = {name for row in name_rows(config) for name in row.names()}
    return {name: tensor for name, tensor in tensors.items() if name not in used}


Index = tuple[slice, ...]


def parts(shape: tuple[int, ...], part: tuple[int, ...]) -> Iterator[Index]:
    """Yield the indices of an array's chunks in row-major order; the last ones may be smaller."""
    starts = (range(0, size, step) for size, step in zip(shape, part, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, size))
            for start, step, size in zip(corner, part, shape, strict=True)
        )


def whole(shape: tuple[int, ...]) -> Index:
    """Return the index that selects a whole array."""
    return tuple(slice(0, size) for size in shape)


def read_part(
    row: NameRow,
    tensors: dict[str, Tensor],
    index: Index,
    dtype: Any,
    problems: list[str],
    progress: Callable[[int], None] = lambda size: None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Read a slice of one JAX parameter from published tensors.

    Only the needed rows of a published tensor are read. A slice of its columns reads whole rows.

    Args:
      row: the parameter's row of the name table.
      tensors: tensors of the checkpoint, by published name.
      index: slices with start and stop for every axis of the JAX parameter.
      dtype: dtype of the result.
      problems: list to which a message is added for each tensor with NaN or infinite weights.
      progress: called with the number of bytes after each read.
      out: array for the result; None allocates one.

    Returns:
      the slice, `out` if it was given.
    """
    out = _allocate([part.stop - part.start for part in index], dtype) if out is None else out
    names = row.names()[index[0]] if row.layers else row.names()
    inner = index[1:] if row.layers else index

    def read_layer(name: str, out: np.ndarray) -> None:
        # SAME: JAX rows are published rows. LINEAR: JAX columns are. Others are read whole.
        tensor, by_column = tensors[name], row.layout is LINEAR
        if row.layout not in (LINEAR, SAME):
            values = tensor.read()
            check_finite(name, tensor, values, problems)
            out[...] = row.layout.to_ours(values)[inner]
            progress(tensor.bytes)
            return
        wanted = inner[1] if by_column else inner[0]
        for start, piece in tensor.rows(wanted.start, wanted.stop).pieces():
            values = piece.read()
            check_finite(name, tensor, values, problems)
            here = slice(start, start + len(values))
            if by_column:
                transpose_into(out[:, here], values[:, inner[0]])
            else:
                out[here] = values[:, *inner[1:]]
            progress(piece.bytes)

    layers = out if row.layers else out[None]
    if len(names) == 1:
        read_layer(names[0], layers[0])
        return out
    in_threads(read_layer, zip(names, layers, strict=True))
    return out


def _allocate(shape: list[int], dtype: Any) -> np.ndarray:
    """Allocate an array in pages of the default size.

    NumPy asks for huge pages. When memory is full of cached files, the kernel takes longer to find
    those than all other work takes.
    """
    size = math.prod(shape)
    pages = mmap.mmap(-1, max(1, size * np.dtype(dtype).itemsize))
    return np.frombuffer(pages, np.dtype(dtype), size).reshape(shape)


def transpose_into(out: np.ndarray, x: np.ndarray) -> None:
    """Copy the transpose of `x` into `out`, by blocks that fit the CPU cache."""
    x = x.astype(out.dtype, copy=False)
    if x.dtype.itemsize == 2:  # NumPy copies its own integers faster than bfloat16
        out, x = out.view(np.uint16), x.view(np.uint16)
    for i in range(0, len(x), 32):
        for j in range(0, x.shape[1], 512):
            out[j : j + 512, i : i + 32] = x[i : i + 32, j : j + 512].T
