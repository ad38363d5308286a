"""What a run writes while it goes on: rows of metrics, names of bad samples."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.clock import Clock
from train.data.loader import Batch
from train.data.records.sample import BadSample
from train.errors import TooManyBadSamples
from train.rows import read_rows, write_text
from train.run import report
from train.run.bad_samples import BadSamples
from train.run.report import RunLog, draw_loss

METRICS = {
    **{"loss": 1.0, "accuracy": 0.5, "tokens": 4.0, "learning_rate": 0.1},
    **{"gradient_norm": 2.0, "gradient_norm_language": 2.0},
}


def flops_of(batch: Batch) -> int:
    """Operations of a batch: a thousand for each token."""
    return 1000 * batch.tokens


def batch(samples: int, tokens: int, frames: int, places: int) -> Batch:
    """What the log counts of a batch, one place of which is empty."""
    made: Any = [*[object()] * samples, None]
    nothing: Any = None
    return Batch(nothing, None, made, frames=frames, tokens=tokens, token_places=places)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the logs; next to nothing passes but what a test adds."""
    clock = Clock(tick=1e-9)
    monkeypatch.setattr(report, "time", clock)
    return clock


def open_log(run_dir: Path, start: int = 0, log_every: int = 1, began: float = 0.0) -> RunLog:
    """The log of a run of 9 steps."""
    return RunLog(run_dir, start, 9, log_every, began, counted_share=1.0, flops_of=flops_of)


def log_steps(run_dir: Path, start: int, stop: int, began: float = 0.0) -> RunLog:
    """Log every step after `start` up to `stop`."""
    log = open_log(run_dir, start, began=began)
    for step in range(start + 1, stop + 1):
        log.count(batch(samples=2, tokens=10, frames=0, places=20))
        log.add(METRICS)
        log.log(step)
    log.close()
    return log


def test_metrics_after_the_last_checkpoint_are_dropped(tmp_path: Path):
    log_steps(tmp_path, 0, 5)
    log_steps(tmp_path, 3, 6)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    log_steps(tmp_path, 0, 1)  # no checkpoint: the run begins again
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path):
    log_steps(tmp_path, 0, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    log_steps(tmp_path, 2, 3)
    assert [row["step"] for row in read_rows(path)] == [1, 3]


def test_seconds_are_those_of_all_pieces_that_count(tmp_path: Path):
    first = log_steps(tmp_path, 0, 5, began=-100)
    assert first.seconds == first.history[2]["seconds"] == 100
    second = log_steps(tmp_path, 3, 6, began=-10)
    assert second.seconds == second.history[-1]["seconds"] == 110


def test_rates_are_since_the_row_before(tmp_path: Path, clock: Clock):
    log = open_log(tmp_path, log_every=3)
    for _ in range(3):
        log.count(batch(samples=4, tokens=100, frames=8, places=125))
    clock.now += 2
    log.add(METRICS)
    log.log(3)
    clock.now += 8
    log.log(6)
    log.count(batch(samples=4, tokens=100, frames=8, places=125))
    clock.now += 16
    log.log(9)
    log.close()
    first, second, third = log.history
    for row, batches, seconds in ((first, 3, 2), (third, 1, 16)):
        assert row["samples_per_second"] == pytest.approx(4 * batches / seconds)
        assert row["tokens_per_second"] == pytest.approx(100 * batches / seconds)
        assert row["frames_per_second"] == pytest.approx(8 * batches / seconds)
    assert first["tflops_per_device"] == pytest.approx(1e-9 * first["tokens_per_second"])
    assert "peak_share" not in first  # nobody knows what this processor can do at most
    assert second["samples_per_second"] == second["tokens_per_second"] == 0
    assert [row["seconds"] for row in log.history] == [2, 10, 26]
    assert (first["padding"], second["padding"]) == (pytest.approx(0.2), 0)


def test_waiting_is_a_share_and_what_is_aside_is_left_out(tmp_path: Path, clock: Clock):
    log = open_log(tmp_path)
    log.count(batch(samples=4, tokens=100, frames=8, places=125))
    for _ in range(2):
        with log.waiting():
            clock.now += 1
    clock.now += 6
    with log.aside():
        clock.now += 100
    log.add(METRICS)
    log.log(1)
    log.count(batch(samples=4, tokens=100, frames=8, places=125))
    clock.now += 4
    log.log(2)
    log.close()
    first, second = log.history
    assert first["samples_per_second"] == pytest.approx(4 / 8)
    assert second["samples_per_second"] == pytest.approx(4 / 4)
    assert (first["data_wait"], second["data_wait"]) == (pytest.approx(2 / 8), 0)
    assert [row["seconds"] for row in log.history] == [108, 112]


def test_metrics_are_due_at_the_first_and_last_step_and_between(tmp_path: Path):
    log = RunLog(tmp_path, 0, 10, log_every=4, began=0, counted_share=1.0, flops_of=flops_of)
    assert [step for step in range(1, 11) if log.due(step)] == [1, 4, 8, 10]
    log.close()


# What a row is the mean of.


def metrics_of(step: int) -> dict[str, float]:
    """Of a step, all different; every fifth has no labelled token."""
    tokens = float(step % 5)
    rate = 0.1 / step
    if not tokens:
        none = {"loss": math.nan, "accuracy": math.nan, "gradient_norm": 0.0}
        return {**none, "gradient_norm_vision": 0.0, "tokens": 0.0, "learning_rate": rate}
    return {
        "loss": 10 + 1 / step,
        "accuracy": 1 / tokens,
        "gradient_norm": 3.0 + step,
        "gradient_norm_vision": 2.0 * step,
        "tokens": tokens,
        "learning_rate": rate,
    }


VALUES = ("loss", "accuracy", "gradient_norm", "gradient_norm_vision", "learning_rate")


def log_metrics(run_dir: Path, start: int, stop: int, last: int, log_every: int) -> RunLog:
    """A run of `last` steps that is killed after `stop`, where it has saved."""
    run_dir.mkdir(exist_ok=True)
    log = RunLog(run_dir, start, last, log_every, 0.0, counted_share=1.0, flops_of=flops_of)
    for step in range(start + 1, stop + 1):
        log.add(metrics_of(step))
        if log.due(step):
            log.log(step)
        log.keep_unlogged(step)
    log.close()
    return log


def values_of(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["step"], *(row[name] for name in VALUES)) for row in rows]


