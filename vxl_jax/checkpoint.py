"""Checkpoints of this library, and loading a model from these or from the published layout.

A checkpoint directory stands by itself: the published `config.json`, tokenizer and image-processor
files as they are, `vision_tower/` with the tower's configuration, `params/` with the parameters as
an Orbax tree, and `unused.safetensors` with the tensors that the network never reads.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding
from orbax.checkpoint import type_handlers

from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.errors import CheckpointError, ConfigError, is_file_fault
from vxl_jax.model import VideoXL
from vxl_jax.names import EMBEDDING, HEAD, LINEAR, Row, table
from vxl_jax.published import PARAMS, UNUSED, Fields, read_config, refuse_adapter
from vxl_jax.quantize import new_network, quantized
from vxl_jax.tensors import (
    STORED_NAME,
    Index,
    Tensor,
    check_tensors,
    find_tensors,
    in_threads,
    parts,
    raise_problems,
    read_json,
    read_part,
    scratch_array,
    stored_dtype,
    tensors_of,
    transpose_into,
    whole,
)

CHUNK_BYTES = 2**23
"""Most bytes of a stored chunk: small enough for a device to read its part alone."""

READ_BYTES = 2**30
"""Bytes of parameters after which those that were read are handed on."""

ParamPath = tuple[str, ...]
Params = dict[ParamPath, Any]
Shapes = dict[ParamPath, jax.ShapeDtypeStruct]
Placement = Callable[[ParamPath, tuple[int, ...]], Sharding]


def load_network(
    directory: str | Path,
    *,
    vision: str | Path | None = None,
    placement: Placement | None = None,
    weights: Literal["int8"] | None = None,
    **changes: Any,
) -> VideoXL:
    """The network of a checkpoint directory, converted or in the published layout.

    Args:
        directory: from `convert.from_hf`, or with `config.json` and safetensors files.
        vision: directory of the vision tower's config.json, where the checkpoint has none.
        placement: function from a parameter's path and shape to its sharding; each device's part is
            read by itself. All on the default device if None.
        weights: int8 makes the language model's linears so, each when it is read; see
            `vxl_jax.quantize`. As stored if None.
        changes: fields of VideoXLConfig. `param_dtype` and `dtype` are those of the stored weights
            unless given.

    Raises: CheckpointError that lists every missing, unexpected or misshapen tensor, and every one
        whose weights are not finite.
    """
    directory = Path(directory)
    if weights not in (None, "int8"):
        raise ConfigError(f"weights {weights!r}: use 'int8', or None for those that are stored")
    is_converted = (directory / PARAMS).is_dir()
    read = _read_converted if is_converted else _read_published
    config, graph, arrays = read(directory, vision, placement, changes)
    if weights is None:
        return nnx.merge(graph, unflatten_dict(dict(arrays)))
    kept: Params = {}
    for path, array in arrays:
        kept |= quantized(path, array)
    graph = nnx.graphdef(nnx.eval_shape(lambda: new_network(config, weights)))
    return nnx.merge(graph, unflatten_dict(kept))


def abstract_params(config: VideoXLConfig) -> tuple[Any, Shapes]:
    """Graph of the model, and shape and dtype of every parameter by path; nothing is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: VideoXL(config, rngs=nnx.Rngs(0))))
    return graph, {
        tuple(map(str, path)): jax.ShapeDtypeStruct(leaf.get_value().shape, leaf.get_value().dtype)
        for path, leaf in nnx.to_flat_state(state)
    }


Arrays = Iterator[tuple[ParamPath, jax.Array]]


def _read_published(
    directory: Path, vision: Any, placement: Placement | None, changes: dict[str, Any]
) -> tuple[VideoXLConfig, Any, Arrays]:
    tensors, config, graph, shapes = open_published(directory, vision, **changes)
    return config, graph, _published_arrays(directory, tensors, config, shapes, placement)


def _published_arrays(
    directory: Path,
    tensors: dict[str, Tensor],
    config: VideoXLConfig,
    shapes: Shapes,
    placement: Placement | None,
) -> Arrays:
    problems: list[str] = []
    for row in table(config):
        shape, dtype = shapes[row.ours].shape, DTYPES[config.param_dtype]
        read = partial(_read_index, row, tensors, shape, dtype, problems)
        if placement is None:
            yield row.ours, jnp.asarray(read(whole(shape)))
        else:
            sharding = placement(row.ours, shape)
            yield row.ours, jax.make_array_from_callback(shape, sharding, read)
    raise_problems(directory, problems)


