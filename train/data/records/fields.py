"""Names of the fields of records that are read, and what values count."""

import re
from typing import Any


def short(value: Any) -> str:
    """A value as text for an error, however long or deep it is."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deep {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}…"


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
    "history": "a history in addition to the conversation",
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


URL = re.compile(r"(?:[a-z][a-z0-9+.-]*://|data:)", re.IGNORECASE)


def is_empty(value: Any) -> bool:
    """Whether a field counts as not there: tables that became JSON have such values in a column
    where a record has nothing.
    """
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list):
        return all(item is None or item == "" for item in value)
    return value is None or value == {} or (isinstance(value, float) and value != value)
