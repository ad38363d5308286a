"""Start a new Video-XL from a Qwen2 and a CLIP checkpoint.

    python -m convert.init QWEN_DIR CLIP_DIR DST [--projector FILE_OR_RUN] [--seed 0]

QWEN_DIR (such as Qwen2-7B-Instruct) and CLIP_DIR (such as clip-vit-large-patch14-336) have
config.json and safetensors. Beacon projections start as copies of q, k and v, the beacon embedding
as that of the end-of-sequence token; the projector is new, or comes from a first stage of training.
"""

import re
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import arg

from convert.command import StoredDtype, run_command
from convert.from_hf import write_checkpoint
from convert.sources import open_source
from convert.writing import check_apart, copy_small_files, published_config, write_tower
from vxl_jax.checkpoints.arrays import check_tensors, stored_dtype, whole
from vxl_jax.checkpoints.hf_config import read_language, refuse_adapter
from vxl_jax.checkpoints.hf_tower import read_vision
from vxl_jax.checkpoints.json_files import Fields, read_json, write_json
from vxl_jax.checkpoints.load import abstract_params
from vxl_jax.checkpoints.names import name_rows
from vxl_jax.checkpoints.safetensors_read import find_tensors, tensors_of
from vxl_jax.checkpoints.tensors import STORED_NAME, Tensor, raise_problems, tensors_not_finite
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import CheckpointError

TOWER_PREFIX = "model.vision_tower.vision_tower."
NOT_OF_THE_TOWER = r"text_model\..*|logit_scale|(text|visual)_projection\.weight"
"""Tensors of CLIP that a Video-XL has no use for."""

PROJECTOR = "model.mm_projector."


def init_checkpoint(
    qwen: Annotated[str | Path, arg(metavar="QWEN_DIR")],
    clip: Annotated[str | Path, arg(metavar="CLIP_DIR")],
    destination: Annotated[str | Path, arg(metavar="DST")],
    *,
    projector: Annotated[str | Path | None, arg(metavar="FILE_OR_RUN")] = None,
    seed: int = 0,
    dtype: StoredDtype | None = None,
    overwrite: bool = False,
) -> None:
    """Assemble a new Video-XL in `destination`.

    The projector of a safetensors file has tensors named `…mm_projector.0.weight` and so on. New
    weights are uniform within ±1/√inputs, as torch starts a linear layer.

    Args:
        qwen: directory of a Qwen2 checkpoint with its tokenizer.
        clip: directory of a CLIP checkpoint, or of its vision tower alone.
        destination: directory that is made, whole or not at all.
        projector: from a safetensors file, a training run or a checkpoint; None: new weights.
        seed: of a new projector.
        dtype: of the weights; None: that of Qwen2.
        overwrite: replace a checkpoint at the destination.

    Raises: CheckpointError that lists every missing, unexpected or misshapen tensor, and every one
        whose weights are not finite; `destination` is then as it was.
    """
    qwen, clip, destination = Path(qwen), Path(clip), Path(destination)
    for source in (qwen, clip, *([] if projector is None else [Path(projector)])):
        check_apart(source, destination)
    values = Fields(read_json(qwen / "config.json"), qwen / "config.json")
    values.require({"model_type": ("qwen2",)})
    refuse_adapter(qwen)
    tensors, problems = find_tensors(qwen)
    tower, tower_problems = find_tensors(clip)
    param_dtype = dtype or stored_dtype(tensors)
    config = VideoXLConfig(
        vision=read_vision(clip), language=read_language(values, tensors), param_dtype=param_dtype
    )
    tensors |= _beacons(tensors, _end_of_sequence(values))
    tensors |= {
        # transformers 5 saves a tower alone without this prefix.
        f"{TOWER_PREFIX}vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in tower.items()
        if not re.fullmatch(NOT_OF_THE_TOWER, name)
    }
    if projector is None:
        tensors |= _new_projector(config, seed)
    else:
        tensors |= _read_projector(Path(projector))
    _, shapes = abstract_params(config)
    problems += tower_problems + check_tensors(tensors, config, shapes, param_dtype)
    if problems:
        raise_problems(f"{qwen} and {clip}", problems + tensors_not_finite(tensors))

    def write_files(part: Path) -> None:
        copy_small_files(qwen, part, leave=("config.json",))
        write_json(part / "config.json", {**values.values, **published_config(config)})
        write_tower(clip, part)

    write_checkpoint(
        qwen, destination, tensors, config, shapes, write_files, overwrite, unused_dtype=param_dtype
    )


def _beacons(tensors: dict[str, Tensor], end: int) -> dict[str, Tensor]:
    """Beacon parameters as copies: of q, k and v, and of one token's embedding."""
    made = {
        re.sub(r"self_attn\.([qkv])_proj", r"self_attn.beacon_\1_proj", name): tensor
        for name, tensor in tensors.items()
        if re.search(r"self_attn\.[qkv]_proj", name)
    }
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is not None and end < embedding.shape[0]:
        made["model.beacon_embed_tokens.weight"] = embedding.rows(end, end + 1)
    return made


def _end_of_sequence(values: Fields) -> int:
    end = values["eos_token_id"]
    end = end[0] if isinstance(end, list) and end else end
    if not isinstance(end, int) or not 0 <= end < values["vocab_size"]:
        raise CheckpointError(f"{values.path}: eos_token_id {end!r} is not a token")
    return end


def _new_projector(config: VideoXLConfig, seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    made = {}
    width = config.language.width
    for i, inputs in ((0, config.tower.width), (2, width)):
        bound = inputs**-0.5
        for name, shape in (("weight", (width, inputs)), ("bias", (width,))):
            values = rng.uniform(-bound, bound, shape).astype(np.float32)
            made[f"{PROJECTOR}{i}.{name}"] = _in_memory(values)
    return made


def _read_projector(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        source = open_source(path, same_base=False)
        rows = [row for row in name_rows(source.config) if row.ours[0] == "projector"]
        return {
            row.theirs: _in_memory(
                row.layout.to_theirs(source.read(row, whole(source.shapes[row.ours].shape)))
            )
            for row in rows
        }
    found = {
        PROJECTOR + name.partition("mm_projector.")[2]: tensor
        for name, tensor in tensors_of(path).items()
        if "mm_projector." in name
    }
    if not found:
        raise CheckpointError(f"{path}: has no tensor named …mm_projector.0.weight or the like")
    return found


def _in_memory(values: np.ndarray) -> Tensor:
    dtype = STORED_NAME[values.dtype.name]
    return Tensor(Path("memory"), dtype, values.shape, array=np.ascontiguousarray(values))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(init_checkpoint, "convert.init", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
