"""Read LLaVA-format JSON and check every record before training: what is in it, how long it is.

A record is `{"id", "conversations": [{"from", "value"}, …]}` with one of `image` (a path or a list
of paths), `video` (a path), or neither.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from train.config import DataSection
from train.progress import progress_bar
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
    MediaError,
    frame_indices,
    grid_pinpoints,
    image_size,
    load_image,
    load_video_frames,
    probe_video,
    resize_and_crop,
    resolve_media,
    tile_grid,
    tile_image,
)
from vxl_jax.stream import Ratio, Stream, plan_stream


class DataError(ValueError):
    """Training data that cannot be used; the message names file, record and what to do."""


@dataclass(frozen=True)
class Block:
    """One visual block: an image cut into tiles, or a video's frames.

    indices: frames to decode; None for an image.
    """

    path: Path
    frames: int
    indices: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sample:
    """A record that passed all checks: token ids, labels, and where its pixels come from.

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

    def plan(self, model: VideoXLConfig, ratio: Ratio) -> Stream:
        """The sample's stream under a ratio."""
        tokens = [block.frames * model.tokens_per_frame for block in self.blocks]
        return plan_stream(self.ids, tokens, window=model.window, ratio=ratio, labels=self.labels)


@dataclass(frozen=True)
class BadSample:
    """A record that is left out, and why."""

    name: str
    reason: str


class Preparer:
    """Turns records into samples and blocks into pixels, for one configuration of data and model.

    Picklable: data workers hold one.
    """

    def __init__(self, data: DataSection, model: VideoXLConfig):
        self.data, self.model = data, model
        size = model.vision.image_size
        self.pinpoints = grid_pinpoints(size, data.max_tiles, data.min_tiles)

    def block(self, path: Path, is_video: bool) -> Block:
        """What a media file gives, from its header. Raises: MediaError."""
        if is_video:
            info = probe_video(path)
            indices = frame_indices(
                info.frames, info.fps, self.data.max_frames, self.data.video_fps
            )
            return Block(path, len(indices), tuple(indices))
        size = image_size(path)
        if self.data.image_mode == "square":
            return Block(path, 1)
        columns, rows = tile_grid(size, self.pinpoints, self.model.vision.image_size)
        return Block(path, columns * rows)

    def pixels(self, block: Block) -> np.ndarray:
        """uint8 [F, S, S, 3] of a block.

        Raises: MediaError; also if the file gives another number of frames or tiles than it did.
        """
        size = self.model.vision.image_size
        if block.indices is not None:
            return load_video_frames(block.path, block.indices, size)
        image = load_image(block.path)
        if self.data.image_mode == "square":
            return resize_and_crop(image, size)[None]
        tiles = tile_image(image, self.pinpoints, size)
        if len(tiles) != block.frames:
            raise MediaError(
                f"{block.path}: {len(tiles)} tiles, but its header promised {block.frames}; the "
                "file was changed or is damaged, replace it"
            )
        return tiles


