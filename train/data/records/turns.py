"""Turns of a record, of LLaVA, LLaMA-Factory or Qwen."""

from typing import Any

from train.data.records.fields import (
    LOSS_KEYS,
    REFUSED_TURN_KEYS,
    ROLES,
    VIDEO_MARK,
    is_empty,
    short,
)
from train.data.records.other_fields import looks_like_media
from vxl_jax.errors import ConversationError
from vxl_jax.text.template import IMAGE_MARK

TurnMedium = tuple[str, str | None]
"""Kind of a medium inside a turn, `image` or `video`, and its path if the turn names it."""


def read_turns(raw: Any) -> tuple[Any, list[TurnMedium]]:
    """Read turns as `from` and `value`, and the media inside of them; other values unchanged."""
    if not isinstance(raw, list):
        return raw, []
    parts: list[TurnMedium] = []
    return [_turn(i, turn, parts) for i, turn in enumerate(raw)], parts


def _turn(i: int, turn: Any, parts: list[TurnMedium]) -> Any:
    if not isinstance(turn, dict):
        return turn
    for key, what in REFUSED_TURN_KEYS.items():
        if not is_empty(turn.get(key)):
            raise ConversationError(
                f"turn {i} has {key} ({what}), which cannot be trained on; remove the record"
            )
    for key in LOSS_KEYS:
        if not is_empty(turn.get(key)) and turn[key] not in (True, 1):
            raise ConversationError(
                f"turn {i} has {key} {short(turn[key])}; every answer is trained on, remove it"
            )
    for key, value in turn.items():
        if key not in ("from", "value", "role", "content") and looks_like_media(key, value):
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
                f"turn {i} needs 'role' and 'content'; its keys are {short(list(turn))}"
            )
        return turn  # `count_marks` says what it lacks
    role, value = turn[names[0]], turn[names[1]]
    if isinstance(value, list):
        value = "".join(_text_of(i, j, part, parts) for j, part in enumerate(value))
    if not isinstance(value, str):
        raise ConversationError(f"turn {i}: {names[1]!r} must be text, got {type(value).__name__}")
    return {"from": ROLES.get(role, role) if isinstance(role, str) else role, "value": value}


def _text_of(i: int, j: int, part: Any, parts: list[TurnMedium]) -> str:
    """The text of a part of a turn's content, a mark for a medium."""
    place = f"turn {i}, part {j}"
    if not isinstance(part, dict):
        raise ConversationError(f"{place}: must be an object, got {type(part).__name__}")
    kinds = [kind for kind in ("text", "image", "video") if part.get(kind) is not None]
    kind = part.get("type", kinds[0] if len(kinds) == 1 else None)
    if kind not in ("text", "image", "video"):
        raise ConversationError(
            f"{place}: type {short(kind)} is not read; use text, image or video"
        )
    names = ("text",) if kind == "text" else (kind, "path")
    others = [k for k, v in part.items() if k not in (*names, "type") and not is_empty(v)]
    if others:
        raise ConversationError(
            f"{place}: {', '.join(map(short, others))} of a part of type {kind} is not read; "
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


def role_of(turn: Any) -> Any:
    return turn.get("from") if isinstance(turn, dict) else None


def check_roles(turns: list[Any], first: int) -> None:
    """Refuse a system turn that is not the first. first: number of the first turn."""
    for i, turn in enumerate(turns, first):
        if role_of(turn) == "system":
            raise ConversationError(
                f"turn {i} is from system; a record has one system turn, its first"
            )
