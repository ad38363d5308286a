"""LLaVA-OneVision as transformers saves it, read as a checkpoint in the published layout.

transformers has its own names for the fields of config.json and for tensors
(`LlavaOnevisionForConditionalGeneration`). They are translated when they are read; everything after
that sees the published layout alone.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from vxl_jax.checkpoints.names import NEWLINE_NAME, PUBLISHED_TOWER

MODEL_TYPE = "llava_onevision"

TEXT_DEFAULTS = {
    "attention_dropout": 0.0,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "vocab_size": 151936,
}
"""Fields of Qwen2 that transformers leaves out where they have these values."""

TOWER_DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-6,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 16,
}
"""The same for SigLIP."""

Held = TypeVar("Held")


def published_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Translate the fields of config.json; those of other models are returned unchanged.

    The tower's fields stay in `vision_config`, counted as the published layout does: features come
    from before the last layer.
    """
    if values.get("model_type") != MODEL_TYPE:
        return values
    text, tower = (_object(values, name) for name in ("text_config", "vision_config"))
    if "rope_parameters" in text:
        text.setdefault("rope_theta", _object(text, "rope_parameters").get("rope_theta", 1e4))
    tower = TOWER_DEFAULTS | tower
    layers, feature = tower["num_hidden_layers"], values.get("vision_feature_layer", -1)
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    if isinstance(layers, int) and isinstance(feature, int):
        tower["num_hidden_layers"] = layers + 1 + feature + 1 if feature < 0 else feature + 1
    pinpoints = values.get("image_grid_pinpoints")
    if isinstance(pinpoints, list):  # transformers has (height, width)
        pinpoints = [list(reversed(p)) if isinstance(p, list) else p for p in pinpoints]
    kept = ("torch_dtype", "dtype", "eos_token_id", "transformers_version")
    tied = values.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    return {
        **TEXT_DEFAULTS,
        **text,
        **{name: values[name] for name in kept if name in values},
        "tie_word_embeddings": tied,  # a head with other weights counts, see `ties_embeddings`
        "model_type": "llava_qwen",
        "architectures": ["LlavaQwenForCausalLM"],
        "vision_config": tower,
        "mm_vision_tower": "vision_tower",
        "mm_hidden_size": tower["hidden_size"],
        "mm_projector_type": _projector(values),
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": "one_token",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": values.get("vision_aspect_ratio", "anyres_max_9"),
        "image_grid_pinpoints": pinpoints,
        "force_sample": True,
    }


def _object(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return dict(found) if isinstance(found, dict) else {}


def _projector(values: dict[str, Any]) -> str:
    """`mm_projector_type` of a projector like the published one; else a name that is refused."""
    activation = values.get("projector_hidden_act", "gelu")
    has_bias = values.get("multimodal_projector_bias", True)
    strategy = values.get("vision_feature_select_strategy", "full")
    layer = values.get("vision_feature_layer", -1)
    if isinstance(layer, list) and len(layer) != 1:
        strategy = f"of layers {layer}"
    if (activation, has_bias, strategy) == ("gelu", True, "full"):
        return "mlp2x_gelu"
    return f"{activation}, bias {has_bias}, features {strategy}"


NAMES = (
    (r"(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"language_model\.model\.", "model."),
    (r"model\.language_model\.", "model."),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", PUBLISHED_TOWER),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"(?:model\.)?image_newline$", NEWLINE_NAME),
)
"""Beginnings of transformers' names, of version 4 and 5, and the published ones."""


def published_names(tensors: Mapping[str, Held]) -> dict[str, Held]:
    """Give tensors their published names; those of other layouts keep theirs."""
    if not _is_of_transformers(tensors):
        return dict(tensors)
    return {_published_name(name): tensor for name, tensor in tensors.items()}


def _is_of_transformers(names: Iterable[str]) -> bool:
    return any("multi_modal_projector." in name for name in names)


def _published_name(name: str) -> str:
    for pattern, published in NAMES:
        found = re.match(pattern, name)
        if found:
            return published + name[found.end() :]
    return name
