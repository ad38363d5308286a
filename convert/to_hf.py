"""Write a checkpoint, or what a training run has come to, in the published PyTorch layout.

    python -m convert.to_hf SRC DST [--dtype bfloat16] [--shard-size 5GB]
    python -m convert.to_hf RUN DST [--step best] [--base DIR] [--adapter]

SRC is a converted checkpoint or the directory of a training run. DST has safetensors (several with
an index, where they are larger than a shard), config.json and tokenizer files. Converted there and
back, every tensor is the same bit for bit.
"""

import math
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from convert.adapter import write_adapter
from convert.command import DIRECTORY, StoredDtype, run_command
from convert.sources import OpenModel, open_source
from convert.writing import byte_bar, check_apart, new_directory, set_dtype
from vxl_jax.checkpoints.arrays import Index, parts, transpose_into
from vxl_jax.checkpoints.names import LINEAR, NameRow, name_rows
from vxl_jax.checkpoints.orbax_tree import CHUNK_BYTES
from vxl_jax.checkpoints.safetensors_write import NewTensor, Piece, write_shards
from vxl_jax.checkpoints.tensors import (
    STORED,
    STORED_NAME,
    Tensor,
    all_finite,
    as_dtype,
    scratch_array,
    stored_bytes,
)
from vxl_jax.config import DTYPES
from vxl_jax.errors import CheckpointError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert_to_hf(
    source: Annotated[str | Path, arg(metavar="SRC")],
    destination: Annotated[str | Path, arg(metavar="DST")],
    *,
    dtype: StoredDtype | None = None,
    shard_size: Annotated[str | int, arg(metavar="SIZE")] = "5GB",
    step: Annotated[str | int | None, arg(metavar="STEP")] = None,
    base: Annotated[str | Path | None, DIRECTORY] = None,
    adapter: bool = False,
    overwrite: bool = False,
) -> None:
    """Write `source` in the published layout.

    An adapter has the low-rank updates, and the projector and beacons if they were trained.

    Args:
        source: a training run, or a checkpoint, converted or in the published layout.
        destination: directory that is made, whole or not at all.
        dtype: of the weights; None: that of the source.
        shard_size: most bytes of a safetensors file, a number or text such as "5GB".
        step: of a training run: a number, or "best" by held-out questions; None: the last.
        base: of a training run: its base checkpoint, with the same weights, where that has moved.
        adapter: of a LoRA run: write a peft adapter of the base instead of a whole model.
        overwrite: replace a checkpoint at the destination.

    Raises: CheckpointError if the source cannot be read, a weight is NaN or infinite, or the base
        of a run has other weights than the run began with.
    """
    shard_bytes = read_size(shard_size)
    check_apart(Path(source), Path(destination))
    found = open_source(
        Path(source), None if step is None else str(step), None if base is None else Path(base)
    )
    if found.run is not None and found.run.base is not None:
        check_apart(found.run.base, Path(destination))
    if adapter:
        write_adapter(found, Path(destination), dtype, overwrite)
        return
    planned = [*_plan_rows(found, dtype), *_plan_unused(found, dtype)]
    size = sum(tensor.bytes for tensor in planned)
    with new_directory(Path(destination), size, overwrite) as part:
        found.write_files(part)
        if dtype:
            set_dtype(part, dtype)
        with byte_bar("writing", size) as bar:
            write_shards(part, planned, shard_bytes, bar.update)


def read_size(size: str | int) -> int:
    """Bytes of a size such as "5GB" or 5000000000.

    Raises: CheckpointError if it is not one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", str(size).upper())
    if match is None or float(match[1]) <= 0:
        raise CheckpointError(f"shard size {size!r}: use a number of bytes, or one such as 5GB")
    return max(1, int(float(match[1]) * UNITS[match[2]]))


def _plan_rows(source: OpenModel, dtype: str | None) -> Iterator[NewTensor]:
    for row in name_rows(source.config):
        struct = source.shapes[row.ours]
        to_dtype = np.dtype(DTYPES[dtype] if dtype else struct.dtype)
        one = (1, *struct.shape[1:]) if row.layers else struct.shape
        run = row.run(one, CHUNK_BYTES // np.dtype(struct.dtype).itemsize)
        for i, name in enumerate(row.names()):
            pieces = [
                Piece(
                    math.prod(p.stop - p.start for p in index) * to_dtype.itemsize,
                    partial(_published_part, source, name, row, _of_layer(row, i, index), to_dtype),
                )
                for index in parts(one, run)
            ]
            published = row.published_shape(struct.shape)
            yield NewTensor(name, STORED_NAME[to_dtype.name], published, pieces)


def _of_layer(row: NameRow, layer: int, index: Index) -> Index:
    return (slice(layer, layer + 1), *index[1:]) if row.layers else index


def _published_part(
    source: OpenModel, name: str, row: NameRow, index: Index, dtype: Any
) -> np.ndarray:
    """Part of our array as one run of numbers of a published tensor.

    Raises: CheckpointError naming the tensor if it has NaN or infinite weights.
    """
    values = source.read(row, index)
    values = values[0] if row.layers else values
    if row.layout is LINEAR:
        out = scratch_array(values.shape[::-1], dtype)
        transpose_into(out, values)
    else:
        out = np.ascontiguousarray(row.layout.to_theirs(values).astype(dtype, copy=False))
    if not all_finite(out):
        raise CheckpointError(f"tensor {name} has NaN or infinite weights in the dtype asked for")
    return out


def _plan_unused(source: OpenModel, dtype: str | None) -> Iterator[NewTensor]:
    for name, tensor in sorted(source.unused.items()):
        stored = STORED_NAME[dtype] if dtype and tensor.dtype in STORED else tensor.dtype
        piece = Piece(stored_bytes(stored, tensor.shape), partial(_read_unused, tensor, dtype))
        yield NewTensor(name, stored, tensor.shape, [piece])


def _read_unused(tensor: Tensor, dtype: str | None) -> np.ndarray:
    return as_dtype(tensor.read(), tensor, dtype)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(convert_to_hf, "convert.to_hf", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
