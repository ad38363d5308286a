"""Compute the SHA-256 of a checkpoint's weights, the same in every layout."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vxl_jax.checkpoints.arrays import Index, parts, transpose_into
from vxl_jax.checkpoints.hf_config import PARAMS, read_config
from vxl_jax.checkpoints.load import abstract_params, compare_shapes, open_published
from vxl_jax.checkpoints.names import LINEAR, NameRow, name_rows
from vxl_jax.checkpoints.orbax_tree import CHUNK_BYTES, part_reader, stored_shapes
from vxl_jax.checkpoints.tensors import STORED_NAME, in_threads, raise_problems, scratch_array
from vxl_jax.typing import ParamPath


def weights_digest(directory: str | Path, progress: Callable[[int], None] = lambda n: None) -> str:
    """Return the SHA-256 of all weights that the network reads.

    Names, dtypes, shapes and bytes are hashed. The digest does not depend on how a published
    checkpoint is split into shards. A converted checkpoint of the same dtype has the same digest.

    Args:
      directory: a published or converted checkpoint.
      progress: called with the number of bytes after each read.

    Raises:
      CheckpointError: the checkpoint is incomplete or cannot be read.
    """
    directory = Path(directory)
    open_digests = _converted_pieces if (directory / PARAMS).is_dir() else _published_pieces
    found: dict[str, str] = {}

    def work(name: str, pieces: Iterator[np.ndarray]) -> None:
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            progress(piece.nbytes)
        found[name] = digest.hexdigest()

    in_threads(work, open_digests(directory))
    lines = "".join(f"{name} {found[name]}\n" for name in sorted(found))
    return hashlib.sha256(lines.encode()).hexdigest()


Pieces = Iterator[tuple[str, Iterator[np.ndarray]]]
"""For each tensor: its name, dtype and shape as one string, and its values piece by piece."""


def _published_pieces(directory: Path) -> Pieces:
    tensors, config, _, _ = open_published(directory, param_dtype="float32")
    for row in name_rows(config):
        for name in row.names():
            tensor = tensors[name]
            pieces = (piece.read() for _, piece in tensor.pieces())
            yield f"{name} {tensor.dtype} {tensor.shape}", pieces


def _converted_pieces(directory: Path) -> Pieces:
    stored = stored_shapes(directory / PARAMS)
    config = read_config(directory)
    raise_problems(directory / PARAMS, compare_shapes(abstract_params(config)[1], stored))
    read = part_reader(directory / PARAMS)
    for row in name_rows(config):
        struct = stored[row.ours]
        dtype, shape = STORED_NAME[struct.dtype.name], row.published_shape(struct.shape)
        for layer, name in enumerate(row.names()):
            yield f"{name} {dtype} {shape}", _as_published(row, layer, struct, read)


def _as_published(
    row: NameRow, layer: int, struct: jax.ShapeDtypeStruct, read: Callable[[ParamPath, Index], Any]
) -> Iterator[np.ndarray]:
    """Yield the values of one published tensor in its order, from a converted checkpoint."""
    one = (1, *struct.shape[1:]) if row.layers else struct.shape
    for index in parts(one, row.run(one, CHUNK_BYTES // struct.dtype.itemsize)):
        values = read(row.ours, (slice(layer, layer + 1), *index[1:]) if row.layers else index)
        values = values[0] if row.layers else values
        if row.layout is LINEAR:
            out = scratch_array(values.shape[::-1], values.dtype)
            transpose_into(out, values)
            yield out
        else:
            yield row.layout.to_theirs(values)
