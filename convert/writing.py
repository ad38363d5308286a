"""Write a checkpoint directory atomically, with its configuration and tokenizer files."""

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

import vxl_jax.progress
from vxl_jax.checkpoints.hf_config import (
    PARAMS,
    REQUIRED_BEACONS,
    REQUIRED_LANGUAGE,
    REQUIRED_VISION,
    read_layout,
)
from vxl_jax.checkpoints.hf_onevision import published_fields
from vxl_jax.checkpoints.hf_preprocessing import preprocessing_fields, read_preprocessing
from vxl_jax.checkpoints.hf_tower import KNOWN_TOWERS, TOWER_FOLDER, find_tower
from vxl_jax.checkpoints.json_files import Fields, Required, read_json, write_json
from vxl_jax.checkpoints.safetensors_read import INDEX_FILE
from vxl_jax.config import Compression, VideoXLConfig, VisionConfig, with_changes
from vxl_jax.errors import CheckpointError, ConfigError

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""Tokenizer, image-processor and generation files, which every direction carries along."""

SPARE_DISK_BYTES = 2**24
"""Room on the disk for small files and metadata."""


def check_apart(source: Path, destination: Path) -> None:
    """Check that writing the destination does not overwrite the source.

    Raises:
      CheckpointError: the destination is the source or contains it.
    """
    if source.resolve().is_relative_to(destination.resolve()):
        raise CheckpointError(f"{destination}: holds {source}, which is read; choose another")


@contextmanager
def new_directory(path: Path, needed: int, overwrite: bool) -> Iterator[Path]:
    """Write a directory atomically: it is renamed to `path` when the block ends without an error.

    If the process is killed, `path` is either absent or complete. The next run removes the
    temporary directory of a killed one.

    Args:
        path: the name.
        needed: bytes that will be written; checked against the disk first.
        overwrite: replace a checkpoint that has the name.

    Raises: CheckpointError if the name is taken, another process is writing it, or the disk is too
        small.
    """
    path = path.absolute()
    part, old = (path.with_name(f".{path.name}.vxl-{end}") for end in ("part", "old"))
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a link; name the directory itself")
    if old.exists() and not path.exists():  # killed between the two renames
        old.rename(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: exists already; choose another, or --overwrite it")
    if path.exists() and not _is_checkpoint(path):
        raise CheckpointError(f"{path}: is not a checkpoint, so it is not overwritten; remove it")
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{part}: cannot be made ({error.strerror})") from error
    lock = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            still_there = part.stat().st_ino == os.fstat(lock).st_ino
        except OSError:
            still_there = False
        if not still_there:
            raise CheckpointError(f"{path}: another process is writing it")
        try:
            _empty_directory(part)
            free = shutil.disk_usage(part).free
            if free < needed + SPARE_DISK_BYTES:
                raise CheckpointError(
                    f"{path}: {needed / 1e9:.2f} GB will be written, and the disk has "
                    f"{free / 1e9:.2f} GB left; make room, or choose another disk"
                )
            yield part
            _sync(part)
            _put_in_place(part, path, old)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    finally:
        os.close(lock)
    shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Flush all files in a directory to disk."""
    for entry in [*directory.rglob("*"), directory]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(part: Path, path: Path, old: Path) -> None:
    if not path.exists():
        part.rename(path)
        return
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    try:
        part.rename(path)
    except BaseException:
        old.rename(path)
        raise


def _is_checkpoint(path: Path) -> bool:
    """Return whether a directory is a model or an adapter, and not a training run."""
    files = [*path.glob("model*.safetensors"), *path.glob("adapter_model.safetensors")]
    has_weights = (path / PARAMS).is_dir() or bool(files)
    return has_weights and not (path / "checkpoints").exists()


