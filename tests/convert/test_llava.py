"""LLaVA-Video there and back, and the fields that say which family a checkpoint is of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import convert_from_hf, convert_to_hf
from tests.support.checkpoints import (
    MICRO,
    assert_same,
    run_config,
    save_published,
    tensors_in,
)
from train.config import ModelSection
from train.run.setup import read_model_config
from vxl_jax.checkpoints.hf_config import read_config
from vxl_jax.checkpoints.load import load_network
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import CheckpointError, ConfigError
from vxl_jax.presets import demo, tiny, tiny_llava

TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.mark.parametrize(
    "config",
    [
        tiny_llava(),
        tiny_llava(slow_every=3, faster_token=True, newline="frame", pool_mode="max"),
        tiny_llava(newline="one_token", max_image_tiles=None),
        tiny_llava(vision=tiny().tower, image_tokens="flat", newline="none", max_image_tiles=None),
        tiny_llava(compression=demo().compression),
    ],
    ids=["published", "SlowFast", "OneVision", "LLaVA-Qwen", "beacons"],
)
def test_there_and_back_every_tensor_is_the_same(config: VideoXLConfig, tmp_path: Path):
    source = save_published(config, tmp_path / "source")
    extra = {
        f"{TOWER}post_layernorm.{name}": np.ones(16, np.float32) for name in ("weight", "bias")
    }
    if config.tower.kind == "siglip":
        extra[f"{TOWER}head.probe"] = np.ones((1, 1, 16), np.float32)
        extra[f"{TOWER}encoder.layers.2.mlp.fc1.bias"] = np.full(32, 2, np.float32)
    save_file(extra, source / "extra.safetensors")
    assert read_config(source) == config
    convert_from_hf(source, tmp_path / "ours")
    assert load_network(tmp_path / "ours").config == config
    convert_to_hf(tmp_path / "ours", tmp_path / "back")
    assert_same(tensors_in(tmp_path / "back"), tensors_in(source))
    assert read_config(tmp_path / "back") == config


def test_the_published_fields_are_read(llava: Path):
    values = json.loads((llava / "config.json").read_text())
    assert values["image_aspect_ratio"] == "anyres_max_2"
    assert values["mm_newline_position"] == "grid"
    assert values["mm_patch_merge_type"] == "spatial_unpad"
    assert values["force_sample"] is True

    def read(**changes: Any) -> VideoXLConfig:
        return read_config(llava, overrides=changes)

    base = tiny_llava()
    assert read(mm_newline_position="no_token").newline == "none"
    assert read(image_aspect_ratio="anyres").max_image_tiles is None
    assert read(image_aspect_ratio="pad").preprocessing.image_mode == "pad"
    assert read(mm_spatial_pool_stride=3).pool_stride == 3
    slow_fast = read(add_faster_video=True, faster_token_stride=4)
    assert (slow_fast.slow_every, slow_fast.faster_token) == (4, False)
    assert read(add_faster_video=False, faster_token_stride=4) == base
    grids = read(image_grid_pinpoints="(1x1),...,(2x3)").preprocessing.grids
    assert grids == ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3))
    strided = read(force_sample=False, vxl_preprocessing=None).preprocessing
    assert (strided.frame_sampling, strided.max_frames) == ("strided", 64)
    assert read(mm_vision_select_layer=-1) == base  # SigLIP's features are always the same
    assert read_config(MICRO).family == "video_xl"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"add_faster_video": True, "faster_token_stride": 0}, "faster_token_stride is 0"),
        ({"image_grid_pinpoints": [[70, 100]]}, "70 x 100, which is not a multiple of .* 70"),
        ({"mm_patch_merge_type": "spatial_unpad_maxpool2x2"}, "mm_patch_merge_type is"),
        ({"mm_newline_position": "row"}, "mm_newline_position is 'row'"),
        ({"mm_spatial_pool_mode": "conv"}, "mm_spatial_pool_mode is 'conv'"),
        ({"mm_spatial_pool_stride": 9}, "pool_stride 9 is larger than the tower's grid"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer'"),
        ({"force_sample": "yes"}, "force_sample is 'yes'"),
    ],
)
def test_what_is_not_implemented_is_named(llava: Path, fields: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        read_config(llava, overrides=fields)


def test_a_run_for_another_family_is_refused(llava: Path):
    for checkpoint, preset in ((llava, "tiny"), (MICRO, "tiny_llava")):
        with pytest.raises(ConfigError, match=r"is of the family .*, and model\.preset"):
            read_model_config(run_config(ModelSection(checkpoint=str(checkpoint), preset=preset)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "video_xl"}, "averages all frames and tiles alike"),
        ({"image_tokens": "pooled"}, "image_tokens is 'pooled'"),
        ({"image_tokens": "flat"}, "'flat' with newline 'grid'"),
        ({"preprocessing": tiny().preprocessing}, "base_tile must be true"),
    ],
)
def test_what_a_checkpoint_cannot_say_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        tiny_llava(**changes)
    with pytest.raises(ConfigError, match="averages all frames"):
        tiny(pool_mode="max")
