"""Configuration of the vision tower of a published checkpoint."""

import os
import re
from pathlib import Path
from typing import Any

from vxl_jax.checkpoints.json_files import Fields, Required, read_json
from vxl_jax.config import TowerKind, VisionConfig, siglip_so400m
from vxl_jax.errors import CheckpointError

TOWER_FOLDER = "vision_tower"
"""Where a checkpoint that stands by itself has the tower's config.json."""


KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": VisionConfig(),
    "google/siglip-so400m-patch14-384": siglip_so400m(),
}


KNOWN_PARTS = {name.rpartition("/")[2]: name for name in KNOWN_TOWERS}
"""Names of `KNOWN_TOWERS` by their last part."""


REQUIRED_TOWER: dict[TowerKind, Required] = {
    "clip": {
        "hidden_act": ("quick_gelu",),
        "model_type": ("clip_vision_model", "clip"),
        "num_channels": (3,),
        "attention_dropout": (0.0,),
    },
    "siglip": {
        "hidden_act": ("gelu_pytorch_tanh",),
        "model_type": ("siglip_vision_model", "siglip"),
        "num_channels": (3,),
        "attention_dropout": (0.0,),
    },
}
NORM_EPS = {"clip": 1e-5, "siglip": 1e-6}
"""What transformers takes where `layer_norm_eps` is not given."""

SIGLIP_FEATURES = -2
"""SigLIP's features in LLaVA: before its last layer, without its last norm. Published code does
not read `mm_vision_select_layer` for it."""


REQUIRED_PIXELS: Required = {
    "do_normalize": (True,),
    "do_rescale": (True,),
    "do_convert_rgb": (True, None),
    "resample": (3,),  # bicubic
}


def find_tower(directory: Path, name: str, vision: str | Path | None) -> Path | VisionConfig:
    """Directory with the tower's config.json, or the configuration of a tower known by name.

    name: `mm_vision_tower` of the checkpoint: a directory, or the name of a known tower. A path
    that does not exist here names the known tower that it ends with. vision: see `read_config`.

    Raises: CheckpointError saying where it was looked for.
    """
    if vision is not None:
        if not (Path(vision) / "config.json").is_file():
            raise CheckpointError(f"{vision}: has no config.json of a vision tower")
        return Path(vision)
    places = [directory / TOWER_FOLDER, Path(os.path.abspath(directory / name))]
    for place in places:
        if os.path.isfile(place / "config.json"):  # False also where it may not be looked at
            return place
    if known := known_tower(name):
        return KNOWN_TOWERS[known]
    raise CheckpointError(
        f"{directory / 'config.json'}: mm_vision_tower {name!r} is neither a directory with a "
        f"config.json (looked in {' and '.join(map(str, places))}) nor one of "
        f"{sorted(KNOWN_TOWERS)}; copy the tower's config.json and preprocessor_config.json to "
        f"{places[0]}, or name their directory with --vision"
    )


def known_tower(name: str) -> str | None:
    """Which of `KNOWN_TOWERS` a name or a path of another machine means; None if none of them.

    A path means the tower that its last part names; one into a Hugging Face cache, that of its
    `models--OWNER--NAME` part.
    """
    parts = [part for part in re.split(r"[/\\]+", name.strip()) if part not in ("", ".")]
    if len(parts) >= 3 and parts[-2] == "snapshots":
        parts = parts[-3].split("--")
    return KNOWN_PARTS.get(parts[-1].lower()) if parts else None


def read_vision(tower: Path, feature_layer: int = -2) -> VisionConfig:
    """Sizes of a CLIP or SigLIP vision tower from its config.json, alone or inside a whole model's.

    feature_layer: of CLIP; SigLIP's is `SIGLIP_FEATURES`.

    Raises: CheckpointError if a field is missing or asks for what the network does not compute.
    """
    path = tower / "config.json"
    tower_values = read_json(path)
    inner = tower_values.get("vision_config", tower_values)
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path}: vision_config must be an object")
    model_type = inner.get("model_type", tower_values.get("model_type"))
    return read_vision_fields(
        Fields(inner | {"model_type": model_type}, path), tower, feature_layer
    )


def read_vision_fields(fields: Fields, directory: Path, feature_layer: int = -2) -> VisionConfig:
    """As `read_vision`, from fields that have been read.

    directory: has preprocessor_config.json, if there is one.
    """
    kind: TowerKind = "clip"
    if str(fields.get("model_type", None)).startswith("siglip"):
        kind, feature_layer = "siglip", SIGLIP_FEATURES
    fields.require(REQUIRED_TOWER[kind])
    size = fields.integer("image_size")
    pixels: dict[str, Any] = {}
    if (directory / "preprocessor_config.json").is_file():
        file = directory / "preprocessor_config.json"
        processor = Fields(read_json(file), file)
        _check_pixels(processor, size, kind)
        for name in ("image_mean", "image_std"):
            if name in processor.values:
                pixels[name] = processor.items(name, float)
    elif kind == "siglip":
        pixels = {name: (0.5, 0.5, 0.5) for name in ("image_mean", "image_std")}
    return VisionConfig(
        kind=kind,
        image_size=size,
        patch_size=fields.integer("patch_size"),
        width=fields.integer("hidden_size"),
        layers=fields.integer("num_hidden_layers"),
        feature_layer=feature_layer,
        heads=fields.integer("num_attention_heads"),
        mlp_width=fields.integer("intermediate_size"),
        norm_eps=fields.number("layer_norm_eps", NORM_EPS[kind]),
        **pixels,
    )


def _check_pixels(processor: Fields, size: int, kind: TowerKind) -> None:
    """Refuse an image processor that makes other pixels than this library does.

    size: of the tower's input.
    """
    if kind == "siglip":
        processor.require({"do_center_crop": (False, None)})
    processor.require(REQUIRED_PIXELS)
    if abs(processor.number("rescale_factor", 1 / 255) * 255 - 1) > 1e-4:
        raise CheckpointError(
            f"{processor.path}: rescale_factor is {processor['rescale_factor']!r}; only 1/255 is "
            "implemented"
        )
    for name in ("crop_size", "size"):
        value = size if processor.get(name, None) is None else processor[name]
        sides = {*value.values()} if isinstance(value, dict) else {value}
        if sides != {size}:
            raise CheckpointError(
                f"{processor.path}: {name} is {value!r}, but the tower's image_size is {size}"
            )
