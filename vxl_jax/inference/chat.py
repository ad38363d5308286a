"""Conversations about a memory: turns, and media that come with them."""

import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from vxl_jax.errors import ArgumentError
from vxl_jax.inference.entries import Base, Continuation, Entries, append_text
from vxl_jax.inference.memory import VisualMemory
from vxl_jax.inference.ratios import Ratios
from vxl_jax.inference.runtime import Runtime, video_times
from vxl_jax.inference.sampling import GREEDY, Sampling, check_new_tokens
from vxl_jax.inference.watching import Watcher, begin_block, watch_film
from vxl_jax.interrupts import held_interrupts
from vxl_jax.media.open import Film, FrameLimit, MediaLike
from vxl_jax.media.sampling import FrameTimes
from vxl_jax.planning.inference_bytes import OWN_SLOTS
from vxl_jax.text.chat import encode_follow_up, with_marks
from vxl_jax.text.template import IMAGE_MARK, IMAGE_TOKEN
from vxl_jax.text.time_prompt import with_time_prompt

NEW_TOKENS = 256
"""Most tokens of an answer, unless told."""


class Chat:
    """A conversation about a memory. Turns and further media are its own; the memory stays as it
    is, and what the memory watches later is not seen.

    One question is answered at a time: a thread that asks while another does waits.

    turns: {"from": "human" | "gpt", "value": text}, as in data files.
    """

    def __init__(self, model: Runtime, memory: VisualMemory):
        memory.attach(model)
        now = memory.snapshot()
        self.model, self.memory = model, memory
        self.turns: list[dict[str, str]] = []
        self._blocks, self._times = len(now.watched), now.video_times()
        self._base: Base = now.base
        self._entries, self._length = Entries(model), 0  # of all turns, after the memory's
        self._rest = np.empty(0, np.int32)  # ids of the last answer that are not in the entries
        self._answering: Generator[str, None, None] | None = None
        self._lock = threading.RLock()

    def ask(
        self,
        question: str,
        media: MediaLike | Sequence[MediaLike] = (),
        *,
        ratio: Ratios | Literal["model"] = "model",
        frames: FrameLimit = "model",
        max_new_tokens: int = NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> str:
        """The answer to the next question.

        media: videos and images that are new in it, one for each `<image>` of the question; without
        such marks they come before its text. Other arguments as for `Model.watch` and `Model.ask`.

        Raises: as these. The conversation is then as it was before.
        """
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}
        with self._lock:
            pieces = self.stream(question, media, ratio=ratio, frames=frames, **options)
            return "".join(pieces).strip()

    def stream(
        self,
        question: str,
        media: MediaLike | Sequence[MediaLike] = (),
        *,
        ratio: Ratios | Literal["model"] = "model",
        frames: FrameLimit = "model",
        max_new_tokens: int = NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> Iterator[str]:
        """As `ask`, giving the answer in pieces as they come. Stopped early, or followed by another
        question, the conversation has what was answered until then.
        """
        check_question(question)
        media = as_list(media)
        if media and IMAGE_MARK not in question:
            question = with_marks(len(media), question, self.model.config.family)
        if question.count(IMAGE_MARK) != len(media):
            raise ArgumentError(
                f"{question.count(IMAGE_MARK)} {IMAGE_MARK} marks in the question for {len(media)} "
                "videos and images"
            )
        ratios = self.model.checked_ratios(ratio)
        films = self.model.open_films(media, frames=frames)
        check_new_tokens(max_new_tokens)
        with self._lock:
            if self._answering is not None:
                self._answering.close()
            answer = self._answer(question, films, ratios, max_new_tokens, sampling)
            self._answering = answer
        return self._pieces(answer)

    def _pieces(self, answer: Generator[str, None, None]) -> Iterator[str]:
        """The pieces of an answer, each made while no other thread uses the conversation."""
        try:
            while True:
                with self._lock:
                    piece = next(answer, None)
                if piece is None:
                    return
                yield piece
        finally:
            # Whoever has the lock closes the answer; the garbage collector must not wait for it.
            if self._lock.acquire(blocking=False):
                try:
                    answer.close()
                finally:
                    self._lock.release()

    def _answer(
        self,
        question: str,
        films: list[Film],
        ratios: Ratios,
        max_new_tokens: int,
        sampling: Sampling,
    ) -> Generator[str, None, None]:
        model = self.model
        times = self._video_times(films)
        if self.turns:
            family = model.config.family
            said = with_time_prompt(question, times, family) if times else question
            follow_up = encode_follow_up(said, model.tokenizer, False, family)
            ids = np.append(self._rest, follow_up)
        else:
            ids = model.first_turn(self._blocks, question, times)
        self._entries.reserve(OWN_SLOTS)
        length, text_ids = self._watch(ids, films, ratios)
        slots = len(text_ids) + max_new_tokens
        model.check_context(self._base[1] + length + slots, "the conversation")
        self._entries.reserve(length + slots)  # to keep the turn
        turn = Continuation(model, [self._base, (self._entries, length)], slots=slots)
        logits = turn.read_text(text_ids)
        answer: list[int] = []
        shown = ""
        try:
            for (token,) in turn.decode(logits, max_new_tokens, sampling):
                if token in model.stop_ids:
                    break
                answer.append(int(token))
                text = model.text_of(answer)
                if not text.endswith("\ufffd"):  # the rest of a character is to come
                    yield text[len(shown) :]
                    shown = text
        except (GeneratorExit, KeyboardInterrupt):  # what was answered until then stands
            self._keep(question, turn, answer, length, len(films))
            raise
        self._keep(question, turn, answer, length, len(films))
        text = model.text_of(answer)
        if text != shown:
            yield text[len(shown) :]

    def _video_times(self, films: Sequence[Film]) -> FrameTimes | None:
        """When the frames are shown of the conversation's one video, in the turn that brings it:
        the first turn for that of the memory. None in other turns.

        Raises: ArgumentError if the model is to be told, and a live source does not know.
        """
        if not self.model.config.preprocessing.time_prompt or (self.turns and not films):
            return None
        times = video_times(self._blocks, self._times, films)
        is_only = self._blocks + len(films) == 1
        if is_only and any(film.is_video and film.seconds is None for film in films):
            raise ArgumentError(
                "the model is told when frames are shown, which a live source does not know; watch "
                "it into a memory first"
            )
        return times

    def _watch(
        self, ids: np.ndarray, films: Sequence[Film], ratios: Ratios
    ) -> tuple[int, np.ndarray]:
        """Append the media of a turn, and the text before each; returns how many entries there are
        then, and the text after the last. They count when the turn is kept.
        """
        length = self._length
        marks = np.flatnonzero(ids == IMAGE_TOKEN)
        pieces = np.split(ids[ids != IMAGE_TOKEN], marks - np.arange(len(marks)))
        for text, film in zip(pieces, films, strict=False):
            if len(text):
                length = append_text([self._base, (self._entries, length)], text)
            bases = [self._base, (self._entries, length)]
            watcher = Watcher(bases, begin_block(self.model, film, length))
            watch_film(watcher, film, ratios)
            length = watcher.length
        return length, pieces[-1]

    def _keep(
        self, question: str, turn: Continuation, answer: list[int], length: int, blocks: int
    ) -> None:
        """Append a turn, as far as it was answered, after `length` entries.

        blocks: visual blocks of the turn.

        Raises: VisualMemoryError if a step has failed; the conversation is as it was before.
        """
        held = min(len(answer), turn.decoded)
        kept = int(turn.lengths[0]) + held
        said = self.model.text_of(answer).strip()
        with held_interrupts():
            self._entries.append(length, turn.memory, 0, kept)
            self._length = length + kept
            self._blocks += blocks
            self._rest = np.array(answer[held:], np.int32)
            self.turns += [{"from": "human", "value": question}, {"from": "gpt", "value": said}]


def as_list(media: MediaLike | Sequence[MediaLike]) -> list[MediaLike]:
    """One or several, as several."""
    return list(media) if isinstance(media, list | tuple) else [media]


def check_question(question: Any, media: bool = True) -> None:
    """Refuse a question that is not text, or has marks where no media are given.

    Raises: ArgumentError.
    """
    if not isinstance(question, str):
        raise ArgumentError(f"a question must be text, got {type(question).__name__}")
    if not question.replace(IMAGE_MARK, "").strip():
        raise ArgumentError("the question has no text")
    try:
        question.encode()
    except UnicodeEncodeError as error:  # of a terminal with another encoding
        raise ArgumentError(f"the question is not valid Unicode ({error})") from None
    if IMAGE_MARK in question and not media:
        raise ArgumentError(f"{IMAGE_MARK} in a question: more media belong to a `chat`")
