"""Records that cannot be used: every fault is named, and costs its own record alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.data import (
    ASK,
    TALK,
    Record,
    check,
    pixels_of,
    read_from,
    turns,
    work_on,
    write_media,
)
from train.data.records.sample import BadSample, Sample
from train.data.workers import LoadedSample, Measured, RecordWork
from vxl_jax.errors import MediaError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media of all kinds, good and bad."""
    return write_media(tmp_path_factory.mktemp("media"))


# Records that are left out.

BAD: dict[str, tuple[Any, str]] = {
    "not an object": ("a.png", "the record is str, it must be an object"),
    "no conversations": ({"image": "a.png"}, "the record has no conversations"),
    "empty conversations": ({"conversations": []}, "the record has no conversations"),
    "conversations of text": (
        {"conversations": "what is the colour"},
        "a conversation must be a list of turns, got str",
    ),
    "conversations of a table": (
        {"conversations": {"human": "a"}},
        "a conversation must be a list of turns, got dict",
    ),
    "turn of text": ({"conversations": ["hello"]}, "turn 0 must be an object, got str"),
    "turn without a value": (
        {"conversations": [{"from": "human"}]},
        "turn 0 has no 'value'; its keys are ['from']",
    ),
    "value of a number": (
        {"conversations": [*TALK[:1], {"from": "gpt", "value": 3}]},
        "turn 1: 'value' must be text, got int",
    ),
    "unknown role": (
        {"conversations": [{"from": "bot", "value": "a"}]},
        "turn 0: unknown role 'bot'; use human or gpt",
    ),
    "two questions in a row": (
        {"conversations": [TALK[0], *TALK]},
        "turn 1 is from human, expected gpt: roles must alternate",
    ),
    "no answer": ({"conversations": TALK[:1]}, "the conversation has no answer"),
    "empty answer": ({"conversations": turns("a", " \n")}, "turn 1: the answer is empty"),
    "half a surrogate pair": (
        {"conversations": turns("a", "red \ud83d")},
        "turn 1: 'value' is not valid Unicode",
    ),
    "mark without a file": ({"conversations": ASK}, "1 <image> marks but 0 media files"),
    "file without a mark": (
        {"image": "a.png", "conversations": TALK},
        "0 <image> marks but 1 media files",
    ),
    "fewer marks than files": (
        {"image": ["a.png", "a.png"], "conversations": ASK},
        "1 <image> marks but 2 media files",
    ),
    "mark for a null": ({"image": None, "conversations": ASK}, "1 <image> marks but 0 media files"),
    "mark in an answer": (
        {"image": ["a.png", "a.png"], "conversations": turns("<image> a", "b <image>")},
        "turn 1: an answer cannot hold <image>",
    ),
    "image and video": (
        {"image": "a.png", "video": "a.mp4", "conversations": ASK},
        "the record has both image and video; use one of them",
    ),
    "image of a number": (
        {"image": 3, "conversations": ASK},
        "image and video must be a path or a list of paths",
    ),
    "images of numbers": (
        {"image": ["a.png", 3], "conversations": ASK},
        "image and video must be a path or a list of paths",
    ),
    "missing image": (
        {"image": "gone.png", "conversations": ASK},
        "{root}/gone.png: no such file; check the sample and the media folder",
    ),
    "missing video": (
        {"video": "gone.mp4", "conversations": ASK},
        "{root}/gone.mp4: no such file; check the sample and the media folder",
    ),
    "folder": ({"image": "folder.png", "conversations": ASK}, "{root}/folder.png: is not a file"),
    "name too long": ({"image": "a" * 300, "conversations": ASK}, "File name too long"),
    "video name too long": (
        {"video": "a" * 300, "conversations": ASK},
        "cannot be read (File name too long)",
    ),
    "name that cannot be": ({"image": "\ud800", "conversations": ASK}, "cannot be followed inside"),
    "text for an image": (
        {"image": "text.png", "conversations": ASK},
        "{root}/text.png: not a readable image",
    ),
    "text for a video": (
        {"video": "text.mp4", "conversations": ASK},
        "{root}/text.mp4: is not a video: it begins with the text 'no video'; fetch it again",
    ),
    "empty video file": (
        {"video": "empty.mp4", "conversations": ASK},
        "{root}/empty.mp4: is empty; fetch it again",
    ),
    "video without frames": ({"video": "none.mp4", "conversations": ASK}, "{root}/none.mp4: "),
    "truncated video": (
        {"video": "cut.mp4", "conversations": ASK},
        "{root}/cut.mp4: has no index (moov box): it was cut off",
    ),
    "folder without pictures": (
        {"video": "folder.png", "conversations": ASK},
        "{root}/folder.png: a folder without pictures; put files into it that end in .jpg,",
    ),
    "choices of a word": (
        {"conversations": TALK, "choices": "four"},
        "choices is 'four'; it must be the number of possible answers",
    ),
    "no choices": ({"conversations": TALK, "choices": 0}, "choices is 0; it must be the number"),
    "path that goes up": (
        {"image": "../outside.png", "conversations": ASK},
        "../outside.png: leaves the media folder; give a path relative to {root}",
    ),
    "absolute path": ({"image": "/etc/passwd", "conversations": ASK}, "leaves the media folder"),
    "path of frames that goes up": (
        {"video": "frames/../../frames", "conversations": ASK},
        "leaves the media folder",
    ),
    "link that leads out": (
        {"image": "link.png", "conversations": ASK},
        "link.png: a link leads out of {root}",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named_with_the_reason(case: str, root: Path, demo_tokenizer: Any):
    record, message = BAD[case]
    if isinstance(record, dict):
        record = {"id": "it", **record}
    doer = work_on(record, root, demo_tokenizer)
    (bad,) = doer.measure(0, [0])
    assert isinstance(bad, BadSample)
    assert bad.name == ("x.json[0] it" if isinstance(record, dict) else "x.json[0]")
    assert message.replace("{root}", str(root)) in bad.reason
    print(bad.reason)  # fails if it holds what cannot be written
    assert doer.load(0, 0, None, np.zeros((2, 56, 56, 3), np.uint8)) == bad


def test_good_neighbours_of_bad_records_are_kept(root: Path, demo_tokenizer: Any):
    records = [{"conversations": TALK}, 3, {"conversations": TALK}]
    found = RecordWork(read_from(records, root, demo_tokenizer), ()).measure(0, [0, 1, 2])
    assert [type(one) for one in found] == [Measured, BadSample, Measured]


def test_a_sample_may_be_as_long_as_the_limit(root: Path, demo_tokenizer: Any):
    record = {"image": "a.png", "conversations": ASK}
    sample = check(record, root, demo_tokenizer)
    assert isinstance(sample, Sample)
    tokens = len(sample.ids) - 1 + 2 * 4  # two tiles of 4 tokens for the mark
    assert isinstance(check(record, root, demo_tokenizer, max_length=tokens), Sample)
    long = check(record, root, demo_tokenizer, max_length=tokens - 1)
    assert isinstance(long, BadSample)
    assert long.reason == (
        f"{tokens} tokens (2 frames or tiles) are over data.max_length {tokens - 1}; "
        "lower data.max_frames or data.max_tiles"
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": TALK}, "the caption template needs one image or video a record"),
        (
            {"image": ["a.png", "a.png"], "conversations": turns("<image><image>", "red")},
            "the caption template needs one image or video a record",
        ),
        (
            {"image": "a.png", "conversations": [*ASK, *TALK]},
            "the caption template needs one answer (the caption), got 2",
        ),
    ],
)
def test_misused_caption_template(record: Record, message: str, root: Path, demo_tokenizer: Any):
    bad = check(record, root, demo_tokenizer, template="caption")
    assert isinstance(bad, BadSample)
    assert bad.reason == message


def test_a_held_out_record_ends_in_an_answer(root: Path, demo_tokenizer: Any):
    record = {"conversations": [*TALK, *TALK[:1]]}
    bad = check(record, root, demo_tokenizer, prompts=True)
    assert isinstance(bad, BadSample)
    assert bad.reason == "the last turn must be the answer that is asked for (from gpt)"
    assert isinstance(check(record, root, demo_tokenizer), Sample)


# Faults that only decoding shows.


def test_a_truncated_image_is_found_on_decoding(root: Path, demo_tokenizer: Any):
    record = {"id": "it", "image": "cut.png", "conversations": ASK}
    assert isinstance(check(record, root, demo_tokenizer), Sample)
    bad = pixels_of(record, root, demo_tokenizer)
    assert isinstance(bad, BadSample)
    assert bad.name == "x.json[0] it"
    assert "cut.png: image cannot be decoded (PNG, cut off); fetch it again" in bad.reason


def test_a_video_cut_at_any_place_is_bad_or_whole(root: Path, tmp_path: Path, demo_tokenizer: Any):
    whole = (root / "a.mp4").read_bytes()
    record = {"video": "a.mp4", "conversations": ASK}
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        (tmp_path / "a.mp4").write_bytes(whole[: int(share * len(whole))])
        bad = check(record, tmp_path, demo_tokenizer)
        assert isinstance(bad, BadSample), share
        assert "a.mp4: " in bad.reason


def test_media_that_were_replaced_after_the_measuring(tmp_path: Path, demo_tokenizer: Any):
    doer = work_on({"image": "a.png", "conversations": ASK}, tmp_path, demo_tokenizer)
    out = np.zeros((2, 56, 56, 3), np.uint8)
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    assert isinstance(doer.load(0, 0, None, out), LoadedSample)
    Image.new("RGB", (560, 56)).save(tmp_path / "a.png")
    bad = doer.load(0, 0, None, out)
    assert isinstance(bad, BadSample)
    assert f"{tmp_path}/a.png: 10 frames or tiles now, 2 when the data was measured" in bad.reason


def test_an_image_that_is_replaced_while_it_is_read(tmp_path: Path, demo_tokenizer: Any):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    reader = read_from([{"image": "a.png", "conversations": ASK}], tmp_path, demo_tokenizer)
    _, (picture,) = reader.open(0, 0)
    Image.new("RGB", (560, 56)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match="10 tiles, but its header promised 2"):
        picture.read(np.zeros((2, 56, 56, 3), np.uint8), None)
