"""Parameters from the tensors of a checkpoint, part by part."""

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
    """What is missing, unexpected, or of the wrong shape or dtype, by name.

    shapes: structs of our parameters, by path. dtype: what weights are converted to; None if they
    keep theirs, which then has to be one and the same.
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
    """The dtype that most tensors have, of those that a model can have; float32 without any."""
    counts = Counter(STORED.get(tensor.dtype) for tensor in tensors.values())
    return max(DTYPES, key=lambda dtype: counts[dtype])


def unused_tensors(tensors: dict[str, Tensor], config: VideoXLConfig) -> dict[str, Tensor]:
    """Those that the network never reads."""
    used = {name for row in name_rows(config) for name in row.names()}
    return {name: tensor for name, tensor in tensors.items() if name not in used}


Index = tuple[slice, ...]


def parts(shape: tuple[int, ...], part: tuple[int, ...]) -> Iterator[Index]:
    """The indices of an array's parts of one shape, in order; those at an end may be smaller."""
    starts = (range(0, size, step) for size, step in zip(shape, part, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, size))
            for start, step, size in zip(corner, part, shape, strict=True)
        )


def whole(shape: tuple[int, ...]) -> Index:
    """The index of all of an array."""
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
    """Read part of our array of one row of the table.

    Their rows are read as far as they are needed; a part along their columns reads whole rows.

    index: slices with start and stop for every axis of our array. dtype: of the result. Weights
    that are not finite are added to `problems`. progress: called with the bytes read. out: where
    the result goes; new memory if None.
    """
    out = _allocate([part.stop - part.start for part in index], dtype) if out is None else out
    names = row.names()[index[0]] if row.layers else row.names()
    inner = index[1:] if row.layers else index

    def read_layer(name: str, out: np.ndarray) -> None:
        # Our rows are theirs, or (LINEAR) our columns are; other layouts are read whole.
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
    """An array in plain pages: NumPy asks for huge ones, and where memory is full of cached files
    the kernel takes longer to find those than all the rest of the work takes.
    """
    size = math.prod(shape)
    pages = mmap.mmap(-1, max(1, size * np.dtype(dtype).itemsize))
    return np.frombuffer(pages, np.dtype(dtype), size).reshape(shape)


def transpose_into(out: np.ndarray, x: np.ndarray) -> None:
    """out[...] = x.T, by blocks that stay in the cache."""
    x = x.astype(out.dtype, copy=False)
    if x.dtype.itemsize == 2:  # NumPy copies its own integers faster than bfloat16
        out, x = out.view(np.uint16), x.view(np.uint16)
    for i in range(0, len(x), 32):
        for j in range(0, x.shape[1], 512):
            out[j : j + 512, i : i + 32] = x[i : i + 32, j : j + 512].T