def test_a_row_is_the_mean_of_the_steps_since_the_row_before(tmp_path: Path):
    log_metrics(tmp_path, 0, 9, last=9, log_every=4)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 4, 8, 9]
    for row, steps in zip(rows, ([1], [2, 3, 4], [6, 7, 8], [9]), strict=True):  # not 5
        given = [metrics_of(step) for step in steps]
        tokens = sum(x["tokens"] for x in given)
        for name in ("loss", "accuracy"):
            mean = sum(x[name] * x["tokens"] for x in given) / tokens
            assert row[name] == pytest.approx(mean, rel=1e-12)
        for name in ("gradient_norm", "gradient_norm_vision"):
            assert row[name] == pytest.approx(sum(x[name] for x in given) / len(given), rel=1e-12)
        assert row["learning_rate"] == given[-1]["learning_rate"]
        assert "tokens" not in row


def test_a_step_without_labels_has_no_loss_and_is_counted(tmp_path: Path):
    log = log_metrics(tmp_path, 0, 10, last=10, log_every=1)
    rows = read_rows(tmp_path / "metrics.jsonl")
    names = VALUES[:-1]
    for row in rows:
        assert [row[name] is None for name in names] == [row["step"] % 5 == 0] * len(names)
        assert row["learning_rate"] == pytest.approx(0.1 / row["step"])
    assert log.steps_without_labels == 2
    assert log.final_loss == rows[8]["loss"] == 10 + 1 / 9  # of step 9: 10 has none
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    draw_loss(log.history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_no_labels_at_all(tmp_path: Path):
    log = RunLog(tmp_path, 0, 5, 1, 0.0, counted_share=1.0, flops_of=flops_of)
    log.add(metrics_of(5))
    log.log(1)
    log.close()
    assert log.final_loss is None
    draw_loss(log.history, tmp_path / "loss.png")


@pytest.mark.parametrize("killed", range(1, 12))
def test_rows_of_a_run_in_two_pieces_are_those_of_a_whole_one(killed: int, tmp_path: Path):
    """It is stopped after a step, or `run.max_steps` ends it there, which writes a row."""
    expected = log_metrics(tmp_path / "whole", 0, 12, last=12, log_every=4)
    for name, last in (("stopped", 12), ("ended", killed)):
        log_metrics(tmp_path / name, 0, killed, last, log_every=4)
        if name == "stopped" and killed > 2:  # steps after the checkpoint are lost
            log_metrics(tmp_path / name, killed, min(killed + 2, 12), 12, log_every=4)
        found = log_metrics(tmp_path / name, killed, 12, 12, log_every=4)
        rows = [row for row in found.history if row["step"] in (1, 4, 8, 12)]
        assert values_of(rows) == values_of(expected.history)
        assert found.steps_without_labels == expected.steps_without_labels == 2


RECORDS = {"a.json": 8, "b.json": 2}


def test_bad_samples_are_counted_once_by_file(tmp_path: Path):
    bad = BadSamples(tmp_path, RECORDS, 0.3, start=0)
    for step in (1, 2):  # again in the next epoch
        bad.note([BadSample("a.json[3] x", "dark"), BadSample("b.json[0]", "long")], step)
    assert bad.summary() == {
        "count": 2,
        "by_file": {"a.json": 1, "b.json": 1},
        "reasons": {"a.json[3] x": "dark", "b.json[0]": "long"},
    }
    assert [row["step"] for row in read_rows(tmp_path / "bad_samples.jsonl")] == [1, 1]


def test_more_bad_samples_than_allowed_are_an_error(tmp_path: Path):
    bad = BadSamples(tmp_path, RECORDS, 0.3, start=0)
    bad.note([BadSample(f"a.json[{i}]", "dark") for i in range(3)], step=0)
    bad.check(len(bad.reasons))
    bad.note([BadSample("a.json[3]", "dark")], step=1)
    with pytest.raises(TooManyBadSamples, match=r"4 of 10 samples are bad, more than .* 0\.3"):
        bad.check(len(bad.reasons))
    strict = BadSamples(tmp_path, RECORDS, 0.0, start=0)
    strict.check(0)
    with pytest.raises(TooManyBadSamples):
        strict.check(1)


def test_bad_samples_of_other_processes_are_collected(tmp_path: Path):
    """A sample that two have found counts once; processes of a run before this one do not."""
    bad = BadSamples(tmp_path, RECORDS, 1.0, start=0)
    bad.note([BadSample("a.json[0]", "dark")], step=1)
    for process, name in ((1, "a.json[0]"), (2, "b.json[1]"), (3, "b.json[2]")):
        own = tmp_path / "processes" / str(process)
        own.mkdir(parents=True)
        BadSamples(own, RECORDS, 1.0, start=0).note([BadSample(name, "dark")], step=1)
    bad.collect(tmp_path / "processes", 3)
    assert bad.summary()["by_file"] == {"a.json": 1, "b.json": 1}


def test_a_resumed_run_knows_the_bad_samples_of_the_steps_it_has_done(tmp_path: Path):
    bad = BadSamples(tmp_path, RECORDS, 1.0, start=0)
    for step in range(5):
        bad.note([BadSample(f"a.json[{step}]", "dark")], step)
    with (tmp_path / "bad_samples.jsonl").open("a") as file:
        file.write('{"step": 1, "name": "a.js')  # killed while writing
    resumed = BadSamples(tmp_path, RECORDS, 1.0, start=2)
    # Those found before training are found again, unless they are repaired; so are later ones.
    assert list(resumed.reasons) == ["a.json[1]", "a.json[2]"]
    resumed.note([BadSample("a.json[3]", "dark")], step=3)
    rows = read_rows(tmp_path / "bad_samples.jsonl")
    assert [row["name"] for row in rows] == ["a.json[1]", "a.json[2]", "a.json[3]"]


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "summary.json"
    write_text(path, json.dumps({"steps": 1}))

    def fail(self: Path, text: str) -> None:
        self.open("w").write(text[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, json.dumps({"steps": 2}))
    assert json.loads(path.read_text()) == {"steps": 1}
