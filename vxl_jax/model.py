"""Video-XL: vision tower, projector and language model, and the pure functions over them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array, lax

from vxl_jax.config import VideoXLConfig
from vxl_jax.language import LanguageModel, make_group, map_in_blocks
from vxl_jax.memory import Memory, empty_memory
from vxl_jax.sharding import by_sample, sample_shards
from vxl_jax.stream import IGNORE, StreamBatch
from vxl_jax.vision import Projector, VisionTower

GROUP_FIELDS = ("kind", "source", "rank", "window_start", "window_memory")


FRAME_BLOCK_BYTES = 2**29
"""Most bytes of the vision tower's attention scores on a device at once; above it, frames are
encoded in blocks."""


class VideoXL(nnx.Module):
    """Parameters of the whole model; random until a checkpoint is loaded into it."""

    def __init__(self, config: VideoXLConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision = VisionTower(config, rngs=rngs)
        self.projector = Projector(config, rngs=rngs)
        self.language = LanguageModel(config, rngs=rngs)
        start_beacons(self.language, rngs.params())

    def encode(self, pixels: Array | np.ndarray) -> Array:
        """Frames or tiles [B, F, S, S, 3] -> visual tokens [B, F * tokens_per_frame, D].

        uint8 RGB, or floats that are already normalised.
        """
        vision, batch = self.config.vision, pixels.shape[0]
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


def take_group(streams: StreamBatch, index: Any) -> StreamBatch:
    """Select group `index` of a batch; the result has no group axis."""
    return replace(streams, **{name: getattr(streams, name)[index] for name in GROUP_FIELDS})


def map_by_sample(fn: Callable[[Any, int], Any], streams: StreamBatch) -> StreamBatch:
    """Replace each array of a batch with `fn(array, axis of samples)`."""
    arrays = {
        name: fn(value, 1 if name in GROUP_FIELDS else 0)
        for name, value in vars(streams).items()
        if hasattr(value, "shape")
    }
    return replace(streams, **arrays)


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


def loss_and_metrics(
    model: VideoXL, streams: StreamBatch, pixels: Array | np.ndarray | None
) -> tuple[Array, dict[str, Array]]:
    """Summed next-token cross-entropy in float32, and counts of `tokens` (labelled) and `correct`.

    Divide by `tokens` for the loss of the published code; with a sum, gradient accumulation gives
    every labelled token the same weight. pixels: as for `VideoXL.encode`, or None.
    """
    visual = None if pixels is None else model.encode(pixels)
    hidden = model(streams, visual)
    picked = by_sample(jax.vmap(lambda rows, index: rows[index])(hidden, streams.label_index))
    return cross_entropy(model, picked, streams.label)


LOGITS_BYTES = 2**28
"""Most bytes of logits on a device at once in `cross_entropy`."""


def cross_entropy(model: VideoXL, hidden: Array, label: Array) -> tuple[Array, dict[str, Array]]:
    """Summed cross-entropy of hidden states [B, N, D] with labels [B, N], as `loss_and_metrics`.

    Logits are computed for a block of labels at a time, and recomputed for gradients.
    """
    batch, count = label.shape
    vocabulary = model.config.language.vocab_size
    step = max(1, LOGITS_BYTES // (4 * -(-batch // sample_shards()) * vocabulary))
    graph, params = nnx.split(model)

    def of_some(hidden: Array, label: Array) -> tuple[Array, Array, Array]:
        logits = nnx.merge(graph, params).logits(hidden)
        counted = label != IGNORE
        label = jnp.where(counted, label, 0)
        scores = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
        losses = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - scores, 0.0)
        return losses.sum(), counted.sum(), (counted & (logits.argmax(-1) == label)).sum()

    if step >= count:
        loss, tokens, correct = of_some(hidden, label)
        return loss, {"tokens": tokens, "correct": correct}
    blocks = -(-count // step)
    pad = blocks * step - count
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    label = jnp.pad(label, ((0, 0), (0, pad)), constant_values=IGNORE)

    def add(sums: Any, some: tuple[Array, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, jax.checkpoint(of_some)(*some)), None

    first = (rearrange(hidden, "B (K N) D -> K B N D", K=blocks),)
    some = (*first, rearrange(label, "B (K N) -> K B N", K=blocks))
    zero = jnp.zeros((), jnp.int32)
    (loss, tokens, correct), _ = lax.scan(add, (jnp.zeros((), jnp.float32), zero, zero), some)
    return loss, {"tokens": tokens, "correct": correct}


@partial(jax.jit, static_argnums=0)
def encode(graph: Any, params: Any, pixels: Array) -> Array:
    """`VideoXL.encode` of split parameters."""
    return nnx.merge(graph, params).encode(pixels)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(
    graph: Any,
    params: Any,
    memory: Memory,
    streams: StreamBatch,
    visual: Array | None,
    bases: tuple[Memory, ...] = (),
) -> tuple[Array, Memory]:
    """Run the streams through the model and append their persistent tokens to the memory.

    visual: features [B, V, D] that the streams' sources count in, None for text alone. bases: see
    `scan_groups`; they are not donated. Returns logits [B, V] float32 after each sample's last
    token, and the memory; the one passed in is donated. The caller checks that there is room.
    """
    return _read(nnx.merge(graph, params), memory, streams, visual, bases)


def _read(
    model: VideoXL,
    memory: Memory,
    streams: StreamBatch,
    visual: Array | None,
    bases: tuple[Memory, ...] = (),
) -> tuple[Array, Memory]:
    hidden, memory = scan_groups(model, streams, visual, memory, keep_hidden=False, bases=bases)
    last = jax.vmap(lambda rows, index: rows[index])(hidden, streams.last)
    return model.logits(last), memory


@partial(jax.jit, static_argnums=(0, 4))
def prefill(
    graph: Any, params: Any, streams: StreamBatch, pixels: Array | None, capacity: int
) -> tuple[Array, Memory]:
    """Compress the streams into a new memory and read the logits after each sample's last token.

    graph, params: `nnx.split(model)`. capacity: memory slots for a sample, `streams.memory` at
    least. Returns logits [B, V] float32 and the memory.
    """
    if capacity < streams.memory:
        raise ValueError(f"capacity {capacity} is less than the {streams.memory} slots needed")
    model = nnx.merge(graph, params)
    visual = None if pixels is None else model.encode(pixels)
    memory = empty_memory(model.config, streams.kind.shape[1], capacity)
    return _read(model, memory, streams, visual)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_step(
    graph: Any, params: Any, memory: Memory, token: Array, bases: tuple[Memory, ...] = ()
) -> tuple[Array, Memory]:
    """Append one text token to every sample: a group of one window of one token.

    token [B] int32. bases: see `scan_groups`; they are not donated. Returns logits [B, V] float32
    and the memory, one entry longer; the memory passed in is donated. The caller checks that there
    is room: a full memory would drop the entry.
    """
    model = nnx.merge(graph, params)
    rank = sum((base.length for base in bases), memory.length)  # [B]
    one = rank[None, :, None]  # [G, B, T]
    zero = jnp.zeros_like(one)
    streams = StreamBatch(
        kind=zero,
        source=token[None, :, None],
        rank=one,
        window_start=zero,
        window_memory=one,
        last=zero[0, :, 0],
        length=jnp.ones_like(token),
        label_index=zero[0],
        label=zero[0],
        memory=memory.capacity,
        has_beacons=False,
    )
    hidden, memory = scan_groups(model, streams, None, memory, keep_hidden=False, bases=bases)
    return model.logits(hidden[:, 0]), memory


def parameter_count(params: Any) -> int:
    """Number of scalars in a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
