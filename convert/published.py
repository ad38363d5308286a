"""Read a checkpoint in the published PyTorch layout: `config.json` and safetensors."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open

from convert.names import is_unused, table
from vxl_jax.config import DTYPES, LanguageConfig, VideoXLConfig, VisionConfig
from vxl_jax.model import VideoXL

KNOWN_TOWERS = {"openai/clip-vit-large-patch14-336": VisionConfig()}

# What the network computes; a checkpoint that asks for anything else is refused.
REQUIRED_MODEL = {
    "model_type": ("llava_qwen",),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_sliding_window": (False,),
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


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names file and tensors and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises: CheckpointError naming the file if it is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def read_config(directory: Path, **changes: Any) -> VideoXLConfig:
    """The model configuration of a published directory; `changes` are fields of VideoXLConfig.

    Raises: CheckpointError if a field is missing or asks for what the network does not compute.
    """
    path = directory / "config.json"
    values = _Fields(read_json(path), path)
    values.require(REQUIRED_MODEL)
    if sorted(values.get("beacon_param", ["q", "k", "v"])) != ["k", "q", "v"]:
        raise CheckpointError(f"{path}: beacon_param must be q, k and v")
    if values["beacon_window"] != values.get("beacon_stride", values["beacon_window"]):
        raise CheckpointError(f"{path}: beacon_stride must equal beacon_window")
    language = LanguageConfig(
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        kv_heads=values["num_key_value_heads"],
        mlp_width=values["intermediate_size"],
        rope_theta=float(values["rope_theta"]),
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=values.get("tie_word_embeddings", False),
    )
    return VideoXLConfig(
        vision=_read_vision(directory, values),
        language=language,
        pool_stride=values["mm_spatial_pool_stride"],
        window=values["beacon_window"],
        ratios=tuple(values["beacon_ratio"]),
        **changes,
    )


class _Fields:
    """A JSON object that names its file when a field is missing."""

    def __init__(self, values: dict[str, Any], path: Path):
        self.values, self.path = values, path

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise CheckpointError(f"{self.path}: has no field {name!r}")
        return self.values[name]

    def get(self, name: str, default: Any) -> Any:
        return self.values.get(name, default)

    def require(self, required: dict[str, tuple[Any, ...]]) -> None:
        for name, allowed in required.items():
            if self.get(name, allowed[0]) not in allowed:
                raise CheckpointError(
                    f"{self.path}: {name} is {self[name]!r}; only {allowed[0]!r} is implemented"
                )


def _read_vision(directory: Path, values: _Fields) -> VisionConfig:
    name = values["mm_vision_tower"]
    tower = (directory / name).resolve()
    if not (tower / "config.json").is_file():
        if name in KNOWN_TOWERS:
            return KNOWN_TOWERS[name]
        raise CheckpointError(
            f"{values.path}: mm_vision_tower {name!r} is neither a directory with a config.json "
            f"(looked in {tower}) nor one of {sorted(KNOWN_TOWERS)}"
        )
    path = tower / "config.json"
    tower_values = read_json(path)
    fields = _Fields(tower_values.get("vision_config", tower_values), path)
    fields.require(REQUIRED_TOWER)
    pixels: dict[str, Any] = {}
    if (tower / "preprocessor_config.json").is_file():
        processor = read_json(tower / "preprocessor_config.json")
        for name in ("image_mean", "image_std"):
            if name in processor:
                pixels[name] = tuple(processor[name])
    return VisionConfig(
        image_size=fields["image_size"],
        patch_size=fields["patch_size"],
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        feature_layer=values.get("mm_vision_select_layer", -2),
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        norm_eps=fields.get("layer_norm_eps", 1e-5),
        **pixels,
    )


def tensor_files(directory: Path) -> dict[str, Path]:
    """Name of every tensor in a directory and the safetensors file that holds it.

    Raises: CheckpointError if there is no safetensors file, or one cannot be opened.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{directory}: no *.safetensors file; pickle files (.bin, .pt) are not read because "
            "loading one can run any code, save the model with safe_serialization=True instead"
        )
    found: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as tensors:
                names = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error
        for name in names:
            if name in found:
                raise CheckpointError(f"{path}: tensor {name} is also in {found[name].name}")
            found[name] = path
    return found


def load_published(directory: str | Path, **changes: Any) -> VideoXL:
    """The model of a published directory, with its parameters.

    Args:
        directory: holds `config.json` and one or several safetensors files.
        changes: fields of VideoXLConfig, such as `dtype="bfloat16"`.

    Raises: CheckpointError that lists every missing, unexpected or misshapen tensor.
    """
    directory = Path(directory)
    config = read_config(directory, **changes)
    abstract = nnx.eval_shape(lambda: VideoXL(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    shapes = {path: leaf.get_value().shape for path, leaf in state.flat_state()}
    arrays = {}
    where = tensor_files(directory)
    rows = table(config)
    wanted = {name for row in rows for name in row.names()}
    problems = [f"missing tensor {name}" for name in sorted(wanted - set(where))]
    for name in sorted(set(where) - wanted):
        if not is_unused(name, config):
            problems.append(f"unexpected tensor {name} in {where[name].name}")
    if problems:
        raise CheckpointError(f"{directory}: " + "; ".join(problems))

    with ExitStack() as stack:
        readers = {
            path: stack.enter_context(safe_open(path, framework="numpy"))
            for path in set(where.values())
        }
        for row in rows:
            value = np.empty(shapes[row.ours], DTYPES[config.param_dtype])
            layers = value if row.layers else value[None]
            for name, layer in zip(row.names(), layers, strict=True):
                tensor = row.layout.to_ours(readers[where[name]].get_tensor(name))
                if tensor.shape != layer.shape:
                    problems.append(
                        f"tensor {name} gives shape {tensor.shape}, "
                        f"config.json asks for {layer.shape}"
                    )
                else:
                    layer[...] = tensor
            arrays[row.ours] = jnp.asarray(value)
    if problems:
        raise CheckpointError(f"{directory}: " + "; ".join(problems))
    return nnx.merge(graph, unflatten_dict(arrays))
