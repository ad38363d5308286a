"""Held-out questions that are asked while training goes on."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from tests.support.clock import Clock
from tests.support.runs import Run, add_kinds, make_folder, read_lines, run
from train import finetune
from train.run import report
from train.run.evaluate import evaluate

OPTIONS = "--run.max-steps 8 --run.eval-every 3 --run.save-every 2 --run.log-every 1"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """Data with held-out questions of several kinds; `folder` has the compiled programs."""
    return add_kinds(make_folder(tmp_path_factory.mktemp("heldout")))


@pytest.fixture(scope="module")
def asked(kinds: Path) -> Run:
    """A run of 8 steps that asks after steps 3 and 6, which takes 1000 s; the rest takes 1 s each
    time that the clock is read.
    """
    clock = Clock(tick=1.0)

    def slowly(*given: Any) -> Any:
        clock.now += 1000
        return evaluate(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "time", clock)
        patch.setattr(report, "time", clock)
        patch.setattr(finetune, "evaluate", slowly)
        return run(kinds, kinds / "asked", *OPTIONS.split(), *heldout(kinds))


def heldout(folder: Path) -> list[str]:
    return ["--data.eval-json", f"{folder}/asked.json", f"{folder}/heldout.json"]


def test_accuracies_by_type_and_modality_are_written(asked: Run):
    rows = read_lines(asked.path / "evaluations.jsonl")
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        assert row.keys() == {"step", "accuracy", "modality"}
        assert row["accuracy"].keys() == asked.summary["heldout_accuracy"].keys() >= {"colour"}
        assert row["modality"].keys() == {"all", "image", "video", "text"}
        assert all(0 <= share <= 1 for share in row["modality"].values())
        assert row["accuracy"]["all"] == row["modality"]["all"]
        assert f"step {row['step']}: held-out questions: all {row['modality']['all']:.0%}, " in (
            asked.out
        )


def test_the_answers_are_those_at_the_end_of_a_run_that_ends_there(
    asked: Run, kinds: Path, tmp_path: Path
):
    shorter = run(kinds, tmp_path / "run", *OPTIONS.split(), *heldout(kinds), "--run.max-steps=6")
    at_step_6 = read_lines(asked.path / "evaluations.jsonl")[1]["accuracy"]
    assert shorter.summary["heldout_accuracy"] == at_step_6
    assert [row["step"] for row in read_lines(shorter.path / "evaluations.jsonl")] == [3]


def test_asking_changes_nothing(asked: Run, kinds: Path, tmp_path: Path):
    options = [*OPTIONS.split(), "--run.eval-every", "None"]
    unasked = run(kinds, tmp_path / "run", *options, *heldout(kinds))
    assert unasked.summary["params_sha256"] == asked.summary["params_sha256"]
    assert unasked.losses == asked.losses
    assert not read_lines(unasked.path / "evaluations.jsonl")


def test_tensorboard_has_them(asked: Run):
    found: dict[str, dict[int, float]] = {}
    (path,) = (asked.path / "tensorboard").iterdir()
    content = path.read_bytes()
    while content:  # records: length, its checksum, event, its checksum
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        content = content[12 + size + 4 :]
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    for row in read_lines(asked.path / "evaluations.jsonl"):
        for group in ("accuracy", "modality"):
            for name, share in row[group].items():
                shown = found[f"heldout/{group}/{name}"]
                assert shown.keys() == {3, 6}
                assert shown[row["step"]] == pytest.approx(share)
    assert found["loss"] == pytest.approx(asked.losses)


def test_rates_leave_its_time_out(asked: Run):
    """8 samples a step. The 1000 s would show in the steps after 3 and 6."""
    rows = asked.metrics
    spent = [after["seconds"] - before["seconds"] for before, after in pairwise(rows)]
    assert [seconds > 1000 for seconds in spent] == [False, False, True] * 2 + [False]
    assert all(8 / row["samples_per_second"] < 100 for row in rows)


def test_waiting_for_data_is_a_share_of_the_time(asked: Run):
    shares = [row["data_wait"] for row in asked.metrics]
    assert all(0 < share < 1 for share in shares)


def test_evaluations_after_the_last_checkpoint_are_dropped(asked: Run, kinds: Path, tmp_path: Path):
    """They are made again, and are the same."""
    path = tmp_path / "run"
    shutil.copytree(asked.path, path)
    shutil.rmtree(path / "checkpoints/8")
    rows = read_lines(path / "evaluations.jsonl")
    late = json.dumps({**rows[1], "step": 7})
    (path / "evaluations.jsonl").open("a").write(f"{late}\n{{")  # killed while writing
    resumed = run(kinds, path, *OPTIONS.split(), *heldout(kinds))
    assert "resumed at step 6" in resumed.out
    assert read_lines(path / "evaluations.jsonl") == rows


def test_questions_of_which_none_can_be_decoded(own: Path):
    for picture in (own / "media").glob("wide_*.png"):
        picture.write_bytes(picture.read_bytes()[:60])
    options = "--run.max-steps 2 --run.eval-every 1 --run.keep-best 1 --data.max-bad-share 1"
    ended = run(own, own / "run", *options.split())
    assert ended.status == 0
    assert [row["accuracy"] for row in read_lines(ended.path / "evaluations.jsonl")] == [{}]
    assert ended.summary["bad_samples"]["by_file"][f"{own}/heldout.json"] == 8


def test_workers_answer_several_times(kinds: Path, tmp_path: Path, asked: Run):
    """The processes that read held-out samples are started again each time."""
    options = [*OPTIONS.split(), *heldout(kinds), "--data.workers", "1"]
    again = run(kinds, tmp_path / "run", *options)
    assert again.status == 0, again.err
    assert read_lines(again.path / "evaluations.jsonl") == read_lines(
        asked.path / "evaluations.jsonl"
    )
