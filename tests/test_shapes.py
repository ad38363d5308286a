"""Shapes of records: those of other trainers are read as they are meant, or refused by name."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import ASK, TALK, Record, check, open_files, turns, work_on, write_media
from tests.data import write_records as write
from train.dataset import KINDS
from train.records import BadSample, Reader, Sample, read_record
from train.workers import Measured
from vxl_jax import chat


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media of all kinds, good and bad."""
    return write_media(tmp_path_factory.mktemp("media"))


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


@pytest.mark.parametrize("case", SHAPES)
def test_other_shapes_are_the_sample_of_llavas(case: str, root: Path, demo_tokenizer: Any):
    record, media = SHAPES[case]
    media = {"image": "a.png"} if media == {"image": 0} else media
    options = {"allow_outside_root": ".." in str(media)}
    expected = check({**media, "conversations": ASK}, root, demo_tokenizer, **options)
    assert isinstance(expected, Sample)
    for prompts in (False, True):
        want = check({**media, "conversations": ASK}, root, demo_tokenizer, prompts, **options)
        found = check(record, root, demo_tokenizer, prompts, **options)
        assert isinstance(found, Sample), found
        assert isinstance(want, Sample)
        assert found.ids.tolist() == want.ids.tolist()
        assert found.labels.tolist() == want.labels.tolist()
        assert found.blocks == want.blocks
        assert (found.question, found.answer) == ("what is the colour", "red")
        assert found.question_type == next(iter(media))


def test_several_media_and_turns_keep_their_places(root: Path, demo_tokenizer: Any):
    record = {
        "messages": [
            {"role": "system", "content": [text("answer "), text("in one word")]},
            *messages(
                [text("what "), image("a.png"), text(" or "), image("line.png"), text(" now")],
                "red",
                [image("dot.png"), text("and here")],
                "one",
            ),
        ]
    }
    sample = check(record, root, demo_tokenizer)
    assert isinstance(sample, Sample)
    same = turns("what <image> or <image> now", "red", "<image>and here", "one")
    expected = chat.encode_conversation(same, demo_tokenizer, SYSTEM)
    assert sample.ids.tolist() == expected.ids.tolist()
    assert sample.labels.tolist() == expected.labels.tolist()
    assert [block.path.name for block in sample.blocks] == ["a.png", "line.png", "dot.png"]


# System messages.


@pytest.mark.parametrize(
    "record",
    [
        {"system": SYSTEM, "conversations": ASK},
        {"system_prompt": SYSTEM, "conversations": ASK},
        {"system": SYSTEM, "system_prompt": SYSTEM, "conversations": ASK},
        {"system": "", "system_prompt": SYSTEM, "conversations": ASK},
        {"conversations": [{"from": "system", "value": SYSTEM}, *ASK]},
        {"system": SYSTEM, "conversations": [{"from": "system", "value": ""}, *ASK]},
        {"messages": [{"role": "system", "content": SYSTEM}, *messages(ASK[0]["value"], "red")]},
    ],
)
def test_system_messages_are_the_system_turn(record: Record, root: Path, demo_tokenizer: Any):
    record = {"image": "a.png", **record}
    trained = check(record, root, demo_tokenizer)
    asked = check(record, root, demo_tokenizer, prompts=True)
    assert isinstance(trained, Sample)
    assert isinstance(asked, Sample)
    expected = chat.encode_conversation(ASK, demo_tokenizer, SYSTEM)
    np.testing.assert_array_equal(trained.ids, expected.ids)
    np.testing.assert_array_equal(trained.labels, expected.labels)
    prompt = chat.encode_prompt(ASK[:1], demo_tokenizer, SYSTEM)
    np.testing.assert_array_equal(asked.ids, prompt)
    assert SYSTEM in demo_tokenizer.decode(asked.ids[: asked.ids.tolist().index(-200)])
    bad = check(record, root, demo_tokenizer, template="caption")
    assert isinstance(bad, BadSample)
    assert "the caption template has no system turn" in bad.reason


@pytest.mark.parametrize("empty", [None, "", " ", [], float("nan")])
def test_an_empty_system_message_is_the_default(empty: Any, root: Path, demo_tokenizer: Any):
    sample = check({"system": empty, "conversations": TALK}, root, demo_tokenizer)
    assert isinstance(sample, Sample)
    np.testing.assert_array_equal(sample.ids, chat.encode_conversation(TALK, demo_tokenizer).ids)


# What is refused.

QUESTION = {"from": "human", "value": "what"}
REFUSED: dict[str, tuple[Any, str]] = {
    **{
        f"{key} {'beside an image' if media else 'alone'}": (
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


def test_kinds_are_counted_as_they_are(root: Path, tmp_path: Path, demo_tokenizer: Any):
    records = [
        {"videos": ["a.mp4"], "conversations": turns(VIDEO, "red")},
        {"images": ["a.png", "dot.png"], "messages": messages("<image><image>what", "red")},
        {"messages": messages([image("a.png"), text("what")], "red")},
        {"videos": ["a.mp4", "frames"], "messages": messages("<video><video>what", "red")},
        {"messages": messages("what", "red")},
    ]
    path = write(tmp_path / "x.json", records)
    with open_files(path, root, demo_tokenizer, max_frames=4) as dataset:
        kinds = [KINDS[kind] for kind in dataset.kind]
        assert kinds == ["video", "images", "image", "videos", "text"]
        assert dataset.lengths.frames.tolist() == [4, 4, 2, 7, 0]
        assert dataset.reader.files(0, 1) == "'a.png', 'dot.png'"
        assert dataset.reader.files(0, 4) == "no media"


def test_control_tokens_of_records_follow_the_switch(root: Path, demo_tokenizer: Any):
    record = {"system": "be <|im_end|>", "conversations": turns("a <|im_end|> b", "<|im_start|>")}
    plain = work_on(record, root, demo_tokenizer).reader
    parts = (plain.sources, plain.indices, plain.preparer, plain.tokenizer)
    for control in (True, False):
        for prompts in (False, True):
            sample, _ = Reader(*parts, prompts, control).open(0, 0)
            talk = record["conversations"][: 1 if prompts else 2]
            encode = chat.encode_prompt if prompts else chat.encode_conversation
            found: Any = encode(talk, demo_tokenizer, record["system"], control)
            assert sample.ids.tolist() == (found if prompts else found.ids).tolist()


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
