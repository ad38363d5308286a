"""Records of LLaVA, LLaMA-Factory and Qwen in one shape."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train.data.records.fields import (
    MEDIA_KEYS,
    REFUSED_KEYS,
    SYSTEM_KEYS,
    TURN_KEYS,
    URL,
    VIDEO_MARK,
    is_empty,
    short,
)
from train.data.records.other_fields import check_other_fields
from train.data.records.sample import Clip
from train.data.records.turns import TurnMedium, check_roles, read_turns, role_of
from train.errors import DataError
from vxl_jax.errors import ConversationError
from vxl_jax.text.chat import count_marks
from vxl_jax.text.template import IMAGE_MARK

_MARK_LIKE = re.compile(
    r"<\|?(?:image|video|audio)s?(?:[ _-]?(?:pad|placeholder|here|token|\d+))?\|?>",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RecordShape:
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


def read_record(record: Any) -> RecordShape:
    """Bring a record of LLaVA, LLaMA-Factory or Qwen into one shape.

    Raises: ConversationError, DataError: it cannot be used; the message names the field or turn.
    """
    if not isinstance(record, dict):
        raise DataError(f"the record is {type(record).__name__}, it must be an object")
    for key, what in REFUSED_KEYS.items():
        if not is_empty(record.get(key)) and record[key] != "[]":
            raise DataError(f"the record has {key} ({what}), which cannot be trained on; remove it")
    raw = _turns_of(record)
    turns, parts = read_turns(raw)
    system, first = None, 0
    if isinstance(turns, list):
        has_system = turns and role_of(turns[0]) == "system" and "value" in turns[0]
        systems = [turns[0]["value"]] if has_system else []
        first = len(systems)
        turns = turns[first:]
        system = _system(record, systems)
        check_roles(turns, first)
    files, is_video = _media_files(record, parts)
    check_other_fields(record, files)
    count_marks(turns, first)
    turns = _with_marks(turns, len(files), is_video, first)
    marks = count_marks(turns, first)
    if marks != len(files):
        others = _other_marks([turn["value"] for turn in turns if turn["from"] == "human"])
        hint = f"; {short(others[0])} is not a mark, use {IMAGE_MARK}" if others else ""
        raise DataError(f"{marks} {IMAGE_MARK} marks but {len(files)} media files{hint}")
    return RecordShape(
        conversations=turns,
        files=files,
        is_video=is_video,
        clips=_clips(record, len(files), is_video),
        system=system,
        question_type=_question_type(record),
        choices=_choices(record),
    )


def _turns_of(record: dict[str, Any]) -> Any:
    found = [key for key in TURN_KEYS if not is_empty(record.get(key))]
    if not found:
        fields = short(list(record))
        raise DataError(f"the record has no conversations (or messages); its fields are {fields}")
    if len(found) > 1:
        raise DataError("the record has both conversations and messages; use one of them")
    return record[found[0]]


def _system(record: dict[str, Any], turns: list[str]) -> str | None:
    """The system message of a record and its system turn."""
    named = [(repr(key), record.get(key)) for key in SYSTEM_KEYS]
    named += [("the system turn", turn) for turn in turns]
    found = {name: value for name, value in named if not is_empty(value)}
    for name, value in found.items():
        if not isinstance(value, str):
            raise DataError(f"{name} is {type(value).__name__}; a system message must be text")
        for mark in (IMAGE_MARK, VIDEO_MARK):
            if mark in value:
                raise DataError(f"{name} holds {mark}; marks belong to questions")
    if len(set(found.values())) > 1:
        raise DataError(f"{' and '.join(found)} are different system messages; keep one")
    return next(iter(found.values()), None)


def _media_files(record: dict[str, Any], parts: list[TurnMedium]) -> tuple[list[str], bool]:
    """The record's media paths, and whether they are videos. parts: media inside its turns."""
    found: dict[str, list[str]] = {}
    for kind, keys in MEDIA_KEYS.items():
        for key in keys:
            if is_empty(value := record.get(key)):
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
        if URL.match(file):
            raise DataError(f"{key}: {short(file)} is a URL; save it as a file and give its path")


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
    if is_empty(value):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"question_type is {short(value)}; it must be text")
    return str(value).encode(errors="replace").decode()


def _choices(record: dict[str, Any]) -> int | None:
    choices = record.get("choices")
    if is_empty(choices):
        return None
    if type(choices) is not int or choices < 1:
        raise DataError(f"choices is {short(choices)}; it must be the number of possible answers")
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
            raise DataError(f"{name} is {short(value)}; it must be a number, or one for each video")
        if any(not 0 <= v <= 1e9 or (name == "fps" and v == 0) for v in numbers):
            raise DataError(f"{name} is {short(value)}; it must be positive, and at most 1e9")
        if name == "fps" and any(v < 1e-9 for v in numbers):  # seconds would pass float64
            raise DataError(f"fps is {short(value)}; it must be at least 1e-9")
        if len(values) != files:
            raise DataError(f"{len(values)} values of {name} but {files} media files")
        columns[name] = values
    return [Clip(*values) for values in zip(*columns.values(), strict=True)]
