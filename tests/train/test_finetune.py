"""`python -m train.finetune` from end to end, on small data: what it leaves, resuming, refusals."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.runs import STEPS, Run, arguments, cut_in_half, run, write_records
from train.config.cli import load_config
from train.run.optimizer import Optimizer

# What a run leaves.


def test_summary(whole: Run, folder: Path):
    assert whole.status == 0
    summary = whole.summary
    assert summary.keys() == {
        *("steps", "final_loss", "heldout_accuracy", "blank_accuracy", "chance", "bad_samples"),
        *("parameters", "params_sha256", "seconds", "steps_without_labels"),
    }
    assert summary["steps_without_labels"] == 0
    assert summary["steps"] == STEPS
    assert summary["parameters"] > 100_000
    assert len(summary["params_sha256"]) == 64
    assert summary["seconds"] > 0
    assert summary["bad_samples"] == {
        "count": 0,
        "by_file": {f"{folder}/train.json": 0, f"{folder}/heldout.json": 0},
        "reasons": {},
    }
    for name in ("heldout_accuracy", "blank_accuracy", "chance"):
        assert summary[name].keys() == {"all", "colour"}
        assert all(0 <= share <= 1 for share in summary[name].values())
    assert summary["chance"] == {"all": 1 / 8, "colour": 1 / 8}


def test_metrics_and_falling_loss(whole: Run):
    rows = whole.metrics
    assert [row["step"] for row in rows] == [1, *range(4, STEPS + 1, 4)]
    for row in rows:
        assert row.keys() == {
            *("step", "loss", "accuracy", "gradient_norm", "learning_rate", "seconds"),
            *("samples_per_second", "tokens_per_second", "frames_per_second"),
            *("padding", "data_wait", "tflops_per_device"),
            *(f"gradient_norm_{part}" for part in ("vision", "projector", "language", "beacon")),
        }
        assert np.isfinite(list(row.values())).all()
    assert rows[0]["loss"] > 4
    assert rows[-1]["loss"] < 0.7
    assert rows[-1]["loss"] == whole.summary["final_loss"]
    assert rows[-1]["samples_per_second"] == pytest.approx(rows[-1]["frames_per_second"])
    assert rows[-1]["tokens_per_second"] > 10 * rows[-1]["frames_per_second"]
    assert max(row["learning_rate"] for row in rows) <= 3e-3
    assert 0 < rows[-1]["learning_rate"] < 1e-4
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= whole.summary["seconds"]


def test_picture_board_and_checkpoints(whole: Run):
    with Image.open(whole.path / "heldout.png") as picture:
        assert picture.size[0] == 960
    with Image.open(whole.path / "loss.png") as picture:
        assert min(picture.size) > 300
        assert len(set(picture.convert("RGB").get_flattened_data())) > 10
    (events,) = (whole.path / "tensorboard").iterdir()
    for name in whole.metrics[0]:
        assert name.encode() in events.read_bytes()
    kept = sorted(int(path.name) for path in (whole.path / "checkpoints").iterdir())
    assert kept == [STEPS - 4, STEPS]


def test_questions_are_shown_with_answers(whole: Run):
    table = [line.split() for line in whole.out.split("\n")]
    assert ["held-out", "questions", "accuracy", "blank", "chance"] in table
    percent = [f"{whole.summary[k]['colour']:.0%}" for k in ("heldout_accuracy", "blank_accuracy")]
    assert ["colour", *percent, "12%"] in table
    shown = [line for line in whole.out.split("\n") if "what is the colour -> " in line]
    assert len(shown) == 8
    assert all(line.startswith("[wide_") for line in shown)
    assert all("(right)" in line or "(expected " in line for line in shown)


def test_progress_does_not_flood_a_log(whole: Run):
    assert "training: 100%" in whole.err
    assert whole.err.count("\r") < 30


# Steps without a labelled token.


MEANS = ("loss", "accuracy", "gradient_norm", "gradient_norm_projector", "learning_rate")


def test_steps_without_labels_change_nothing_and_are_counted(own: Path):
    """Of 16 steps of one sample each, two have a picture that cannot be decoded."""
    cut_in_half(own / "media/0.png")
    options = [
        *("--data.batch-size", "1", "--optim.accumulate", "1", "--data.epochs", "1"),
        *("--optim.train", "projector", "--optim.warmup-share", "0.2", "--data.eval-json"),
    ]
    every = run(own, own / "every", *options, "--run.log-every", "1")
    assert every.status == 0, every.err
    rows = every.metrics
    empty = [row["step"] for row in rows if row["loss"] is None]
    assert len(rows) == 16
    assert len(empty) == every.summary["steps_without_labels"] == 2
    assert "2 of 16 steps had no labelled token and changed nothing" in every.out
    for row in rows:
        assert {row[name] is None for name in MEANS[:-1]} == {row["step"] in empty}
    real = [row for row in rows if row["step"] not in empty]
    assert every.summary["final_loss"] == real[-1]["loss"] > 0.1
    # The learning rate is that of the updates that were made.
    config = load_config(arguments(own, own / "every", *options)).config
    schedule = Optimizer(config.optim, 16, 0).schedule
    rates = [row["learning_rate"] for row in real]
    assert rates == pytest.approx([float(schedule(i)) for i in range(14)], rel=1e-6)

    # In the mean of several steps they have no weight; a run in pieces has the same rows.
    whole = run(own, own / "whole", *options, "--run.log-every", "5")
    assert [row["step"] for row in whole.metrics] == [1, 5, 10, 15, 16]
    first = 1
    for row in whole.metrics:
        mine = [x for x in real if first <= x["step"] <= row["step"]]
        first = row["step"] + 1
        for name in MEANS[2:4]:
            mean = sum(x[name] for x in mine) / len(mine) if mine else None
            assert row[name] == (mean and pytest.approx(mean, rel=1e-5))
        losses = [x["loss"] for x in mine]
        assert not mine or min(losses) <= row["loss"] <= max(losses)
    for end in (8, 13):  # no row is due after these, and run.max_steps writes one
        done = run(
            own, own / "pieces", *options, "--run.log-every", "5", "--run.max-steps", f"{end}"
        )
        assert done.status == 0, done.err
    pieces = run(own, own / "pieces", *options, "--run.log-every", "5")
    assert pieces.summary["params_sha256"] == whole.summary["params_sha256"]
    assert pieces.summary["params_sha256"] == every.summary["params_sha256"]
    assert pieces.summary["steps_without_labels"] == 2
    of_step = {row["step"]: row for row in pieces.metrics}
    assert of_step.pop(8)
    assert of_step.pop(13)
    for row in whole.metrics:
        assert [of_step[row["step"]][name] for name in MEANS] == [row[name] for name in MEANS]


# Other data.


def test_a_run_without_held_out_questions(folder: Path, tmp_path: Path):
    ended = run(folder, tmp_path / "run", "--run.max-steps", "1", "--data.eval-json")
    assert ended.status == 0
    assert "held-out questions  " not in ended.out
    for name in ("heldout_accuracy", "blank_accuracy", "chance"):
        assert ended.summary[name] == {}


REAL = [
    ({"image": "waterview.jpg"}, "<image>\n", "water"),
    ({"image": ["example2_dog.jpg", "extreme_ironing.jpg"]}, "<image><image>\n", "a dog"),
    ({"video": "bikes.mp4"}, "<image>\n", "a bike"),
    ({"video": "bigbuckbunny.mp4"}, "<image>\n", "a bunny"),
    ({"video": "carphone_pristine.mp4"}, "<image>\n", "a man"),
    ({}, "", "nothing"),
]
"""Media, their marks, and the answer to what can be seen."""


def test_real_files_take_the_same_path(shared: Path, own: Path):
    """Real videos, photographs of different sizes, several in one record, and text."""
    media = shared / "media"
    if not media.is_dir():
        pytest.skip(f"no media in {shared}")
    records = []
    for files, marks, answer in REAL:
        question = {"from": "human", "value": f"{marks}What is here?"}
        records.append({**files, "conversations": [question, {"from": "gpt", "value": answer}]})
    write_records(own / "train.json", records)
    options = {
        "--data.media-root": (str(media),),
        "--data.eval-json": (),
        "--data.epochs": ("8",),
        "--data.max-tiles": ("2",),
        "--data.max-frames": ("4",),
        "--data.cache-mb": ("64",),
        "--run.log-every": ("1",),
    }
    flat = [word for name, values in options.items() for word in (name, *values)]
    ended = run(own, own / "run", *flat)
    assert ended.status == 0, ended.err
    assert ended.summary["bad_samples"]["count"] == 0
    losses = [row["loss"] for row in ended.metrics]
    assert losses[0] > 4
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
