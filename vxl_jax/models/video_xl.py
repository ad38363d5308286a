"""Video-XL: vision tower, projector and language model, and the pure functions over them."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array, lax

from vxl_jax.config import VideoXLConfig
from vxl_jax.nn.clip import VisionTower
from vxl_jax.nn.groups import GROUP_FIELDS, make_group, take_group
from vxl_jax.nn.memory import Memory, empty_memory
from vxl_jax.nn.projector import Projector
from vxl_jax.nn.qwen2 import LanguageModel
from vxl_jax.nn.scan import map_in_blocks
from vxl_jax.nn.sharding import by_sample, sample_shards
from vxl_jax.stream.batch import StreamBatch

FRAME_BLOCK_BYTES = 2**29
"""Most bytes of the vision tower's attention scores on a device at once; above it, frames are
encoded in blocks."""


class VideoXL(nnx.Module):
    """Parameters of the whole model; random until a checkpoint is loaded into it."""

    def __init__(self, config: VideoXLConfig, *, rngs: nnx.Rngs):
        self.config = config
        if config.vision is not None:
            self.vision = VisionTower(config, rngs=rngs)
            self.projector = Projector(config, rngs=rngs)
        self.language = LanguageModel(config, rngs=rngs)
        if config.compression is not None:
            start_beacons(self.language, rngs.params())

    def encode(self, pixels: Array | np.ndarray) -> Array:
        """Frames or tiles [B, F, S, S, 3] -> visual tokens [B, F * tokens_per_frame, D].

        uint8 RGB, or floats that are already normalised.

        Raises: ConfigError if the model has no vision tower.
        """
        vision, batch = self.config.tower, pixels.shape[0]
        frame_bytes = 4 * vision.heads * (vision.grid**2 + 1) ** 2
        most = FRAME_BLOCK_BYTES // (frame_bytes * -(-batch // sample_shards()))
        graph, params = nnx.split((self.vision, self.projector))

        def encode_some(frames: Array) -> Array:
            tower, projector = nnx.merge(graph, params)
            frames = by_sample(rearrange(frames, "F B height width C -> (B F) height width C"))
            tokens = by_sample(projector(tower(frames)))
            return rearrange(tokens, "(B F) P D -> F B P D", B=batch)

        frames = rearrange(jnp.asarray(pixels), "B F height width C -> F B height width C")
        tokens = map_in_blocks(encode_some, frames, max(1, most))
        return by_sample(rearrange(tokens, "F B P D -> B (F P) D"))

    def __call__(self, streams: StreamBatch, visual: Array | None = None) -> Array:
        """Return the hidden states of all tokens after the last layer, [B, G * T, D].

        visual [B, V, D] from `encode`; None for streams of text alone.
        """
        if streams.kind.shape[0] == 1:
            group = take_group(streams, 0)
            x = self.language.embed_group(group, visual)
            device_group = make_group(self.config.language, group)
            return self.language.run_group_alone(x, device_group, streams.memory)
        memory = empty_memory(self.config, streams.kind.shape[1], streams.memory)
        hidden, _ = scan_groups(self, streams, visual, memory, keep_hidden=True)
        return rearrange(hidden, "G B T D -> B (G T) D")

    def logits(self, hidden: Array) -> Array:
        """Hidden states [..., D] -> logits [..., V] float32."""
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
    visual: Array | None,
    memory: Memory,
    keep_hidden: bool,
    bases: tuple[Memory, ...] = (),
) -> tuple[Array, Memory]:
    """Run the groups one after another, the memory carried from each to the next.

    bases: memories of one sample each, shared by all samples, which come before `memory` in stream
    order, one after another; the ranks of the streams go on after the sum of their lengths.

    Returns hidden states, [G, B, T, D] if `keep_hidden`, else [B, T, D] of the last group alone;
    and the memory with the persistent tokens of all groups.
    """
    language_config = model.config.language
    graph, params = nnx.split(model.language)
    base_lengths = [base.length for base in bases]

    def step(carry: tuple[Memory, Array], arrays: dict[str, Array]) -> tuple[Any, Array | None]:
        language = nnx.merge(graph, params)
        group = replace(streams, **arrays)  # type: ignore[arg-type]
        x = language.embed_group(group, visual)
        device_group = make_group(language_config, group, base_lengths)
        x, memory = language.run_group(x, device_group, carry[0], bases)
        return (memory, x), x if keep_hidden else None

    arrays = {name: getattr(streams, name) for name in GROUP_FIELDS}
    shape = (*streams.kind.shape[1:], language_config.width)
    last = jnp.zeros(shape, memory.keys.dtype)
    (memory, last), hidden = lax.scan(step, (memory, last), arrays)
    memory = replace(memory, length=memory.length + streams.length)
    return last if hidden is None else hidden, memory
