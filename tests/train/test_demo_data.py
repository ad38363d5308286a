"""The demo data set: reproducible real files whose answers are what the pictures show."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import decord
import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from train.demo import data as demo_data
from train.demo.data import NUMBERS, Amounts, demo_words, make_demo_data
from train.demo.drawing import COLOURS, SHAPES, TILE, Thing, draw_tile
from train.demo.tokenizer import END_TOKEN, PAD_TOKEN, SPECIAL_TOKENS, VOCABULARY, save_tokenizer

MEDIA = ("tile", "wide", "grid", "needle", "pair")
TRAIN = Amounts(files=dict.fromkeys(MEDIA, 12), records=dict.fromkeys((*MEDIA, "set", "text"), 12))
HELDOUT = Amounts(
    files=dict.fromkeys(MEDIA, 16), records=dict.fromkeys((*MEDIA[1:], "set", "text"), 16)
)
FILES = ("frames.json", "train.json", "heldout.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "data"
    make_demo_data(directory, 0, TRAIN, HELDOUT)
    return directory


def _records(data: Path, file: str) -> list[dict[str, Any]]:
    return json.loads((data / file).read_text())


def _paths(record: dict[str, Any]) -> list[str]:
    paths = record.get("image", record.get("video", []))
    return [paths] if isinstance(paths, str) else paths


def _pairs(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Questions without marks, and their answers."""
    texts = [turn["value"] for turn in record["conversations"]]
    return [(q.split("\n")[-1], a) for q, a in zip(texts[::2], texts[1::2], strict=True)]


def _tiles(path: Path) -> np.ndarray:
    """Tiles of a picture, row-major, or frames of a video: (count, TILE, TILE, 3)."""
    if path.suffix == ".mp4":
        return decord.VideoReader(str(path)).get_batch(range(_frames(path))).asnumpy()
    pixels = np.asarray(Image.open(path))
    rows, columns = pixels.shape[0] // TILE, pixels.shape[1] // TILE
    tiles = pixels.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2)
    return tiles.reshape(rows * columns, TILE, TILE, 3)


def _frames(path: Path) -> int:
    return len(decord.VideoReader(str(path)))


def _see(path: Path) -> list[Thing]:
    """Colours and shapes in a file, read from its pixels."""
    things = []
    for tile in _tiles(path) / 255:
        inside = tile.max(-1) > 0.5
        if inside.mean() < 0.05:
            continue
        mean = tile[inside].mean(0)
        colour = min(COLOURS, key=lambda c: float(np.square(mean - COLOURS[c]).sum()))
        things.append(Thing(colour, _see_shape(inside)))
    return things


def _see_shape(inside: np.ndarray) -> str:
    """The shape whose drawing, over sizes and centres, differs from a mask in the fewest pixels."""
    points = np.arange(TILE) + 0.5
    ys, xs = np.nonzero(inside)
    left, right, top, bottom = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    differences = {}
    for name, contains in SHAPES.items():
        unit = np.linspace(-1, 1, 201)
        whole = contains(unit[None, :], unit[:, None])
        extent = unit[whole.any(0)].min(), unit[whole.any(1)].min(), np.ptp(unit[whole.any(1)])
        radius = (bottom - top) / extent[2]
        x = (points[None, :] - left) / radius + extent[0]
        y = (points[:, None] - top) / radius + extent[1]
        differences[name] = int((contains(x, y) != inside).sum())
    assert right > left
    return min(differences, key=lambda name: differences[name])