def _empty_directory(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def copy_small_files(source: Path, destination: Path, leave: Collection[str] = ()) -> None:
    """Copy the files other than weights: configuration, tokenizer and processor."""
    for pattern in SMALL_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name not in (INDEX_FILE, *leave):
                shutil.copyfile(file, destination / file.name)


def copy_files(
    source: Path, config: VideoXLConfig, part: Path, vision: str | Path | None = None
) -> None:
    """Copy everything but the weights of a checkpoint, with its tower's configuration.

    config: of the model. Where it uses a head that the source's `tie_word_embeddings` denies, the
    flag is corrected: other readers would follow it.
    """
    copy_small_files(source, part)
    stored = read_json(source / "config.json")
    values = published_fields(stored)
    if values != stored:  # of transformers: written as they were read
        del values["vision_config"]
        write_json(part / "config.json", values)
    if values.get("tie_word_embeddings") and not config.language.tie_embeddings:
        write_json(part / "config.json", {**values, "tie_word_embeddings": False})
    if config.vision is not None:
        if "vision_config" in stored and vision is None:
            write_tower(config.vision, part)
        else:
            write_tower(find_tower(source, values["mm_vision_tower"], vision), part)


def set_dtype(part: Path, dtype: str) -> None:
    """Set the weights' dtype in config.json."""
    write_json(part / "config.json", {**read_json(part / "config.json"), "torch_dtype": dtype})


TOWER_FILES = ("config.json", "preprocessor_config.json")


def write_tower(tower: Path | VisionConfig, part: Path) -> None:
    """Write the vision tower's configuration, and how its pixels are normalised."""
    destination = part / TOWER_FOLDER
    destination.mkdir()
    if isinstance(tower, Path):
        for name in TOWER_FILES:
            if (tower / name).is_file():
                shutil.copyfile(tower / name, destination / name)
        return
    for name, values in _tower_files(tower).items():
        write_json(destination / name, values)


def _tower_files(tower: VisionConfig) -> dict[str, dict[str, Any]]:
    """A tower's config.json and preprocessor_config.json in the layout of transformers."""
    is_clip = tower.kind == "clip"
    sides: dict[str, Any] = {"size": {"height": tower.image_size, "width": tower.image_size}}
    if is_clip:
        sides = {
            "crop_size": sides["size"],
            "size": {"shortest_edge": tower.image_size},
            "do_center_crop": True,
        }
    return {
        "config.json": {
            "model_type": f"{tower.kind}_vision_model",
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "num_channels": 3,
            "hidden_size": tower.width,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "intermediate_size": tower.mlp_width,
            "layer_norm_eps": tower.norm_eps,
            "hidden_act": "quick_gelu" if is_clip else "gelu_pytorch_tanh",
        },
        "preprocessor_config.json": {
            "image_processor_type": f"{'CLIP' if is_clip else 'Siglip'}ImageProcessor",
            **sides,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": list(tower.image_mean),
            "image_std": list(tower.image_std),
        },
    }


def published_config(config: VideoXLConfig) -> dict[str, Any]:
    """Fields of config.json for a model that never had any."""
    c = config.language
    values = {
        **_allowed(REQUIRED_LANGUAGE),
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "intermediate_size": c.mlp_width,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": config.param_dtype,
    }
    if config.vision is not None:
        values |= _vision_fields(config, config.vision)
    if config.compression is not None:
        values |= beacon_fields(config.compression)
    return values


def run_fields(config: VideoXLConfig) -> dict[str, Any]:
    """Fields of config.json that a training run may change of its base checkpoint."""
    fields = preprocessing_fields(config) | _layout_fields(config)
    if config.compression is not None:
        fields["beacon_ratio"] = list(config.ratios)
    return fields


def with_run_fields(config: VideoXLConfig, fields: Fields) -> VideoXLConfig:
    """Change a configuration by `run_fields` that were read from a file.

    Raises: CheckpointError naming the file and a field that is not one of them, or has a bad value.
    """
    if unknown := sorted(fields.values.keys() - run_fields(config)):
        raise CheckpointError(
            f"{fields.path}: has {', '.join(unknown)}, which a run does not change; remove it"
        )
    preprocessing = read_preprocessing(fields, config.tower, config.family)
    changes: dict[str, Any] = {"preprocessing": preprocessing}
    layout = _layout_fields(config)
    if layout.keys() & fields.values.keys():
        known = Fields(layout | fields.values, fields.path)
        changes |= read_layout(known, config.family, config.faster_token)
    if "beacon_ratio" in fields.values:
        changes["ratios"] = fields.items("beacon_ratio", int)
    try:
        return with_changes(config, **changes)
    except ConfigError as error:
        raise CheckpointError(f"{fields.path}: {error}") from error


def _vision_fields(config: VideoXLConfig, tower: VisionConfig) -> dict[str, Any]:
    known = (name for name, known in KNOWN_TOWERS.items() if known == tower)
    return {
        **_allowed(REQUIRED_VISION[config.family]),
        "model_type": "llava_qwen",
        "architectures": ["LlavaQwenForCausalLM"],
        "enable_beacon": config.compression is not None,
        **preprocessing_fields(config),
        **_layout_fields(config),
        "mm_hidden_size": tower.width,
        "mm_vision_select_layer": tower.feature_layer,
        "mm_vision_tower": next(known, TOWER_FOLDER),
    }


def _layout_fields(config: VideoXLConfig) -> dict[str, Any]:
    """Fields that `read_layout` reads."""
    fields: dict[str, Any] = {"mm_spatial_pool_stride": config.pool_stride}
    if config.family == "video_xl":
        return fields
    has_fast = config.slow_every > 1 or config.faster_token
    return fields | {
        "mm_spatial_pool_mode": config.pool_mode,
        "mm_newline_position": {"none": "no_token"}.get(config.newline, config.newline),
        "mm_patch_merge_type": "spatial_unpad" if config.image_tokens == "unpad" else "flat",
        "add_faster_video": has_fast,
        "faster_token_stride": config.slow_every if has_fast else 10,
    }


def beacon_fields(compression: Compression) -> dict[str, Any]:
    """Fields of config.json of a model with beacons."""
    return {
        **_allowed(REQUIRED_BEACONS),
        "beacon_window": compression.window,
        "beacon_stride": compression.window,
        "beacon_ratio": list(compression.ratios),
        "beacon_ratio_mix": "step-random",
        "beacon_param": ["q", "k", "v"],
        "beacon_embed_init": "eos",
    }


def change_fields(path: Path, fields: dict[str, Any]) -> None:
    """Replace fields of a JSON object in a file."""
    write_json(path, read_json(path) | fields)


def _allowed(required: Required) -> dict[str, Any]:
    return {name: allowed[0] for name, allowed in required.items()}


def byte_bar(what: str, total: int) -> tqdm:
    """A bar in bytes, with rate and time left."""
    return vxl_jax.progress.progress_bar(
        desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1000
    )
