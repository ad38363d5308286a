"""Records in the shapes of several trainers."""

from typing import Any

from tests.support.data import ASK, Record, turns


def messages(*values: Any) -> list[Record]:
    """A conversation in the words of OpenAI, from user and assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": v} for i, v in enumerate(values)]


def image(path: str | None = None) -> Record:
    """A part of a turn."""
    return {"type": "image"} if path is None else {"type": "image", "image": path}


def text(value: str) -> Record:
    """A part of a turn."""
    return {"type": "text", "text": value}


SYSTEM = "answer in one word"


VIDEO = "<video>\nwhat is the colour"


SHAPES: dict[str, tuple[Record, Record]] = {
    "images": ({"images": ["a.png"], "conversations": ASK}, {"image": "a.png"}),
    "images of one": ({"images": "a.png", "conversations": ASK}, {"image": "a.png"}),
    "videos": ({"videos": ["a.mp4"], "conversations": turns(VIDEO, "red")}, {"video": "a.mp4"}),
    "video with its mark": (
        {"video": "a.mp4", "conversations": turns(VIDEO, "red")},
        {"video": "a.mp4"},
    ),
    "videos with the mark of images": (
        {"videos": ["a.mp4"], "conversations": ASK},
        {"video": "a.mp4"},
    ),
    "two names, one file": (
        {"image": "a.png", "images": ["a.png"], "conversations": ASK},
        {"image": "a.png"},
    ),
    "messages": ({"images": ["a.png"], "messages": messages(ASK[0]["value"], "red")}, {"image": 0}),
    "messages with empty conversations": (
        {"images": ["a.png"], "conversations": [], "messages": messages(ASK[0]["value"], "red")},
        {"image": 0},
    ),
    "conversations of messages": (
        {"videos": ["a.mp4"], "conversations": messages(VIDEO, "red")},
        {"video": "a.mp4"},
    ),
    "parts": (
        {"messages": messages([image("a.png"), text("\nwhat is the colour")], [text("red")])},
        {"image": "a.png"},
    ),
    "parts without files": (
        {"images": ["a.png"], "messages": messages([image(), text("\nwhat is the colour")], "red")},
        {"image": "a.png"},
    ),
    "parts without types": (
        {"messages": messages([{"image": "a.png"}, {"text": "\nwhat is the colour"}], "red")},
        {"image": "a.png"},
    ),
    "parts of a table": (
        {
            "messages": messages(
                [
                    {"type": "video", "video": "a.mp4", "text": None},
                    {"type": "text", "text": "\nwhat is the colour", "video": None},
                ],
                "red",
            )
        },
        {"video": "a.mp4"},
    ),
    "a part's path": (
        {
            "messages": messages(
                [{"type": "image", "path": "a.png"}, text("\nwhat is the colour")], "red"
            )
        },
        {"image": "a.png"},
    ),
    **{
        f"image of {empty!r}": (
            {"image": empty, "video": "a.mp4", "conversations": ASK},
            {"video": "a.mp4"},
        )
        for empty in ("", " ", [], None, [""], [None], float("nan"))
    },
    "clip of nothing": (
        {"image": "a.png", "start": "", "end": [], "choices": "", "conversations": ASK},
        {"image": "a.png"},
    ),
    "what says nothing of media": (
        {
            **{"image": "sub/../a.png", "image_id": "sub/a.png", "image_path": "old/a.png"},
            **{"num_frames": 8, "frames": 8, "video_fps": 30.0, "image_size": [70, 30]},
            **{"video_id": "v_17", "source": "coco/a.jpg", "caption": "a red picture"},
            **{"image_url": "http://example.org/b.png", "has_video": False, "duration": 3.5},
            **{"tools": "[]", "audios": [], "videos": "", "id": "x/b.png", "media_type": "image"},
            "conversations": ASK,
        },
        {"image": "sub/../a.png"},
    ),
}
