"""Read, merge and write low-rank (LoRA) adapters in the layout of peft.

A folder has adapter_config.json and adapter_model.safetensors. A linear's update is
`base_model.model.MODULE.lora_A.weight` [r, in] and `lora_B.weight` [out, r], where MODULE.weight is
the published name of its kernel; a module that was trained whole (`modules_to_save`) has its
tensors under `base_model.model.` and their published names.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources import OpenModel
from convert.writing import byte_bar, new_directory, run_fields
from train.config import part_of
from vxl_jax.checkpoints.arrays import Index, whole
from vxl_jax.checkpoints.json_files import Fields, Required, read_json, write_json
from vxl_jax.checkpoints.names import (
    EMBEDDING_NAME,
    FASTER_NAME,
    LINEAR,
    NEWLINE_NAME,
    NameRow,
    is_unused,
    name_rows,
)
from vxl_jax.checkpoints.safetensors_read import NO_PICKLE, tensors_of
from vxl_jax.checkpoints.safetensors_write import NewTensor, Piece, write_tensors
from vxl_jax.checkpoints.tensors import (
    NUMPY,
    STORED,
    STORED_NAME,
    Tensor,
    all_finite,
    raise_problems,
    tensors_not_finite,
)
from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.errors import CheckpointError
from vxl_jax.models.lora import LORA_NAMES

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_FIELDS = "vxl_model.json"
"""Fields of config.json that a run may change: ratios, visual tokens and preprocessing."""
PREFIX = "base_model.model."

# What changes how an adapter is applied. A missing field counts as the first value.
REQUIRED: Required = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "megatron_config": (None,),
}
CHANGES_BASE = ("pissa", "olora", "loftq", "corda")
"""Values of `init_lora_weights` that subtract the first update from the base's weights."""


@dataclass(frozen=True)
class Update:
    """The LoRA update of one linear layer: kernel [out, in] + scale * up @ down."""

    down: Tensor  # [r, in]
    up: Tensor  # [out, r]
    scale: float

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Read down and up as float32."""
        down, up = (np.array(tensor.read(), np.float32) for tensor in (self.down, self.up))
        return down, up


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes of a base: updates by published name of the kernel, and tensors that
    take the place of the base's. fields: of config.json that take the place of the base's.
    """

    directory: Path
    updates: dict[str, Update]
    replaced: dict[str, Tensor]
    fields: dict[str, Any]

    def touches(self, row: NameRow) -> bool:
        """Return whether the adapter updates a row of the name table."""
        return any(name in self.updates for name in row.names())

    def check(self, config: VideoXLConfig) -> None:
        """Check that the network uses every linear layer that has an update.

        Raises:
          CheckpointError: it does not use some of them.
        """
        used = {name for row in name_rows(config) if row.layout is LINEAR for name in row.names()}
        raise_problems(
            self.directory,
            [
                f"has an update of {name}, which is not a linear of this model"
                for name in sorted(self.updates.keys() - used)
                if not is_unused(name, config)
            ],
        )

    def merge(self, row: NameRow, index: Index, values: np.ndarray) -> None:
        """Add the updates to part of a row's kernel, float32, in place."""
        names = row.names()[index[0]] if row.layers else row.names()
        rows, columns = index[-2:]
        for name, kernel in zip(names, values if row.layers else values[None], strict=True):
            if name in self.updates:
                down, up = self.updates[name].arrays
                kernel += self.updates[name].scale * (down[:, rows].T @ up[columns].T)


def read_adapter(directory: Path, tensors: dict[str, Tensor]) -> Adapter:
    """An adapter for a base with these tensors; its weights are checked.

    Raises: CheckpointError that lists all tensors that do not fit the base, or names the field of
        adapter_config.json that is not implemented.
    """
    path = directory / ADAPTER_CONFIG
    values = Fields(read_json(path), path)
    values.require(REQUIRED)
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, which changed the weights of the base; save "
            "the adapter as a plain LoRA (path_initial_model_for_weight_conversion)"
        )
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{directory}: has no {ADAPTER_WEIGHTS}; {NO_PICKLE}")
    alpha, rooted = values.number("lora_alpha", 8), bool(values.get("use_rslora", False))
    found, problems = tensors_of(directory / ADAPTER_WEIGHTS), []
    sides: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in sorted(found.items()):
        update = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])(\.\w+)?\.weight", name)
        kernel = f"{update[1]}.weight" if update else ""
        plain = re.sub(r"\.modules_to_save\.\w+\.", ".", name).removeprefix(PREFIX)
        if tensor.dtype not in STORED:
            problems.append(f"tensor {name} has dtype {tensor.dtype}, which is not one of weights")
        elif update and kernel in tensors and kernel != EMBEDDING_NAME:
            sides.setdefault(kernel, {})[update[2]] = tensor
        elif not update and name.startswith(PREFIX) and plain in tensors:
            if tensor.shape != tensors[plain].shape:
                problems.append(
                    f"tensor {name} has shape {tensor.shape}, the base has {tensors[plain].shape}"
                )
            replaced[plain] = tensor
        else:
            problems.append(f"tensor {name} belongs to nothing in the base")
    updates = {}
    for kernel, pair in sides.items():
        shape = tensors[kernel].shape
        rank = pair["A"].shape[0] if "A" in pair else 0
        shapes = {side: tensor.shape for side, tensor in pair.items()}
        if len(shape) != 2 or shapes != {"A": (rank, shape[1]), "B": (shape[0], rank)}:
            problems.append(f"the update of {kernel} {shape} has shapes {shapes}")
            continue
        updates[kernel] = Update(
            pair["A"], pair["B"], alpha / (math.sqrt(rank) if rooted else max(rank, 1))
        )
    if not updates and not replaced and not problems:
        problems.append(f"{ADAPTER_WEIGHTS} has no tensors")
    raise_problems(directory, problems + tensors_not_finite(found))
    held = {name: _like(tensor, tensors[name].dtype) for name, tensor in replaced.items()}
    fields = directory / MODEL_FIELDS
    return Adapter(directory, updates, held, read_json(fields) if fields.is_file() else {})


