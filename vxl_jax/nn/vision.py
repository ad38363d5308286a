"""Vision towers, frames to features of patches: CLIP (arXiv 2103.00020), SigLIP (arXiv 2303.15343).

Both are pre-norm transformers. CLIP has a class token, a norm before the first layer and a quick
GELU; SigLIP has a bias in its patch embedding and the tanh approximation of GELU.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Num

from vxl_jax.config import DTYPES, TowerKind, VideoXLConfig, VisionConfig
from vxl_jax.nn.backend import gpu_capability, on_cpu
from vxl_jax.nn.layers import ModuleState, make_linear
from vxl_jax.nn.scan import recomputed, stacked
from vxl_jax.nn.sharding import by_sample


def normalize_pixels(
    pixels: Num[Array, "*batch C"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "*batch C"]:
    """Normalise uint8 RGB by mean and standard deviation of each channel, in float32.

    Floating-point pixels are assumed to be normalised and returned unchanged.
    """
    if jnp.issubdtype(pixels.dtype, jnp.floating):
        return pixels
    return (pixels.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def quick_gelu(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Sigmoid approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[TowerKind, Callable[[Array], Array]] = {
    "clip": quick_gelu,
    "siglip": partial(jax.nn.gelu, approximate=True),
}


class VisionLayer(nnx.Module):
    """Pre-norm transformer layer with bidirectional attention."""

    def __init__(self, config: VideoXLConfig, *, rngs: nnx.Rngs):
        c = config.tower
        linear = partial(make_linear, config, rngs)
        norm = _layer_norm(config, rngs)
        self.attention_norm = norm()
        self.q, self.k, self.v, self.o = (linear(c.width, c.width) for _ in range(4))
        self.mlp_norm = norm()
        self.up = linear(c.width, c.mlp_width)
        self.down = linear(c.mlp_width, c.width)
        self.heads = c.heads
        self.activation = ACTIVATIONS[c.kind]

    def __call__(self, x: Float[Array, "F P D"], patches: int) -> Float[Array, "F P D"]:
        """Run the layer over the patches of each frame; those from `patches` on are padding."""
        y = self.attention_norm(x)
        heads = partial(rearrange, pattern="F P (N H) -> F P N H", N=self.heads)
        y = _attend(heads(self.q(y)), heads(self.k(y)), heads(self.v(y)), patches)
        x = x + self.o(rearrange(y, "F P N H -> F P (N H)"))
        return x + self.down(self.activation(self.up(self.mlp_norm(x))))


def _attend(
    q: Float[Array, "F P N H"], k: Float[Array, "F P N H"], v: Float[Array, "F P N H"], patches: int
) -> Float[Array, "F P N H"]:
    """Attend to the first `patches`, with the softmax in float32.

    On a GPU, in half precision, cuDNN does it and stores no scores. On a CPU it goes head by head:
    the scores of one stay in the caches.
    """
    if has_fused_attention(q.dtype):
        lengths = jnp.full(k.shape[:1], patches, jnp.int32)
        return jax.nn.dot_product_attention(
            *(q, k, v),
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )

    def one(head: tuple[Array, Array, Array]) -> Array:
        q, k, v = head
        scores = jnp.einsum("PH,QH->PQ", q, k, preferred_element_type=jnp.float32)
        scores *= q.shape[-1] ** -0.5
        likely = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = likely.sum(-1, keepdims=True)
        mixed = jnp.matmul(likely.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (mixed / total).astype(v.dtype)

    if is_one_cpu():
        heads = tuple(rearrange(x, "F P N H -> (F N) P H") for x in (q, k, v))
        return rearrange(lax.map(one, heads), "(F N) P H -> F P N H", F=len(q))
    return jax.vmap(jax.vmap(one, in_axes=1, out_axes=1))((q, k, v))


def is_one_cpu() -> bool:
    """Whether programs are for a CPU alone, not for a mesh of which each device has some frames."""
    return on_cpu() and jax.sharding.get_abstract_mesh().size <= 1


def has_fused_attention(dtype: DTypeLike) -> bool:
    """Whether cuDNN computes the tower's attention: half precision, on a GPU that it supports."""
    return dtype in (jnp.bfloat16, jnp.float16) and (gpu_capability() or (0, 0)) >= (8, 0)


