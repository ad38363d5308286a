"""Write a checkpoint, or what a training run has come to, in the published PyTorch layout.

    python -m convert.to_hf SRC DST [--dtype bfloat16] [--shard-size 5GB]

SRC is a converted checkpoint or the directory of a training run. DST has safetensors (several with
an index, where they are larger than a shard), config.json and tokenizer files. Converted there and
back, every tensor is the same bit for bit.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.command import add_destination, run
from convert.sources import Source, open_source
from convert.writing import (
    Planned,
    check_apart,
    new_directory,
    progress_bar,
    set_dtype,
    write_shards,
)
from vxl_jax.config import DTYPES
from vxl_jax.names import LINEAR, Row, table
from vxl_jax.tensors import (
    PIECE_BYTES,
    STORED,
    STORED_NAME,
    CheckpointError,
    Tensor,
    all_finite,
    as_dtype,
    scratch,
    transpose_into,
)

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert_to_hf(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> None:
    """Write `source` in the published layout.

    Args:
        source: a converted checkpoint, a training run's directory (its last step counts), or a
            directory in the published layout.
        destination: directory that is made, whole or not at all.
        dtype: float32 or bfloat16; that of the source if None.
        shard_size: most bytes of a safetensors file, a number or text such as "5GB".
        overwrite: replace a checkpoint at `destination`.

    Raises: CheckpointError if the source cannot be read, or a weight is NaN or infinite.
    """
    shard_bytes = read_size(shard_size)
    check_apart(Path(source), Path(destination))
    found = open_source(Path(source))
    planned = [*_plan_rows(found, dtype), *_plan_unused(found, dtype)]
    size = sum(tensor.bytes for tensor in planned)
    with new_directory(Path(destination), size, overwrite) as part:
        found.write_files(part)
        if dtype:
            set_dtype(part, dtype)
        with progress_bar("writing", size) as bar:
            write_shards(part, planned, shard_bytes, bar.update)


def read_size(size: str | int) -> int:
    """Bytes of a size such as "5GB" or 5000000000.

    Raises: CheckpointError if it is not one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", str(size).upper())
    if match is None or float(match[1]) <= 0:
        raise CheckpointError(f"shard size {size!r}: use a number of bytes, or one such as 5GB")
    return max(1, int(float(match[1]) * UNITS[match[2]]))


def _plan_rows(source: Source, dtype: str | None) -> Iterator[Planned]:
    """The tensors of all rows. A row is read when the first of its tensors is written, and given up
    when the first of another row is.
    """
    held: dict[Row, np.ndarray] = {}

    def values_of(row: Row) -> np.ndarray:
        if row not in held:
            held.clear()
            held[row] = source.read(row)
        return held[row] if row.layers else held[row][None]

    for row in table(source.config):
        struct = source.shapes[row.ours]
        published = row.published_shape(struct.shape)
        to_dtype = dtype or np.dtype(struct.dtype).name
        for i, name in enumerate(row.names()):
            pieces = partial(_finite_pieces, name, values_of, row, i, DTYPES[to_dtype])
            yield Planned(name, STORED_NAME[to_dtype], published, pieces)


def _finite_pieces(name: str, *arguments: Any) -> Iterator[np.ndarray]:
    """`_pieces`, unless one of them has NaN or infinite weights.

    Raises: CheckpointError naming the tensor.
    """
    for piece in _pieces(*arguments):
        if not all_finite(piece):
            raise CheckpointError(
                f"tensor {name} has NaN or infinite weights in the dtype asked for"
            )
        yield piece


def _pieces(values_of: Any, row: Row, layer: int, dtype: Any) -> Iterator[np.ndarray]:
    """A layer's tensor in the published layout, some rows at a time, each in the same memory."""
    values = values_of(row)[layer]
    if row.layout is not LINEAR:
        yield row.layout.to_theirs(values).astype(dtype, copy=False)
        return
    inputs, outputs = values.shape
    step = max(1, PIECE_BYTES // (inputs * np.dtype(dtype).itemsize))
    for start in range(0, outputs, step):
        part = values[:, start : start + step]
        piece = scratch(part.size * np.dtype(dtype).itemsize).view(dtype).reshape(-1, inputs)
        transpose_into(piece, part)
        yield piece


def _plan_unused(source: Source, dtype: str | None) -> Iterator[Planned]:
    for name, tensor in sorted(source.unused.items()):
        stored = STORED_NAME[dtype] if dtype and tensor.dtype in STORED else tensor.dtype
        yield Planned(name, stored, tensor.shape, partial(_read_unused, tensor, dtype))


def _read_unused(tensor: Tensor, dtype: str | None) -> Iterator[np.ndarray]:
    yield as_dtype(tensor.read(), tensor, dtype)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint or run to read")
    add_destination(parser, dtype_of="SRC")
    parser.add_argument("--shard-size", default="5GB", help="most bytes of a file (default: 5GB)")
    return run(convert_to_hf, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
