"""Write and read parameters as an Orbax tree, chunk by chunk."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import type_handlers

from vxl_jax.checkpoints.arrays import Index, parts
from vxl_jax.checkpoints.json_files import Fields, read_json
from vxl_jax.checkpoints.names import NameRow, name_rows
from vxl_jax.checkpoints.tensors import in_threads, scratch_array
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import CheckpointError, is_file_fault
from vxl_jax.typing import ParamPath, Params, Shapes

CHUNK_BYTES = 2**23
"""Most bytes of a stored chunk: small enough for a device to read its part alone."""


class _Described(type_handlers.NumpyHandler):
    """Let Orbax write the metadata of arrays only; TensorStore writes their values."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        return []


def save_params(
    directory: Path,
    config: VideoXLConfig,
    shapes: Shapes,
    read: Callable[[NameRow, Index, np.ndarray], None],
) -> None:
    """Write an Orbax tree chunk by chunk, without holding a whole parameter in memory.

    Each chunk is contiguous in a published tensor. Orbax writes the metadata of the tree.
    TensorStore writes the arrays in Orbax's layout: uncompressed zarr3, one directory for each
    parameter.

    Args:
      directory: the new tree.
      config: the model.
      shapes: shape and dtype of each parameter, by path.
      read: copies the slice of a row's parameter at an index into an array. Several threads call
        it.

    Raises:
      CheckpointError: the tree cannot be written.
    """
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        use_compression=False,
        type_handler_registry=type_handlers.create_type_handler_registry(
            (jax.ShapeDtypeStruct, _Described())
        ),
    )
    with _failing(directory, "written"), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory.resolve(), args=ocp.args.PyTreeSave(unflatten_dict(shapes)))
    jobs = []
    for row in name_rows(config):
        struct = shapes[row.ours]
        chunk = row.run(struct.shape, CHUNK_BYTES // struct.dtype.itemsize)
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        spec = {
            **_spec(directory, row.ours),
            "store_data_equal_to_fill_value": True,
            "metadata": {
                "shape": struct.shape,
                "data_type": struct.dtype.name,
                "chunk_grid": grid,
            },
        }
        with _failing(directory, "written"):
            store = tensorstore.open(spec, create=True).result()
        jobs += [(row, store, index) for index in parts(struct.shape, chunk)]

    def write(row: NameRow, store: Any, index: Index) -> None:
        out = scratch_array(tuple(p.stop - p.start for p in index), shapes[row.ours].dtype)
        read(row, index, out)
        with _failing(directory, "written"):
            # This thread does not reuse the buffer before the write is done, so no copy is needed.
            store[index].write(out, can_reference_source_data_indefinitely=True).result()

    in_threads(write, jobs)


@contextmanager
def _failing(directory: Path, what: str) -> Iterator[None]:
    """Turn errors of Orbax and TensorStore about files or the disk into CheckpointError.

    what: "read" or "written", for the message.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if not is_file_fault(error):
            raise
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{directory}: cannot be {what} ({reason})") from error


def part_reader(directory: Path) -> Callable[[ParamPath, Index], np.ndarray]:
    """Return a function that reads a slice of an array of an Orbax tree.

    It reads only the chunks that overlap the slice, and raises CheckpointError if it cannot.
    """
    opened: dict[ParamPath, tensorstore.TensorStore] = {}

    def read(path: ParamPath, index: Index) -> np.ndarray:
        with _failing(directory, "read"):
            if path not in opened:
                opened[path] = tensorstore.open(_spec(directory, path), open=True).result()
            return opened[path][index].read().result()

    return read


def _spec(directory: Path, path: ParamPath) -> dict[str, Any]:
    """Return the TensorStore spec of an array of an Orbax tree."""
    layout = Fields(read_json(directory / "_METADATA"), directory / "_METADATA")
    # TensorStore refuses a path with `..` in it.
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{directory.resolve()}/"}
    if layout["use_ocdbt"]:
        kvstore = {"driver": "ocdbt", "base": kvstore}
    return {
        "driver": "zarr3" if layout["use_zarr3"] else "zarr",
        "kvstore": kvstore,
        "path": ".".join(path),
        "fill_missing_data_reads": False,
    }


def stored_shapes(directory: Path, part: str | None = None) -> Shapes:
    """Return shape and dtype of every array of an Orbax tree, or of one subtree, by path.

    Raises:
      CheckpointError: the tree cannot be read.
    """
    with _failing(directory, "read"), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(directory.resolve()).item_metadata
    if metadata is None:
        raise CheckpointError(f"{directory}: cannot be read (it has no metadata of Orbax)")
    tree = metadata.tree
    if part is not None:
        if part not in tree:
            raise CheckpointError(f"{directory}: has no {part}")
        tree = tree[part]
    leaves = flatten_dict(tree)
    if no_arrays := [".".join(path) for path in leaves if not hasattr(leaves[path], "shape")]:
        raise CheckpointError(f"{directory}: {', '.join(no_arrays)} must be arrays")
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}


def read_params(directory: Path, target: Shapes) -> Params:
    """Read sharded parameters from an Orbax tree; each device reads only its shard.

    target: shape, dtype and sharding of all or some of the stored parameters, by path.

    Raises:
      CheckpointError: a parameter cannot be read.
    """

    def how(struct: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
        return ocp.ArrayRestoreArgs(sharding=struct.sharding, dtype=struct.dtype)

    tree = unflatten_dict(target)
    args = ocp.args.PyTreeRestore(
        item=tree, restore_args=jax.tree.map(how, tree), partial_restore=True
    )
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1)
    with _failing(directory, "read"), ocp.Checkpointer(handler) as checkpointer:
        return flatten_dict(checkpointer.restore(directory.resolve(), args=args))
