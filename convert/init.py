"""Start a new model from checkpoints of its parts, or a compressing one from a LLaVA-Video.

    python -m convert.init QWEN_DIR TOWER_DIR DST [--projector FILE_OR_RUN] [--seed 0]
    python -m convert.init LLAVA_DIR DST [--window 1680] [--ratios 2 4 8 12 16]

QWEN_DIR (such as Qwen2-7B-Instruct) and TOWER_DIR have config.json and safetensors. With CLIP (such
as clip-vit-large-patch14-336) the result is a Video-XL, with SigLIP (siglip-so400m-patch14-384) a
LLaVA-Video. Its projector is new, or comes from a first stage of training. LLAVA_DIR is a
LLaVA-Video, LLaVA-OneVision or LLaVA-Qwen without beacons.

Beacon projections start as copies of q, k and v, the beacon embedding as that of the
end-of-sequence token.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import arg

from convert.command import StoredDtype, run_command
from convert.from_hf import write_checkpoint
from convert.sources import open_source
from convert.writing import (
    beacon_fields,
    change_fields,
    check_apart,
    copy_files,
    copy_small_files,
    published_config,
    set_dtype,
    write_tower,
)
from vxl_jax.checkpoints.arrays import check_tensors, stored_dtype, whole
from vxl_jax.checkpoints.hf_config import PARAMS, read_language, refuse_adapter
from vxl_jax.checkpoints.hf_onevision import published_fields
from vxl_jax.checkpoints.hf_tower import read_vision
from vxl_jax.checkpoints.json_files import Fields, read_json, write_json
from vxl_jax.checkpoints.load import abstract_params, open_published
from vxl_jax.checkpoints.names import NEWLINE_NAME, name_rows
from vxl_jax.checkpoints.safetensors_read import find_tensors, tensors_of
from vxl_jax.checkpoints.tensors import STORED_NAME, Tensor, raise_problems, tensors_not_finite
from vxl_jax.config import Compression, LanguageConfig, VideoXLConfig, VisionConfig
from vxl_jax.errors import CheckpointError, ConfigError
from vxl_jax.media.preprocessing import llava_preprocessing
from vxl_jax.presets import llava_video_7b, video_xl_7b
from vxl_jax.text.tokenizer import load_tokenizer

TOWER_PREFIX = "model.vision_tower.vision_tower."
NOT_OF_THE_TOWER = r"text_model\..*|logit_(scale|bias)|(text|visual)_projection\.weight"
"""Tensors of CLIP and SigLIP that are not of their towers."""

PROJECTOR = "model.mm_projector."


WINDOW_FRAMES = 8
"""Frames of a LLaVA-Video in a compression window, unless told: with newline grids 1680 tokens,
which all of `RATIOS` divide."""

RATIOS = Compression().ratios


def init_checkpoint(
    qwen: str | Path,
    tower: str | Path,
    destination: str | Path,
    *,
    projector: str | Path | None = None,
    seed: int = 0,
    dtype: StoredDtype | None = None,
    overwrite: bool = False,
) -> None:
    """Assemble a new Video-XL or LLaVA-Video in `destination`.

    The projector of a safetensors file has tensors named `…mm_projector.0.weight` and so on. New
    weights are uniform within ±1/√inputs, as torch starts a linear layer; a new newline vector is
    normal with a deviation of 1/√width.

    Args:
        qwen: directory of a Qwen2 checkpoint with its tokenizer.
        tower: directory of a CLIP or SigLIP checkpoint, or of its vision tower alone.
        destination: directory that is made, whole or not at all.
        projector: from a safetensors file, a training run or a checkpoint; None: new weights.
        seed: of a new projector.
        dtype: of the weights; None: that of Qwen2.
        overwrite: replace a checkpoint at the destination.

    Raises: CheckpointError that lists every missing, unexpected or misshapen tensor, and every one
        whose weights are not finite; `destination` is then as it was.
    """
    qwen, tower, destination = Path(qwen), Path(tower), Path(destination)
    for source in (qwen, tower, *([] if projector is None else [Path(projector)])):
        check_apart(source, destination)
    values = Fields(read_json(qwen / "config.json"), qwen / "config.json")
    values.require({"model_type": ("qwen2",)})
    refuse_adapter(qwen)
    tensors, problems = find_tensors(qwen)
    of_tower, tower_problems = find_tensors(tower)
    param_dtype = dtype or stored_dtype(tensors)
    config = _family_of(read_vision(tower))
    config = replace(config, language=read_language(values, tensors), param_dtype=param_dtype)
    if config.compression is not None:
        tensors |= _beacons(tensors, _end_of_sequence(values, config.language))
    tensors |= {
        # transformers 5 saves a tower alone without this prefix.
        f"{TOWER_PREFIX}vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in of_tower.items()
        if not re.fullmatch(NOT_OF_THE_TOWER, name)
    }
    tensors |= _new_newline(config, seed)
    if projector is None:
        tensors |= _new_projector(config, seed)
    else:
        tensors |= _read_projector(Path(projector))
    _, shapes = abstract_params(config)
    problems += tower_problems + check_tensors(tensors, config, shapes, param_dtype)
    if problems:
        raise_problems(f"{qwen} and {tower}", problems + tensors_not_finite(tensors))

    def write_files(part: Path) -> None:
        copy_small_files(qwen, part, leave=("config.json",))
        write_json(part / "config.json", {**values.values, **published_config(config)})
        write_tower(tower, part)

    write_checkpoint(
        qwen, destination, tensors, config, shapes, write_files, overwrite, unused_dtype=param_dtype
    )


def compress_checkpoint(
    llava: str | Path,
    destination: str | Path,
    *,
    window: int | None = None,
    ratios: tuple[int, ...] = RATIOS,
    dtype: StoredDtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint without beacons as one with beacons that have learned nothing yet.

    Args:
        llava: directory of a LLaVA-Video, LLaVA-OneVision or LLaVA-Qwen.
        destination: directory that is made, whole or not at all.
        window: visual tokens in a compression window; None: those of 8 frames.
        ratios: that training will draw from.
        dtype: of the weights; None: as stored.
        overwrite: replace a checkpoint at the destination.

    Raises: CheckpointError as `init_checkpoint`, and if the model has beacons already.
    """
    llava, destination = Path(llava), Path(destination)
    check_apart(llava, destination)
    if (llava / PARAMS).is_dir():
        raise CheckpointError(f"{llava}: is converted; write it with convert.to_hf first")
    changes = {} if dtype is None else {"param_dtype": dtype}
    tensors, config, _, _ = open_published(llava, **changes)
    if config.compression is not None or config.vision is None:
        has = "beacons already" if config.compression is not None else "no vision tower"
        raise CheckpointError(f"{llava}: has {has}; give a LLaVA-Video or the like")
    compression = Compression(window or config.layout.count(WINDOW_FRAMES), ratios)
    if uneven := [ratio for ratio in ratios if compression.window % ratio]:
        print(
            f"note: a window of {compression.window} visual tokens is not a multiple of the ratios "
            f"{uneven}, which training draws for such windows only if no other divides them",
            file=sys.stderr,
        )
    values = Fields(published_fields(read_json(llava / "config.json")), llava / "config.json")
    tensors |= _beacons(tensors, _end_of_sequence(values, config.language))
    with_beacons = replace(config, compression=compression)
    _, shapes = abstract_params(with_beacons)
    raise_problems(llava, check_tensors(tensors, with_beacons, shapes, dtype))

    def write_files(part: Path) -> None:
        copy_files(llava, config, part)
        change_fields(part / "config.json", {"enable_beacon": True, **beacon_fields(compression)})
        if dtype:
            set_dtype(part, dtype)

    write_checkpoint(
        llava, destination, tensors, with_beacons, shapes, write_files, overwrite, dtype
    )


