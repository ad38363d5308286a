"""Find and check safetensors files."""

import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vxl_jax.checkpoints.hf_onevision import published_names
from vxl_jax.checkpoints.json_files import read_json
from vxl_jax.checkpoints.tensors import Tensor
from vxl_jax.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"


NO_PICKLE = (
    "pickle files (.bin, .pt) are not read because loading one can run any code, save the model "
    "with safe_serialization=True instead"
)


PICKLES = (".bin", ".pt", ".pth")
"""Suffixes of files that are refused without being opened."""


def find_tensors(
    directory: Path, leave_out: Callable[[str], bool] = lambda name: False
) -> tuple[dict[str, Tensor], list[str]]:
    """Find all tensors in the safetensors files of a directory, and list problems.

    Problems are files that cannot be opened, a tensor that is in two files, and an index that
    disagrees with its shards.

    Args:
      directory: the checkpoint.
      leave_out: returns True for names of tensors to skip.

    Returns:
      the tensors by published name, and one message for each problem.

    Raises:
      CheckpointError: the directory does not exist or has no safetensors file.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such directory")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no *.safetensors file; {NO_PICKLE}")
    found: dict[str, Tensor] = {}
    problems = []
    for path in files:
        try:
            here = tensors_of(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for name, tensor in here.items():
            if leave_out(name):
                continue
            if name in found:
                problems.append(f"tensor {name} is in {found[name].file.name} and in {path.name}")
            found[name] = tensor
    if (directory / INDEX_FILE).exists():
        try:
            problems += _against_index(read_json(directory / INDEX_FILE), found, leave_out)
        except CheckpointError as error:
            problems.append(str(error))
    return published_names(found), problems


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file, by name.

    Raises:
      CheckpointError: the file cannot be opened.
    """
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: {NO_PICKLE}")
    try:
        with safe_open(path, framework="numpy"):  # checks the header and the file's length
            pass
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size), object_pairs_hook=_once_each)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error
    return {
        name: Tensor(
            path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def metadata_of(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file.

    Raises:
      CheckpointError: the file cannot be opened.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise ValueError(f"{', '.join(twice)}: more than once in its header")
    return dict(pairs)


def _against_index(
    index: dict[str, Any], found: dict[str, Tensor], leave_out: Callable[[str], bool]
) -> list[str]:
    where = index.get("weight_map")
    if not isinstance(where, dict):
        return [f"{INDEX_FILE} has no weight_map"]
    problems = []
    for name, file in sorted(where.items()):
        if leave_out(name):
            continue
        if name not in found:
            problems.append(f"{INDEX_FILE} has tensor {name} in {file}, which does not hold it")
        elif found[name].file.name != file:
            problems.append(
                f"{INDEX_FILE} has tensor {name} in {file}, it is in {found[name].file.name}"
            )
    problems += [
        f"{INDEX_FILE} does not have tensor {name} of {found[name].file.name}"
        for name in sorted(set(found) - set(where))
    ]
    return problems
