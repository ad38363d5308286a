"""Records that are refused by name."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.data import ASK, TALK, check, turns, work_on
from tests.train.data.records.examples import SHAPES, image, messages, text
from train.data.records.sample import BadSample, Sample
from train.data.records.shapes import read_record
from train.data.workers import Measured
from vxl_jax.text import chat

QUESTION = {"from": "human", "value": "what"}


REFUSED: dict[str, tuple[Any, str]] = {
    **{
        f"{key} {'next to an image' if media else 'alone'}": (
            {key: value, **media, "conversations": ASK if media else TALK},
            f"the record has {key!r} (",
        )
        for key, value in {
            **{"Image": "b.png", "IMAGES": ["b.png"], "image_path": "b.png", "imgPath": "b.png"},
            **{"video_path": "b.mp4", "Videos": ["b.mp4"], "videofile": "b", "frames": ["0.png"]},
            **{"picture": "b", "img": "b.png", "clip": "b.mp4", "audio": "b.wav", "media": ["b"]},
            **{"audios": ["b.wav"], "image_1": "b.png", "frame_dir": "b", "left_image": "b.png"},
            **{"image_data": {"bytes": "iVBORw0KGgo", "path": None}, "videoUrls": ["b.mp4"]},
        }.items()
        for media in ({}, {"image": "a.png"})
    },
    **{
        f"{key} in a text": ({key: value, "conversations": TALK}, f"the record has {key!r} (")
        for key, value in {
            **{"image_url": "https://example.org/b.png", "file_name": "b.jpg", "path": "b.mp4"},
            **{"metadata": {"video": "b.mp4"}, "extra": [{"files": ["x/b.JPG"]}]},
        }.items()
    },
    **{
        f"{key} for system": (
            {key: "be nice", "conversations": TALK},
            f"the record has {key!r}, which is not read; rename it to 'system'",
        )
        for key in ("System", "system_message", "systemPrompt", "sys_prompt")
    },
    **{
        f"{mark} in a text": (
            {"conversations": turns(f"{mark} what", "red", "and", "one")},
            f"turn 0 has the mark {mark} but the record has 0 media files",
        )
        for mark in ("<video>", "<Image>", "<image_1>", "<|image_pad|>", "<audio>", "<VIDEO>")
    },
    "video mark in a later turn": (
        {"conversations": [{"from": "system", "value": "x"}, *TALK, *turns("and <video>", "no")]},
        "turn 3 has the mark <video> but the record has 0 media files",
    ),
    "video mark for an image": (
        {"image": "a.png", "conversations": turns("<video>what", "red")},
        "the record has images, but a question has the mark <video>",
    ),
    "both marks": (
        {"videos": ["a.mp4", "a.mp4"], "conversations": turns("<image><video>what", "red")},
        "questions have both <image> and <video>",
    ),
    "too few video marks": (
        {"videos": ["a.mp4", "a.mp4"], "conversations": turns("<video>what", "red")},
        "1 <image> marks but 2 media files",
    ),
    "another mark": (
        {"image": "a.png", "conversations": turns("<Image>what", "red")},
        "0 <image> marks but 1 media files; '<Image>' is not a mark, use <image>",
    ),
    "video mark in an answer": (
        {"video": "a.mp4", "conversations": turns("<video>what", "<video>")},
        "turn 1: an answer cannot hold <video>",
    ),
    "two different systems": (
        {"system": "a", "system_prompt": "b", "conversations": TALK},
        "'system' and 'system_prompt' are different system messages; keep one",
    ),
    "another system turn": (
        {"system": "a", "conversations": [{"from": "system", "value": "b"}, *TALK]},
        "'system' and the system turn are different system messages; keep one",
    ),
    "a late system turn": (
        {"conversations": [*TALK, {"from": "system", "value": "b"}, *TALK]},
        "turn 2 is from system; a record has one system turn, its first",
    ),
    "a system turn without a value": ({"conversations": [{"from": "system"}]}, "turn 0"),
    "system of a list": (
        {"system": ["a"], "conversations": TALK},
        "'system' is list; a system message must be text",
    ),
    "mark in a system message": (
        {"system": "see <image>", "image": "a.png", "conversations": TALK},
        "'system' holds <image>",
    ),
    "system of half a pair": (
        {"system": "\ud800", "conversations": TALK},
        "the system text is not valid Unicode",
    ),
    "turns are numbered as in the file": (
        {"conversations": [{"from": "system", "value": "x"}, QUESTION, QUESTION]},
        "turn 2 is from human, expected gpt",
    ),
    "two conversations": (
        {"conversations": TALK, "messages": messages("what", "red")},
        "the record has both conversations and messages",
    ),
    "alpaca": (
        {"instruction": "what", "output": "red"},
        "the record has no conversations (or messages); its fields are ['instruction', 'output']",
    ),
    "tools": ({"tools": "[{}]", "conversations": TALK}, "the record has tools (definitions of"),
    "ranking pair": (
        {"chosen": TALK[1], "rejected": TALK[1], "conversations": TALK[:1]},
        "the record has chosen (a ranking pair)",
    ),
    "tool role": (
        {"messages": [*messages("what", "red"), {"role": "tool", "content": "1"}]},
        "turn 2: unknown role 'tool'",
    ),
    "observation": (
        {"conversations": [TALK[0], {"from": "observation", "value": "x"}]},
        "turn 1: unknown role 'observation'",
    ),
    "tool call": (
        {
            "messages": [
                *messages("what"),
                {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
            ]
        },
        "turn 1 has tool_calls (calls of tools)",
    ),
    "answer without loss": (
        {"messages": [*messages("what"), {"role": "assistant", "content": "a", "loss": False}]},
        "turn 1 has loss False; every answer is trained on",
    ),
    "media in a turn": (
        {"messages": [{"role": "user", "content": "what", "images": ["a.png"]}]},
        "turn 0 has 'images', which is not read",
    ),
    "audio part": (
        {"messages": messages([{"type": "audio", "audio": "b.wav"}, text("what")], "red")},
        "turn 0, part 0: type 'audio' is not read; use text, image or video",
    ),
    "address part": (
        {"messages": messages([{"type": "image_url", "image_url": {"url": "x"}}], "red")},
        "turn 0, part 0: type 'image_url' is not read",
    ),
    "options of a part": (
        {"messages": messages([{"type": "video", "video": "a.mp4", "nframes": 4}], "red")},
        "turn 0, part 0: 'nframes' of a part of type video is not read",
    ),
    "frames of a part": (
        {"messages": messages([{"type": "video", "video": ["0.png", "1.png"]}], "red")},
        "turn 0, part 0: video must be one path (a folder for frames)",
    ),
    "two places for files": (
        {"images": ["dot.png"], "messages": messages([image("a.png"), text("what")], "red")},
        "parts of type image and the record name different files",
    ),
    "mixed parts": (
        {"messages": messages([image("a.png"), {"type": "video", "video": "a.mp4"}], "red")},
        "the record has both image and video",
    ),
    "media in an answer": (
        {"messages": messages("what", [image("a.png")])},
        "turn 1: an answer cannot hold <image>",
    ),
    "a list of frames": (
        {"videos": [["0.png", "1.png"]], "conversations": turns("<video>what", "red")},
        "videos is not; frames of a video go into a folder",
    ),
    "address": (
        {"image": "https://example.org/a.png", "conversations": ASK},
        "image: 'https://example.org/a.png' is a URL; save it as a file",
    ),
    "pixels as text": (
        {"image": "data:image/png;base64," + "A" * 9999, "conversations": ASK},
        "… is a URL",
    ),
    "two names, two files": (
        {"image": "a.png", "images": ["dot.png"], "conversations": ASK},
        "image and images name different files",
    ),
    "type of a list": ({"question_type": ["a"], "conversations": TALK}, "question_type is ['a']"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, root: Path, demo_tokenizer: Any):
    record, message = REFUSED[case]
    (bad,) = work_on(record, root, demo_tokenizer).measure(0, [0])
    assert isinstance(bad, BadSample), bad
    assert message in bad.reason
    assert len(bad.reason) < 400
    bad.reason.encode()


def test_words_about_media_are_text(root: Path, demo_tokenizer: Any):
    conversation = turns("write a page with a video, image.png and <b>", "<video src='a.mp4'>")
    record = {"conversations": conversation, "topic": "a page with x.png", "video_title": "My day"}
    sample = check(record, root, demo_tokenizer)
    assert isinstance(sample, Sample)
    expected = chat.encode_conversation(conversation, demo_tokenizer)
    np.testing.assert_array_equal(sample.ids, expected.ids)


ATOMS: list[Any] = [
    *(None, True, 0, -1, 3.5, float("nan"), float("inf"), 10**400, "", "a.png", "a.mp4", "a\0b"),
    *("<image>", "<video>", "\ud800", "x" * 5000, "http://x/a.png", "system", "user", "gpt"),
]


NAMES = [
    *("id", "image", "images", "video", "videos", "conversations", "messages", "system"),
    *("system_prompt", "start", "end", "fps", "question_type", "choices", "tools", "frames"),
    *("meta", "image_path", "from", "value", "role", "content", "type", "text", "loss"),
]


def anything(rng: random.Random, depth: int = 0) -> Any:
    """A random value of JSON; some are very deep."""
    if rng.random() < 0.02:
        value: Any = []
        for _ in range(900):
            value = [value] if rng.random() < 0.5 else {"image": value}
        return value
    if depth > 3 or rng.random() < 0.5:
        return rng.choice(ATOMS)
    if rng.random() < 0.5:
        return [anything(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {rng.choice(NAMES): anything(rng, depth + 1) for _ in range(rng.randint(0, 4))}


def test_no_record_is_a_fault_of_the_program(root: Path, demo_tokenizer: Any):
    """`measure` raises for anything but the errors that say what is wrong with a record."""
    rng = random.Random(0)
    good = 0
    for _ in range(1500):
        record, _ = SHAPES[rng.choice([*SHAPES])]
        name = rng.choice(NAMES)
        turn = {**messages("what")[0], rng.choice(NAMES): anything(rng)}
        changed = rng.choice(
            [
                {**record, name: anything(rng)},
                {**record, "id": anything(rng), "question_type": anything(rng)},
                {"messages": [turn, *messages("a", "b")[1:]]},
                {"messages": messages([image("a.png"), anything(rng)], anything(rng))},
                anything(rng),
            ]
        )
        data = rng.choice([{}, {"template": "caption"}, {"time_prompt": True}])
        (found,) = work_on(changed, root, demo_tokenizer, **data).measure(0, [0])
        good += isinstance(found, Measured)
    assert good > 100


def test_reading_changes_no_record(demo_tokenizer: Any):
    record, _ = SHAPES["parts"]
    before = repr(record)
    read_record(record)
    assert repr(record) == before
