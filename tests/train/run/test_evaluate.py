"""Held-out questions: who is asked what, and how the answers are counted."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.support.data import frame_numbers, open_files, turns, write_records, write_video
from train.config import RunSection
from train.data.dataset import Dataset
from train.data.records.sample import Sample
from train.run import evaluate
from train.run.evaluate import Answer, accuracy, answer_questions, chance, eval_ratios
from vxl_jax.config import VideoXLConfig
from vxl_jax.presets import tiny
from vxl_jax.stream.batch import StreamBatch
from vxl_jax.stream.plan import BEACON, TEXT, VISUAL

NO_IDS = np.zeros(0, np.int32)


def answer(type_: str, expected: str, given: str) -> Answer:
    return Answer(Sample("s", NO_IDS, NO_IDS, (), "q", expected, type_), given)


@pytest.mark.parametrize(
    ("expected", "given", "right"),
    [
        ("red circle", "red circle", True),
        ("red circle", " Red \n circle ", True),
        ("Straße", "STRASSE", True),
        ("red", "red circle", False),
        ("red circle", "redcircle", False),
        ("red", "", False),
    ],
)
def test_answers_are_compared_without_case_and_white_space(expected: str, given: str, right: bool):
    assert answer("t", expected, given).right is right


ANSWERS = [
    *(answer("colour", "red", given) for given in ("red", "blue", "red", "x")),
    answer("colour", "blue", "BLUE"),
    answer("count", "one", "two"),
    answer("count", "two", "two"),
    answer("count", "Two", "one"),
]


def test_accuracy_by_type_and_over_all():
    assert accuracy(ANSWERS) == {"all": 4 / 8, "colour": 3 / 5, "count": 1 / 3}
    assert accuracy([]) == {}


def test_chance_is_the_best_blind_guess_of_each_type():
    # Always "red" is right 4 times of 5, always "two" 2 times of 3.
    expected = {"all": 6 / 8, "colour": 4 / 5, "count": 2 / 3}
    assert chance(ANSWERS) == pytest.approx(expected)
    assert chance([]) == {}


def test_chance_of_a_question_with_a_known_number_of_choices():
    """Four equally likely answers are one in four, however often each was drawn."""
    given = [answer("which", "first", ""), answer("which", "first", "")]
    known = [replace(a, sample=replace(a.sample, choices=4)) for a in given]
    assert chance(given) == {"all": 1, "which": 1}
    assert chance(known) == {"all": 1 / 4, "which": 1 / 4}
    mixed = [*known, *ANSWERS[:4]]
    assert chance(mixed) == pytest.approx({"all": 4.5 / 6, "which": 1 / 4, "colour": 1})


class Model(NamedTuple):
    """All of a model that is asked for here."""

    config: VideoXLConfig


class Asked(NamedTuple):
    """What `generate` was called with."""

    streams: StreamBatch
    pixels: np.ndarray | None
    options: dict[str, Any]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Calls of `generate`, which answers with the last four tokens of the question."""
    calls: list[Asked] = []

    def generate(model: Model, streams: StreamBatch, pixels: Any, **options: Any) -> Any:
        calls.append(Asked(streams, pixels, options))
        kinds, sources = np.asarray(streams.kind[0]), np.asarray(streams.source[0])
        # A turn ends in: question, <|im_end|>, newline, <|im_start|>, assistant, newline.
        return [list(row[kind == TEXT][-9:-5]) for kind, row in zip(kinds, sources, strict=True)]

    monkeypatch.setattr(evaluate, "generate", generate)
    return calls


