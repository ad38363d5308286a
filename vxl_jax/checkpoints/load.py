"""Load a model from a checkpoint of this library or in the published layout.

Orbax is imported only where it reads: that takes a third of a second.

A checkpoint directory stands by itself: the published `config.json`, tokenizer and image-processor
files as they are, `vision_tower/` with the tower's configuration, `params/` with the parameters as
an Orbax tree, and `unused.safetensors` with the tensors that the network never reads.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from vxl_jax.checkpoints.arrays import check_tensors, read_part, stored_dtype, whole
from vxl_jax.checkpoints.hf_config import PARAMS, UNUSED, read_config, refuse_adapter
from vxl_jax.checkpoints.names import EMBEDDING_NAME, HEAD_NAME, NameRow, name_rows
from vxl_jax.checkpoints.safetensors_read import find_tensors, tensors_of
from vxl_jax.checkpoints.tensors import Tensor, raise_problems
from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.errors import CheckpointError, ConfigError
from vxl_jax.models.int8 import new_network, quantized
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.typing import ParamPath, Params, Placement, Shapes

READ_BYTES = 2**30
"""Bytes of parameters after which those that were read are handed on."""


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
            `vxl_jax.models.int8`. As stored if None.
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
    for row in name_rows(config):
        shape, dtype = shapes[row.ours].shape, DTYPES[config.param_dtype]
        read = partial(_read_index, row, tensors, shape, dtype, problems)
        if placement is None:
            # Copied without compiling a program: `read` may use its buffer again.
            yield row.ours, jax.device_put(read(whole(shape)), may_alias=False)
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
    row: NameRow,
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
    from vxl_jax.checkpoints.orbax_tree import stored_shapes

    stored = stored_shapes(directory / PARAMS)
    dtypes = {struct.dtype.name for struct in stored.values()}
    config = read_config(directory, vision=vision, **_with_dtype(changes, sorted(dtypes)[0]))
    graph, shapes = abstract_params(config)
    if config.compression is None:  # left out, see `is_unused`
        stored = {path: x for path, x in stored.items() if not any("beacon" in n for n in path)}
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
    from vxl_jax.checkpoints.orbax_tree import read_params

    some: Shapes = {}
    for path, struct in target.items():
        some[path] = struct
        if sum(s.size * s.dtype.itemsize for s in some.values()) > READ_BYTES:
            yield from read_params(directory, some).items()
            some = {}
    yield from read_params(directory, some).items() if some else ()


def check_unused_head(directory: Path, config: VideoXLConfig, stored: Shapes) -> None:
    """Refuse a converted checkpoint whose separate head was put aside.

    Older versions did so where `tie_word_embeddings` was true.

    Raises: CheckpointError naming the tensor and the flag.
    """
    if not config.language.tie_embeddings or not (directory / UNUSED).is_file():
        return
    head = tensors_of(directory / UNUSED).get(HEAD_NAME)
    if head is None:
        return
    from vxl_jax.checkpoints.orbax_tree import part_reader

    (row,) = (row for row in name_rows(config) if row.theirs == EMBEDDING_NAME)
    read, columns = part_reader(directory / PARAMS), slice(0, stored[row.ours].shape[1])
    for start, piece in head.pieces():
        values = piece.read()
        embedding = read(row.ours, (slice(start, start + len(values)), columns))
        if not np.array_equal(values.astype("f4"), embedding.astype("f4")):
            raise CheckpointError(
                f"{directory}: tie_word_embeddings is true, but the checkpoint that it was "
                f"converted from had a {HEAD_NAME} with other weights than {EMBEDDING_NAME}, "
                "which was not used; convert that checkpoint again"
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