def _family_of(tower: VisionConfig) -> VideoXLConfig:
    """The model that a tower is for."""
    if tower.kind == "clip":
        return video_xl_7b(vision=tower)
    preprocessing = llava_preprocessing(mean=tower.image_mean)
    return llava_video_7b(vision=tower, preprocessing=preprocessing)


def _new_newline(config: VideoXLConfig, seed: int) -> dict[str, Tensor]:
    if not config.layout.has_newline:
        return {}
    width = config.language.width
    values = np.random.default_rng([seed, 1]).normal(0, width**-0.5, width)
    return {NEWLINE_NAME: _in_memory(values.astype(np.float32))}


def _beacons(tensors: dict[str, Tensor], end: int) -> dict[str, Tensor]:
    """Beacon parameters as copies: of q, k and v, and of one token's embedding."""
    made = {
        re.sub(r"self_attn\.([qkv])_proj", r"self_attn.beacon_\1_proj", name): tensor
        for name, tensor in tensors.items()
        if re.match(r"model\.layers\.\d+\.self_attn\.[qkv]_proj", name)
    }
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is not None and end < embedding.shape[0]:
        made["model.beacon_embed_tokens.weight"] = embedding.rows(end, end + 1)
    return made


def _end_of_sequence(values: Fields, language: LanguageConfig) -> int:
    """Of config.json, or of the tokenizer next to it where that says nothing."""
    end = values.get("eos_token_id", None)
    end = end[0] if isinstance(end, list) and end else end
    if end is None:
        try:
            end = load_tokenizer(values.path.parent, language).convert_tokens_to_ids("<|im_end|>")
        except ConfigError as error:
            raise CheckpointError(
                f"{values.path}: has no eos_token_id, whose embedding the beacons start with, and "
                f"{error}"
            ) from error
    if not isinstance(end, int) or not 0 <= end < values["vocab_size"]:
        raise CheckpointError(
            f"{values.path}: eos_token_id {end!r} is not a token; add that of "
            "<|im_end|>, whose embedding the beacons start with"
        )
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


