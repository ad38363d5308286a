"""Decoding: from the logits after a prompt, one jitted step a token."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Literal, NamedTuple, overload

import jax
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Float32, Int32

from vxl_jax.errors import ArgumentError
from vxl_jax.inference.sampling import GREEDY, Sampling, check_new_tokens, token_logprobs
from vxl_jax.models.functions import decode_step, prefill
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.stream.batch import StreamBatch, round_up
from vxl_jax.stream.plan import VISUAL
from vxl_jax.stream.visual import Pixels, VisualInput

Step = Callable[[Array], Array]
"""Append a token of every sample, int32 [B], to a memory; return the logits [B, V] after it."""


class ScoredTokens(NamedTuple):
    """The next token of every sample, and the model's log-probability of it (`token_logprobs`)."""

    ids: Int32[np.ndarray, " B"]
    logprobs: Float32[np.ndarray, " B"]


class ScoredAnswer(NamedTuple):
    """New token ids of one sample, and the model's log-probability of each."""

    ids: list[int]
    logprobs: list[float]


def stream_tokens(
    model: VideoXL,
    streams: StreamBatch,
    pixels: Pixels | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[Int32[np.ndarray, " B"]]:
    """Yield the next token of every sample, `max_new_tokens` times.

    Programs are compiled for the first token alone, and reused by calls whose shapes are padded to
    the same sizes.

    Args:
        model: the network.
        streams: from `batch_streams`, each ending where the answer begins.
        pixels: see `Pixels`.
        max_new_tokens: how many to yield.
        sampling: how each is chosen.
    """
    step, logits = _read_prompts(model, streams, pixels, max_new_tokens)
    yield from decode(step, logits, max_new_tokens, sampling)


def _read_prompts(
    model: VideoXL, streams: StreamBatch, pixels: Pixels | None, max_new_tokens: int
) -> tuple[Step, Array]:
    check_new_tokens(max_new_tokens)
    check_frame_count(model, streams, pixels)
    graph, params = nnx.split(model)
    capacity = round_up(streams.memory + max_new_tokens, steps=4)
    logits, memory = prefill(graph, params, streams, pixels, capacity)

    def step(token: Array) -> Array:
        nonlocal memory
        logits, memory = decode_step(graph, params, memory, token)
        return logits

    return step, logits


def decode(
    step: Step, logits: Float[Array, "B V"], max_new_tokens: int, sampling: Sampling = GREEDY
) -> Iterator[Int32[np.ndarray, " B"]]:
    """Yield the next token of every sample, `max_new_tokens` times.

    An accelerator makes a step while the host looks at the token before it: a step may be made
    whose result is not used.

    Args:
        step: appends a token to the memory; see `Step`.
        logits: those before the first token.
        max_new_tokens: how many to yield.
        sampling: how each is chosen.
    """
    for ids, _ in _decode(step, logits, max_new_tokens, sampling, lambda logits, ids: None):
        yield np.asarray(ids)


def decode_scored(
    step: Step, logits: Float[Array, "B V"], max_new_tokens: int, sampling: Sampling = GREEDY
) -> Iterator[ScoredTokens]:
    """Yield the next token of every sample with its log-probability; arguments as for `decode`."""
    for ids, logprobs in _decode(step, logits, max_new_tokens, sampling, token_logprobs):
        yield ScoredTokens(np.asarray(ids), np.asarray(logprobs))


def _decode(
    step: Step,
    logits: Array,
    max_new_tokens: int,
    sampling: Sampling,
    score: Callable[[Array, Array], Array | None],
) -> Iterator[tuple[Array, Array | None]]:
    ahead = jax.default_backend() != "cpu"
    key = jax.random.key(sampling.seed)
    for i in range(max_new_tokens):
        ids = sampling.choose(logits, jax.random.fold_in(key, i))
        if ids.shape != logits.shape[:1]:
            raise ArgumentError(
                f"{type(sampling).__name__}.choose: returned shape {ids.shape} for logits "
                f"{logits.shape}; return one token id for each sample"
            )
        scores = score(logits, ids)
        last = i + 1 == max_new_tokens
        if ahead and not last:
            logits = step(ids)
        yield ids, scores
        if not (ahead or last):
            logits = step(ids)


def until_stopped(
    tokens: Iterable[Int32[np.ndarray, " B"]],
    stop_ids: Collection[int],
    stopped: Bool[np.ndarray, " B"],
) -> list[list[int]]:
    """Gather the token ids of each sample, up to and without its first stop id.

    Ends early when all samples have stopped.

    Args:
        tokens: from `decode`.
        stop_ids: token ids that end an answer.
        stopped: samples that have stopped before the first token.
    """
    scored = (ScoredTokens(ids, np.zeros(len(stopped), np.float32)) for ids in tokens)
    return [answer.ids for answer in scored_until_stopped(scored, stop_ids, stopped)]


def scored_until_stopped(
    tokens: Iterable[ScoredTokens], stop_ids: Collection[int], stopped: Bool[np.ndarray, " B"]
) -> list[ScoredAnswer]:
    """Gather the answers of `decode_scored`, as `until_stopped` does those of `decode`."""
    answers = [ScoredAnswer([], []) for _ in stopped]
    for ids, logprobs in tokens:
        stopped = stopped | np.isin(ids, list(stop_ids))
        if stopped.all():
            break
        for answer, token, logprob, done in zip(answers, ids, logprobs, stopped, strict=True):
            if not done:
                answer.ids.append(int(token))
                answer.logprobs.append(float(logprob))
    return answers


def check_frame_count(model: VideoXL, streams: StreamBatch, pixels: Pixels | None) -> None:
    """Refuse pixels that the streams were not planned for.

    Raises:
        ValueError: fewer frames than the plan reads.
    """
    visual = np.asarray(streams.source)[np.asarray(streams.kind) == VISUAL]
    tokens = int(visual.max()) + 1 if visual.size else 0
    if isinstance(pixels, VisualInput):
        if tokens > pixels.patch.shape[1]:
            raise ValueError(
                f"the streams were planned for {tokens} visual tokens, and there are "
                f"{pixels.patch.shape[1]}"
            )
        return
    needed = model.config.layout.frames_of(tokens) if tokens else 0
    given = 0 if pixels is None else pixels.shape[1]
    if needed > given:
        raise ValueError(f"the streams were planned for {needed} frames, pixels has {given}")


@overload
def generate(
    model: VideoXL,
    streams: StreamBatch,
    pixels: Pixels | None = ...,
    *,
    max_new_tokens: int,
    sampling: Sampling = ...,
    stop_ids: Collection[int] = ...,
    logprobs: Literal[False] = ...,
) -> list[list[int]]: ...


@overload
def generate(
    model: VideoXL,
    streams: StreamBatch,
    pixels: Pixels | None = ...,
    *,
    max_new_tokens: int,
    sampling: Sampling = ...,
    stop_ids: Collection[int] = ...,
    logprobs: Literal[True],
) -> list[ScoredAnswer]: ...


def generate(
    model: VideoXL,
    streams: StreamBatch,
    pixels: Pixels | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
    logprobs: bool = False,
) -> list[list[int]] | list[ScoredAnswer]:
    """Generate the answer of every sample of a batch.

    Ends early when all samples have stopped.

    Args:
        model: the network.
        streams: as for `stream_tokens`.
        pixels: see `Pixels`.
        max_new_tokens: most tokens of an answer.
        sampling: how each is chosen.
        stop_ids: token ids that end an answer.
        logprobs: return the log-probability of each token as well.

    Returns:
        The new token ids of each sample, up to and without its first stop id; with `logprobs`, a
        `ScoredAnswer` of each.
    """
    step, logits = _read_prompts(model, streams, pixels, max_new_tokens)
    empty = np.asarray(streams.length) == 0  # places without a sample
    if logprobs:
        scored = decode_scored(step, logits, max_new_tokens, sampling)
        return scored_until_stopped(scored, stop_ids, empty)
    return until_stopped(decode(step, logits, max_new_tokens, sampling), stop_ids, empty)