def read_records(path: str | Path) -> list[tuple[str, Any]]:
    """(name, record) of every record of a LLaVA-format JSON file.

    The name is `FILE[17] ID`: data sets repeat ids, so it says the place too.

    Raises: DataError naming the file if it cannot be read, or is not a list of records.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(values, list):
        raise DataError(f"{path}: must hold a list of records")
    if not values:
        raise DataError(f"{path}: has no records")
    names = (str(value.get("id", "")) if isinstance(value, dict) else "" for value in values)
    # Half of a surrogate pair, which JSON can spell, could not be printed.
    names = (name.encode(errors="replace").decode() for name in names)
    return [
        (f"{path}[{i}] {name}".rstrip(), value)
        for i, (name, value) in enumerate(zip(names, values, strict=True))
    ]


def check_records(
    records: Sequence[tuple[str, Any]],
    preparer: Preparer,
    tokenizer: Tokenizer,
    prompts: bool,
) -> tuple[list[Sample], list[BadSample]]:
    """Check every record without decoding its media, and tokenise it.

    prompts: make samples that end where the last answer is to begin, for evaluation.

    Raises: DataError if there is no directory data.media_root.
    """
    if not Path(preparer.data.media_root).is_dir():
        raise DataError(f"data.media_root {preparer.data.media_root}: there is no such directory")
    check = partial(
        _check_record,
        data=preparer.data,
        block=cache(preparer.block),  # a file may be in many records
        tokenizer=tokenizer,
        prompts=prompts,
    )
    samples: list[Sample] = []
    bad: list[BadSample] = []
    for name, record in progress_bar(iterable=records, desc="checking data", unit="record"):
        try:
            sample = check(name, record)
            _check_length(sample, preparer)
        except (ConversationError, MediaError, DataError) as error:
            bad.append(BadSample(name, str(error)))
        else:
            samples.append(sample)
    return samples, bad


def _check_record(
    name: str,
    record: Any,
    data: DataSection,
    block: Callable[[Path, bool], Block],
    tokenizer: Tokenizer,
    prompts: bool,
) -> Sample:
    if not isinstance(record, dict):
        raise DataError(f"the record is {type(record).__name__}, it must be an object")
    conversations = record.get("conversations")
    if not conversations:
        raise DataError("the record has no conversations")
    files, is_video = _media_files(record)
    marks = count_marks(conversations)
    if marks != len(files):
        raise DataError(f"{marks} <image> marks but {len(files)} media files")
    if data.template == "caption":
        encoded = encode_caption(_caption(conversations), tokenizer)
        if len(files) != 1:
            raise DataError("the caption template needs one image or video a record")
    else:
        encoded = encode_conversation(conversations, tokenizer)
    ids, labels = encoded.ids, encoded.labels
    if prompts:
        if conversations[-1]["from"] != "gpt":
            raise DataError("the last turn must be the answer that is asked for (from gpt)")
        # A caption follows its picture; an answer follows the turns before it.
        caption = data.template == "caption"
        ids = ids[:1] if caption else encode_prompt(conversations[:-1], tokenizer)
        labels = np.full_like(ids, IGNORE)
    questions = [turn["value"] for turn in conversations if turn["from"] == "human"]
    return Sample(
        name=name,
        ids=ids,
        labels=labels,
        blocks=tuple(block(resolve_media(data.media_root, file), is_video) for file in files),
        question=questions[-1].replace(IMAGE_MARK, "").strip(),
        answer=conversations[-1]["value"],
        question_type=str(
            record.get("question_type", "video" if is_video else "image" if files else "text")
        ),
        choices=_choices(record),
    )


def _choices(record: dict[str, Any]) -> int | None:
    choices = record.get("choices")
    if choices is not None and (not isinstance(choices, int) or choices < 1):
        raise DataError(f"choices is {choices!r}; it must be the number of possible answers")
    return choices


def _media_files(record: dict[str, Any]) -> tuple[list[str], bool]:
    """The record's media paths, and whether they are videos."""
    # Tables that became JSON have null where a column was empty.
    image, video = record.get("image"), record.get("video")
    if image is not None and video is not None:
        raise DataError("the record has both image and video; use one of them")
    is_video = video is not None
    files = video if is_video else image if image is not None else []
    if isinstance(files, str):
        files = [files]
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise DataError("image and video must be a path or a list of paths")
    return files, is_video


def _caption(conversations: list[dict[str, Any]]) -> str:
    answers = [turn["value"] for turn in conversations if turn["from"] == "gpt"]
    if len(answers) != 1:
        raise DataError(f"the caption template needs one answer (the caption), got {len(answers)}")
    return answers[0]


def _check_length(sample: Sample, preparer: Preparer) -> None:
    tokens = len(sample.ids) - len(sample.blocks)
    tokens += sample.frames * preparer.model.tokens_per_frame
    if tokens > preparer.data.max_length:
        raise DataError(
            f"{tokens} tokens ({sample.frames} frames or tiles) are over data.max_length "
            f"{preparer.data.max_length}; lower data.max_frames or data.max_tiles"
        )
