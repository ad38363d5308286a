"""One record of a data file as a sample: token ids, labels, and the pixels of its media.

A record is `{"id", "conversations": [{"from", "value"}, …]}` with one of `image` (a path or a list
of paths), `video` (a path or a list: video files, or folders of frames), or neither. A video may
have `start` and `end` in seconds, and a folder of frames `fps`; lists of them where there are
several videos.

This module runs in data workers, which do not import JAX.
"""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from train.config import DataSection
from train.errors import DataError
from train.index import RecordIndex
from train.sources import Source
from vxl_jax.chat import (
    IGNORE,
    IMAGE_MARK,
    ConversationError,
    Tokenizer,
    count_marks,
    encode_caption,
    encode_conversation,
    encode_prompt,
)
from vxl_jax.config import VideoXLConfig
from vxl_jax.media import (
    FrameChoice,
    MediaError,
    grid_pinpoints,
    image_size,
    jitter_indices,
    load_image,
    open_video,
    resize_and_crop,
    resolve_media,
    select_frames,
    tile_grid,
    tile_image,
)
from vxl_jax.stream import Ratio, Stream, plan_stream

BAD = (ConversationError, MediaError, DataError)
"""What a record that cannot be used raises."""


@dataclass(frozen=True)
class Block:
    """One visual block: an image cut into tiles, or a video's frames."""

    path: Path
    frames: int
    is_video: bool = False


@dataclass(frozen=True)
class Sample:
    """A record that passed all checks.

    ids and labels as in `vxl_jax.chat.EncodedText`; the last question (without marks), its answer,
    question_type, and among how many equally likely answers it is, if known, for evaluation.
    """

    name: str
    ids: np.ndarray
    labels: np.ndarray
    blocks: tuple[Block, ...]
    question: str
    answer: str
    question_type: str
    choices: int | None = None

    @property
    def frames(self) -> int:
        """Frames and tiles of all blocks."""
        return sum(block.frames for block in self.blocks)

    @property
    def text(self) -> int:
        """Token ids without the marks of blocks."""
        return len(self.ids) - len(self.blocks)

    @property
    def labelled(self) -> int:
        """Token ids that carry loss."""
        return int((self.labels != IGNORE).sum())

    def plan(self, model: VideoXLConfig, ratio: Ratio) -> Stream:
        """The sample's stream under a ratio."""
        tokens = [block.frames * model.tokens_per_frame for block in self.blocks]
        return plan_stream(self.ids, tokens, window=model.window, ratio=ratio, labels=self.labels)


@dataclass(frozen=True)
class BadSample:
    """A record that is left out, and why; whether that is because its media were changed."""

    name: str
    reason: str
    changed: bool = False


class Preparer:
    """Turns media files into blocks and pixels, for one configuration of data and model."""

    def __init__(self, data: DataSection, model: VideoXLConfig):
        self.data, self.model = data, model
        self.size = model.vision.image_size
        self.pinpoints = grid_pinpoints(self.size, data.max_tiles, data.min_tiles)

    def image(self, path: Path) -> "Picture":
        """An image of which only the header is read. Raises: MediaError."""
        return Picture(self, path)

    def video(self, path: Path, clip: "Clip", follow_links: bool) -> "Film":
        """A video file or folder of frames of which no frame is decoded. Raises: MediaError."""
        return Film(self, path, clip, follow_links)


class Picture:
    """An image, open until its pixels are read."""

    def __init__(self, preparer: Preparer, path: Path):
        self.preparer, self.path = preparer, path
        size = image_size(path)
        if preparer.data.image_mode == "square":
            self.block = Block(path, 1)
            return
        columns, rows = tile_grid(size, preparer.pinpoints, preparer.size)
        self.block = Block(path, columns * rows)

    def read(self, out: np.ndarray, rng: np.random.Generator | None) -> None:
        """Put the tiles into uint8 [F, S, S, 3]. Raises: MediaError."""
        image = load_image(self.path, self.preparer.data.media_options)
        if self.preparer.data.image_mode == "square":
            out[0] = resize_and_crop(image, self.preparer.size)
            return
        tiles = tile_image(image, self.preparer.pinpoints, self.preparer.size)
        if len(tiles) != len(out):
            raise MediaError(
                f"{self.path}: {len(tiles)} tiles, but its header promised {len(out)}; the file "
                "was changed or is damaged, replace it"
            )
        out[...] = tiles


@dataclass(frozen=True)
class Clip:
    """Seconds of a video that are taken, and the frames a second of a folder of frames."""

    start: float | None = None
    end: float | None = None
    fps: float | None = None


