"""Watch once, ask as often as you like.

    model = vxl_jax.load("checkpoints/Video_XL")
    memory = model.watch("film.mp4", frames=2048, ratio=16)
    print(model.ask(memory, "What happens?"))

The memory is read by every question and changed by none: what a question and its answer add lies in
a small memory of their own, behind it.
"""

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import Array, lax

from vxl_jax.chat import (
    DEFAULT_SYSTEM,
    IMAGE_MARK,
    IMAGE_TOKEN,
    encode_follow_up,
    encode_prompt,
)
from vxl_jax.checkpoint import load_network
from vxl_jax.config import VideoXLConfig
from vxl_jax.decode import GREEDY, Sampling, check_new_tokens, until_stopped
from vxl_jax.estimate import STEP_TOKENS
from vxl_jax.film import FRAMES, Film, Media, as_media, open_film
from vxl_jax.media import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.model import VideoXL
from vxl_jax.published import load_tokenizer, read_config, read_max_context
from vxl_jax.visual_memory import (
    Block,
    Growing,
    Ratios,
    VisualMemory,
    VisualMemoryError,
    check_ratios,
    check_room,
    watch_film,
)

CPU_STEP_TOKENS = 2048
"""Visual tokens that are put into a memory at once on a CPU."""

NEW_TOKENS = 256
"""Most tokens of an answer, unless told."""


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
    directory = Path(directory)
    config = read_config(directory, vision=vision)
    tokenizer = load_tokenizer(directory, config.language)
    if max_context == "model":
        max_context = read_max_context(directory)
    return Model(load_network(directory, vision=vision, **changes), tokenizer, max_context)


