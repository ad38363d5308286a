"""Shapes of records: those of other trainers are read as they are meant, or refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.data import (
    ASK,
    TALK,
    Record,
    check,
    open_files,
    turns,
    work_on,
    write_records as write,
)
from tests.train.data.records.examples import SHAPES, SYSTEM, VIDEO, image, messages, text
from train.data.lengths import KINDS
from train.data.records.reader import Reader
from train.data.records.sample import BadSample, Sample
from vxl_jax.text import chat


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
