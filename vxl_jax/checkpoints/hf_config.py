"""Read the configuration of a checkpoint in the published PyTorch layout."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vxl_jax.checkpoints.hf_onevision import published_fields
from vxl_jax.checkpoints.hf_preprocessing import read_max_tiles, read_preprocessing
from vxl_jax.checkpoints.hf_tower import find_tower, read_vision, read_vision_fields
from vxl_jax.checkpoints.json_files import Fields, Required, read_json
from vxl_jax.checkpoints.names import EMBEDDING_NAME, FASTER_NAME, HEAD_NAME, is_beacon
from vxl_jax.checkpoints.safetensors_read import find_tensors
from vxl_jax.checkpoints.tensors import STORED, Tensor
from vxl_jax.config import (
    Compression,
    LanguageConfig,
    VideoXLConfig,
    VisionConfig,
    with_changes,
)
from vxl_jax.errors import CheckpointError, ConfigError
from vxl_jax.typing import Family

MODEL_TYPES = ("llava_qwen", "qwen2")

PARAMS, UNUSED = "params", "unused.safetensors"
"""What a converted checkpoint has instead of the published safetensors files."""


# What the network computes; a checkpoint that asks for anything else is refused. A missing field
# counts as the first value.
REQUIRED_LANGUAGE: Required = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_sliding_window": (False,),
    "attention_dropout": (0.0,),
}
REQUIRED_BEACONS: Required = {
    "enable_beacon": (True,),
    "beacon_pos": ("interleave",),
    "beacon_attn": ("full-coverage",),
    "beacon_attend_prev": (True,),
    "beacon_sink_size": (0,),
}
REQUIRED_VISION: dict[Family, Required] = {
    "video_xl": {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_resampler_type": ("spatial_pool",),
        "mm_spatial_pool_mode": ("average",),
        "mm_vision_select_feature": ("patch",),
        "mm_patch_merge_type": ("unires",),
    },
    "llava_video": {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_resampler_type": (None,),
        "mm_spatial_pool_mode": ("bilinear", "average", "max", None),
        "mm_vision_select_feature": ("patch",),
        "mm_patch_merge_type": ("flat", "spatial_unpad"),
        "mm_newline_position": ("grid", "frame", "one_token", "no_token", None),
        "add_faster_video": (False, True, None),
    },
}
"""By family; `read_family` tells which."""

# The same for fields that other models have and that this one's checkpoints do not write.
FOREIGN_LANGUAGE: Required = {
    "attention_bias": (True, None),
    "qkv_bias": (True, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
FOREIGN_BEACONS: Required = {
    "beacon_accum": (True,),
    "beacon_parallel_window": (1,),
    "beacon_ratio_mix": ("step-random",),
}
FOREIGN_VISION: Required = {
    "mm_use_im_start_end": (False, None),
    "s2": (False, None),
}
NEWLINES = {"no_token": "none"}
"""Values of `mm_newline_position` that have another name here."""


def read_config(
    directory: Path,
    *,
    vision: str | Path | None = None,
    tensors: Any = None,
    overrides: Mapping[str, Any] | None = None,
    **changes: Any,
) -> VideoXLConfig:
    """Read the model configuration of a directory in the published layout.

    Plain Qwen2, which has no vision tower, is told from the others by `model_type`; Video-XL from
    LLaVA-Video, LLaVA-OneVision and plain LLaVA-Qwen by `read_family`. Any of them may have beacons
    (`enable_beacon`, `beacon_window`).

    Args:
      directory: has `config.json`.
      vision: directory of the tower's config.json; by default `vision_tower/` in the directory, or
        what its `mm_vision_tower` names.
      tensors: `Tensor` by name of the checkpoint, if they are known already; they tell whether
        embeddings are tied, see `ties_embeddings`.
      overrides: fields that take the place of those of `config.json`.
      changes: as for `with_changes`.

    Raises:
      CheckpointError: a field is missing or asks for what the network does not compute.
    """
    refuse_adapter(directory)
    path = directory / "config.json"
    values = Fields(published_fields(read_json(path)) | dict(overrides or {}), path)
    if "model_type" not in values.values and (directory / "checkpoints").is_dir():
        raise CheckpointError(
            f"{directory}: is a training run; python -m convert.to_hf {directory} DIR makes a "
            "checkpoint of it"
        )
    values.require({"model_type": MODEL_TYPES})
    has_vision = values.get("model_type", MODEL_TYPES[0]) != "qwen2"
    if tensors is None:
        tensors = _stored_tensors(directory) if values.get("tie_word_embeddings", False) else {}
    config = VideoXLConfig(
        vision=None, language=read_language(values, tensors), compression=_read_compression(values)
    )
    if has_vision:
        family = read_family(values)
        tower = _read_tower(values, directory, vision, family)
        layout = read_layout(values, family, _has_faster(values, directory, tensors))
        config = _with_vision(config, values, tower, family, layout)
    if config.compression is None and "compression" not in changes:
        _refuse_beacons(values, tensors)
    return with_changes(config, **changes)


def read_family(values: Fields) -> Family:
    """Tell whose layout a `llava_qwen` checkpoint has.

    `mm_patch_merge_type` says it: `unires` is Video-XL's. Without that field, Video-XL has its
    resampler or beacons.
    """
    merge = values.get("mm_patch_merge_type", None)
    own = values.get("mm_resampler_type", None) is not None or "beacon_window" in values.values
    is_video_xl = merge == "unires" or (merge is None and own)
    return "video_xl" if is_video_xl else "llava_video"


def read_layout(values: Fields, family: Family, has_faster: bool = False) -> dict[str, Any]:
    """Read the fields of `VideoXLConfig` that decide visual tokens, besides the tower.

    has_faster: whether the checkpoint has the token that ends each frame of a SlowFast video.

    Where a LLaVA's file has none: what LLaVA-Video was trained with, and not the defaults of the
    published code, which reads `mm_spatial_pool_stride` nowhere.
    """
    if family == "video_xl":
        return {"pool_stride": values.integer("mm_spatial_pool_stride")}
    position = values.get("mm_newline_position", None) or "grid"
    merge = values.get("mm_patch_merge_type", None) or "flat"
    is_slow_fast = values.get("add_faster_video", False)
    if is_slow_fast and values.integer("faster_token_stride", 10) < 1:
        raise CheckpointError(
            f"{values.path}: faster_token_stride is {values['faster_token_stride']}; it must be at "
            "least 1: every such frame is slow"
        )
    return {
        "pool_stride": values.integer("mm_spatial_pool_stride", 2),
        "pool_mode": values.get("mm_spatial_pool_mode", None) or "bilinear",
        "newline": NEWLINES.get(position, position) if merge == "spatial_unpad" else "none",
        "slow_every": values.integer("faster_token_stride", 10) if is_slow_fast else 1,
        "faster_token": bool(is_slow_fast) and has_faster,
        "image_tokens": "unpad" if merge == "spatial_unpad" else "flat",
        "max_image_tiles": read_max_tiles(values),
    }


def _with_vision(
    config: VideoXLConfig,
    values: Fields,
    tower: VisionConfig,
    family: Family,
    layout: dict[str, Any],
) -> VideoXLConfig:
    """Add what depends on the vision tower."""
    try:
        return dataclasses.replace(
            config,
            family=family,
            vision=tower,
            preprocessing=read_preprocessing(values, tower, family),
            **layout,
        )
    except ConfigError as error:
        raise CheckpointError(f"{values.path}: {error}") from error


def _read_tower(
    values: Fields, directory: Path, vision: str | Path | None, family: Family
) -> VisionConfig:
    values.require(REQUIRED_VISION[family] | FOREIGN_VISION)
    name = values["mm_vision_tower"]
    if not isinstance(name, str):
        raise CheckpointError(
            f"{values.path}: mm_vision_tower is {name!r}; it must be a path or a name"
        )
    tower: Path | VisionConfig
    if isinstance(inside := values.get("vision_config", None), dict) and vision is None:
        tower = read_vision_fields(Fields(inside, values.path), directory)
    else:
        tower = find_tower(directory, name, vision)
    if isinstance(tower, Path):
        tower = read_vision(tower, values.integer("mm_vision_select_layer", -2))
    elif tower.kind == "clip":
        layer = values.integer("mm_vision_select_layer", tower.feature_layer)
        tower = dataclasses.replace(tower, feature_layer=layer)
    if values.get("mm_hidden_size", tower.width) != tower.width:
        raise CheckpointError(
            f"{values.path}: mm_hidden_size is {values['mm_hidden_size']!r}, but the vision "
            f"tower's hidden_size is {tower.width}"
        )
    return tower


def _read_compression(values: Fields) -> Compression | None:
    """Window and ratios; None for a checkpoint without beacons."""
    if not values.get("enable_beacon", "beacon_window" in values.values):
        return None
    values.require(REQUIRED_BEACONS | FOREIGN_BEACONS)
    if sorted(values.items("beacon_param", str, ["q", "k", "v"])) != ["k", "q", "v"]:
        raise CheckpointError(f"{values.path}: beacon_param must be q, k and v")
    window = values.integer("beacon_window")
    if window != values.get("beacon_stride", window):
        raise CheckpointError(f"{values.path}: beacon_stride must equal beacon_window")
    return Compression(window, values.items("beacon_ratio", int))


def _refuse_beacons(values: Fields, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of beacons that config.json does not mention.

    Raises: CheckpointError.
    """
    beacons = [name for name in tensors if is_beacon(name)]
    if beacons and values.get("enable_beacon", None) is not False:
        raise CheckpointError(
            f"{values.path}: has no beacon_window, but the checkpoint has {len(beacons)} beacon "
            "tensors; restore the beacon_* fields, or set enable_beacon to false to leave them out"
        )