def _like(tensor: Tensor, dtype: str) -> Tensor:
    """Load a tensor into memory, in the dtype of the tensor that it replaces."""
    if tensor.dtype == dtype or dtype not in STORED:
        return tensor
    return replace(tensor, dtype=dtype, array=tensor.read().astype(NUMPY[dtype]))


# Writing.


def write_adapter(source: OpenModel, destination: Path, dtype: str | None, overwrite: bool) -> None:
    """Write what a LoRA run has trained as an adapter of its base checkpoint.

    dtype: of the tensors; that in which they were trained if None.

    Raises: CheckpointError if the run has no updates or no base, or trained more than an adapter
        can hold.
    """
    run = source.run
    if run is None or not run.lora.rank or run.base is None:
        raise CheckpointError(
            f"{destination}: an adapter is written from a run with lora.rank and model.checkpoint"
        )
    paths = {path for path in run.trained if path[-1] not in LORA_NAMES}
    if more := sorted({part_of(path) for path in paths} - {"projector", "beacon"}):
        raise CheckpointError(
            f"{destination}: the run has trained {', '.join(more)} as a whole, which an adapter "
            "cannot hold; write the merged checkpoint, without --adapter"
        )
    planned: list[NewTensor] = []
    modules: list[str] = []
    saved: set[str] = set()
    for row in name_rows(source.config):
        linear, name = row.ours[:-1], row.ours[-1]
        if row.ours in paths:  # with its update, if it has one
            saved.update(_saved_module(row))
            planned += _plan_whole(source, row, dtype)
        elif name == "kernel" and (*linear, LORA_NAMES[0]) in run.trained:
            modules.append(row.theirs.removeprefix("model.layers.{i}.").removesuffix(".weight"))
            planned += _plan_update(source, row, dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(run.base),
        "r": run.lora.rank,
        "lora_alpha": int(run.lora.alpha) if run.lora.alpha % 1 == 0 else run.lora.alpha,
        "lora_dropout": 0.0,
        # A text is a regular expression of whole names; q_proj alone would be the tower's as well.
        "target_modules": rf"model\.layers\.\d+\.({'|'.join(map(re.escape, modules))})",
        "modules_to_save": sorted(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    size = sum(tensor.bytes for tensor in planned)
    with (
        new_directory(destination, size, overwrite) as part,
        byte_bar("writing", size) as bar,
    ):
        write_json(part / ADAPTER_CONFIG, config)
        write_json(part / MODEL_FIELDS, run_fields(source.config))
        write_tensors(part / ADAPTER_WEIGHTS, planned, {"format": "pt"}, bar.update)


def _saved_module(row: NameRow) -> tuple[str, ...]:
    """The name by which peft finds the module of a tensor that was trained whole; learned vectors
    of LLaVA-Video are in no module of theirs.
    """
    if row.theirs in (NEWLINE_NAME, FASTER_NAME):
        return ()
    return ("mm_projector" if "mm_projector" in row.theirs else row.theirs.split(".")[-2],)


def _plan_whole(source: OpenModel, row: NameRow, dtype: str | None) -> Iterator[NewTensor]:
    assert source.run is not None
    struct = source.run.trained[row.ours]
    stored = np.dtype(DTYPES[dtype] if dtype else struct.dtype)

    def read(layer: int, name: str) -> np.ndarray:
        index = whole(struct.shape)
        values = source.read(row, (slice(layer, layer + 1), *index[1:]) if row.layers else index)
        return _finite(name, row.layout.to_theirs(values[0] if row.layers else values), stored)

    for layer, name in enumerate(row.names()):
        shape = row.published_shape(struct.shape)
        yield _planned(PREFIX + name, shape, stored, partial(read, layer, name))


def _plan_update(source: OpenModel, row: NameRow, dtype: str | None) -> Iterator[NewTensor]:
    run = source.run
    assert run is not None
    for ours, theirs in zip(LORA_NAMES, ("lora_A", "lora_B"), strict=True):
        path = (*row.ours[:-1], ours)
        struct = run.trained[path]
        stored = np.dtype(DTYPES[dtype] if dtype else struct.dtype)

        def read(layer: int, name: str, path: Any = path, dtype: Any = stored) -> np.ndarray:
            index = (slice(layer, layer + 1), *whole(run.trained[path].shape)[1:])
            return _finite(name, run.read(path, index)[0].T, dtype)

        for layer, kernel in enumerate(row.names()):
            name = f"{PREFIX}{kernel.removesuffix('.weight')}.{theirs}.weight"
            shape = (struct.shape[2], struct.shape[1])
            yield _planned(name, shape, stored, partial(read, layer, name))


def _planned(name: str, shape: tuple[int, ...], dtype: np.dtype, read: Any) -> NewTensor:
    size = math.prod(shape) * dtype.itemsize
    return NewTensor(name, STORED_NAME[dtype.name], shape, [Piece(size, read)])


def _finite(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    out = np.ascontiguousarray(values.astype(dtype, copy=False))
    if not all_finite(out):
        raise CheckpointError(f"tensor {name} has NaN or infinite weights in the dtype asked for")
    return out
