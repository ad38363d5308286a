"""Projector: features of the vision tower to visual tokens.

Sources: LLaVA-1.5's two linear layers (arXiv 2310.03744); Video-XL's 2 × 2 average pooling after
them (arXiv 2409.14485, section 3.1); pooling, newlines and unpadded images of LLaVA-Video (arXiv
2410.02713, appendix A).
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx
from jax import Array
from jaxtyping import Float

from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.media.layout import FASTER, NEWLINE
from vxl_jax.nn.layers import make_linear
from vxl_jax.nn.sharding import by_sample
from vxl_jax.stream.visual import VisualInput

# Registered here and not in `vxl_jax.stream`: data workers make batches without importing JAX.
jax.tree_util.register_dataclass(
    VisualInput, data_fields=["pixels", "patch", "weight", "is_max"], meta_fields=[]
)


class Projector(nnx.Module):
    """Two linear layers with an exact GELU between, and what becomes of the patches after them.

    newline, faster: the learned vectors of the layouts that have them.
    """

    def __init__(self, config: VideoXLConfig, *, rngs: nnx.Rngs):
        linear = partial(make_linear, config, rngs)
        width = config.language.width
        self.config = config
        self.up = linear(config.tower.width, width)
        self.down = linear(width, width)
        vector = nnx.initializers.normal(width**-0.5)
        param_dtype = DTYPES[config.param_dtype]
        if config.layout.has_newline:
            self.newline = nnx.Param(vector(rngs.params(), (width,), param_dtype))
        if config.layout.faster_token:
            self.faster = nnx.Param(vector(rngs.params(), (width,), param_dtype))

    @jax.named_scope("projector")
    def __call__(self, features: Float[Array, "F P features"]) -> Float[Array, "F tokens D"]:
        """Project the features of all patches.

        Returns:
            The visual tokens of each frame, where the layout of the model `is_uniform`; else the
            projected patches (tokens = P), for `merge`.
        """
        x = by_sample(self.up(features))
        x = by_sample(self.down(jax.nn.gelu(x, approximate=False)))
        if not self.config.layout.is_uniform:
            return x
        stride, grid = self.config.pool_stride, self.config.tower.grid
        side = grid // stride * stride
        x = rearrange(x, "F (h w) D -> F h w D", h=grid)[:, :side, :side]
        return reduce(x, "F (h p) (w q) D -> F (h w) D", "mean", p=stride, q=stride)

    @jax.named_scope("merge")
    def merge(
        self, patches: Float[Array, "B patches D"], tokens: VisualInput
    ) -> Float[Array, "B V D"]:
        """Make visual tokens of projected patches and learned vectors, summed in float32.

        patches: of all frames of each sample, in order.
        """
        dtype = patches.dtype
        patch, weight = jnp.asarray(tokens.patch), jnp.asarray(tokens.weight)
        source = [patches]
        for number, name in ((NEWLINE, "newline"), (FASTER, "faster")):
            if hasattr(self, name):
                place = sum(some.shape[1] for some in source)
                patch = jnp.where(patch == number, place, patch)
                row = getattr(self, name)[...].astype(dtype)
                source.append(jnp.broadcast_to(row, (len(patches), 1, len(row))))
        rows = by_sample(jnp.concatenate(source, axis=1))

        def taken(place: int) -> Array:
            return by_sample(jax.vmap(lambda rows, index: rows[index])(rows, patch[..., place]))

        places = range(patch.shape[-1])
        mean = jnp.zeros((*patch.shape[:2], patches.shape[-1]), jnp.float32)
        for i in places:
            mean += taken(i).astype(jnp.float32) * weight[..., i, None]
        if tokens.is_max is None:
            return by_sample(mean.astype(dtype))
        low = jnp.finfo(dtype).min
        largest = jnp.full_like(mean, low)
        for i in places:
            largest = jnp.maximum(largest, jnp.where(weight[..., i, None] > 0, taken(i), low))
        chosen = jnp.where(jnp.asarray(tokens.is_max)[..., None], largest, mean)
        return by_sample(chosen.astype(dtype))
