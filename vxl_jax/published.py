"""Read the configuration of a checkpoint in the published PyTorch layout."""

import os
import warnings
from pathlib import Path
from typing import Any

from vxl_jax.chat import encode_prompt
from vxl_jax.config import (
    ConfigError,
    LanguageConfig,
    VideoXLConfig,
    VisionConfig,
    cross_check_vocabulary,
)
from vxl_jax.tensors import CheckpointError, read_json

TOWER_FOLDER = "vision_tower"
"""Where a checkpoint that stands by itself has the tower's config.json."""

KNOWN_TOWERS = {"openai/clip-vit-large-patch14-336": VisionConfig()}

# What the network computes; a checkpoint that asks for anything else is refused.
REQUIRED_LANGUAGE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_sliding_window": (False,),
}
REQUIRED_MODEL: dict[str, tuple[Any, ...]] = {
    "model_type": ("llava_qwen",),
    "enable_beacon": (True,),
    "beacon_pos": ("interleave",),
    "beacon_attn": ("full-coverage",),
    "beacon_attend_prev": (True,),
    "beacon_sink_size": (0,),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": ("spatial_pool",),
    "mm_spatial_pool_mode": ("average",),
    "mm_vision_select_feature": ("patch",),
}
REQUIRED_TOWER = {"hidden_act": ("quick_gelu",), "num_channels": (3,)}


def read_config(
    directory: Path, *, vision: str | Path | None = None, **changes: Any
) -> VideoXLConfig:
    """The model configuration of a published directory; `changes` are fields of VideoXLConfig.

    vision: directory of the tower's config.json; by default `vision_tower/` in the directory, or
    what its `mm_vision_tower` names.

    Raises: CheckpointError if a field is missing or asks for what the network does not compute.
    """
    path = directory / "config.json"
    values = Fields(read_json(path), path)
    if "model_type" not in values.values and (directory / "checkpoints").is_dir():
        raise CheckpointError(
            f"{directory}: is a training run; python -m convert.to_hf {directory} DIR makes a "
            "checkpoint of it"
        )
    values.require(REQUIRED_MODEL)
    if sorted(values.items("beacon_param", str, ["q", "k", "v"])) != ["k", "q", "v"]:
        raise CheckpointError(f"{path}: beacon_param must be q, k and v")
    if values.integer("beacon_window") != values.get(
        "beacon_stride", values.integer("beacon_window")
    ):
        raise CheckpointError(f"{path}: beacon_stride must equal beacon_window")
    name = values["mm_vision_tower"]
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: mm_vision_tower is {name!r}; it must be a path or a name")
    tower = find_tower(directory, name, vision)
    if isinstance(tower, Path):
        tower = read_vision(tower, values.integer("mm_vision_select_layer", -2))
    return VideoXLConfig(
        vision=tower,
        language=read_language(values),
        pool_stride=values.integer("mm_spatial_pool_stride"),
        window=values.integer("beacon_window"),
        ratios=values.items("beacon_ratio", int),
        **changes,
    )


def read_max_context(directory: Path) -> int | None:
    """Positions that the model of a published directory has learned; None if it does not say.

    Raises: CheckpointError if that is no number.
    """
    path = directory / "config.json"
    values = Fields(read_json(path), path)
    known = "max_position_embeddings" in values.values
    return values.integer("max_position_embeddings") if known else None


def load_tokenizer(directory: Path, config: LanguageConfig, name: str = "tokenizer") -> Any:
    """The tokenizer of a local directory; nothing is downloaded.

    name: of the directory, for messages.

    Raises: ConfigError if it is missing, damaged, not Qwen2's, or larger than the vocabulary.
    """
    # transformers advises to install torch when it is imported without it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    if not directory.is_dir():
        raise ConfigError(f"{name} {directory}: there is no such directory")
    verbosity = logging.get_verbosity()
    try:
        with warnings.catch_warnings():  # of a config.json that is not transformers' own
            warnings.simplefilter("ignore", FutureWarning)
            logging.set_verbosity_error()
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        encode_prompt("", tokenizer)  # refuses one without the chat template's tokens
    except Exception as error:  # damaged files raise anything
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{name} {directory}: cannot be loaded ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
    cross_check_vocabulary(config, len(tokenizer), f"{name} {directory}")
    return tokenizer


