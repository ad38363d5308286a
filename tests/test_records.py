"""Reading and checking training data: every fault is named, and nothing else is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train.config import DataSection
from train.demo_drawing import TILE, write_mp4
from train.records import BadSample, DataError, Preparer, Sample, check_records, read_records
from vxl_jax import chat
from vxl_jax.chat import IGNORE, IMAGE_TOKEN
from vxl_jax.config import tiny
from vxl_jax.media import MediaError

Record = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media of all kinds, good and bad."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (70, 30), "dot.png": (1, 1), "line.png": (10_000, 10)}.items():
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    frames = [rng.integers(0, 256, (TILE, TILE, 3), np.uint8) for _ in range(6)]
    write_mp4(folder / "a.mp4", frames)
    whole = (folder / "a.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video")
    _write_video_without_frames(folder / "none.mp4")
    (folder / "folder.png").mkdir()
    (folder.parent / "outside.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    return folder


def _write_video_without_frames(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.height = stream.width = TILE
        container.start_encoding()


def turns(*values: str) -> list[dict[str, str]]:
    """A conversation, from human and gpt by turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def preparer(root: Path, **data: Any) -> Preparer:
    return Preparer(DataSection(train_json=("x",), media_root=str(root), **data), tiny())


def check(
    record: Any, root: Path, tokenizer: Any, prompts: bool = False, **data: Any
) -> Sample | BadSample:
    """What becomes of one record."""
    good, bad = check_records(
        [("x.json[0] it", record)], preparer(root, **data), tokenizer, prompts
    )
    (result,) = [*good, *bad]
    return result


# Files of records.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory); check the path"),
        (b"[{", "is not valid JSON (Expecting"),
        (b'[{"id": "caf\xe9"}]', "is not valid JSON ('utf-8' codec can't decode"),
        (b'{"id": 1}\n{"id": 2}\n', "is not valid JSON (Extra data: line 2"),
        (b"[" * 100_000, "is not valid JSON (maximum recursion depth"),
        (b'{"id": 1}', "must hold a list of records"),
        (b"null", "must hold a list of records"),
        (b"[]", "has no records"),
    ],
)
def test_unusable_files(content: bytes | None, message: str, tmp_path: Path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"{path}: {message}")):
        read_records(path)


def test_a_folder_is_no_file_of_records(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path)


def test_names_say_file_and_place_and_id(tmp_path: Path):
    path = tmp_path / "x.json"
    values = [{"id": "same"}, {"id": "same"}, {"id": 7}, {}, "no record", {"id": "\ud800"}]
    path.write_text(json.dumps(values))
    records = read_records(path)
    assert [record for _, record in records] == values
    assert [name.removeprefix(f"{path}") for name, _ in records] == [
        *("[0] same", "[1] same", "[2] 7", "[3]", "[4]", "[5] ?"),
    ]


def test_a_missing_media_root_is_one_error(tmp_path: Path, demo_tokenizer: Any):
    with pytest.raises(DataError, match=r"data.media_root .*nowhere: there is no such directory"):
        check({"conversations": turns("a", "b")}, tmp_path / "nowhere", demo_tokenizer)


# Records that are left out.