QUESTIONS = {
    **{f"what is the {name}": "a.png" for name in ("colour", "shape", "number", "position")},
    "which came first red": None,
    "which came last blue": None,
    "what appeared of red": "cut.png",
}
RUN = RunSection(run_dir="x", eval_batch_size=3, max_new_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions about a picture, two without, one about a picture that cannot be decoded."""
    folder = tmp_path_factory.mktemp("media")
    pixels = np.random.default_rng(0).integers(1, 256, (56, 112, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    records = []
    for question, file in QUESTIONS.items():
        media = {"image": file} if file else {}
        mark = "<image>\n" if file else ""
        conversation = turns(f"{mark}{question}", "red")
        records.append({"id": question, **media, "conversations": conversation})
    write_records(folder / "x.json", records)
    write_records(folder / "four.json", records[:3])
    return folder


def heldout(folder: Path, tokenizer: Any, name: str = "x.json", **options: Any) -> Dataset:
    """Questions, as a run opens them."""
    return open_files(folder / name, folder, tokenizer, prompts=True, **options)


def asked_of(answer: Answer) -> str:
    """The question, as the record's id says it."""
    return answer.sample.name.partition("] ")[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_asked_once_and_gets_its_own_answer(
    workers: int, folder: Path, asked: list[Asked], demo_tokenizer: Any
):
    model: Any = Model(tiny())
    # As many as fit into a batch of training.
    options: dict[str, Any] = {
        "workers": workers,
        "batch_size": 2,
        "max_tokens_per_batch": 1,
        "frame_jitter": 0.5,
    }
    with heldout(folder, demo_tokenizer, **options) as dataset:
        answers, bad = answer_questions(model, dataset, demo_tokenizer, RUN)
    assert [sample.name for sample in bad] == [f"{folder}/x.json[6] what appeared of red"]
    assert "cut.png" in bad[0].reason
    assert sorted(map(asked_of, answers)) == sorted(QUESTIONS.keys() - {"what appeared of red"})
    for a in answers:
        assert a.sample.question == asked_of(a)
        assert a.answer == a.sample.question
        assert a.sample.answer == "red"
    ends = {demo_tokenizer.convert_tokens_to_ids("<|im_end|>"), demo_tokenizer.eos_token_id}
    assert len(asked) == 3  # at most three at once, text apart
    for call in asked:
        assert set(call.options.pop("stop_ids")) == ends
        assert call.options == {"max_new_tokens": 5}
        assert call.streams.kind.shape[1] == 3


def test_blank_questions_are_dark_and_only_those_about_media(
    folder: Path, asked: list[Asked], demo_tokenizer: Any
):
    model: Any = Model(tiny())
    with heldout(folder, demo_tokenizer, cache_mb=1) as dataset:
        seen, _ = answer_questions(model, dataset, demo_tokenizer, RUN)
        pixels = [call.pixels for call in asked if call.pixels is not None]
        assert any(array.any() for array in pixels)
        asked.clear()
        blind, bad = answer_questions(model, dataset, demo_tokenizer, RUN, see=False)
    names = {question for question, file in QUESTIONS.items() if file == "a.png"}
    assert {*map(asked_of, blind)} == names
    assert {*map(asked_of, seen)} > names
    assert len(bad) == 1
    for call in asked:
        assert call.pixels is not None
        assert not call.pixels.any()


@pytest.mark.parametrize(
    ("eval_ratio", "ratios", "expected"), [(None, (2, 8, 4), 8), (2, (2, 4), 2), (None, (), None)]
)
def test_questions_are_compressed_by_one_ratio(
    eval_ratio: int | None,
    ratios: tuple[int, ...],
    expected: int | None,
    folder: Path,
    asked: list[Asked],
    demo_tokenizer: Any,
):
    """The largest that is trained, unless told."""
    config = tiny(ratios=ratios)
    model: Any = Model(config)
    run = replace(RUN, eval_ratio=eval_ratio)
    used = eval_ratios(config, run)
    assert used == (() if expected is None else (expected,))
    with heldout(folder, demo_tokenizer, "four.json", model=config, ratios=used) as dataset:
        answer_questions(model, dataset, demo_tokenizer, run)
    (call,) = asked
    for kind in call.streams.kind[0]:
        visual, beacons = (kind == VISUAL).sum(), (kind == BEACON).sum()
        assert visual == 8
        assert beacons == (0 if expected is None else visual / expected)


def test_questions_are_the_same_each_time(
    folder: Path, tmp_path: Path, asked: list[Asked], demo_tokenizer: Any
):
    """Though training draws ratios and moves frames in time."""
    model: Any = Model(tiny())
    video = write_video(folder / "a.mp4", 24, fps=4)
    record = {"video": video.name, "conversations": turns("<image> what", "red")}
    path = write_records(tmp_path / "x.json", [record])
    with open_files(path, folder, demo_tokenizer, prompts=True, frame_jitter=1.0) as dataset:
        answer_questions(model, dataset, demo_tokenizer, RUN)
    (call,) = asked
    assert call.pixels is not None
    assert frame_numbers(call.pixels[0]) == [0, 4, 8, 12, 16, 20]
    # Two windows, of 16 and of 8 tokens, by the smallest of three ratios.
    assert (call.streams.kind == BEACON).sum() == 8 + 4


def test_all_questions_may_be_undecodable(
    folder: Path, tmp_path: Path, asked: list[Asked], demo_tokenizer: Any
):
    model: Any = Model(tiny())
    record = {"image": "cut.png", "conversations": turns("<image> what", "red")}
    path = write_records(tmp_path / "x.json", [record] * 2)
    with open_files(path, folder, demo_tokenizer, prompts=True) as dataset:
        answers, bad = answer_questions(model, dataset, demo_tokenizer, RUN)
    assert (answers, len(bad)) == ([], 2)
    assert accuracy(answers) == chance(answers) == {}


def test_text_alone_is_not_asked_blindly(
    folder: Path, tmp_path: Path, asked: list[Asked], demo_tokenizer: Any
):
    model: Any = Model(tiny())
    path = write_records(tmp_path / "x.json", [{"conversations": turns("what is red", "red")}])
    with open_files(path, folder, demo_tokenizer, prompts=True) as dataset:
        assert answer_questions(model, dataset, demo_tokenizer, RUN, see=False) == ([], [])
        assert not asked
        answers, _ = answer_questions(model, dataset, demo_tokenizer, RUN)
    assert [a.sample.question_type for a in answers] == ["text"]
