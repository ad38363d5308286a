"""Preprocessing in the config.json of a checkpoint.

Fields that the published code reads have its names: `image_aspect_ratio`, `image_grid_pinpoints`,
`add_time_instruction` and `force_sample`. The rest is an object `vxl_preprocessing`, which that
code ignores.
"""

import ast
import re
from dataclasses import asdict, replace
from operator import index
from typing import Any

from vxl_jax.checkpoints.json_files import Fields
from vxl_jax.config import VideoXLConfig, VisionConfig
from vxl_jax.errors import CheckpointError, VxlError
from vxl_jax.media import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.media.preprocessing import (
    DEFAULT_PREPROCESSING,
    Preprocessing,
    llava_preprocessing,
    parse_grids,
)
from vxl_jax.media.tiles import Size
from vxl_jax.typing import Family

OWN = "vxl_preprocessing"
"""Field of config.json with what the published code has no field for."""

OWN_FIELDS = (
    *("frame_sampling", "max_frames", "video_fps"),
    *("resize", "base_tile", "pad_several", "background"),
)

ANYRES_MAX = re.compile(r"anyres_max_(\d+)")
"""`image_aspect_ratio` of tiles whose patches are downscaled to those of some tiles."""


def read_preprocessing(values: Fields, tower: VisionConfig, family: Family) -> Preprocessing:
    """Read how a model's pixels are made; as in the published inference code where it is silent.

    Args:
      values: of config.json.
      tower: that takes the pixels.
      family: of the model.

    Raises:
      CheckpointError: a field has a value that is not implemented or does not fit the tower.
    """
    own = Fields(_object(values, OWN), values.path)
    options = Fields(_object(own, "options"), values.path)
    known = (*OWN_FIELDS, "options")
    if unknown := [*own.values.keys() - known, *options.values.keys() - asdict(DEFAULT_OPTIONS)]:
        raise CheckpointError(
            f"{values.path}: {OWN} has {', '.join(sorted(unknown))}, which this version does not "
            "read; use the version that wrote it"
        )
    values.require({"add_time_instruction": (False, True, None)})
    default = DEFAULT_PREPROCESSING
    if family == "llava_video":
        values.require({"force_sample": (False, True, None)})
        default = replace(
            llava_preprocessing(tower.kind == "siglip", tower.image_mean),
            frame_sampling="forced" if values.get("force_sample", False) else "strided",
        )
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in own.values.items()
        if name in OWN_FIELDS
    }
    try:
        return replace(
            default,
            image_mode=_image_mode(values, family),
            grids=_read_grids(values, tower.image_size, default),
            time_prompt=bool(values.get("add_time_instruction", False)),
            options=MediaOptions(**options.values),
            **given,
        )
    except (VxlError, TypeError) as error:
        if str(values.path) in str(error):
            raise
        raise CheckpointError(f"{values.path}: {OWN}: {error}") from error


def preprocessing_fields(config: VideoXLConfig) -> dict[str, Any]:
    """Write what `read_preprocessing` and `read_max_tiles` read."""
    preprocessing, side = config.preprocessing, config.tower.image_size
    mode: str = preprocessing.image_mode
    if mode == "anyres" and config.max_image_tiles is not None:
        mode = f"anyres_max_{config.max_image_tiles}"
    fields: dict[str, Any] = {
        "image_aspect_ratio": mode,
        "image_grid_pinpoints": [[w * side, h * side] for w, h in preprocessing.grids],
        "add_time_instruction": preprocessing.time_prompt,
        OWN: {
            **{name: getattr(preprocessing, name) for name in OWN_FIELDS},
            "options": asdict(preprocessing.options),
        },
    }
    if config.family == "llava_video":
        fields["force_sample"] = preprocessing.frame_sampling == "forced"
    return fields


def read_max_tiles(values: Fields) -> int | None:
    """Read to how many tiles unpadded images are downscaled; None: they are not.

    Raises:
      CheckpointError: none at all.
    """
    limit = ANYRES_MAX.fullmatch(str(values.get("image_aspect_ratio", None)))
    if limit is not None and int(limit[1]) < 1:
        raise CheckpointError(
            f"{values.path}: image_aspect_ratio is {values['image_aspect_ratio']!r}; it must leave "
            "at least one tile"
        )
    return None if limit is None else int(limit[1])


def _image_mode(values: Fields, family: Family) -> Any:
    if read_max_tiles(values) is not None:
        return "anyres"
    values.require({"image_aspect_ratio": ("anyres", "square", "pad", None)})
    absent = "anyres" if family == "video_xl" else "square"
    return values.get("image_aspect_ratio", None) or absent


def _object(values: Fields, name: str) -> dict[str, Any]:
    found = values.get(name, None) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{values.path}: {name} is {found!r}; it must be an object")
    return found


def _read_grids(values: Fields, side: int, default: Preprocessing) -> tuple[Size, ...]:
    """Grids of tiles from resolutions in pixels: a list, a list as text, or a range of grids."""
    pinpoints = values.get("image_grid_pinpoints", None)
    if pinpoints is None:
        return default.grids
    if isinstance(pinpoints, str):
        if grids := parse_grids(pinpoints):
            return grids
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError):
            pinpoints = None
    try:
        sizes = [(index(width), index(height)) for width, height in pinpoints]
    except (TypeError, ValueError):
        raise CheckpointError(
            f"{values.path}: image_grid_pinpoints is {values['image_grid_pinpoints']!r:.80}; it "
            "must be a list of [width, height] in pixels"
        ) from None
    if not sizes:
        raise CheckpointError(f"{values.path}: image_grid_pinpoints is empty; give at least one")
    for width, height in sizes:
        if width < 1 or height < 1 or width % side or height % side:
            raise CheckpointError(
                f"{values.path}: image_grid_pinpoints has {width} x {height}, which is not a "
                f"multiple of the tower's image_size, {side}"
            )
    return tuple((width // side, height // side) for width, height in sizes)