def init_from(
    directories: Annotated[tuple[Path, ...], arg(metavar="QWEN_DIR TOWER_DIR DST")],
    *,
    projector: Annotated[Path | None, arg(metavar="FILE_OR_RUN")] = None,
    seed: int = 0,
    window: int | None = None,
    ratios: tuple[int, ...] = RATIOS,
    dtype: StoredDtype | None = None,
    overwrite: bool = False,
) -> None:
    """Call `init_checkpoint` for two sources, `compress_checkpoint` for one.

    Args:
        directories: a Qwen2, a vision tower and the directory to make; or LLAVA_DIR DST.
        projector: from a safetensors file, a training run or a checkpoint; None: new weights.
        seed: of a new projector.
        window: of a LLaVA that is to compress; None: the visual tokens of 8 frames.
        ratios: of a LLaVA that is to compress.
        dtype: of the weights; None: as stored.
        overwrite: replace a checkpoint at the destination.

    Raises: ConfigError for another number of sources, or options that do not belong to them;
        CheckpointError as the two functions.
    """
    if not directories:
        raise ConfigError("give QWEN_DIR TOWER_DIR DST, or LLAVA_DIR DST")
    *sources, destination = directories
    if len(sources) == 1:
        if projector is not None or seed:
            raise ConfigError("--projector and --seed belong to a model of two parts")
        compress_checkpoint(
            sources[0],
            destination,
            window=window,
            ratios=ratios,
            dtype=dtype,
            overwrite=overwrite,
        )
        return
    if len(sources) != 2 or window is not None or ratios != RATIOS:
        raise ConfigError(
            "give QWEN_DIR TOWER_DIR DST, or LLAVA_DIR DST with --window and --ratios"
        )
    qwen, tower = sources
    init_checkpoint(
        qwen,
        tower,
        destination,
        projector=projector,
        seed=seed,
        dtype=dtype,
        overwrite=overwrite,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(
        init_from, "convert.init", __doc__, arguments, lambda options: options["directories"][-1]
    )


if __name__ == "__main__":
    sys.exit(main())