def test_same_seed_same_bytes(data: Path, tmp_path: Path):
    make_demo_data(tmp_path / "again", 0, TRAIN, HELDOUT)
    files = sorted(p.relative_to(data) for p in data.rglob("*") if p.is_file())
    assert len(files) == 12 * 5 + 16 * 5 + len(FILES) + 3
    for file in files:
        assert (data / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file

    make_demo_data(tmp_path / "other", 1, TRAIN, HELDOUT)
    assert (tmp_path / "other/tokenizer/tokenizer.json").read_bytes() == (
        data / "tokenizer/tokenizer.json"
    ).read_bytes()
    assert (tmp_path / "other/train.json").read_text() != (data / "train.json").read_text()


def test_complete_data_is_kept_and_other_files_are_not_touched(data: Path, tmp_path: Path):
    before = (data / "train.json").stat().st_mtime_ns
    make_demo_data(data, 0, TRAIN, HELDOUT)
    assert (data / "train.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="seed 1"):
        make_demo_data(data, 1, TRAIN, HELDOUT)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="mine"):
        make_demo_data(tmp_path / "mine", 0, TRAIN, HELDOUT)


def test_interrupted_making_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_data, "save_tokenizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_demo_data(tmp_path / "data", 0, TRAIN, HELDOUT)
    assert not (tmp_path / "data").exists()
    (tmp_path / "data.part" / "left").write_text("over")
    make_demo_data(tmp_path / "data", 0, TRAIN, HELDOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert not (tmp_path / "data" / "left").exists()


@pytest.mark.parametrize("file", FILES)
def test_records_are_well_formed(data: Path, file: str):
    records = _records(data, file)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        marks = [turn["value"].count("<image>") for turn in turns]
        assert marks == [len(_paths(record))] + [0] * (len(turns) - 1)
        assert all(turn["value"].strip() for turn in turns)
        types = record.get("question_types") or [record["question_type"]]
        assert len(types) == len(turns) // 2
        assert all((data / "media" / path).is_file() for path in _paths(record))


def test_heldout_media_are_not_trained_on(data: Path):
    trained = {p for f in FILES[:2] for r in _records(data, f) for p in _paths(r)}
    heldout = {p for r in _records(data, "heldout.json") for p in _paths(r)}
    assert trained
    assert heldout
    assert not trained & heldout
    contents = {(data / "media" / p).read_bytes() for p in trained}
    assert not any((data / "media" / p).read_bytes() in contents for p in heldout)


def test_first_lesson_is_single_tiles(data: Path):
    for record in _records(data, "frames.json"):
        with Image.open(data / "media" / record["image"]) as picture:
            assert picture.size == (TILE, TILE)


@pytest.mark.parametrize("file", FILES)
def test_answers_are_what_the_media_show(data: Path, file: str):
    seen = {p: _see(data / "media" / p) for r in _records(data, file) for p in _paths(r)}
    for record in _records(data, file):
        shown = [seen[path] for path in _paths(record)]
        text = ""
        for question, answer in _pairs(record):
            if not shown:
                text = text or question.split(" : ")[0]
                assert answer in text.split()
                assert answer in demo_data.CLASSES[question.split()[-1]]
            elif question == "how many shapes":
                assert answer == NUMBERS[len(shown[0]) - 1]
            elif match := re.fullmatch(r"what is the (colour|shape)", question):
                ((thing,),) = shown
                assert answer == getattr(thing, match[1])
            elif match := re.fullmatch(r"which shape is (\w+)", question):
                assert [t.shape for (t,) in shown if t.colour == match[1]] == [answer]
            elif match := re.fullmatch(r"which colour is the (\w+)", question):
                assert [t.colour for (t,) in shown if t.shape == match[1]] == [answer]
            elif question == "what appeared":
                ((thing,),) = shown
                assert answer == f"{thing.colour} {thing.shape}"
            elif match := re.fullmatch("which colour came (first|last)", question):
                ((first, last),) = shown
                assert first.colour != last.colour
                assert answer == (first if match[1] == "first" else last).colour
            else:
                pytest.fail(question)


def test_videos_have_a_frame_a_second_and_ordered_shapes_far_apart(data: Path):
    for path in (data / "media").rglob("*.mp4"):
        tiles = _tiles(path)
        assert decord.VideoReader(str(path)).get_avg_fps() == 1.0
        assert len(tiles) in demo_data.VIDEO_FRAMES
        places = np.nonzero((tiles.max(-1) > 128).mean((1, 2)) > 0.05)[0]
        if path.name.startswith("pair"):
            assert places[1] - places[0] >= len(tiles) / 4
        else:
            assert len(places) == 1


def test_the_best_blind_guess_is_right_at_most_one_time_in_four(data: Path):
    answers: dict[str, Counter[str]] = {}
    for record in _records(data, "heldout.json"):
        ((_, answer),) = _pairs(record)
        answers.setdefault(record["question_type"], Counter())[answer] += 1
    assert sorted(answers) == ["colour", "count", "needle", "order", "shape", "text", "which"]
    for name, counts in answers.items():
        assert counts.most_common(1)[0][1] <= counts.total() / 4, name


def test_every_word_is_one_token(data: Path):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    assert len(tokenizer) <= VOCABULARY
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD_TOKEN, END_TOKEN)
    words = {
        word
        for file in FILES
        for record in _records(data, file)
        for pair in _pairs(record)
        for word in " ".join(pair).split()
    }
    assert len(words) > 30
    for word in [*words, *demo_words(), *SPECIAL_TOKENS]:
        assert len(tokenizer(word)["input_ids"]) == 1, word
        assert len(tokenizer(f"a {word}")["input_ids"]) <= 3, word
    assert len(tokenizer("what is the colour of the third")["input_ids"]) == 7


@pytest.mark.parametrize(
    "text", ["", " red  circle ", "Ünïcode 中文 🐶", "a\n\n\tb , . ! 's\r\n", "\x00\x7f<image>"]
)
def test_any_text_survives_the_tokenizer(data: Path, text: str):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_too_many_words_for_the_tokenizer_are_refused(tmp_path: Path):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), 8)) for _ in range(300)]
    with pytest.raises(ValueError, match="too few for the words"):
        save_tokenizer(tmp_path / "tokenizer", words)


def test_a_tile_is_dark_but_for_its_shape():
    empty = draw_tile(np.random.default_rng(0), None)
    assert empty.shape == (TILE, TILE, 3)
    assert empty.dtype == np.uint8
    assert abs(empty.mean() / 255 - 0.15) < 0.01
    assert empty.max() < 128
    filled = draw_tile(np.random.default_rng(0), Thing("white", "circle"))
    assert 0.25 < (filled.min(-1) > 128).mean() < 0.6
