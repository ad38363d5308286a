"""Watch once, ask as often as you like.

    model = vxl_jax.load("checkpoints/Video_XL")
    memory = model.watch("film.mp4", frames=2048, ratio=16)
    print(model.ask(memory, "What happens?"))

Every question reads the memory and none changes it: a question and its answer are kept in a small
second memory that follows it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from jax import Array

from vxl_jax.checkpoints.hf_config import read_config, read_max_context
from vxl_jax.checkpoints.load import load_network
from vxl_jax.inference.chat import NEW_TOKENS, Chat, as_list, check_question
from vxl_jax.inference.decode import ScoredAnswer, scored_until_stopped, until_stopped
from vxl_jax.inference.entries import Base, Continuation
from vxl_jax.inference.memory import VisualMemory
from vxl_jax.inference.ratios import Ratios
from vxl_jax.inference.runtime import Runtime
from vxl_jax.inference.sampling import GREEDY, Sampling, check_new_tokens
from vxl_jax.media import MediaOptions
from vxl_jax.media.open import FrameLimit, MediaLike
from vxl_jax.planning.cards import claim_memory
from vxl_jax.text.chat import DEFAULT_SYSTEM
from vxl_jax.text.tokenizer import load_tokenizer


def load(
    directory: str | Path,
    *,
    vision: str | Path | None = None,
    max_context: int | Literal["model"] | None = "model",
    **changes: Any,
) -> "Model":
    """The model of a checkpoint directory, with its tokenizer, to watch and to answer.

    Args:
        directory: in the published layout or converted, with the files of a tokenizer.
        vision: directory of the vision tower's config.json, where the checkpoint has none.
        max_context: most positions, entries and text together; None: any number. By default as many
            as the model has learned, the `max_position_embeddings` of its config.json.
        changes: as for `load_network`: `weights`, `dtype` and other fields of VideoXLConfig.

    Raises: CheckpointError or ConfigError if files are missing, damaged or do not fit together.
    """
    claim_memory()
    directory = Path(directory)
    config = read_config(directory, vision=vision)
    tokenizer = load_tokenizer(directory, config.language)
    if max_context == "model":
        max_context = read_max_context(directory)
    return Model(load_network(directory, vision=vision, **changes), tokenizer, max_context)


class Model(Runtime):
    """A network with its tokenizer: it watches media, and answers questions about them."""

    def watch(
        self,
        media: MediaLike | Sequence[MediaLike],
        *,
        frames: FrameLimit = "model",
        ratio: Ratios | Literal["model"] = "model",
        sample_fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        slow_every: int | None = None,
        options: MediaOptions | None = None,
        system: str = DEFAULT_SYSTEM,
        progress: bool = False,
    ) -> VisualMemory:
        """Watch videos and images, in their order, into a new memory.

        Args:
            media: one or a list, each a path, a Pillow image, pixels, or a `Video` or `Picture`.
                Image files, by their content, are images; all else are videos, see `Video`.
            frames: taken of each video file, evenly from its first to its last; None takes every
                frame. By default, frames are sampled as in training (`Preprocessing`), and as the
                published evaluations do for published checkpoints: 128. Arrays and live sources
                are always read in full.
            ratio: see `Ratios`; by default the largest that the model was trained with.
            sample_fps: take this many frames a second instead, up to `frames`.
            start: second of each video file where frames begin; its beginning if None.
            end: second where they end; the file's end if None.
            slow_every: every such frame of a video is slow, and the others are fast, which have
                fewer tokens (SlowFast); by default as the model was trained. Video-XL has no fast
                frames.
            options: how the pixels of files are decoded; None: as in training.
            system: the system turn of conversations about the memory.
            progress: show bars.

        Raises: MediaError if a file cannot be opened; PartlyWatched, which has the memory of what
            came before, if a video is damaged; VisualMemoryError if it is more than the context of
            the model or the memory of the device has room for, before anything is watched.
        """
        ratios = self.checked_ratios(ratio)
        fields: dict[str, Any] = {"frames": frames, "sample_fps": sample_fps}
        fields |= {"start": start, "end": end, "slow_every": slow_every, "options": options}
        films = self.open_films(as_list(media), **fields)
        memory = self.remember(system)
        memory.check_room(films, ratios)
        for film in films:
            memory.watch(film, ratios, progress=progress)
        return memory

    def remember(self, system: str = DEFAULT_SYSTEM) -> VisualMemory:
        """A memory that has watched nothing yet, for `VisualMemory.extend`."""
        memory = VisualMemory(self.head_ids(system))
        memory.attach(self)
        return memory

    @overload
    def ask(
        self,
        memory: VisualMemory,
        question: str,
        *,
        max_new_tokens: int = ...,
        sampling: Sampling = ...,
    ) -> str: ...

    @overload
    def ask(
        self,
        memory: VisualMemory,
        question: list[str],
        *,
        max_new_tokens: int = ...,
        sampling: Sampling = ...,
    ) -> list[str]: ...

    def ask(
        self,
        memory: VisualMemory,
        question: str | list[str],
        *,
        max_new_tokens: int = NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> str | list[str]:
        """Answer one question about a memory, or several at once, each by itself.

        Raises: ValueError for a question without text; VisualMemoryError if another model has made
            the memory, or the context has no room for question and answer.
        """
        questions = [question] if isinstance(question, str) else question
        for text in questions:
            check_question(text, media=False)
        check_new_tokens(max_new_tokens)
        memory.attach(self)
        now = memory.snapshot()  # another thread may be extending it
        times = now.video_times()
        prompts = [self.first_turn(len(now.watched), text, times) for text in questions]
        new = self._answers(now.base, prompts, max_new_tokens, sampling)
        answers = [self.text_of(ids).strip() for ids in new]
        return answers[0] if isinstance(question, str) else answers

    def stream(
        self,
        memory: VisualMemory,
        question: str,
        *,
        max_new_tokens: int = NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> Iterator[str]:
        """As `ask`, giving the answer in pieces as they come."""
        return self.chat(memory).stream(question, max_new_tokens=max_new_tokens, sampling=sampling)

    @overload
    def ask_ids(
        self,
        memory: VisualMemory,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        max_new_tokens: int = ...,
        sampling: Sampling = ...,
        logprobs: Literal[False] = ...,
    ) -> list[list[int]]: ...

    @overload
    def ask_ids(
        self,
        memory: VisualMemory,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        max_new_tokens: int = ...,
        sampling: Sampling = ...,
        logprobs: Literal[True],
    ) -> list[ScoredAnswer]: ...

    def ask_ids(
        self,
        memory: VisualMemory,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        max_new_tokens: int = NEW_TOKENS,
        sampling: Sampling = GREEDY,
        logprobs: bool = False,
    ) -> list[list[int]] | list[ScoredAnswer]:
        """Continue the memory and each prompt, up to and without a stop token.

        Args:
            memory: what is asked about.
            prompts: token ids of what comes after the memory's last block, to where the answer
                begins; `Runtime.first_turn` makes them of a question.
            max_new_tokens: most tokens of an answer.
            sampling: how each token is chosen.
            logprobs: return the log-probability of each token as well.

        Returns:
            New token ids of each prompt; with `logprobs`, a `ScoredAnswer` of each.
        """
        check_new_tokens(max_new_tokens)
        memory.attach(self)
        base = memory.snapshot().base
        if not logprobs:
            return self._answers(base, prompts, max_new_tokens, sampling)
        if not prompts:
            return []
        turn, logits = self._read_prompts(base, prompts, max_new_tokens)
        tokens = turn.decode_scored(logits, max_new_tokens, sampling)
        return scored_until_stopped(tokens, self.stop_ids, np.zeros(len(prompts), bool))

    def _answers(
        self,
        base: Base,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> list[list[int]]:
        if not prompts:
            return []
        turn, logits = self._read_prompts(base, prompts, max_new_tokens)
        tokens = turn.decode(logits, max_new_tokens, sampling)
        return until_stopped(tokens, self.stop_ids, np.zeros(len(prompts), bool))

    def _read_prompts(
        self, base: Base, prompts: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int
    ) -> tuple[Continuation, Array]:
        """Read prompts behind a memory; returns the logits after each."""
        slots = max(map(len, prompts)) + max_new_tokens
        self.check_context(base[1] + slots, "the question")
        turn = Continuation(self, [base], len(prompts), slots=slots)
        return turn, turn.read([turn.plan_text(ids, i) for i, ids in enumerate(prompts)])

    def chat(self, memory: VisualMemory | None = None, system: str = DEFAULT_SYSTEM) -> "Chat":
        """A conversation of several turns about a memory, which stays as it is, or about nothing
        yet. system: of one without a memory.
        """
        return Chat(self, self.remember(system) if memory is None else memory)
