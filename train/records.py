"""One record of a data file as a sample: token ids, labels, and the pixels of its media.

A record is `{"id", "conversations": [{"from", "value"}, …]}` with one of `image` (a path or a list
of paths), `video` (a path or a list: video files, or folders of frames), or neither. A video may
have `start` and `end` in seconds, and a folder of frames `fps`; lists of them where there are
several videos. `system` is the text of the system turn.

Records of LLaMA-Factory and Qwen are brought into this shape first (`read_record`). A record that
holds something else that would change training (media under another name, a mark without a file,
tools) is refused by name.

This module runs in data workers, which do not import JAX.
"""

import copy
import re
from collections.abc import Iterator, Sequence
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
    DEFAULT_SYSTEM,
    IGNORE,
    IMAGE_MARK,
    Tokenizer,
    count_marks,
    encode_caption,
    encode_conversation,
    encode_prompt,
)
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import ConversationError, MediaError
from vxl_jax.media import (
    FrameChoice,
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
RECORDS_VERSION = 2
"""Part of the key of cached lengths: raise it when a record becomes another sample."""


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
        times = np.maximum(self.selection.seconds - begin, 0.0)
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
    control_tokens: see `vxl_jax.chat.encode_conversation`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        indices: Sequence[RecordIndex],
        preparer: Preparer,
        tokenizer: Tokenizer,
        prompts: bool = False,
        control_tokens: bool = True,
    ):
        self.sources, self.indices, self.preparer = list(sources), list(indices), preparer
        self.tokenizer, self.prompts, self.control_tokens = tokenizer, prompts, control_tokens

    def name(self, source: int, record: int) -> str:
        """`FILE[17] ID`: data sets repeat ids, so it says the place too."""
        value = None
        with suppress(DataError):
            value = self.indices[source][record]
        return self._name(source, record, value)

    def _name(self, source: int, record: int, value: Any) -> str:
        place = f"{self.sources[source].path}[{record}]"
        name = value.get("id") if isinstance(value, dict) else None
        name = "" if name is None else name if isinstance(name, str) else _short(name)
        # Half of a surrogate pair, which JSON can spell, could not be printed.
        return f"{place} {name.encode(errors='replace').decode()}".rstrip()

    def files(self, source: int, record: int) -> str:
        """The media that a record names, for an error about them."""
        with suppress(*BAD):
            files = read_record(self.indices[source][record]).files
            return ", ".join(_short(file) for file in files) or "no media"
        return "no media"

    def open(self, source: int, record: int) -> tuple[Sample, list[Medium]]:
        """A sample, and its media ready to be read.

        Raises: ConversationError, MediaError, DataError: the record cannot be used.
        """
        value = self.indices[source][record]
        shape = read_record(value)
        files, conversations = shape.files, shape.conversations
        media = self._media(self.sources[source], files, shape.clips)
        questions = [turn["value"] for turn in conversations if turn["from"] == "human"]
        if self.preparer.data.time_prompt and len(media) == 1 and isinstance(media[0], Film):
            conversations = _with_times(conversations, media[0].time_prompt())
        ids, labels = self._encode(conversations, len(files), shape.system)
        kind = "video" if shape.is_video else "image" if files else "text"
        sample = Sample(
            name=self._name(source, record, value),
            ids=ids,
            labels=labels,
            blocks=tuple(medium.block for medium in media),
            question=questions[-1].replace(IMAGE_MARK, "").strip(),
            answer=conversations[-1]["value"],
            question_type=kind if shape.question_type is None else shape.question_type,
            choices=shape.choices,
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

    def _encode(
        self, conversations: Any, files: int, system: str | None
    ) -> tuple[np.ndarray, np.ndarray]:
        options: dict[str, Any] = {"control_tokens": self.control_tokens}
        caption = self.preparer.data.template == "caption"
        if caption:
            encoded = encode_caption(_caption(conversations), self.tokenizer, **options)
            if files != 1:
                raise DataError("the caption template needs one image or video a record")
            if system is not None:
                raise DataError(
                    "the record has a system message, but the caption template has no system turn; "
                    "remove it, or use data.template chat"
                )
        else:
            options["system"] = DEFAULT_SYSTEM if system is None else system
            encoded = encode_conversation(conversations, self.tokenizer, **options)
        if not self.prompts:
            return encoded.ids, encoded.labels
        if conversations[-1]["from"] != "gpt":
            raise DataError("the last turn must be the answer that is asked for (from gpt)")
        # A caption follows its picture; an answer follows the turns before it.
        if caption:
            ids = encoded.ids[:1]
        else:
            ids = encode_prompt(conversations[:-1], self.tokenizer, **options)
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

    @property
    def backend_tokenizer(self) -> Any:
        """The tokenizer in Rust, under the name that transformers gives it."""
        return self.backend

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
    """A value as text for an error, however long or deep it is."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deep {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}…"


# One record in the shape of LLaVA, from any of the shapes that are read.

VIDEO_MARK = "<video>"
"""A mark of LLaMA-Factory and Qwen; in records of videos it counts as `<image>`."""

MEDIA_KEYS = {"image": ("image", "images"), "video": ("video", "videos")}
"""Names of the fields that hold media, by kind."""
TURN_KEYS = ("conversations", "messages")
SYSTEM_KEYS = ("system", "system_prompt")
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
REFUSED_KEYS = {
    "tools": "definitions of tools",
    "functions": "definitions of functions",
    "chosen": "a ranking pair",
    "rejected": "a ranking pair",
    "rejected_response": "a ranking pair",
    "kto_tag": "a preference",
    "history": "a history beside the conversation",
}
"""Fields of other trainers that would change training."""
REFUSED_TURN_KEYS = {
    "tool_calls": "calls of tools",
    "function_call": "a call of a function",
    "tool_call_id": "the answer of a tool",
    "refusal": "a refusal",
}
LOSS_KEYS = ("loss", "weight", "train", "trainable", "loss_scale")
"""Fields of a turn by which other trainers leave it out of the loss."""
_READ = {*MEDIA_KEYS["image"], *MEDIA_KEYS["video"], *TURN_KEYS, *SYSTEM_KEYS, *REFUSED_KEYS}
_READ |= {"id", "start", "end", "fps", "question_type", "choices"}

_MEDIUM = (
    "images?|imgs?|pictures?|pics?|photos?|photographs?|screenshots?|gifs?|videos?|vids?|clips?|"
    "films?|movies?|frames?|keyframes?|media|visuals?|vision|pixels?|audios?|sounds?|speech"
)
_FILE = (
    "paths?|files?|filenames?|filepaths?|names?|urls?|uris?|dirs?|directory|folders?|lists?|data|"
    r"bytes|base64|b64|inputs?|values?|contents?|tensors?|the|a|of|\d+"
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_IS_MEDIUM = re.compile(f"(?:{_MEDIUM})(?:{_FILE})?")
_IS_FILE = re.compile(_FILE)
_SUFFIX = re.compile(
    r"\S.*\.(?:jpe?g|png|gif|bmp|webp|avif|heic|heif|tiff?|ppm|mp4|m4v|mov|mkv|webm|avi|flv|wmv|"
    r"mpe?g|m2ts|mts|3gp|ogv|vob|mxf|wav|mp3|flac|m4a|ogg|aac)",
    re.IGNORECASE,
)
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*://|data:)", re.IGNORECASE)
_NUMBER = re.compile(r"\s*[\d.,:]+\s*")
_SYSTEM = re.compile(r"sys(?:tem)?(?:prompt|message|msg|text|instruction)?s?")
_MARK_LIKE = re.compile(
    r"<\|?(?:image|video|audio)s?(?:[ _-]?(?:pad|placeholder|here|token|\d+))?\|?>",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Shape:
    """A record in one shape, checked but for its files.

    conversations: turns from human and gpt, with an `<image>` mark for each file. clips: of every
    video; None for every image. system: None if the record has no system message.
    """

    conversations: list[dict[str, Any]]
    files: list[str]
    is_video: bool
    clips: list["Clip | None"]
    system: str | None
    question_type: str | None
    choices: int | None


def read_record(record: Any) -> Shape:
    """Bring a record of LLaVA, LLaMA-Factory or Qwen into one shape.

    Raises: ConversationError, DataError: it cannot be used; the message names the field or turn.
    """
    if not isinstance(record, dict):
        raise DataError(f"the record is {type(record).__name__}, it must be an object")
    for key, what in REFUSED_KEYS.items():
        if not _empty(record.get(key)) and record[key] != "[]":
            raise DataError(f"the record has {key} ({what}), which cannot be trained on; remove it")
    raw = _turns_of(record)
    turns, parts = _read_turns(raw)
    system, first = None, 0
    if isinstance(turns, list):
        has_system = turns and _role(turns[0]) == "system" and "value" in turns[0]
        systems = [turns[0]["value"]] if has_system else []
        first = len(systems)
        turns = turns[first:]
        system = _system(record, systems)
        _check_roles(turns, first)
    files, is_video = _media_files(record, parts)
    _check_other_keys(record, files)
    count_marks(turns, first)
    turns = _with_marks(turns, len(files), is_video, first)
    marks = count_marks(turns, first)
    if marks != len(files):
        others = _other_marks([turn["value"] for turn in turns if turn["from"] == "human"])
        hint = f"; {_short(others[0])} is not a mark, use {IMAGE_MARK}" if others else ""
        raise DataError(f"{marks} {IMAGE_MARK} marks but {len(files)} media files{hint}")
    return Shape(
        conversations=turns,
        files=files,
        is_video=is_video,
        clips=_clips(record, len(files), is_video),
        system=system,
        question_type=_question_type(record),
        choices=_choices(record),
    )


def _empty(value: Any) -> bool:
    """Whether a field counts as not there: tables that became JSON have such values in a column
    where a record has nothing.
    """
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list):
        return all(item is None or item == "" for item in value)
    return value is None or value == {} or (isinstance(value, float) and value != value)


def _turns_of(record: dict[str, Any]) -> Any:
    found = [key for key in TURN_KEYS if not _empty(record.get(key))]
    if not found:
        fields = _short(list(record))
        raise DataError(f"the record has no conversations (or messages); its fields are {fields}")
    if len(found) > 1:
        raise DataError("the record has both conversations and messages; use one of them")
    return record[found[0]]


Part = tuple[str, str | None]
"""Kind of a medium inside a turn, `image` or `video`, and its path if the turn names it."""


def _read_turns(raw: Any) -> tuple[Any, list[Part]]:
    """Turns as `from` and `value`, and the media inside of them; what is no turn as it is."""
    if not isinstance(raw, list):
        return raw, []
    parts: list[Part] = []
    return [_turn(i, turn, parts) for i, turn in enumerate(raw)], parts


def _turn(i: int, turn: Any, parts: list[Part]) -> Any:
    if not isinstance(turn, dict):
        return turn
    for key, what in REFUSED_TURN_KEYS.items():
        if not _empty(turn.get(key)):
            raise ConversationError(
                f"turn {i} has {key} ({what}), which cannot be trained on; remove the record"
            )
    for key in LOSS_KEYS:
        if not _empty(turn.get(key)) and turn[key] not in (True, 1):
            raise ConversationError(
                f"turn {i} has {key} {_short(turn[key])}; every answer is trained on, remove it"
            )
    for key, value in turn.items():
        if key not in ("from", "value", "role", "content") and _holds_media(key, value):
            raise ConversationError(
                f"turn {i} has {key!r}, which is not read; name its media in the record's 'image' "
                "or 'video'"
            )
    names = ("role", "content") if "role" in turn else ("from", "value")
    if "role" in turn and ("from" in turn or "value" in turn):
        raise ConversationError(f"turn {i} has both role/content and from/value; use one of them")
    if names[1] not in turn or names[0] not in turn:
        if "role" in turn or "content" in turn:
            raise ConversationError(
                f"turn {i} needs 'role' and 'content'; its keys are {_short(list(turn))}"
            )
        return turn  # `count_marks` says what it lacks
    role, value = turn[names[0]], turn[names[1]]
    if isinstance(value, list):
        value = "".join(_text_of(i, j, part, parts) for j, part in enumerate(value))
    if not isinstance(value, str):
        raise ConversationError(f"turn {i}: {names[1]!r} must be text, got {type(value).__name__}")
    return {"from": ROLES.get(role, role) if isinstance(role, str) else role, "value": value}


def _text_of(i: int, j: int, part: Any, parts: list[Part]) -> str:
    """The text of a part of a turn's content, a mark for a medium."""
    place = f"turn {i}, part {j}"
    if not isinstance(part, dict):
        raise ConversationError(f"{place}: must be an object, got {type(part).__name__}")
    kinds = [kind for kind in ("text", "image", "video") if part.get(kind) is not None]
    kind = part.get("type", kinds[0] if len(kinds) == 1 else None)
    if kind not in ("text", "image", "video"):
        raise ConversationError(
            f"{place}: type {_short(kind)} is not read; use text, image or video"
        )
    names = ("text",) if kind == "text" else (kind, "path")
    others = [k for k, v in part.items() if k not in (*names, "type") and not _empty(v)]
    if others:
        raise ConversationError(
            f"{place}: {', '.join(map(_short, others))} of a part of type {kind} is not read; "
            "remove it (data.* options say how media are read)"
        )
    values = [part[name] for name in names if part.get(name) is not None]
    if kind == "text":
        if not values or not isinstance(values[0], str):
            raise ConversationError(f"{place}: 'text' must be text")
        return values[0]
    if len(values) > 1 or not all(isinstance(value, str) for value in values):
        raise ConversationError(f"{place}: {kind} must be one path (a folder for frames)")
    parts.append((kind, values[0] if values and values[0].strip() else None))
    return IMAGE_MARK if kind == "image" else VIDEO_MARK


def _role(turn: Any) -> Any:
    return turn.get("from") if isinstance(turn, dict) else None


def _check_roles(turns: list[Any], first: int) -> None:
    """Refuse a system turn that is not the first. first: number of the first turn."""
    for i, turn in enumerate(turns, first):
        if _role(turn) == "system":
            raise ConversationError(
                f"turn {i} is from system; a record has one system turn, its first"
            )


def _system(record: dict[str, Any], turns: list[str]) -> str | None:
    """The system message of a record and its system turn."""
    named = [(repr(key), record.get(key)) for key in SYSTEM_KEYS]
    named += [("the system turn", turn) for turn in turns]
    found = {name: value for name, value in named if not _empty(value)}
    for name, value in found.items():
        if not isinstance(value, str):
            raise DataError(f"{name} is {type(value).__name__}; a system message must be text")
        for mark in (IMAGE_MARK, VIDEO_MARK):
            if mark in value:
                raise DataError(f"{name} holds {mark}; marks belong to questions")
    if len(set(found.values())) > 1:
        raise DataError(f"{' and '.join(found)} are different system messages; keep one")
    return next(iter(found.values()), None)


def _media_files(record: dict[str, Any], parts: list[Part]) -> tuple[list[str], bool]:
    """The record's media paths, and whether they are videos. parts: media inside its turns."""
    found: dict[str, list[str]] = {}
    for kind, keys in MEDIA_KEYS.items():
        for key in keys:
            if _empty(value := record.get(key)):
                continue
            files: Any = [value] if isinstance(value, str) else value
            _check_files(key, files)
            if found.setdefault(kind, files) != files:
                raise DataError(f"{keys[0]} and {keys[1]} name different files; use one of them")
    for kind in MEDIA_KEYS:
        named = [path for part, path in parts if part == kind]
        files = [path for path in named if path is not None]
        if not files:
            continue
        _check_files(f"a part of type {kind}", files)
        if len(files) < len(named) or found.setdefault(kind, files) != files:
            raise DataError(f"parts of type {kind} and the record name different files")
    if len(found) > 1:
        raise DataError("the record has both image and video; use one of them")
    for kind, _ in parts:
        if found and kind not in found:
            has = next(iter(found))
            raise DataError(f"a turn has a part of type {kind}, but the record has {has} files")
    is_video = "video" in found
    return next(iter(found.values()), []), is_video


def _check_files(key: str, files: Any) -> None:
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        hint = ""
        if isinstance(files, list) and any(isinstance(file, list) for file in files):
            hint = "; frames of a video go into a folder"
        raise DataError(f"image and video must be a path or a list of paths, {key} is not{hint}")
    for file in files:
        if _URL.match(file):
            raise DataError(f"{key}: {_short(file)} is a URL; save it as a file and give its path")


def _check_other_keys(record: dict[str, Any], files: list[str]) -> None:
    """Refuse fields that hold media or a system message under a name that is not read."""
    for key, value in record.items():
        if key in _READ or _empty(value):
            continue
        if _is_system(key):
            raise DataError(f"the record has {key!r}, which is not read; rename it to 'system'")
        if _holds_media(key, value, alone=not files) and not _names_same(value, files):
            raise DataError(
                f"the record has {key!r} ({_short(value)}), which is not read; media are under "
                "'image' or 'video': rename or remove it"
            )


@lru_cache(maxsize=2**10)
def _media_words(key: str) -> tuple[bool, bool]:
    """Whether a field's name has a word for media, and whether it says nothing else."""
    words = [word.lower() for word in _WORD.findall(key)]
    media = [bool(_IS_MEDIUM.fullmatch(word)) for word in words]
    files = [bool(_IS_FILE.fullmatch(word)) for word in words]
    return any(media), any(media) and all(m or f for m, f in zip(media, files, strict=True))


@lru_cache(maxsize=2**10)
def _is_system(key: str) -> bool:
    return _SYSTEM.fullmatch(re.sub("[^a-z]", "", key.lower())) is not None


def _holds_media(key: str, value: Any, alone: bool = False, depth: int = 3) -> bool:
    """Whether a field that is not read looks like media, by its name and value.

    alone: the record has no other media. Then the path of a media file counts under any name, also
    inside of other objects, and addresses count as well.
    """
    texts = [text for text in _texts(value, depth) if not _empty(text)]
    if not alone:
        texts = [text for text in texts if not _URL.match(text)]
    some, only = _media_words(key)
    for text in texts:
        spaced = any(map(str.isspace, text[:1000]))
        if only and not spaced and not _NUMBER.fullmatch(text):
            return True
        if (some or (alone and not spaced)) and _is_file(text):
            return True
    inside = _fields(value, depth) if alone and depth else ()
    return any(_holds_media(*field, alone, depth - 1) for field in inside)


def _fields(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Fields of the objects in a value."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list) and depth:
        for item in value:
            yield from _fields(item, depth - 1)


def _texts(value: Any, depth: int = 3) -> Iterator[str]:
    """Texts of a value: itself, or those of its items and fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item, depth - 1)


def _is_file(text: str) -> bool:
    return len(text) < 2**12 and "\n" not in text and _SUFFIX.fullmatch(text) is not None


def _names_same(value: Any, files: list[str]) -> bool:
    """Whether all texts of a value are the names of files that are read, with or without folder
    and suffix.
    """
    known = {name for file in files for name in (file, Path(file).name, Path(file).stem)}
    texts = [*_texts(value)]
    return bool(texts) and all({text, Path(text).name} & known for text in texts)


def _with_marks(turns: list[Any], files: int, is_video: bool, first: int) -> list[Any]:
    """Turns with `<image>` for the marks of videos. first: number of the first turn.

    Raises: ConversationError, DataError for marks that stand for no file.
    """
    start = next(i for i, turn in enumerate(turns) if turn["from"] == "human")
    used = list(enumerate(turns, first))[start:]  # leading answers are dropped
    questions = [turn["value"] for _, turn in used if turn["from"] == "human"]
    if not files:
        for i, turn in used:
            marks = _other_marks([turn["value"]]) if turn["from"] == "human" else []
            if marks:
                raise DataError(
                    f"turn {i} has the mark {marks[0]} but the record has 0 media files; name them "
                    "in 'image' or 'video', or remove the mark"
                )
        return turns
    if not any(VIDEO_MARK in text for text in questions):
        return turns
    if not is_video:
        raise DataError(f"the record has images, but a question has the mark {VIDEO_MARK}")
    if any(IMAGE_MARK in text for text in questions):
        raise DataError(f"questions have both {IMAGE_MARK} and {VIDEO_MARK}; use one of them")
    changed = turns[:start]
    for i, turn in used:
        if turn["from"] == "gpt" and VIDEO_MARK in turn["value"]:
            raise ConversationError(f"turn {i}: an answer cannot hold {VIDEO_MARK}")
        changed.append({**turn, "value": turn["value"].replace(VIDEO_MARK, IMAGE_MARK)})
    return changed


def _other_marks(texts: Sequence[str]) -> list[str]:
    """What looks like a mark and is not `<image>`, in order."""
    return [m for text in texts for m in _MARK_LIKE.findall(text) if m != IMAGE_MARK]


def _question_type(record: dict[str, Any]) -> str | None:
    value = record.get("question_type")
    if _empty(value):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"question_type is {_short(value)}; it must be text")
    return str(value).encode(errors="replace").decode()


def _choices(record: dict[str, Any]) -> int | None:
    choices = record.get("choices")
    if _empty(choices):
        return None
    if type(choices) is not int or choices < 1:
        raise DataError(f"choices is {_short(choices)}; it must be the number of possible answers")
    return choices


def _clips(record: dict[str, Any], files: int, is_video: bool) -> list[Clip | None]:
    """The clip of every video; None for every image."""
    if not is_video:
        if any(record.get(name) not in (None, [], "") for name in ("start", "end")):
            raise DataError("start and end are of a video; the record has none")
        return [None] * files
    columns: dict[str, list[float | None]] = {}
    for name in ("start", "end", "fps"):
        value = None if record.get(name) in ([], "") else record.get(name)
        values = value if isinstance(value, list) else [value] * files
        numbers = [v for v in values if v is not None]
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers):
            raise DataError(
                f"{name} is {_short(value)}; it must be a number, or one for each video"
            )
        if any(not 0 <= v <= 1e9 or (name == "fps" and v == 0) for v in numbers):
            raise DataError(f"{name} is {_short(value)}; it must be positive, and at most 1e9")
        if name == "fps" and any(v < 1e-9 for v in numbers):  # seconds would pass float64
            raise DataError(f"fps is {_short(value)}; it must be at least 1e-9")
        if len(values) != files:
            raise DataError(f"{len(values)} values of {name} but {files} media files")
        columns[name] = values
    return [Clip(*values) for values in zip(*columns.values(), strict=True)]


def _caption(conversations: list[dict[str, Any]]) -> str:
    answers = [turn["value"] for turn in conversations if turn["from"] == "gpt"]
    if len(answers) != 1:
        raise DataError(f"the caption template needs one answer (the caption), got {len(answers)}")
    return answers[0]
