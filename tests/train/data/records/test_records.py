"""One record as a sample: its ids, its media and its name, and nothing good is refused."""

import copy
import pickle
import random
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
    pixels_of,
    turns,
    work_on,
    write_media,
    write_records,
)
from train.data.records.sample import BadSample, Sample
from train.data.tokenizer import FastTokenizer
from train.data.workers import Measured
from train.errors import DataError
from vxl_jax.text import chat
from vxl_jax.text.template import IGNORE, IMAGE_TOKEN


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media of all kinds, good and bad."""
    return write_media(tmp_path_factory.mktemp("media"))


# Files of records.


def test_names_say_file_and_place_and_id(tmp_path: Path, demo_tokenizer: Any):
    values: list[Any] = [{"id": "same"}, {"id": "same"}, {"id": 7}, {}, "no record"]
    values = [*values, {"id": "\ud800"}, {"conversations": TALK}]
    path = write_records(tmp_path / "x.json", values)
    with open_files(path, tmp_path, demo_tokenizer) as dataset:
        names = [bad.name for bad in dataset.bad] + [dataset.name(0)]
    assert [name.removeprefix(f"{path}") for name in names] == [
        *("[0] same", "[1] same", "[2] 7", "[3]", "[4]", "[5] ?", "[6]"),
    ]


def test_a_missing_media_root_is_one_error(tmp_path: Path, demo_tokenizer: Any):
    path = write_records(tmp_path / "x.json", [{"conversations": TALK}])
    with pytest.raises(DataError, match=r"data.media_root .*nowhere: there is no such directory"):
        open_files(path, tmp_path / "nowhere", demo_tokenizer)


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
        ({"video": "frames"}, [3]),
        ({"video": "frames/"}, [3]),
        ({"video": ["frames", "a.mp4", "frames"]}, [3, 6, 3]),
        ({"image": None, "video": "a.mp4"}, [6]),
        ({"image": None, "video": None}, []),
        ({"image": []}, []),
        ({"start": None, "end": None, "fps": None}, []),
        ({}, []),
    ],
)
def test_good_records(media: Record, frames: list[int], root: Path, demo_tokenizer: Any):
    conversation = turns("<image>" * len(frames) + "\nwhat is the colour", "red", "how many", "one")
    record = {**media, "conversations": conversation}
    sample = check(record, root, demo_tokenizer)
    assert isinstance(sample, Sample)
    expected = chat.encode_conversation(conversation, demo_tokenizer)
    np.testing.assert_array_equal(sample.ids, expected.ids)
    np.testing.assert_array_equal(sample.labels, expected.labels)
    assert [block.frames for block in sample.blocks] == frames
    assert sample.frames == sum(frames)
    assert (sample.question, sample.answer) == ("how many", "one")
    pixels = pixels_of(record, root, demo_tokenizer)
    assert isinstance(pixels, np.ndarray)
    start = 0
    for block in sample.blocks:
        assert pixels[start : start + block.frames].any()
        start += block.frames


def test_marks_may_stand_anywhere_in_questions(root: Path, demo_tokenizer: Any):
    conversation = turns("what <image> or <image> there", "red", "and in <image>", "one")
    files = ["a.png", "line.png", "dot.png"]
    sample = check({"image": files, "conversations": conversation}, root, demo_tokenizer)
    assert isinstance(sample, Sample)
    np.testing.assert_array_equal(
        sample.ids, chat.encode_conversation(conversation, demo_tokenizer).ids
    )
    assert (sample.ids == IMAGE_TOKEN).sum() == 3
    assert [block.path.name for block in sample.blocks] == files
    assert sample.question == "and in"


def test_tiles_and_frames_are_bounded(root: Path, demo_tokenizer: Any):
    def frames(media: Record, **data: Any) -> int:
        pixels = pixels_of({**media, "conversations": ASK}, root, demo_tokenizer, **data)
        assert isinstance(pixels, np.ndarray)
        assert pixels.any((1, 2, 3)).any()
        return len(pixels)

    assert frames({"image": "dot.png"}, min_tiles=1) == 1
    assert frames({"image": "line.png"}, max_tiles=5) == 5
    assert frames({"image": "line.png"}, image_mode="square") == 1
    assert frames({"video": "a.mp4"}, max_frames=4) == 4
    assert frames({"video": "a.mp4"}, video_fps=0.5) == 3
    assert frames({"video": "frames"}, max_frames=2) == 2


def test_held_out_records_are_prompts(root: Path, demo_tokenizer: Any):
    conversation = turns("<image>\nwhat is the colour", "red", "how many <image>", "one")
    record = {"image": ["a.png", "a.png"], "conversations": conversation}
    sample = check(record, root, demo_tokenizer, prompts=True)
    assert isinstance(sample, Sample)
    expected = chat.encode_prompt(conversation[:-1], demo_tokenizer)
    np.testing.assert_array_equal(sample.ids, expected)
    assert (sample.labels == IGNORE).all()
    assert (sample.question, sample.answer) == ("how many", "one")


@pytest.mark.parametrize("media", [{"image": "a.png"}, {"video": "a.mp4"}])
def test_captions(media: Record, root: Path, demo_tokenizer: Any):
    record = {**media, "conversations": turns("<image>\ndescribe", "red circle")}
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


def test_measures_are_those_of_the_sample(root: Path, demo_tokenizer: Any):
    conversation = turns("<image><image>\nwhat is the colour", "red", "how many", "one")
    for name, files, frames in (
        ("image", ["a.png", "line.png"], (2, 49)),
        ("video", ["a.mp4", "frames"], (6, 3)),
    ):
        record = {name: files, "conversations": conversation}
        sample = check(record, root, demo_tokenizer)
        assert isinstance(sample, Sample)
        labels = int((sample.labels != IGNORE).sum())
        expected = Measured(
            len(sample.ids) - 2, labels, frames, tuple(4 * n for n in frames), name == "video"
        )
        assert work_on(record, root, demo_tokenizer).measure(0, [0]) == [expected]


def test_media_outside_of_the_root_are_for_those_who_trust(root: Path, demo_tokenizer: Any):
    for name in ("../outside.png", str(root.parent / "outside.png"), "link.png"):
        record = {"image": name, "conversations": ASK}
        assert isinstance(check(record, root, demo_tokenizer), BadSample)
        trusted = check(record, root, demo_tokenizer, allow_outside_root=True)
        assert isinstance(trusted, Sample)
        assert trusted.blocks[0].path == root.parent / "outside.png"


# Token ids without transformers.

ODD = (
    *("", " ", "\n", "\n\n", "  \n  ", "a", "user", "assistant\n", "\t\r\n", "\0", "\x7f\x80"),
    *("red circle", "  red  circle ", "Red CIRCLE", "redcircle", "x" * 32, "x" * 33, "x" * 5000),
    *("<|im_end|>", "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "<|im_end|", "<image>"),
    *(
        "naïve café",
        "ﬁ ﬀ Å Å e\u0301",
        "日本語のテキスト",
        "العربية",
        "🙂👩‍👩‍👧‍👦🏳️‍🌈",
        "\u200b\ufeff\u2028",
    ),
    *("1234567890 3.14 1,000", "don't I'LL we've", "a\u00a0b", "\U0010ffff", "\ufffd", "\ud7ff"),
)


def tokenizer_equals(tokenizer: Any) -> None:
    fast = FastTokenizer(tokenizer)
    copied = pickle.loads(pickle.dumps(fast))
    rng = random.Random(0)
    texts = [*ODD, "".join(ODD)]
    texts += [
        "".join(map(chr, rng.choices(range(0xD800), k=rng.randint(1, 80)))) for _ in range(100)
    ]
    texts += [" ".join(rng.choices(ODD, k=3)) for _ in range(100)]
    for text in texts * 2:  # short ones are kept, and given again
        expected = tokenizer.encode(text, add_special_tokens=False)
        for one in (fast, copied):
            found = one.encode(text, add_special_tokens=False)
            assert found == expected, repr(text)
            found.clear()  # what is kept must not change with it
    for token in range(0, len(tokenizer), 97):
        expected = tokenizer.convert_ids_to_tokens(token)
        assert fast.convert_ids_to_tokens(token) == copied.convert_ids_to_tokens(token) == expected


def test_token_ids_are_those_of_transformers(demo_tokenizer: Any):
    tokenizer_equals(demo_tokenizer)


def test_token_ids_are_those_of_qwen2(shared: Path):
    from transformers import AutoTokenizer

    tokenizer_equals(AutoTokenizer.from_pretrained(shared / "tokenizer" / "qwen2"))


def test_token_ids_do_not_depend_on_what_else_the_tokenizer_is_used_for(demo_tokenizer: Any):
    """Cutting and padding are settings that a tokenizer keeps, and writes to tokenizer.json."""
    tokenizer = copy.deepcopy(demo_tokenizer)
    text = "what is the colour of the circle " * 10
    expected = tokenizer.encode(text, add_special_tokens=False)
    tokenizer("red", truncation=True, max_length=4, padding="max_length")
    fast = FastTokenizer(tokenizer)
    assert fast.encode(text) == expected
    assert fast.encode("red") == tokenizer.encode("red", add_special_tokens=False)


def test_a_tokenizer_without_its_fast_half_is_refused():
    with pytest.raises(DataError, match=r"no tokenizer\.json; save it as a fast tokenizer"):
        FastTokenizer(object())