def refuse_adapter(directory: Path) -> None:
    """Refuse a folder that holds a peft adapter instead of a whole model.

    Raises: CheckpointError that names the adapter's base model.
    """
    path = directory / "adapter_config.json"
    weights = [p.name for end in ("safetensors", "bin", "pt") for p in directory.glob(f"*.{end}")]
    adapters = [name for name in weights if name.startswith("adapter_model.")]
    if not adapters and (not path.is_file() or any("model" in name for name in weights)):
        return
    base = read_json(path).get("base_model_name_or_path") if path.is_file() else None
    raise CheckpointError(
        f"{directory}: holds a peft adapter of {base or 'another model'} (adapter_config.json), "
        "not a whole model; merge it into that model:\n"
        f"  python -m convert.from_hf {base or 'BASE'} DST --adapter {directory}"
    )


def _stored_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a published directory; none of one that is converted or has no weights."""
    if (directory / PARAMS).is_dir() or not any(directory.glob("*.safetensors")):
        return {}
    return find_tensors(directory)[0]


def _has_faster(values: Fields, directory: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint, of which the tensors may be known, has the token of SlowFast frames."""
    if not values.get("add_faster_video", False) or tensors:
        return FASTER_NAME in tensors
    if (directory / PARAMS).is_dir():
        from vxl_jax.checkpoints.orbax_tree import stored_shapes

        return ("projector", "faster") in stored_shapes(directory / PARAMS)
    return FASTER_NAME in _stored_tensors(directory)


