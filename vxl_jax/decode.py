"""Decoding: from the logits after a prompt, one jitted step a token."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from vxl_jax.errors import ArgumentError
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
        if not self.temperature >= 0:  # NaN too
            raise ArgumentError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 <= self.top_k < 2**31:
            raise ArgumentError(
                f"top_k is {self.top_k}; it must be 0 (all tokens) or a number below 2**31"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ArgumentError(f"seed is {self.seed}; it must fit in 64 bits")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p is {self.top_p}; it must be in (0, 1]")


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


def check_new_tokens(max_new_tokens: int) -> None:
    """Refuse answers without a token.

    Raises: ArgumentError.
    """
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")


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
    check_new_tokens(max_new_tokens)
    check_pixels(model, streams, pixels)
    graph, params = nnx.split(model)
    capacity = round_up(streams.memory + max_new_tokens, steps=4)
    logits, memory = prefill(graph, params, streams, pixels, capacity)

    def step(token: Array) -> Array:
        nonlocal memory
        logits, memory = decode_step(graph, params, memory, token)
        return logits

    yield from decode(step, logits, max_new_tokens, sampling)


def decode(
    step: Callable[[Array], Array], logits: Array, max_new_tokens: int, sampling: Sampling = GREEDY
) -> Iterator[np.ndarray]:
    """Yield the next token of every sample, [B] int32, `max_new_tokens` times.

    step: puts a token of every sample into a memory and returns the logits [B, V] after it. logits:
    those before the first. An accelerator makes a step while the host looks at the token: it may be
    one that is not needed.
    """
    ahead = jax.default_backend() != "cpu"
    key = jax.random.key(sampling.seed)
    for i in range(max_new_tokens):
        token = choose(
            logits,
            sampling.temperature == 0,
            jax.random.fold_in(key, i),
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
        )
        last = i + 1 == max_new_tokens
        if ahead and not last:
            logits = step(token)
        yield np.asarray(token)
        if not (ahead or last):
            logits = step(token)


def until_stopped(
    tokens: Iterator[np.ndarray], stop_ids: Collection[int], stopped: np.ndarray
) -> list[list[int]]:
    """The token ids of each sample, up to and without its first stop id; ends early when all have
    stopped. stopped: bool [B], samples that have from the beginning.
    """
    answers: list[list[int]] = [[] for _ in stopped]
    for column in tokens:
        stopped = stopped | np.isin(column, list(stop_ids))
        if stopped.all():
            break
        for answer, token, done in zip(answers, column, stopped, strict=True):
            if not done:
                answer.append(int(token))
    return answers


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
    tokens = stream_tokens(model, streams, pixels, max_new_tokens=max_new_tokens, sampling=sampling)
    empty = np.asarray(streams.length) == 0  # places that no sample has
    return until_stopped(tokens, stop_ids, empty)