class Model:
    """A network with its tokenizer: what it watches, it can be asked about.

    config: of the network. default_ratio: the largest of the ratios that it has learned, None if it
    has learned none. max_context: positions that it has learned, entries and text together; None:
    not known. windows_at_once: windows of frames that are put into a memory together; memory and
    speed depend on it, the result does not.
    """

    def __init__(self, network: VideoXL, tokenizer: Any, max_context: int | None = None):
        self.network, self.tokenizer, self.max_context = network, tokenizer, max_context
        self.config: VideoXLConfig = network.config
        self.graph, self.params = nnx.split(network)
        self.default_ratio = max(self.config.ratios, default=None)
        tokens = CPU_STEP_TOKENS if jax.default_backend() == "cpu" else STEP_TOKENS
        self.windows_at_once = max(1, tokens // self.config.window)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of configuration and parameters: two models with the same make the same memory.

        It is worked out on the device that has the parameters.
        """
        digest = hashlib.sha256(repr(sorted(_of_memory(self.config).items())).encode())
        flat = flatten_dict(nnx.to_pure_dict(self.params))
        for path in sorted(flat, key=str):
            leaf = flat[path]
            name = f"{'/'.join(map(str, path))} {leaf.dtype} {leaf.shape}"
            digest.update(f"{name} {np.asarray(_digest(leaf)).tolist()}\n".encode())
        return digest.hexdigest()

    def watch(
        self,
        media: Media | Sequence[Media],
        *,
        frames: int | None = FRAMES,
        ratio: Ratios | Literal["model"] = "model",
        sample_fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        options: MediaOptions = DEFAULT_OPTIONS,
        system: str = DEFAULT_SYSTEM,
        progress: bool = False,
    ) -> VisualMemory:
        """Watch videos and images, in their order, into a new memory.

        Args:
            media: one or a list, each a path, a Pillow image, pixels, or a `Video` or `Picture`.
                Image files, by their content, are images; all else are videos, see `Video`.
            frames: of each video file, evenly from its first to its last; all if None. What is no
                file is taken whole.
            ratio: see `Ratios`; by default the largest that the model has learned.
            sample_fps: take so many frames a second instead, where these are fewer than `frames`.
            start: second of each video file where frames are taken from; its beginning if None.
            end: second where that ends; the file's end if None.
            options: how the pixels of files are decoded.
            system: the system turn of conversations about the memory.
            progress: show bars.

        Raises: MediaError if a file cannot be opened; PartlyWatched, which has the memory of what
            came before, if a video is damaged; VisualMemoryError if it is more than the context of
            the model or the memory of the device has room for, before anything is watched.
        """
        ratios = self.checked_ratios(ratio)
        fields: dict[str, Any] = {"frames": frames, "sample_fps": sample_fps}
        fields |= {"start": start, "end": end, "options": options}
        size = self.config.vision.image_size
        films = [open_film(as_media(item, **fields), size) for item in as_list(media)]
        memory = self.remember(system)
        check_room(memory.growing, films, ratios)
        for film in films:
            memory.watch(film, ratios, progress=progress)
        return memory

    def checked_ratios(self, ratio: Ratios | Literal["model"]) -> Ratios:
        """A ratio that windows can have; "model": the default.

        Raises: ValueError if they cannot.
        """
        ratios: Any = self.default_ratio if isinstance(ratio, str) and ratio == "model" else ratio
        check_ratios(ratios, self.config.window)
        return ratios

    def remember(self, system: str = DEFAULT_SYSTEM) -> VisualMemory:
        """A memory that has watched nothing yet, for `VisualMemory.extend`."""
        memory = VisualMemory(self._head(system))
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
        new = self.ask_ids(
            memory,
            [self.first_turn(len(memory.watched), text) for text in questions],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
        )
        answers = [self._text(ids) for ids in new]
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

    def ask_ids(
        self,
        memory: VisualMemory,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        max_new_tokens: int = NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> list[list[int]]:
        """New token ids that follow the memory and each prompt, up to and without a stop token.

        prompts: token ids of what comes after the memory's last block, to where the answer begins.
        """
        check_new_tokens(max_new_tokens)
        memory.attach(self)
        if not prompts:
            return []
        entries = Growing(self, len(prompts), memory)
        streams = [entries.plan_text(ids, i) for i, ids in enumerate(prompts)]
        longest = max(stream.persistent for stream in streams) + max_new_tokens
        self.check_context(memory.length + longest, "the question")
        entries.reserve(longest)
        logits = entries.read(streams)
        tokens = entries.decode(logits, max_new_tokens, sampling)
        return until_stopped(tokens, self.stop_ids, np.zeros(len(prompts), bool))

    def chat(self, memory: VisualMemory | None = None, system: str = DEFAULT_SYSTEM) -> "Chat":
        """A conversation of several turns about a memory, which stays as it is, or about nothing
        yet. system: of one without a memory.
        """
        return Chat(self, self.remember(system) if memory is None else memory)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        ends = {self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids("<|im_end|>")}
        return sorted(ends - {None})

    def check_context(self, positions: int, name: str) -> None:
        """See that the model has learned so many positions.

        Raises: VisualMemoryError.
        """
        if self.max_context is not None and positions > self.max_context:
            raise VisualMemoryError(
                f"{name}: makes {positions:,} positions with what is there already, and the model "
                f"has learned {self.max_context:,}; use fewer frames, a higher ratio or a shorter "
                "answer, or load the model with another max_context"
            )

    def first_turn(self, blocks: int, question: str) -> np.ndarray:
        """Ids of a question behind a memory of so many blocks, to where its answer begins."""
        # What people type is text: a control token in it stays letters.
        prompt = IMAGE_MARK * blocks + question
        ids = encode_prompt(prompt, self.tokenizer, control_tokens=False)
        return ids[len(self._head()) + blocks :]

    def _head(self, system: str = DEFAULT_SYSTEM) -> np.ndarray:
        """Ids of a conversation before its first block, or its first question without one."""
        ids = encode_prompt(IMAGE_MARK, self.tokenizer, system, control_tokens=False)
        return ids[: int(np.flatnonzero(ids == IMAGE_TOKEN)[0])]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


class Chat:
    """A conversation about a memory. Turns and further media are its own; the memory stays as it
    is, and what the memory watches later is not seen.

    turns: {"from": "human" | "gpt", "value": text}, as in data files.
    """

    def __init__(self, model: Model, memory: VisualMemory):
        memory.attach(model)
        self.model, self.memory = model, memory
        self.turns: list[dict[str, str]] = []
        self._blocks = len(memory.watched)
        self._entries = Growing(model, 1, memory)
        self._answering: Generator[str, None, None] | None = None
        self._rest = np.empty(0, np.int32)  # ids that are not in the entries yet

    def ask(
        self,
        question: str,
        media: Media | Sequence[Media] = (),
        *,
        ratio: Ratios | Literal["model"] = "model",
        frames: int | None = FRAMES,
        max_new_tokens: int = NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> str:
        """The answer to the next question.

        media: videos and images that are new in it, one for each `<image>` of the question; without
        such marks they come before its text. Other arguments as for `Model.watch` and `Model.ask`.

        Raises: as these. The conversation is then as it was before.
        """
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}
        return "".join(self.stream(question, media, ratio=ratio, frames=frames, **options)).strip()

    def stream(
        self,
        question: str,
        media: Media | Sequence[Media] = (),
        *,
        ratio: Ratios | Literal["model"] = "model",
        frames: int | None = FRAMES,
        max_new_tokens: int = NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> Iterator[str]:
        """As `ask`, giving the answer in pieces as they come. Stopped early, or followed by another
        question, the conversation has what was answered until then.
        """
        check_question(question)
        media = as_list(media)
        if media and IMAGE_MARK not in question:
            question = IMAGE_MARK * len(media) + question
        if question.count(IMAGE_MARK) != len(media):
            raise ValueError(
                f"{question.count(IMAGE_MARK)} {IMAGE_MARK} marks in the question for {len(media)} "
                "videos and images"
            )
        ratios = self.model.checked_ratios(ratio)
        size = self.model.config.vision.image_size
        films = [open_film(as_media(item, frames=frames), size) for item in media]
        check_new_tokens(max_new_tokens)
        if self._answering is not None:
            self._answering.close()
        self._answering = self._answer(question, films, ratios, max_new_tokens, sampling)
        return self._answering

    def _answer(
        self,
        question: str,
        films: list[Film],
        ratios: Ratios,
        max_new_tokens: int,
        sampling: Sampling,
    ) -> Generator[str, None, None]:
        entries, before = self._entries, self._entries.lengths.copy()
        if self.turns:
            follow_up = encode_follow_up(question, self.model.tokenizer, control_tokens=False)
            ids = np.append(self._rest, follow_up)
        else:
            ids = self.model.first_turn(self._blocks, question)
        try:
            logits = self._read(ids, films, ratios, max_new_tokens)
        except BaseException:
            entries.lengths = before
            raise
        start = int(entries.lengths[0])
        answer: list[int] = []
        shown = ""
        try:
            for (token,) in entries.decode(logits, max_new_tokens, sampling):
                if token in self.model.stop_ids:
                    break
                answer.append(int(token))
                text = self.model.tokenizer.decode(answer, skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # the rest of a character is to come
                    yield text[len(shown) :]
                    shown = text
        finally:
            text = self.model.tokenizer.decode(answer, skip_special_tokens=True)
            held = min(len(answer), entries.decoded)
            entries.lengths[0] = start + held
            self._rest = np.array(answer[held:], np.int32)
            self.turns += [
                {"from": "human", "value": question},
                {"from": "gpt", "value": text.strip()},
            ]
        if text != shown:
            yield text[len(shown) :]

    def _read(self, ids: np.ndarray, films: Sequence[Film], ratios: Ratios, new: int) -> Array:
        """Put a turn into the entries: text and media in their order; logits after it."""
        marks = np.flatnonzero(ids == IMAGE_TOKEN)
        pieces = np.split(ids[ids != IMAGE_TOKEN], marks - np.arange(len(marks)))
        for text, film in zip(pieces, films, strict=False):
            if len(text):
                self._entries.read_text(text)
            watch_film(Block(self._entries), film, ratios)
        used = self._entries.before + int(self._entries.lengths[0]) + len(pieces[-1]) + new
        self.model.check_context(used, "the conversation")
        self._entries.reserve(int(self._entries.lengths[0]) + len(pieces[-1]) + new)
        return self._entries.read_text(pieces[-1])


def as_list(media: Media | Sequence[Media]) -> list[Media]:
    """One or several, as several."""
    return list(media) if isinstance(media, list | tuple) else [media]


def check_question(question: Any, media: bool = True) -> None:
    """Refuse what is no text, and marks for media where there are none.

    Raises: ValueError.
    """
    if not isinstance(question, str):
        raise ValueError(f"a question must be text, got {type(question).__name__}")
    if not question.replace(IMAGE_MARK, "").strip():
        raise ValueError("the question has no text")
    try:
        question.encode()
    except UnicodeEncodeError as error:  # of a terminal with another encoding
        raise ValueError(f"the question is not valid Unicode ({error})") from None
    if IMAGE_MARK in question and not media:
        raise ValueError(f"{IMAGE_MARK} in a question: more media belong to a `chat`")


def _of_memory(config: VideoXLConfig) -> dict[str, Any]:
    """Fields of a configuration on which the entries of a memory depend, beside the parameters."""
    unused = ("remat", "ratios", "param_dtype")
    return {name: value for name, value in asdict(config).items() if name not in unused}


@jax.jit
def _digest(x: Array) -> Array:
    """Two sums, uint32 [2], over the bits of all numbers, each weighted by its place."""
    size = jnp.dtype(x.dtype).itemsize
    bits = lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size])
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
        place = place * jnp.uint32(length) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)

    def total(factor: int, shift: int) -> Array:
        weight = (place * jnp.uint32(factor)) ^ (place >> shift)
        return jnp.sum((bits.astype(jnp.uint32) + jnp.uint32(1)) * (2 * weight + 1))

    return jnp.stack([total(0x9E3779B1, 15), total(0x85EBCA77, 13)])