class Film:
    """A video, open until its frames are read."""

    def __init__(self, preparer: Preparer, path: Path, clip: Clip, follow_links: bool):
        data = preparer.data
        self.preparer, self.path = preparer, path
        options = data.media_options
        self.video = open_video(path, clip.fps or 1.0, options=options, follow_links=follow_links)
        choice = FrameChoice(
            data.frame_sampling, data.max_frames, data.video_fps, clip.start, clip.end
        )
        self.selection = select_frames(self.video, choice)
        if self.selection.missing:
            raise MediaError(f"{path}: {self.selection.missing}; fetch it again")
        self.block = Block(path, len(self.selection.indices), is_video=True)

    def read(self, out: np.ndarray, rng: np.random.Generator | None) -> None:
        """Put the frames into uint8 [F, S, S, 3], moved in time if there is `rng`.

        Raises: MediaError.
        """
        indices = self.selection.indices
        if rng is not None:
            jitter = self.preparer.data.frame_jitter
            indices = jitter_indices(indices, self.selection.after, jitter, rng)
        self.video.read(indices, self.preparer.size, out)

    def time_prompt(self) -> str:
        """Where the frames lie, in the words of LLaVA-Video."""
        begin = self.selection.begin
        times = self.selection.seconds - begin
        shown = ",".join(f"{time:.2f}s" for time in times)
        return (
            f"The video lasts for {self.selection.end - begin:.2f} seconds, and {len(times)} "
            f"frames are uniformly sampled from it. These frames are located at {shown}. "
            "Please answer the following questions related to this video."
        )


Medium = Picture | Film


class Reader:
    """Reads records of several sources as samples. Small when pickled: data workers hold one.

    prompts: make samples that end where the last answer is to begin, for evaluation.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        indices: Sequence[RecordIndex],
        preparer: Preparer,
        tokenizer: Tokenizer,
        prompts: bool = False,
    ):
        self.sources, self.indices, self.preparer = list(sources), list(indices), preparer
        self.tokenizer, self.prompts = tokenizer, prompts

    def name(self, source: int, record: int) -> str:
        """`FILE[17] ID`: data sets repeat ids, so it says the place too."""
        value = None
        with suppress(DataError):
            value = self.indices[source][record]
        return self._name(source, record, value)

    def _name(self, source: int, record: int, value: Any) -> str:
        place = f"{self.sources[source].path}[{record}]"
        name = value.get("id") if isinstance(value, dict) else None
        name = "" if name is None else str(name)
        # Half of a surrogate pair, which JSON can spell, could not be printed.
        return f"{place} {name.encode(errors='replace').decode()}".rstrip()

    def files(self, source: int, record: int) -> str:
        """The media that a record names, for an error about them."""
        with suppress(DataError):
            value = self.indices[source][record]
            files = [value.get(name) for name in ("image", "video")] if type(value) is dict else []
            return ", ".join(_short(file) for file in files if file) or "no media"
        return "no media"

    def open(self, source: int, record: int) -> tuple[Sample, list[Medium]]:
        """A sample, and its media ready to be read.

        Raises: ConversationError, MediaError, DataError: the record cannot be used.
        """
        value = self.indices[source][record]
        if not isinstance(value, dict):
            raise DataError(f"the record is {type(value).__name__}, it must be an object")
        conversations = value.get("conversations")
        if not conversations:
            raise DataError("the record has no conversations")
        files, is_video = _media_files(value)
        marks = count_marks(conversations)
        if marks != len(files):
            raise DataError(f"{marks} <image> marks but {len(files)} media files")
        media = self._media(self.sources[source], files, _clips(value, len(files), is_video))
        questions = [turn["value"] for turn in conversations if turn["from"] == "human"]
        if self.preparer.data.time_prompt and len(media) == 1 and isinstance(media[0], Film):
            conversations = _with_times(conversations, media[0].time_prompt())
        ids, labels = self._encode(conversations, len(files))
        kind = "video" if is_video else "image" if files else "text"
        sample = Sample(
            name=self._name(source, record, value),
            ids=ids,
            labels=labels,
            blocks=tuple(medium.block for medium in media),
            question=questions[-1].replace(IMAGE_MARK, "").strip(),
            answer=conversations[-1]["value"],
            question_type=str(value.get("question_type", kind)),
            choices=_choices(value),
        )
        self._check_length(sample)
        return sample, media

    def _media(self, source: Source, files: list[str], clips: list[Clip | None]) -> list[Medium]:
        media: list[Medium] = []
        for file, clip in zip(files, clips, strict=True):
            path = resolve_media(source.media_root, file, source.allow_outside)
            if clip is None:
                media.append(self.preparer.image(path))
            else:
                media.append(self.preparer.video(path, clip, source.allow_outside))
        return media

    def _encode(self, conversations: Any, files: int) -> tuple[np.ndarray, np.ndarray]:
        caption = self.preparer.data.template == "caption"
        if caption:
            encoded = encode_caption(_caption(conversations), self.tokenizer)
            if files != 1:
                raise DataError("the caption template needs one image or video a record")
        else:
            encoded = encode_conversation(conversations, self.tokenizer)
        if not self.prompts:
            return encoded.ids, encoded.labels
        if conversations[-1]["from"] != "gpt":
            raise DataError("the last turn must be the answer that is asked for (from gpt)")
        # A caption follows its picture; an answer follows the turns before it.
        ids = encoded.ids[:1] if caption else encode_prompt(conversations[:-1], self.tokenizer)
        return ids, np.full_like(ids, IGNORE)

    def _check_length(self, sample: Sample) -> None:
        tokens = sample.text + sample.frames * self.preparer.model.tokens_per_frame
        longest = self.preparer.data.max_length
        if tokens > longest:
            raise DataError(
                f"{tokens} tokens ({sample.frames} frames or tiles) are over data.max_length "
                f"{longest}; lower data.max_frames or data.max_tiles"
            )


class FastTokenizer:
    """The Rust half of a transformers tokenizer: what data workers need, without transformers."""

    def __init__(self, tokenizer: Any):
        """tokenizer: of transformers. Raises: DataError if it has no such half."""
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self.backend is None:
            raise DataError("the tokenizer has no tokenizer.json; save it as a fast tokenizer")
        # A copy that never cuts or pads, which tokenizer.json may say, or others turn on.
        self.backend = copy.deepcopy(self.backend)
        self.backend.no_truncation()
        self.backend.no_padding()

    def __getstate__(self) -> Any:
        return self.backend

    def __setstate__(self, backend: Any) -> None:
        self.backend = backend

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text."""
        if len(text) <= 32:  # roles, newlines and the system turn come again and again
            return list(self._short(text))
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    @lru_cache(maxsize=2**12)  # noqa: B019
    def _short(self, text: str) -> tuple[int, ...]:
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """The token of an id."""
        return self.backend.id_to_token(ids)


