"""What a run writes while it goes on: rows of metrics, names of bad samples."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from train.batches import Batch
from train.records import BadSample
from train.report import BadSamples, RunLog, TooManyBadSamples, read_rows, write_text

METRICS = {"loss": 1.0, "learning_rate": 0.1}


def flops_of(batch: Batch) -> int:
    """Operations of a batch: a thousand for each token."""
    return 1000 * batch.tokens


def batch(samples: int, tokens: int, frames: int, places: int) -> Batch:
    """What the log counts of a batch, one place of which is empty."""
    made: Any = [*[object()] * samples, None]
    nothing: Any = None
    return Batch(nothing, None, made, frames=frames, tokens=tokens, token_places=places)


def log_steps(run_dir: Path, start: int, stop: int, seconds_ago: float = 0.0) -> RunLog:
    """Log every step after `start` up to `stop`."""
    began = time.perf_counter() - seconds_ago
    log = RunLog(run_dir, start, 9, log_every=1, began=began, counted_share=1.0, flops_of=flops_of)
    for step in range(start + 1, stop + 1):
        log.count(batch(samples=2, tokens=10, frames=0, places=20))
        log.log(step, METRICS)
    log.close()
    return log


def test_metrics_after_the_last_checkpoint_are_dropped(tmp_path: Path):
    log_steps(tmp_path, 0, 5)
    log_steps(tmp_path, 3, 6)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    log_steps(tmp_path, 0, 1)  # no checkpoint: the run begins anew
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path):
    log_steps(tmp_path, 0, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    log_steps(tmp_path, 2, 3)
    assert [row["step"] for row in read_rows(path)] == [1, 3]


def test_seconds_are_those_of_all_pieces_that_count(tmp_path: Path):
    first = log_steps(tmp_path, 0, 5, seconds_ago=100)
    assert 100 <= first.seconds < 110
    second = log_steps(tmp_path, 3, 6, seconds_ago=10)
    assert 110 <= second.seconds < 120
    assert 110 <= second.history[-1]["seconds"] < 120


def test_rates_are_since_the_row_before(tmp_path: Path):
    log = RunLog(
        tmp_path, 0, 9, log_every=3, began=time.perf_counter(), counted_share=1.0, flops_of=flops_of
    )
    for _ in range(3):
        log.count(batch(samples=4, tokens=100, frames=8, places=125))
    time.sleep(0.05)
    log.log(3, METRICS)
    time.sleep(0.05)
    log.log(6, METRICS)
    log.close()
    first, second = log.history
    assert 0 < first["samples_per_second"] <= 12 / 0.05
    assert first["tokens_per_second"] == pytest.approx(25 * first["samples_per_second"])
    assert first["tflops_per_device"] == pytest.approx(1e-9 * first["tokens_per_second"])
    assert "peak_share" not in first  # nobody knows what this processor can do at most
    assert first["frames_per_second"] == pytest.approx(2 * first["samples_per_second"])
    assert second["samples_per_second"] == second["tokens_per_second"] == 0
    assert (first["padding"], second["padding"]) == (pytest.approx(0.2), 0)


def test_waiting_is_a_share_and_what_is_aside_is_left_out(tmp_path: Path):
    log = RunLog(
        tmp_path, 0, 9, log_every=1, began=time.perf_counter(), counted_share=1.0, flops_of=flops_of
    )
    log.count(batch(samples=4, tokens=100, frames=8, places=125))
    start = time.perf_counter()
    with log.waiting():
        time.sleep(0.1)
    time.sleep(0.1)
    with log.aside():
        time.sleep(0.4)
    log.log(1, METRICS)
    wall = time.perf_counter() - start
    log.count(batch(samples=4, tokens=100, frames=8, places=125))
    log.log(2, METRICS)
    log.close()
    first, second = log.history
    assert 4 / (wall - 0.35) < first["samples_per_second"] <= 4 / 0.2
    assert first["data_wait"] == pytest.approx(0.1 * first["samples_per_second"] / 4, rel=0.2)
    assert second["data_wait"] == 0


def test_metrics_are_due_at_the_first_and_last_step_and_between(tmp_path: Path):
    log = RunLog(tmp_path, 0, 10, log_every=4, began=0, counted_share=1.0, flops_of=flops_of)
    assert [step for step in range(1, 11) if log.due(step)] == [1, 4, 8, 10]
    log.close()


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
    # Those found before training are found again, unless they are mended; so are later ones.
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
