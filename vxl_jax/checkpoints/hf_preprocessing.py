"""Preprocessing in the config.json of a checkpoint.

Fields that the published code reads have its names: `image_aspect_ratio`, `image_grid_pinpoints`
and `add_time_instruction`. The rest is an object `vxl_preprocessing`, which that code ignores.
"""

import ast
from dataclasses import asdict
from operator import index
from typing import Any

from vxl_jax.checkpoints.json_files import Fields
from vxl_jax.errors import CheckpointError, VxlError
from vxl_jax.media import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.media.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from vxl_jax.media.tiles import Size

OWN = "vxl_preprocessing"
"""Field of config.json with what the published code has no field for."""

OWN_FIELDS = ("frame_sampling", "max_frames", "video_fps")


def read_preprocessing(values: Fields, side: int) -> Preprocessing:
    """Read how a model's pixels are made; as in the published inference code where it is silent.

    Args:
      values: of config.json.
      side: of the tower's input in pixels.

    Raises:
      CheckpointError: a field has a value that is not implemented or does not fit the tower.
    """
    values.require({"image_aspect_ratio": ("anyres", "square", None)})
    own = Fields(_object(values, OWN), values.path)
    options = Fields(_object(own, "options"), values.path)
    known = (*OWN_FIELDS, "options")
    if unknown := [*own.values.keys() - known, *options.values.keys() - asdict(DEFAULT_OPTIONS)]:
        raise CheckpointError(
            f"{values.path}: {OWN} has {', '.join(sorted(unknown))}, which this version does not "
            "read; use the version that wrote it"
        )
    values.require({"add_time_instruction": (False, True, None)})
    grids = _read_grids(values, side)
    try:
        return Preprocessing(
            image_mode=values.get("image_aspect_ratio", None) or DEFAULT_PREPROCESSING.image_mode,
            grids=grids,
            time_prompt=bool(values.get("add_time_instruction", False)),
            options=MediaOptions(**options.values),
            **{name: value for name, value in own.values.items() if name in OWN_FIELDS},
        )
    except (VxlError, TypeError) as error:
        raise CheckpointError(f"{values.path}: {OWN}: {error}") from error


def preprocessing_fields(preprocessing: Preprocessing, side: int) -> dict[str, Any]:
    """Write what `read_preprocessing` reads.

    Args:
      preprocessing: of the model.
      side: of the tower's input in pixels.
    """
    return {
        "image_aspect_ratio": preprocessing.image_mode,
        "image_grid_pinpoints": [[w * side, h * side] for w, h in preprocessing.grids],
        "add_time_instruction": preprocessing.time_prompt,
        OWN: {
            **{name: getattr(preprocessing, name) for name in OWN_FIELDS},
            "options": asdict(preprocessing.options),
        },
    }


def _object(values: Fields, name: str) -> dict[str, Any]:
    found = values.get(name, None) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{values.path}: {name} is {found!r}; it must be an object")
    return found


def _read_grids(values: Fields, side: int) -> tuple[Size, ...]:
    """Grids of tiles from resolutions in pixels: a list, or a list as text."""
    pinpoints = values.get("image_grid_pinpoints", None)
    if pinpoints is None:
        return DEFAULT_PREPROCESSING.grids
    if isinstance(pinpoints, str):
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
