"""How pixels are made, written into a checkpoint and read back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convert.writing import published_config
from tests.support.checkpoints import MICRO
from vxl_jax.checkpoints.hf_config import read_config
from vxl_jax.checkpoints.hf_preprocessing import preprocessing_fields, read_preprocessing
from vxl_jax.checkpoints.json_files import Fields
from vxl_jax.config import with_changes
from vxl_jax.errors import CheckpointError, ConfigError
from vxl_jax.media import MediaOptions
from vxl_jax.media.preprocessing import Preprocessing, tile_grids
from vxl_jax.presets import tiny

EVERY = Preprocessing(
    image_mode="square",
    grids=tile_grids(1, 6),
    frame_sampling="fps",
    max_frames=77,
    video_fps=0.5,
    time_prompt=True,
    resize="stretch",
    base_tile=True,
    pad_several=True,
    background=(1, 2, 3),
    options=MediaOptions("pyav", square_pixels=True, tone_map=True, color_profile=True),
)
"""Another value than the default in every field."""


def read(values: dict[str, Any]) -> Preprocessing:
    return read_preprocessing(Fields(values, Path("config.json")), tiny().tower, "video_xl")


def test_every_field_comes_back():
    default = Preprocessing()
    assert not any(getattr(EVERY, name) == value for name, value in vars(default).items())
    for preprocessing in (EVERY, default):
        config = with_changes(tiny(), preprocessing=preprocessing)
        fields = json.loads(json.dumps(preprocessing_fields(config)))
        assert read(fields) == preprocessing
    config = with_changes(tiny(), preprocessing=EVERY)
    assert read(json.loads(json.dumps(published_config(config)))) == EVERY


def test_a_published_checkpoint_is_asked_as_its_evaluations_do():
    preprocessing = read({})
    assert preprocessing == Preprocessing()
    assert (preprocessing.frame_sampling, preprocessing.max_frames) == ("uniform", 128)
    assert preprocessing.grids == tile_grids(2, 49)
    micro = read_config(MICRO, vision=MICRO.parent / "clip-vision").preprocessing
    pinpoints = json.loads((MICRO / "config.json").read_text())["image_grid_pinpoints"]
    grids = tuple((width // 112, height // 112) for width, height in pinpoints)
    assert micro == replace(preprocessing, grids=grids)
    assert grids != preprocessing.grids


@pytest.mark.parametrize("pinpoints", [[[56, 112], [112, 56]], "[(56, 112), (112, 56)]"])
def test_pinpoints_are_read_in_their_order(pinpoints: Any):
    assert read({"image_grid_pinpoints": pinpoints}).grids == ((1, 2), (2, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_aspect_ratio": "crop"}, "image_aspect_ratio is 'crop'; only 'anyres' or 'square'"),
        ({"image_aspect_ratio": "anyres_max_0"}, "'anyres_max_0'; it must leave at least one tile"),
        ({"vxl_preprocessing": {"background": [0, 256, 0]}}, "background is"),
        ({"image_grid_pinpoints": [[56, 100]]}, "has 56 x 100, which is not a multiple of .* 56"),
        ({"image_grid_pinpoints": [[0, 56]]}, "has 0 x 56"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints is empty"),
        ({"image_grid_pinpoints": [[56.5, 56]]}, "must be a list of"),
        ({"vxl_preprocessing": {"max_frames": 12.5}}, "max_frames is 12.5"),
        ({"vxl_preprocessing": {"options": {"tone_map": "yes"}}}, "tone_map is 'yes'"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6"}, "must be a list of"),
        ({"image_grid_pinpoints": [56]}, "must be a list of"),
        ({"image_grid_pinpoints": 3}, "must be a list of"),
        ({"add_time_instruction": "yes"}, "add_time_instruction is 'yes'"),
        ({"vxl_preprocessing": [1]}, "vxl_preprocessing is .* must be an object"),
        ({"vxl_preprocessing": {"later": 1}}, "has later, which this version does not read"),
        ({"vxl_preprocessing": {"frame_sampling": "all"}}, "frame_sampling is 'all'"),
        ({"vxl_preprocessing": {"max_frames": 0}}, "both must be positive"),
        ({"vxl_preprocessing": {"max_frames": "8"}}, "vxl_preprocessing"),
        ({"vxl_preprocessing": {"options": {"decoder": "x"}}}, "decoder is 'x'"),
        ({"vxl_preprocessing": {"options": {"hdr": True}}}, "has hdr"),
    ],
)
def test_what_cannot_be_read_is_named(fields: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        read(fields)


def test_it_is_refused_before_any_weight_is_read(tmp_path: Path):
    shutil.copytree(MICRO, tmp_path / "hf")
    values = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(values | {"image_aspect_ratio": "crop"}))
    with pytest.raises(CheckpointError, match="image_aspect_ratio"):
        read_config(tmp_path / "hf", vision=MICRO.parent / "clip-vision")


@pytest.mark.parametrize(
    "fields", [{"image_mode": "crop"}, {"grids": ()}, {"grids": ((0, 1),)}, {"video_fps": 0.0}]
)
def test_values_out_of_range_are_refused(fields: dict[str, Any]):
    with pytest.raises(ConfigError, match="Preprocessing"):
        Preprocessing(**fields)