def ties_embeddings(values: "Fields", tensors: Mapping[str, Tensor]) -> bool:
    """Whether the logits are read with the token embedding.

    They are if `tie_word_embeddings` says so, unless the checkpoint has an `lm_head.weight` with
    other weights than `model.embed_tokens.weight`: then that head is used, as by transformers 5.

    Raises: CheckpointError if `tie_word_embeddings` is neither true nor false.
    """
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise CheckpointError(
            f"{values.path}: tie_word_embeddings is {tied!r}; it must be true or false"
        )
    if not tied or EMBEDDING_NAME not in tensors or HEAD_NAME not in tensors:
        return tied
    return _same_weights(tensors[EMBEDDING_NAME], tensors[HEAD_NAME])


def _same_weights(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not {one.dtype, other.dtype} <= STORED.keys():
        return False
    for start, piece in one.pieces():
        ours = piece.read().copy()  # the next read uses its buffer
        theirs = other.rows(start, start + len(ours)).read() if one.shape else other.read()
        same_bytes = one.dtype == other.dtype and ours.tobytes() == theirs.tobytes()
        if not same_bytes and not np.array_equal(ours.astype("f4"), theirs.astype("f4")):
            return False
    return True


def read_max_context(directory: Path) -> int | None:
    """Positions that the model of a published directory has learned; None if it does not say.

    Raises: CheckpointError if it is not a whole number.
    """
    path = directory / "config.json"
    values = Fields(published_fields(read_json(path)), path)
    known = "max_position_embeddings" in values.values
    return values.integer("max_position_embeddings") if known else None


def read_language(values: Fields, tensors: Mapping[str, Tensor]) -> LanguageConfig:
    """Sizes of a Qwen2 from its config.json.

    tensors: of the checkpoint; see `ties_embeddings`.

    Raises: CheckpointError if a field is missing or asks for what the network does not compute.
    """
    values = _without_default_rope(values)
    values.require(REQUIRED_LANGUAGE | FOREIGN_LANGUAGE)
    if other := {*values.items("layer_types", str, [])} - {"full_attention"}:
        raise CheckpointError(
            f"{values.path}: layer_types has {', '.join(sorted(other))}; only 'full_attention' is "
            "implemented"
        )
    config = LanguageConfig(
        vocab_size=values.integer("vocab_size"),
        width=values.integer("hidden_size"),
        layers=values.integer("num_hidden_layers"),
        heads=values.integer("num_attention_heads"),
        kv_heads=values.integer("num_key_value_heads"),
        mlp_width=values.integer("intermediate_size"),
        rope_theta=_rope_theta(values),
        norm_eps=values.number("rms_norm_eps"),
        tie_embeddings=ties_embeddings(values, tensors),
    )
    if values.get("head_dim", None) not in (None, config.head_size):
        raise CheckpointError(
            f"{values.path}: head_dim is {values['head_dim']!r}; only hidden_size / "
            f"num_attention_heads, {config.head_size}, is implemented"
        )
    return config


def _without_default_rope(values: Fields) -> Fields:
    """The fields without a `rope_scaling` that scales nothing."""
    scaling = values.get("rope_scaling", None)
    if isinstance(scaling, dict) and all(value == "default" for value in scaling.values()):
        return Fields({**values.values, "rope_scaling": None}, values.path)
    return values


def _rope_theta(values: Fields) -> float:
    """`rope_theta`, which transformers writes inside `rope_parameters` since version 5."""
    inner = values.get("rope_parameters", None)
    if inner is None:
        return values.number("rope_theta")
    if not isinstance(inner, dict):
        raise CheckpointError(f"{values.path}: rope_parameters is {inner!r}; it must be an object")
    fields = Fields(inner, values.path)
    fields.require(
        {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0, None)}
    )
    if "rope_theta" not in inner:
        return values.number("rope_theta")
    theta = fields.number("rope_theta")
    if "rope_theta" in values.values and values.number("rope_theta") != theta:
        raise CheckpointError(
            f"{values.path}: rope_theta is {values['rope_theta']!r}, and {inner['rope_theta']!r} "
            "in rope_parameters; remove the wrong one"
        )
    return theta