ASK = turns("<image>\nwhat is the colour", "red")
TALK = turns("what is the colour", "red")

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
    "name that cannot be": ({"image": "\ud800", "conversations": ASK}, "cannot be followed inside"),
    "text for an image": (
        {"image": "text.png", "conversations": ASK},
        "{root}/text.png: not a readable image",
    ),
    "text for a video": (
        {"video": "text.mp4", "conversations": ASK},
        "{root}/text.mp4: not a readable video",
    ),
    "empty video file": (
        {"video": "empty.mp4", "conversations": ASK},
        "{root}/empty.mp4: not a readable video",
    ),
    "video without frames": ({"video": "none.mp4", "conversations": ASK}, "{root}/none.mp4: "),
    "truncated video": (
        {"video": "cut.mp4", "conversations": ASK},
        "{root}/cut.mp4: not a readable video",
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
    "link that leads out": (
        {"image": "link.png", "conversations": ASK},
        "link.png: a link leads out of {root}",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named_with_the_reason(case: str, root: Path, demo_tokenizer: Any):
    record, message = BAD[case]
    bad = check(record, root, demo_tokenizer)
    assert isinstance(bad, BadSample)
    assert bad.name == "x.json[0] it"
    assert message.replace("{root}", str(root)) in bad.reason
    print(bad.reason)  # fails if it holds what cannot be written


def test_good_neighbours_of_bad_records_are_kept(root: Path, demo_tokenizer: Any):
    records = [("a", {"conversations": TALK}), ("b", 3), ("c", {"conversations": TALK})]
    good, bad = check_records(records, preparer(root), demo_tokenizer, prompts=False)
    assert [sample.name for sample in good] == ["a", "c"]
    assert [sample.name for sample in bad] == ["b"]


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
    sample = check({"image": "cut.png", "conversations": ASK}, root, demo_tokenizer)
    assert isinstance(sample, Sample)
    with pytest.raises(MediaError, match=r"cut.png: image cannot be decoded \(.*\); truncated"):
        preparer(root).pixels(sample.blocks[0])


def test_a_video_cut_at_any_place_is_bad_or_whole(root: Path, tmp_path: Path, demo_tokenizer: Any):
    whole = (root / "a.mp4").read_bytes()
    record = {"video": "a.mp4", "conversations": ASK}
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        (tmp_path / "a.mp4").write_bytes(whole[: int(share * len(whole))])
        bad = check(record, tmp_path, demo_tokenizer)
        assert isinstance(bad, BadSample), share
        assert "a.mp4: " in bad.reason


def test_an_image_that_was_replaced_after_the_check(tmp_path: Path, demo_tokenizer: Any):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    sample = check({"image": "a.png", "conversations": ASK}, tmp_path, demo_tokenizer)
    assert isinstance(sample, Sample)
    Image.new("RGB", (560, 56)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match="10 tiles, but its header promised 2"):
        preparer(tmp_path).pixels(sample.blocks[0])


# Good records.


@pytest.mark.parametrize(
    ("media", "frames"),
    [
        ({"image": "a.png"}, [2]),
        ({"image": ["a.png"]}, [2]),
        ({"image": ["a.png", "line.png", "a.png"]}, [2, 49, 2]),
        ({"image": "dot.png"}, [2]),
        ({"image": "line.png"}, [49]),
        ({"video": "a.mp4"}, [6]),
        ({"video": ["a.mp4", "a.mp4"]}, [6, 6]),
        ({"image": None, "video": "a.mp4"}, [6]),
        ({"image": None, "video": None}, []),
        ({"image": []}, []),
        ({}, []),
    ],
)
def test_good_records(media: Record, frames: list[int], root: Path, demo_tokenizer: Any):
    conversation = turns("<image>" * len(frames) + "\nwhat is the colour", "red", "how many", "one")
    sample = check({**media, "conversations": conversation}, root, demo_tokenizer)
    assert isinstance(sample, Sample)
    expected = chat.encode_conversation(conversation, demo_tokenizer)
    np.testing.assert_array_equal(sample.ids, expected.ids)
    np.testing.assert_array_equal(sample.labels, expected.labels)
    assert [block.frames for block in sample.blocks] == frames
    assert sample.frames == sum(frames)
    assert (sample.question, sample.answer) == ("how many", "one")
    for block in sample.blocks:
        pixels = preparer(root).pixels(block)
        assert pixels.shape == (block.frames, 56, 56, 3)
        assert pixels.any()


def test_tiles_and_frames_are_bounded(root: Path, demo_tokenizer: Any):
    def frames(media: Record, **data: Any) -> int:
        sample = check({**media, "conversations": ASK}, root, demo_tokenizer, **data)
        assert isinstance(sample, Sample)
        assert len(preparer(root, **data).pixels(sample.blocks[0])) == sample.frames
        return sample.frames

    assert frames({"image": "dot.png"}, min_tiles=1) == 1
    assert frames({"image": "line.png"}, max_tiles=5) == 5
    assert frames({"image": "line.png"}, image_mode="square") == 1
    assert frames({"video": "a.mp4"}, max_frames=4) == 4
    assert frames({"video": "a.mp4"}, video_fps=0.5) == 3


def test_held_out_records_are_prompts(root: Path, demo_tokenizer: Any):
    conversation = turns("<image>\nwhat is the colour", "red", "how many <image>", "one")
    record = {"image": ["a.png", "a.png"], "conversations": conversation}
    sample = check(record, root, demo_tokenizer, prompts=True)
    assert isinstance(sample, Sample)
    expected = chat.encode_prompt(conversation[:-1], demo_tokenizer)
    np.testing.assert_array_equal(sample.ids, expected)
    assert (sample.labels == IGNORE).all()
    assert (sample.question, sample.answer) == ("how many", "one")


def test_captions(root: Path, demo_tokenizer: Any):
    record = {"image": "a.png", "conversations": turns("<image>\ndescribe", "red circle")}
    sample = check(record, root, demo_tokenizer, template="caption")
    assert isinstance(sample, Sample)
    expected = chat.encode_caption("red circle", demo_tokenizer)
    np.testing.assert_array_equal(sample.ids, expected.ids)
    np.testing.assert_array_equal(sample.labels, expected.labels)
    prompt = check(record, root, demo_tokenizer, prompts=True, template="caption")
    assert isinstance(prompt, Sample)
    assert prompt.ids.tolist() == [IMAGE_TOKEN]


@pytest.mark.parametrize(
    ("media", "expected"),
    [({"image": "a.png"}, "image"), ({"video": "a.mp4"}, "video"), ({}, "text")],
)
def test_question_type(media: Record, expected: str, root: Path, demo_tokenizer: Any):
    record = {**media, "conversations": ASK if media else TALK}
    for given, type_ in [({}, expected), ({"question_type": "order", "choices": 8}, "order")]:
        sample = check({**record, **given}, root, demo_tokenizer)
        assert isinstance(sample, Sample)
        assert (sample.question_type, sample.choices) == (type_, given.get("choices"))