def _with_times(conversations: list[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
    """The conversation with the times of the frames after the video's mark."""

    def changed(turn: dict[str, Any]) -> dict[str, Any]:
        if IMAGE_MARK not in turn["value"]:
            return turn
        rest = turn["value"].replace(IMAGE_MARK, "").strip()
        return {**turn, "value": f"{IMAGE_MARK}\n{prompt}\n{rest}".rstrip()}

    return [changed(turn) for turn in conversations]


def _short(value: Any) -> str:
    """A value as text for an error, however long it is."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _choices(record: dict[str, Any]) -> int | None:
    choices = record.get("choices")
    if choices is not None and (type(choices) is not int or choices < 1):
        raise DataError(f"choices is {_short(choices)}; it must be the number of possible answers")
    return choices


def _media_files(record: dict[str, Any]) -> tuple[list[str], bool]:
    """The record's media paths, and whether they are videos."""
    # Tables that became JSON have null or no items where a column was empty.
    image, video = (None if record.get(k) == [] else record.get(k) for k in ("image", "video"))
    if image is not None and video is not None:
        raise DataError("the record has both image and video; use one of them")
    is_video = video is not None
    files = video if is_video else image if image is not None else []
    if isinstance(files, str):
        files = [files]
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise DataError("image and video must be a path or a list of paths")
    return files, is_video


def _clips(record: dict[str, Any], files: int, is_video: bool) -> list[Clip | None]:
    """The clip of every video; None for every image."""
    if not is_video:
        if any(record.get(name) not in (None, []) for name in ("start", "end")):
            raise DataError("start and end are of a video; the record has none")
        return [None] * files
    columns: dict[str, list[float | None]] = {}
    for name in ("start", "end", "fps"):
        value = None if record.get(name) == [] else record.get(name)
        values = value if isinstance(value, list) else [value] * files
        numbers = [v for v in values if v is not None]
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers):
            raise DataError(
                f"{name} is {_short(value)}; it must be a number, or one for each video"
            )
        if any(not 0 <= v <= 1e9 or (name == "fps" and v == 0) for v in numbers):
            raise DataError(f"{name} is {_short(value)}; it must be positive, and at most 1e9")
        if len(values) != files:
            raise DataError(f"{len(values)} values of {name} but {files} media files")
        columns[name] = values
    return [Clip(*values) for values in zip(*columns.values(), strict=True)]


def _caption(conversations: list[dict[str, Any]]) -> str:
    answers = [turn["value"] for turn in conversations if turn["from"] == "gpt"]
    if len(answers) != 1:
        raise DataError(f"the caption template needs one answer (the caption), got {len(answers)}")
    return answers[0]
