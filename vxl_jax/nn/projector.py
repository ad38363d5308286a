"""Projector: features of the vision tower to visual tokens."""

import jax
from einops import rearrange, reduce
from flax import nnx
from jax import Array

from vxl_jax.config import VideoXLConfig
from vxl_jax.nn.layers import linear_maker
from vxl_jax.nn.sharding import by_sample


class Projector(nnx.Module):
    """Two linear layers with an exact GELU between, then average pooling over patches."""

    def __init__(self, config: VideoXLConfig, *, rngs: nnx.Rngs):
        linear = linear_maker(config, rngs)
        self.config = config
        self.up = linear(config.tower.width, config.language.width)
        self.down = linear(config.language.width, config.language.width)

    def __call__(self, features: Array) -> Array:
        """Features [F, patches, width of the tower] -> visual tokens [F, tokens_per_frame, D]."""
        x = by_sample(self.up(features))
        x = by_sample(self.down(jax.nn.gelu(x, approximate=False)))
        stride, grid = self.config.pool_stride, self.config.tower.grid
        side = grid // stride * stride
        x = rearrange(x, "F (h w) D -> F h w D", h=grid)[:, :side, :side]
        return reduce(x, "F (h p) (w q) D -> F (h w) D", "mean", p=stride, q=stride)
