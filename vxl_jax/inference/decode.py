"""Decoding: from the logits after a prompt, one jitted step a token."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from vxl_jax.inference.sampling import GREEDY, Sampling, check_new_tokens, choose_token
from vxl_jax.models.functions import decode_step, prefill
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.stream.batch import StreamBatch, round_up
from vxl_jax.stream.plan import VISUAL


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
    check_frame_count(model, streams, pixels)
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
        token = choose_token(
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


def check_frame_count(model: VideoXL, streams: StreamBatch, pixels: Any | None) -> None:
    """Refuse pixels that are not those the streams were planned for.

    Raises: ValueError saying how many frames there are and how many the plan reads.
    """
    visual = np.asarray(streams.source)[np.asarray(streams.kind) == VISUAL]
    needed = model.config.layout.frames_of(int(visual.max()) + 1) if visual.size else 0
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