def open_published(
    directory: Path, vision: str | Path | None = None, **changes: Any
) -> tuple[dict[str, Tensor], VideoXLConfig, Any, Shapes]:
    """Tensors of a directory in the published layout, all accounted for, with the configuration and
    `abstract_params`. Arguments as for `load`; no weight is read.

    Raises: CheckpointError that lists every missing, unexpected or misshapen tensor.
    """
    refuse_adapter(directory)
    tensors, problems = find_tensors(directory)
    dtype = changes.get("param_dtype")
    changes = _with_dtype(changes, dtype or stored_dtype(tensors))
    config = read_config(directory, vision=vision, tensors=tensors, **changes)
    graph, shapes = abstract_params(config)
    raise_problems(directory, problems + check_tensors(tensors, config, shapes, dtype))
    return tensors, config, graph, shapes


def _read_index(
    row: Row,
    tensors: dict[str, Tensor],
    shape: tuple[int, ...],
    dtype: Any,
    problems: list[str],
    index: Any,
) -> np.ndarray:
    ends = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
    return read_part(row, tensors, ends, dtype, problems)


def _read_converted(
    directory: Path, vision: Any, placement: Placement | None, changes: dict[str, Any]
) -> tuple[VideoXLConfig, Any, Arrays]:
    stored = stored_shapes(directory / PARAMS)
    dtypes = {struct.dtype.name for struct in stored.values()}
    config = read_config(directory, vision=vision, **_with_dtype(changes, sorted(dtypes)[0]))
    graph, shapes = abstract_params(config)
    raise_problems(directory / PARAMS, compare_shapes(shapes, stored))
    check_unused_head(directory, config, stored)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        path: jax.ShapeDtypeStruct(
            struct.shape,
            struct.dtype,
            sharding=device if placement is None else placement(path, struct.shape),
        )
        for path, struct in shapes.items()
    }
    return config, graph, _converted_arrays(directory / PARAMS, target)


def _converted_arrays(directory: Path, target: Shapes) -> Arrays:
    some: Shapes = {}
    for path, struct in target.items():
        some[path] = struct
        if sum(s.size * s.dtype.itemsize for s in some.values()) > READ_BYTES:
            yield from read_params(directory, some).items()
            some = {}
    yield from read_params(directory, some).items() if some else ()


def check_unused_head(directory: Path, config: VideoXLConfig, stored: Shapes) -> None:
    """Refuse a converted checkpoint of which a head with weights of its own was put aside.

    Older versions did so where `tie_word_embeddings` was true.

    Raises: CheckpointError naming the tensor and the flag.
    """
    if not config.language.tie_embeddings or not (directory / UNUSED).is_file():
        return
    head = tensors_of(directory / UNUSED).get(HEAD)
    if head is None:
        return
    (row,) = (row for row in table(config) if row.theirs == EMBEDDING)
    read, columns = part_reader(directory / PARAMS), slice(0, stored[row.ours].shape[1])
    for start, piece in head.pieces():
        values = piece.read()
        embedding = read(row.ours, (slice(start, start + len(values)), columns))
        if not np.array_equal(values.astype("f4"), embedding.astype("f4")):
            raise CheckpointError(
                f"{directory}: tie_word_embeddings is true, but the checkpoint that it was "
                f"converted from had a {HEAD} with other weights than {EMBEDDING}, which was not "
                "used; convert that checkpoint again"
            )