def bytes_of_frame(config: VisionConfig, dtype: DTypeLike) -> int:
    """Bytes of one frame in a layer: of attention scores, or of hidden values without them."""
    tokens = config.grid**2 + 1
    if has_fused_attention(dtype):
        return tokens * (config.mlp_width + 4 * config.width) * jnp.dtype(dtype).itemsize
    return 4 * config.heads * tokens**2


class VisionTower(nnx.Module):
    """A vision transformer, up to the layer whose hidden states are the features."""

    def __init__(self, config: VideoXLConfig, *, rngs: nnx.Rngs):
        c = config.tower
        self.config = config
        param_dtype = DTYPES[config.param_dtype]
        is_clip = c.kind == "clip"
        self.patch_embed = make_linear(
            config, rngs, c.patch_size**2 * 3, c.width, use_bias=not is_clip
        )
        init = nnx.initializers.normal(0.02)
        if is_clip:
            self.class_embed = nnx.Param(init(rngs.params(), (c.width,), param_dtype))
            self.pre_norm = _layer_norm(config, rngs)()
        tokens = c.grid**2 + is_clip
        self.position_embed = nnx.Param(init(rngs.params(), (tokens, c.width), param_dtype))
        self.layers = stacked(partial(VisionLayer, config), c.layers_used, rngs)

    @jax.named_scope("tower")
    def __call__(self, pixels: Num[Array, "F S S 3"]) -> Float[Array, "F P D"]:
        """Compute the features of all patches of frames, without the class token.

        pixels: uint8 RGB, or floats that are already normalised.
        """
        graph, params = nnx.split(self.layers)
        x = self.embed(pixels)
        patches = x.shape[1]
        if has_fused_attention(x.dtype):  # matrix products on a GPU want multiples of 8
            x = jnp.pad(x, ((0, 0), (0, -patches % 8), (0, 0)))

        def body(x: Array, layer_params: ModuleState) -> tuple[Array, None]:
            layer = nnx.merge(graph, layer_params)
            # What is between two products stays in the caches of a CPU. Gradients of parameters are
            # summed frame by frame in their dtype: in bfloat16 that would lose most of them.
            if is_one_cpu() and self.config.param_dtype == "float32":
                return lax.map(lambda frame: layer(frame[None], patches)[0], x), None
            return by_sample(layer(x, patches)), None

        x, _ = lax.scan(recomputed(body, self.config.remat), x, params)
        return x[:, self.config.tower.kind == "clip" : patches]

    def embed(self, pixels: Num[Array, "F S S 3"]) -> Float[Array, "F tokens D"]:
        """Compute what the first layer takes: embeddings of all tokens with their positions.

        pixels: as above.
        """
        c = self.config.tower
        dtype = DTYPES[self.config.dtype]
        pixels = normalize_pixels(pixels, c.image_mean, c.image_std).astype(dtype)
        side = c.grid * c.patch_size
        patches = rearrange(
            pixels[:, :side, :side],
            "F (h p) (w q) C -> F (h w) (p q C)",
            p=c.patch_size,
            q=c.patch_size,
        )
        x = by_sample(self.patch_embed(by_sample(patches)))
        if c.kind == "siglip":
            return x + self.position_embed[...].astype(dtype)
        first = jnp.broadcast_to(self.class_embed[...].astype(dtype), (x.shape[0], 1, c.width))
        x = jnp.concatenate([first, x], axis=1) + self.position_embed[...].astype(dtype)
        return by_sample(self.pre_norm(x))


def _layer_norm(config: VideoXLConfig, rngs: nnx.Rngs) -> Callable[[], nnx.LayerNorm]:
    return partial(
        nnx.LayerNorm,
        config.tower.width,
        epsilon=config.tower.norm_eps,
        dtype=DTYPES[config.dtype],
        param_dtype=DTYPES[config.param_dtype],
        use_fast_variance=False,
        rngs=rngs,
    )
