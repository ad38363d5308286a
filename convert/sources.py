"""Open the source of `to_hf`: a converted checkpoint, a training run, or the published layout."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from convert.writing import (
    change_fields,
    copy_files,
    copy_small_files,
    published_config,
    run_fields,
    write_tower,
)
from train.config import DataSection, ModelSection
from train.config.resume import upgrade
from train.config.sections import LAYOUT
from train.run.base import BASE, compare_base, describe_base, read_about
from vxl_jax.checkpoints.arrays import Index, read_part, unused_tensors, whole
from vxl_jax.checkpoints.hf_config import PARAMS, UNUSED, read_config, refuse_adapter
from vxl_jax.checkpoints.json_files import read_json, write_json
from vxl_jax.checkpoints.load import (
    abstract_params,
    check_unused_head,
    compare_shapes,
    open_published,
)
from vxl_jax.checkpoints.names import HEAD_NAME, NameRow
from vxl_jax.checkpoints.orbax_tree import part_reader, stored_shapes
from vxl_jax.checkpoints.safetensors_read import tensors_of
from vxl_jax.checkpoints.tensors import Tensor, raise_problems
from vxl_jax.config import LoRAConfig, VideoXLConfig, with_changes
from vxl_jax.errors import CheckpointError, ConfigError
from vxl_jax.models.lora import LORA_NAMES, lora_shapes, merge_kernel
from vxl_jax.presets import PRESETS
from vxl_jax.typing import ParamPath, Shapes


@dataclass(frozen=True)
class Trained:
    """Parameters that a training run has stored: `read` takes a path and an index of `trained`.

    base: directory of the checkpoint that it began with; None for random weights.
    """

    lora: LoRAConfig
    base: Path | None
    trained: Shapes
    read: Callable[[ParamPath, Index], np.ndarray]


@dataclass(frozen=True)
class OpenModel:
    """An opened model whose parameters are read in slices.

    shapes: shape of every parameter, and the dtype to write unless another is asked for. read: part
    of a row's array, which may have a wider dtype; called by several threads. unused: tensors that
    the network never reads. write_files: writes the files other than weights. run: of a training
    run, what it stored.
    """

    config: VideoXLConfig
    shapes: Shapes
    read: Callable[[NameRow, Index], np.ndarray]
    unused: dict[str, Tensor]
    write_files: Callable[[Path], None]
    run: Trained | None = None


def open_source(
    directory: Path, step: str | None = None, base: Path | None = None, same_base: bool = True
) -> OpenModel:
    """Open a model directory, detect its layout, and check that it is complete.

    step: of a training run; see `saved_step`. base: directory of the run's base checkpoint, where
    it is no longer at `model.checkpoint`. same_base: refuse a base other than the run began with,
    and a tokenizer that is missing.

    Raises:
      CheckpointError: files or parameters are missing.
    """
    if step is not None and not (directory / "checkpoints").is_dir():
        raise CheckpointError(f"{directory}: has no steps to choose from, it is not a training run")
    if base is not None and not (directory / "checkpoints").is_dir():
        raise CheckpointError(f"{directory}: is not a training run, so it has no base checkpoint")
    refuse_adapter(directory)
    if (directory / PARAMS).is_dir():
        return _converted(directory)
    if (directory / "checkpoints").is_dir():
        return _run(directory, step, base, same_base)
    if (directory / "config.json").is_file():
        return _published(directory)
    raise CheckpointError(
        f"{directory}: neither a converted checkpoint ({PARAMS}/), nor a training run "
        "(checkpoints/), nor in the published layout (config.json)"
    )


def _converted(directory: Path) -> OpenModel:
    shapes = stored_shapes(directory / PARAMS)
    config = read_config(directory)
    raise_problems(directory / PARAMS, compare_shapes(abstract_params(config)[1], shapes))
    check_unused_head(directory, config, shapes)
    unused = tensors_of(directory / UNUSED) if (directory / UNUSED).exists() else {}

    read_stored = part_reader(directory / PARAMS)

    def read(row: NameRow, index: Index) -> np.ndarray:
        return read_stored(row.ours, index)

    return OpenModel(config, shapes, read, unused, partial(copy_files, directory, config))


def _published(directory: Path) -> OpenModel:
    tensors, config, _, shapes = open_published(directory)

    def read(row: NameRow, index: Index) -> np.ndarray:
        found: list[str] = []
        values = read_part(row, tensors, index, shapes[row.ours].dtype, found)
        raise_problems(directory, found)
        return values

    unused = unused_tensors(tensors, config)
    return OpenModel(config, shapes, read, unused, partial(copy_files, directory, config))


# A training run holds what it trained; the rest is in the checkpoint that it began with.


def _run(directory: Path, step: str | None, moved: Path | None, same_base: bool) -> OpenModel:
    section, data, lora, run_dir = _sections(directory / "config.json")
    number = saved_step(directory / "checkpoints", step)
    tree = directory / "checkpoints" / str(number) / "state"
    trained = stored_shapes(tree, "params")
    noted = read_about(directory / "checkpoints", number).get("base") or {}
    find = partial(_find_directory, directory, run_dir)
    base = base_path = tokenizer_path = None
    if section.tokenizer and same_base:
        tokenizer_path = find(section.tokenizer, noted.get("tokenizer_directory"), "tokenizer")
    if section.checkpoint:
        base_path = moved or find(section.checkpoint, noted.get("directory"), "checkpoint")
        base = open_source(base_path)
        if noted and same_base:
            found = describe_base(base_path, tokenizer_path or base_path, directory / BASE)
            if changed := compare_base(noted, found):
                raise CheckpointError(
                    f"{directory}: {' and '.join(changed)}; restore what the run began with, or "
                    "name where it is with --base"
                )
    if base:
        names = (*LAYOUT, "ratios")
        changes = {k: v for k, v in section.changes().items() if k in names}
        config = with_changes(base.config, **changes)
    else:
        config = PRESETS[section.preset](**section.changes())
    preprocessing = data.preprocessing_for(config.preprocessing)
    config = with_changes(config, preprocessing=preprocessing)
    shapes = base.shapes if base else abstract_params(config)[1]
    expected = {p: shapes[p] for p in trained if p in shapes} | lora_shapes(shapes, lora)
    raise_problems(tree, compare_shapes(expected, trained))
    lost = sorted(".".join(path) for path in shapes.keys() - trained)
    if lost and base is None:
        raise CheckpointError(
            f"{directory}: began with random weights and did not train {', '.join(lost)}, which "
            "are stored nowhere"
        )

    read_stored = part_reader(tree)

    @lru_cache(maxsize=2)  # whole: many rows need the same two
    def read_update(linear: ParamPath) -> list[np.ndarray]:
        paths = [(*linear, name) for name in LORA_NAMES]
        return [read_stored(("params", *path), whole(trained[path].shape)) for path in paths]

    def read(row: NameRow, index: Index) -> np.ndarray:
        if base and row.ours not in trained:
            values = base.read(row, index)
        else:
            values = read_stored(("params", *row.ours), index)  # optim.param_dtype
        *linear, name = row.ours
        if name == "kernel" and (*linear, LORA_NAMES[0]) in trained:
            a, b = read_update(tuple(linear))
            layers, rows, columns = index
            values = merge_kernel(values, a[layers, rows], b[layers, :, columns], lora.scale)
        return values

    def write_files(part: Path) -> None:
        if base:
            base.write_files(part)
            change_fields(part / "config.json", run_fields(config))
        else:
            write_json(part / "config.json", published_config(config))
            write_tower(config.tower, part)
        if tokenizer_path:
            copy_small_files(tokenizer_path, part, leave=("config.json",))

    unused = dict(base.unused) if base else {}
    if config.language.tie_embeddings and ("language", "embed", "embedding") in trained:
        unused.pop(HEAD_NAME, None)  # a copy of the embedding as it was before training
    run = Trained(lora, base_path, trained, lambda path, i: read_stored(("params", *path), i))
    return OpenModel(config, shapes, read, unused, write_files, run)


def _find_directory(
    directory: Path, run_dir: str, path: str, noted: str | None, field: str
) -> Path:
    """Find a directory that a run's configuration names.

    If it is not there, it is where the step has noted it. A relative path is where the step has
    noted it; else it counts from where `run.run_dir` counts from; else from here.

    directory: of the run, where it is now. run_dir: as its configuration has it. path: as the
    configuration has it. noted: the same absolute, as the step has noted it. field: of `model`.

    Raises: CheckpointError naming the places.
    """
    places = [Path(path.replace("{run_dir}", str(directory)))]
    if noted is not None:
        places.append(Path(noted))
    if "{run_dir}" not in path and not places[0].is_absolute():
        now, before = Path(os.path.abspath(directory)), Path(run_dir)
        depth = len(before.parts)
        if not before.is_absolute() and now.parts[-depth:] == before.parts:
            places.append(Path(*now.parts[:-depth], path))
        places = [*places[1:], places[0]]
    for place in places:
        if place.is_dir():
            return place
    how = "name where it is with --base" if field == "checkpoint" else "restore it"
    raise CheckpointError(
        f"{directory}: model.{field} {path!r} is not a directory (looked in "
        f"{', '.join(dict.fromkeys(map(str, places)))}); {how}"
    )


def _sections(path: Path) -> tuple[ModelSection, DataSection, LoRAConfig, str]:
    try:
        values: Any = upgrade(read_json(path))
        model = _section(ModelSection, values["model"])
        run_dir = str(values.get("run", {}).get("run_dir", ""))
        data = _section(DataSection, values["data"])
        return model, data, _section(LoRAConfig, values.get("lora", {})), run_dir
    except (AttributeError, TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: is not the configuration of a run ({error})") from error


def _section(kind: Callable[..., Any], values: dict[str, Any]) -> Any:
    """A section of a configuration that has been through JSON, where tuples are lists."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def saved_step(checkpoints: Path, wanted: str | None = None) -> int:
    """A step of a run that is whole: a number; `best`, the one with most held-out questions right;
    the last by default.

    Raises: CheckpointError if no step is whole.
    """
    steps = ocp.utils.checkpoint_steps(checkpoints)
    if not steps:
        raise CheckpointError(f"{checkpoints}: no step has been saved yet")
    if wanted is None:
        return max(steps)
    if wanted == "best":
        scores = {
            step: read_json(path).get("accuracy", -1.0)
            for step in steps
            if (path := checkpoints / str(step) / "metrics/metrics").is_file()
        }
        scored = [(score, step) for step, score in scores.items() if score >= 0]
        if not scored:
            raise CheckpointError(
                f"{checkpoints}: no step has a score; train with run.eval_every and run.keep_best"
            )
        return max(scored)[1]
    if not wanted.isdecimal() or int(wanted) not in steps:
        there = ", ".join(map(str, sorted(steps)))
        raise CheckpointError(f"{checkpoints}: has no step {wanted}; it has {there}, and best")
    return int(wanted)