def _with_dtype(changes: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {"param_dtype": dtype, "dtype": dtype, **changes}


def compare_shapes(ours: Shapes, stored: Shapes) -> list[str]:
    """What is missing, unexpected or of another shape in a stored tree, by name."""
    problems = [f"missing parameter {'.'.join(path)}" for path in sorted(ours.keys() - stored)]
    problems += [f"unexpected parameter {'.'.join(path)}" for path in sorted(stored.keys() - ours)]
    return problems + [
        f"parameter {'.'.join(path)} has shape {stored[path].shape}, config.json asks for "
        f"{ours[path].shape}"
        for path in sorted(ours.keys() & stored)
        if ours[path].shape != stored[path].shape
    ]


# Digests.


def weights_digest(directory: str | Path, progress: Callable[[int], None] = lambda n: None) -> str:
    """sha256 of all weights that the network reads: names, dtypes, shapes and bytes.

    A checkpoint in the published layout has the same digest whatever its shards are, and so has a
    converted one of the same dtype. progress: called with the bytes read.

    Raises: CheckpointError if the checkpoint is not whole, or cannot be read.
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
"""Of each tensor: name, dtype and shape in one text; its bytes, piece by piece."""


def _published_pieces(directory: Path) -> Pieces:
    tensors, config, _, _ = open_published(directory, param_dtype="float32")
    for row in table(config):
        for name in row.names():
            tensor = tensors[name]
            pieces = (piece.read() for _, piece in tensor.pieces())
            yield f"{name} {tensor.dtype} {tensor.shape}", pieces


def _converted_pieces(directory: Path) -> Pieces:
    stored = stored_shapes(directory / PARAMS)
    config = read_config(directory)
    raise_problems(directory / PARAMS, compare_shapes(abstract_params(config)[1], stored))
    read = part_reader(directory / PARAMS)
    for row in table(config):
        struct = stored[row.ours]
        dtype, shape = STORED_NAME[struct.dtype.name], row.published_shape(struct.shape)
        for layer, name in enumerate(row.names()):
            yield f"{name} {dtype} {shape}", _as_published(row, layer, struct, read)


def _as_published(
    row: Row, layer: int, struct: jax.ShapeDtypeStruct, read: Callable[[ParamPath, Index], Any]
) -> Iterator[np.ndarray]:
    """The numbers of one published tensor in their order, from a converted checkpoint."""
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


# The Orbax tree.


class _Described(type_handlers.NumpyHandler):
    """Lets Orbax describe arrays in a tree's metadata while their weights are written elsewhere."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        return []


def save_params(
    directory: Path,
    config: VideoXLConfig,
    shapes: Shapes,
    read: Callable[[Row, Index, np.ndarray], None],
) -> None:
    """Write a new Orbax tree chunk by chunk, so that no parameter ever stands whole in memory.

    Each chunk is one run of numbers in a published tensor. Orbax writes the tree's metadata, and
    TensorStore the arrays: uncompressed zarr3, one directory a parameter, as Orbax lays them out.

    read: puts the part of a row's parameter at an index into an array; called by several threads.

    Raises: CheckpointError if the disk refuses.
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
    for row in table(config):
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

    def write(row: Row, store: Any, index: Index) -> None:
        out = scratch_array(tuple(p.stop - p.start for p in index), shapes[row.ours].dtype)
        read(row, index, out)
        with _failing(directory, "written"):
            # The buffer is this thread's until the write is done: nobody has to copy it.
            store[index].write(out, can_reference_source_data_indefinitely=True).result()

    in_threads(write, jobs)


@contextmanager
def _failing(directory: Path, what: str) -> Iterator[None]:
    """What damaged files and a disk raise in Orbax and TensorStore, as CheckpointError.

    what: cannot be done with the directory.
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
    """A function that reads part of an array of an Orbax tree, from only the chunks it is in.

    It raises CheckpointError if the array cannot be read.
    """
    opened: dict[ParamPath, tensorstore.TensorStore] = {}

    def read(path: ParamPath, index: Index) -> np.ndarray:
        with _failing(directory, "read"):
            if path not in opened:
                opened[path] = tensorstore.open(_spec(directory, path), open=True).result()
            return opened[path][index].read().result()

    return read


def _spec(directory: Path, path: ParamPath) -> dict[str, Any]:
    """What TensorStore has to know of an array of an Orbax tree."""
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
    """Shape and dtype of every array of an Orbax tree, or of one part of it, by path.

    Raises: CheckpointError if the tree cannot be read.
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
    """Parameters like those of `target`, whose structs have shardings: all or some of the stored
    ones, each device's part read by itself.

    Raises: CheckpointError if a parameter cannot be read.
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
