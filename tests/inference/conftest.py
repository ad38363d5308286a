"""A small model that watches."""

from typing import Any

import pytest
from flax import nnx

from vxl_jax import Model
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import demo


@pytest.fixture(scope="module")
def model(demo_tokenizer: Any) -> Model:
    model = Model(VideoXL(demo(), rngs=nnx.Rngs(3)), demo_tokenizer)
    model.windows_at_once = 2
    return model
