"""Projector: features of the vision tower to visual tokens.

Sources: LLaVA-1.5's two linear layers (arXiv 2310.03744); Video-XL's 2 × 2 average pooling after
them (arXiv 2409.14485, section 3.1).
"""

from functools import partial

import jax
from einops import rearrange, reduce
from flax import nnx
from jax import Array
from jaxtyping import Float

from vxl_jax.config import VideoXLConfig
from vxl_jax.nn.layers import make_linear
from vxl_jax.nn.sharding import by_sample


class Projector(nnx.Module):
    """Two linear layers with an exact GELU between, then average pooling over patches."""

    def __init__(self, config: VideoXLConfig, *, rngs: nnx.Rngs):
        linear = partial(make_linear, config, rngs)
        self.config = config
        self.up = linear(config.tower.width, config.language.width)
        self.down = linear(config.language.width, config.language.width)

    def __call__(self, features: Float[Array, "F P features"]) -> Float[Array, "F tokens D"]:
        """Project the features of all patches, and pool them to the visual tokens of a frame."""
        x = by_sample(self.up(features))
        x = by_sample(self.down(jax.nn.gelu(x, approximate=False)))
        stride, grid = self.config.pool_stride, self.config.tower.grid
        side = grid // stride * stride
        x = rearrange(x, "F (h w) D -> F h w D", h=grid)[:, :side, :side]
        return reduce(x, "F (h p) (w q) D -> F (h w) D", "mean", p=stride, q=stride)
