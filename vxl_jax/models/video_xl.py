"""Video-XL: vision tower, projector and language model as one module."""

from dataclasses import replace
from typing import Protocol, overload

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Num

from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.errors import ConfigError
from vxl_jax.nn.attention import AttentionName
from vxl_jax.nn.collect import Collect, Collected, LayerFn
from vxl_jax.nn.groups import GROUP_FIELDS, make_group, take_group
from vxl_jax.nn.memory import Memory, empty_memory
from vxl_jax.nn.projector import Projector
from vxl_jax.nn.qwen2 import LanguageModel
from vxl_jax.nn.scan import map_in_blocks
from vxl_jax.nn.sharding import by_sample, sample_shards
from vxl_jax.nn.vision import VisionTower, bytes_of_frame
from vxl_jax.stream.batch import StreamBatch
from vxl_jax.stream.visual import Pixels, VisualInput

FRAME_BLOCK_BYTES = 2**29
"""Most bytes of a layer of the vision tower on a device at once (`bytes_of_frame`); above it,
frames are encoded in blocks."""


class VisionEncoder(Protocol):
    """What a vision tower has to be, besides an `nnx.Module`: a function from frames to features.

    F frames or tiles of S = `config.tower.image_size` pixels a side, uint8 RGB (or floats, if the
    caller has normalised them). `Projector` expects P = `config.tower.grid`**2 patches, row by row,
    of `config.tower.width` features; a tower with another shape needs another `model.projector`,
    see `Projector`.
    """

    def __call__(self, pixels: Num[Array, "F S S 3"]) -> Float[Array, "F P features"]:
        """Encode frames."""
        ...