class Fields:
    """A JSON object that names its file when a field is missing."""

    def __init__(self, values: dict[str, Any], path: Path):
        self.values, self.path = values, path

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise CheckpointError(f"{self.path}: has no field {name!r}")
        return self.values[name]

    def get(self, name: str, default: Any) -> Any:
        """The field, or `default` where it is missing."""
        return self.values.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        """A field that is a whole number.

        Raises: CheckpointError if it is missing without a default, or none.
        """
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} is {value!r}; it must be a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A field that is a number.

        Raises: CheckpointError if it is missing without a default, or none.
        """
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} is {value!r}; it must be a number")
        return float(value)

    def items(self, name: str, kind: type, default: Any = None) -> tuple[Any, ...]:
        """A field that is a list of values of one type.

        Raises: CheckpointError if it is missing without a default, or none.
        """
        value = self[name] if default is None else self.get(name, default)
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, list) or not all(isinstance(item, kinds) for item in value):
            raise CheckpointError(
                f"{self.path}: {name} is {value!r}; it must be a list of {kind.__name__}"
            )
        return tuple(value)

    def require(self, required: dict[str, tuple[Any, ...]]) -> None:
        """Refuse a field with another value than those allowed.

        Raises: CheckpointError naming file and field.
        """
        for name, allowed in required.items():
            if self.get(name, allowed[0]) not in allowed:
                raise CheckpointError(
                    f"{self.path}: {name} is {self[name]!r}; only {allowed[0]!r} is implemented"
                )


def find_tower(directory: Path, name: str, vision: str | Path | None) -> Path | VisionConfig:
    """Directory with the tower's config.json, or the configuration of a tower known by name.

    name: `mm_vision_tower` of the checkpoint. vision: see `read_config`.

    Raises: CheckpointError saying where it was looked for.
    """
    if vision is not None:
        if not (Path(vision) / "config.json").is_file():
            raise CheckpointError(f"{vision}: has no config.json of a vision tower")
        return Path(vision)
    places = [directory / TOWER_FOLDER, (directory / name).resolve()]
    for place in places:
        if (place / "config.json").is_file():
            return place
    if name in KNOWN_TOWERS:
        return KNOWN_TOWERS[name]
    raise CheckpointError(
        f"{directory / 'config.json'}: mm_vision_tower {name!r} is neither a directory with a "
        f"config.json (looked in {' and '.join(map(str, places))}) nor one of "
        f"{sorted(KNOWN_TOWERS)}; give the tower's directory"
    )


def read_language(values: Fields) -> LanguageConfig:
    """Sizes of a Qwen2 from its config.json.

    Raises: CheckpointError if a field is missing or asks for what the network does not compute.
    """
    values.require(REQUIRED_LANGUAGE)
    return LanguageConfig(
        vocab_size=values.integer("vocab_size"),
        width=values.integer("hidden_size"),
        layers=values.integer("num_hidden_layers"),
        heads=values.integer("num_attention_heads"),
        kv_heads=values.integer("num_key_value_heads"),
        mlp_width=values.integer("intermediate_size"),
        rope_theta=_rope_theta(values),
        norm_eps=values.number("rms_norm_eps"),
        tie_embeddings=values.get("tie_word_embeddings", False),
    )


def _rope_theta(values: Fields) -> float:
    """`rope_theta`, which transformers writes inside `rope_parameters` since version 5."""
    inner = values.get("rope_parameters", None)
    if "rope_theta" in values.values or not isinstance(inner, dict):
        return values.number("rope_theta")
    fields = Fields(inner, values.path)
    fields.require({"rope_type": ("default",)})
    return fields.number("rope_theta")


def read_vision(tower: Path, feature_layer: int = -2) -> VisionConfig:
    """Sizes of a CLIP vision tower from its config.json, alone or inside a whole CLIP's.

    Raises: CheckpointError if a field is missing or asks for what the network does not compute.
    """
    path = tower / "config.json"
    tower_values = read_json(path)
    inner = tower_values.get("vision_config", tower_values)
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path}: vision_config must be an object")
    fields = Fields(inner, path)
    fields.require(REQUIRED_TOWER)
    pixels: dict[str, Any] = {}
    if (tower / "preprocessor_config.json").is_file():
        file = tower / "preprocessor_config.json"
        processor = Fields(read_json(file), file)
        for name in ("image_mean", "image_std"):
            if name in processor.values:
                pixels[name] = processor.items(name, float)
    return VisionConfig(
        image_size=fields.integer("image_size"),
        patch_size=fields.integer("patch_size"),
        width=fields.integer("hidden_size"),
        layers=fields.integer("num_hidden_layers"),
        feature_layer=feature_layer,
        heads=fields.integer("num_attention_heads"),
        mlp_width=fields.integer("intermediate_size"),
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        **pixels,
    )
