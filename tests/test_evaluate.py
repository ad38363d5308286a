"""Held-out questions: who is asked what, and how the answers are counted."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from train import evaluate
from train.config import DataSection, RunSection
from train.evaluate import Answer, accuracy, answer_questions, chance
from train.records import Preparer, Sample, check_records
from vxl_jax.config import VideoXLConfig, tiny
from vxl_jax.stream import BEACON, TEXT, VISUAL, StreamBatch

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


@pytest.fixture(scope="module")
def preparer(tmp_path_factory: pytest.TempPathFactory) -> Preparer:
    folder = tmp_path_factory.mktemp("media")
    pixels = np.random.default_rng(0).integers(1, 256, (56, 112, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    data = DataSection(train_json=("x",), media_root=str(folder), bucket_steps=1)
    return Preparer(data, tiny())


QUESTIONS = {
    **{f"what is the {name}": "a.png" for name in ("colour", "shape", "number", "position")},
    "which came first red": None,
    "which came last blue": None,
    "what appeared of red": "cut.png",
}
RUN = RunSection(run_dir="x", eval_batch_size=3, max_new_tokens=5)


@pytest.fixture(scope="module")
def samples(preparer: Preparer, demo_tokenizer: Any) -> list[Sample]:
    """Four questions about a picture, two without, one about a picture that cannot be decoded."""
    records = []
    for question, file in QUESTIONS.items():
        human = {"from": "human", "value": f"<image>\n{question}" if file else question}
        media = {"image": file} if file else {}
        turns = [human, {"from": "gpt", "value": "red"}]
        records.append((question, {**media, "conversations": turns}))
    samples, bad = check_records(records, preparer, demo_tokenizer, prompts=True)
    assert not bad
    return samples


def test_every_sample_is_asked_once_and_gets_its_own_answer(
    preparer: Preparer, samples: list[Sample], asked: list[Asked], demo_tokenizer: Any
):
    model: Any = Model(tiny())
    answers, bad = answer_questions(model, samples, preparer, demo_tokenizer, RUN)
    assert [sample.name for sample in bad] == ["what appeared of red"]
    assert "cut.png" in bad[0].reason
    assert {a.sample.name for a in answers} == QUESTIONS.keys() - {"what appeared of red"}
    assert len(answers) == 6
    for a in answers:
        assert a.sample.question == a.sample.name
        assert a.answer == a.sample.question
    ends = {demo_tokenizer.convert_tokens_to_ids("<|im_end|>"), demo_tokenizer.eos_token_id}
    for call in asked:
        assert set(call.options.pop("stop_ids")) == ends
        assert call.options == {"max_new_tokens": 5}


def test_blank_questions_are_dark_and_only_those_about_media(
    preparer: Preparer, samples: list[Sample], asked: list[Asked], demo_tokenizer: Any
):
    model: Any = Model(tiny())
    seen, _ = answer_questions(model, samples, preparer, demo_tokenizer, RUN)
    pixels = [call.pixels for call in asked if call.pixels is not None]
    assert any(array.any() for array in pixels)
    asked.clear()
    blind, _ = answer_questions(model, samples, preparer, demo_tokenizer, RUN, see=False)
    names = {question for question, file in QUESTIONS.items() if file == "a.png"}
    assert {a.sample.name for a in blind} == names
    assert {a.sample.name for a in seen} > names
    for call in asked:
        assert call.pixels is not None
        assert not call.pixels.any()


@pytest.mark.parametrize(
    ("eval_ratio", "ratios", "expected"), [(None, (2, 4, 8), 2), (8, (2, 4), 8), (None, (), None)]
)
def test_questions_are_compressed_by_one_ratio(
    eval_ratio: int | None,
    ratios: tuple[int, ...],
    expected: int | None,
    preparer: Preparer,
    samples: list[Sample],
    asked: list[Asked],
    demo_tokenizer: Any,
):
    """The smallest that is trained, unless told."""
    model: Any = Model(tiny(ratios=ratios))
    run = replace(RUN, eval_ratio=eval_ratio)
    answer_questions(model, samples[:3], preparer, demo_tokenizer, run)
    (call,) = asked
    for kind in call.streams.kind[0]:
        visual, beacons = (kind == VISUAL).sum(), (kind == BEACON).sum()
        assert visual == 8
        assert beacons == (0 if expected is None else visual / expected)


def test_no_questions_no_answers(preparer: Preparer, demo_tokenizer: Any):
    model: Any = Model(tiny())
    assert answer_questions(model, [], preparer, demo_tokenizer, RUN) == ([], [])