class VideoXL(nnx.Module):
    """Parameters of the whole model; random until a checkpoint is loaded into it.

    Args:
        config: sizes and options.
        vision: a tower (an `nnx.Module`; see `VisionEncoder`) in place of the one that
            `config.vision` describes. `model.vision` may also be assigned later.
        attention: implementation of the language model's attention; see `window_attention`.
        rngs: for random weights.

    Raises:
        ConfigError: `vision` is given and `config.vision` is None.
    """

    def __init__(
        self,
        config: VideoXLConfig,
        *,
        rngs: nnx.Rngs,
        vision: VisionEncoder | None = None,
        attention: AttentionName | None = None,
    ):
        self.config = config
        if config.vision is not None:
            self.vision = VisionTower(config, rngs=rngs) if vision is None else vision
            self.projector = Projector(config, rngs=rngs)
        elif vision is not None:
            raise ConfigError(
                "VideoXLConfig.vision: None, but a tower is given; describe its image_size, "
                "patch_size and width with a VisionConfig"
            )
        self.language = LanguageModel(config, attention, rngs=rngs)
        if config.compression is not None:
            start_beacons(self.language, rngs.params())

    def encode(self, pixels: Pixels) -> Float[Array, "B V D"]:
        """Encode frames or tiles to visual tokens.

        pixels: see `Pixels`. Of pixels alone, V is `config.layout.count(F)`.

        Raises:
            ConfigError: the model has no vision tower, or pixels alone do not say which tokens its
                layout makes of them.
        """
        tokens = pixels if isinstance(pixels, VisualInput) else None
        frames = pixels.pixels if isinstance(pixels, VisualInput) else pixels
        tower_config, batch = self.config.tower, frames.shape[0]
        if tokens is None and not self.config.layout.is_uniform:
            raise ConfigError(
                "the model does not make the same tokens of every frame: give `batch_visual` the "
                "tokens of each block (`config.layout`), and its result instead of pixels alone"
            )
        frame_bytes = bytes_of_frame(tower_config, DTYPES[self.config.dtype])
        most = FRAME_BLOCK_BYTES // (frame_bytes * -(-batch // sample_shards()))
        graph, params = nnx.split((self.vision, self.projector))

        def encode_some(frames: Array) -> Array:
            tower, projector = nnx.merge(graph, params)
            frames = by_sample(rearrange(frames, "F B height width C -> (B F) height width C"))
            tokens = by_sample(projector(tower(frames)))
            return rearrange(tokens, "(B F) P D -> F B P D", B=batch)

        frames = rearrange(jnp.asarray(frames), "B F height width C -> F B height width C")
        features = map_in_blocks(encode_some, frames, max(1, most))
        features = by_sample(rearrange(features, "F B P D -> B (F P) D"))
        return features if tokens is None else self.projector.merge(features, tokens)

    @overload
    def __call__(
        self,
        streams: StreamBatch,
        visual: Float[Array, "B V D"] | None = ...,
        *,
        collect: None = ...,
        layer_fn: LayerFn | None = ...,
    ) -> Float[Array, "B G*T D"]: ...

    @overload
    def __call__(
        self,
        streams: StreamBatch,
        visual: Float[Array, "B V D"] | None = ...,
        *,
        collect: Collect,
        layer_fn: LayerFn | None = ...,
    ) -> tuple[Float[Array, "B G*T D"], Collected]: ...

    def __call__(
        self,
        streams: StreamBatch,
        visual: Float[Array, "B V D"] | None = None,
        *,
        collect: Collect | None = None,
        layer_fn: LayerFn | None = None,
    ) -> Array | tuple[Array, Collected]:
        """Compute the hidden states of all tokens after the last layer, [B, G * T, D].

        Args:
            streams: from `batch_streams`.
            visual: from `encode`; None for streams of text alone.
            collect: layers whose activations are returned as well. Each array of `Collected` has a
                group axis in front: [G, layers, B, T, …].
            layer_fn: hook for the output of every layer, to steer or patch it.

        Returns:
            The hidden states; with `collect`, a pair of them and `Collected`.
        """
        if streams.kind.shape[0] > 1:
            memory = empty_memory(self.config, streams.kind.shape[1], streams.memory)
            hidden, _, collected = scan_groups(
                *(self, streams, visual, memory),
                keep_hidden=True,
                collect=collect,
                layer_fn=layer_fn,
            )
            hidden = rearrange(hidden, "G B T D -> B (G T) D")
        else:
            group = take_group(streams, 0)
            hidden, collected = self.language.run_group_alone(
                self.language.embed_group(group, visual),
                make_group(self.config.language, group),
                streams.memory,
                collect=collect,
                layer_fn=layer_fn,
            )
            collected = jax.tree.map(lambda x: x[None], collected)
        return hidden if collected is None else (hidden, collected)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Read float32 logits from hidden states after the last layer."""
        return self.language.logits(hidden)


def start_beacons(language: LanguageModel, key: Array) -> None:
    """Initialise beacon projections from q, k, v, and the beacon embedding from a random token."""
    attention = language.layers.attention
    for name in ("q", "k", "v"):
        nnx.update(getattr(attention, f"beacon_{name}"), nnx.state(getattr(attention, name)))
    row = jax.random.randint(key, (1,), 0, language.embed.num_embeddings)
    language.beacon_embed[...] = language.embed.embedding[row]


def scan_groups(
    model: VideoXL,
    streams: StreamBatch,
    visual: Float[Array, "B V D"] | None,
    memory: Memory,
    bases: tuple[Memory, ...] = (),
    *,
    keep_hidden: bool = False,
    collect: Collect | None = None,
    layer_fn: LayerFn | None = None,
) -> tuple[Array, Memory, Collected | None]:
    """Run the groups one after another, the memory carried from each to the next.

    Args:
        model: the network.
        streams: from `batch_streams`.
        visual: from `VideoXL.encode`; None for streams of text alone.
        memory: what comes before the streams, with room for their persistent tokens.
        bases: memories of one sample each, shared by all samples, which come before `memory` in
            stream order, one after another; the ranks of the streams start after the sum of all
            lengths.
        keep_hidden: return the hidden states of all groups, [G, B, T, D], instead of those of the
            last group, [B, T, D].
        collect: layers whose activations are returned as well.
        layer_fn: hook for the output of every layer.

    Returns:
        Hidden states, the memory with the persistent tokens of all groups, and the activations of
        the layers of `collect`: each array has a group axis in front, [G, layers, B, T, …].
    """
    language_config = model.config.language
    graph, params = nnx.split(model.language)
    base_lengths = [base.length for base in bases]

    def step(
        carry: tuple[Memory, Array], arrays: dict[str, Array]
    ) -> tuple[tuple[Memory, Array], tuple[Array | None, Collected | None]]:
        language = nnx.merge(graph, params)
        group = replace(streams, **arrays)  # type: ignore[arg-type]
        x, memory, collected = language.run_group(
            language.embed_group(group, visual),
            make_group(language_config, group, base_lengths),
            *(carry[0], bases),
            collect=collect,
            layer_fn=layer_fn,
        )
        return (memory, x), (x if keep_hidden else None, collected)

    arrays = {name: getattr(streams, name) for name in GROUP_FIELDS}
    shape = (*streams.kind.shape[1:], language_config.width)
    last = jnp.zeros(shape, memory.keys.dtype)
    (memory, last), (hidden, collected) = lax.scan(step, (memory, last), arrays)
    memory = replace(memory, length=memory.length + streams.length)
    return last if hidden is None else hidden, memory, collected
