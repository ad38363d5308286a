"""Fields that are not read: refused if they look like media or a system message."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from train.data.records.fields import (
    MEDIA_KEYS,
    REFUSED_KEYS,
    SYSTEM_KEYS,
    TURN_KEYS,
    URL,
    is_empty,
    short,
)
from train.errors import DataError

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


_NUMBER = re.compile(r"\s*[\d.,:]+\s*")


_SYSTEM = re.compile(r"sys(?:tem)?(?:prompt|message|msg|text|instruction)?s?")


def check_other_fields(record: dict[str, Any], files: list[str]) -> None:
    """Refuse fields that hold media or a system message under a name that is not read."""
    for key, value in record.items():
        if key in _READ or is_empty(value):
            continue
        if _is_system(key):
            raise DataError(f"the record has {key!r}, which is not read; rename it to 'system'")
        if looks_like_media(key, value, alone=not files) and not _names_same(value, files):
            raise DataError(
                f"the record has {key!r} ({short(value)}), which is not read; media are under "
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


def looks_like_media(key: str, value: Any, alone: bool = False, depth: int = 3) -> bool:
    """Whether a field that is not read looks like media, by its name and value.

    alone: the record has no other media. Then the path of a media file counts under any name, also
    inside of other objects, and addresses count as well.
    """
    texts = [text for text in _texts(value, depth) if not is_empty(text)]
    if not alone:
        texts = [text for text in texts if not URL.match(text)]
    some, only = _media_words(key)
    for text in texts:
        spaced = any(map(str.isspace, text[:1000]))
        if only and not spaced and not _NUMBER.fullmatch(text):
            return True
        if (some or (alone and not spaced)) and _is_file(text):
            return True
    inside = _fields(value, depth) if alone and depth else ()
    return any(looks_like_media(*field, alone, depth - 1) for field in inside)


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
