"""Decoding: from the logits after a prompt, one jitted step a token."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from vxl_jax.memory import Memory
from vxl_jax.model import VideoXL, decode_step, prefill
from vxl_jax.sharding import everywhere
from vxl_jax.stream import VISUAL, StreamBatch, round_up


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy and ignores the rest.

    top_k: only the k most likely tokens (0: all). top_p: only the most likely tokens that together
    reach this probability (1: all), of all tokens before top_k. seed: of the draws, which also
    depend on a sample's place in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1]")


GREEDY = Sampling()


@partial(jax.jit, static_argnums=1)
def choose(
    logits: Array, greedy: bool, key: Array, temperature: Any, top_k: Any, top_p: Any
) -> Array:
    """Next token [B] int32 from logits [B, V]; see `Sampling`."""
    if greedy:
        return everywhere(logits.argmax(-1).astype(jnp.int32))
    order = jnp.argsort(-logits, axis=-1)
    scaled = jnp.take_along_axis(logits, order, axis=-1) / temperature
    likelihood = jax.nn.softmax(scaled, axis=-1)
    above = jnp.cumsum(likelihood, axis=-1) - likelihood  # probability of all better tokens
    rank = jnp.arange(logits.shape[-1])
    allowed = (above < top_p) & ((top_k == 0) | (rank < top_k))
    drawn = jax.random.categorical(key, jnp.where(allowed, scaled, -jnp.inf), axis=-1)
    return everywhere(jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32))


def stream_tokens(
    model: VideoXL,
    streams: StreamBatch,
    pixels: Any | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[np.ndarray]:
    """Yield the next token of every sample, [B] int32, `max_new_tokens` times.

    streams: from `batch_streams`, each ending where the answer is to begin. pixels as for
    `VideoXL.encode`. Nothing is recompiled from token to token, nor between calls whose shapes are
    on the same steps of the ladder.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    check_pixels(model, streams, pixels)
    graph, params = nnx.split(model)
    capacity = round_up(streams.memory + max_new_tokens, steps=4)
    logits, memory = prefill(graph, params, streams, pixels, capacity)
    for tokens, _ in decode(graph, params, memory, logits, max_new_tokens, sampling):
        yield tokens


def decode(
    graph: Any,
    params: Any,
    memory: Memory,
    logits: Array,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    base: Memory | None = None,
) -> Iterator[tuple[np.ndarray, Memory]]:
    """Yield the next token of every sample, [B] int32, and the memory as it then is.

    memory: has room for all tokens, and is given up (donated); logits [B, V]: after its last token.
    base: see `decode_step`. The memory that is yielded may have the entry of the token already:
    an accelerator works on the next token while the host looks at this one.
    """
    ahead = jax.default_backend() != "cpu"
    key = jax.random.key(sampling.seed)
    for step in range(max_new_tokens):
        token = choose(
            logits,
            sampling.temperature == 0,
            jax.random.fold_in(key, step),
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
        )
        last = step + 1 == max_new_tokens
        if ahead and not last:
            logits, memory = decode_step(graph, params, memory, token, base)
        yield np.asarray(token), memory
        if not (ahead or last):
            logits, memory = decode_step(graph, params, memory, token, base)


def check_pixels(model: VideoXL, streams: StreamBatch, pixels: Any | None) -> None:
    """Refuse pixels that are not those the streams were planned for.

    Raises: ValueError saying how many frames there are and how many the plan reads.
    """
    visual = np.asarray(streams.source)[np.asarray(streams.kind) == VISUAL]
    needed = -(-(int(visual.max()) + 1) // model.config.tokens_per_frame) if visual.size else 0
    given = 0 if pixels is None else pixels.shape[1]
    if needed > given:
        raise ValueError(f"the streams were planned for {needed} frames, pixels has {given}")


def generate(
    model: VideoXL,
    streams: StreamBatch,
    pixels: Any | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    """Answer every sample of a batch.

    Returns the new token ids of each sample, up to and without its first stop id. Ends early when
    all samples have stopped. See `stream_tokens`.
    """
    answers: list[list[int]] = [[] for _ in range(len(streams.last))]
    stopped = np.asarray(streams.length) == 0  # places that no sample has
    for tokens in stream_tokens(
        model, streams, pixels, max_new_tokens=max_new_tokens, sampling=sampling
    ):
        stopped |= np.isin(tokens, stop_ids)
        if stopped.all():
            break
        for answer, token, done in zip(answers, tokens, stopped, strict=True):
            if not done:
                answer.append(int(token))
    return answers
