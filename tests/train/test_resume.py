"""A run that was interrupted goes on where it was."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.runs import STEPS, Run, run, write_records
from train import finetune
from train.run.step import _add_batch
from vxl_jax.interrupts import stop_request, sure_interrupt


def test_a_run_in_two_pieces_equals_a_whole_one(whole: Run, folder: Path):
    # 18 is not a step that is saved or logged otherwise.
    first = run(folder, folder / "pieces", "--run.max-steps", "18")
    assert first.status == 0
    assert first.summary["steps"] == 18
    piece, compiled = first.metrics, _add_batch._cache_size()
    second = run(folder, folder / "pieces")
    assert _add_batch._cache_size() <= compiled + 1  # not for every way that arrays came about
    assert "resumed at step 18" in second.out
    assert second.summary["params_sha256"] == whole.summary["params_sha256"]
    # What came after the last row is not counted: the held-out questions are asked once more.
    seconds = [row["seconds"] for row in second.metrics]
    assert second.metrics[: len(piece)] == piece
    assert [*seconds, second.summary["seconds"]] == sorted([*seconds, second.summary["seconds"]])
    losses = {row["step"]: row["loss"] for row in second.metrics}
    assert losses.pop(18)
    assert losses == {row["step"]: row["loss"] for row in whole.metrics}


def test_a_run_in_bfloat16_goes_on_where_it_was(folder: Path):
    options = [
        *("--optim.optimizer", "adafactor", "--optim.param-dtype", "bfloat16"),
        *("--optim.train", "vision", "projector", "--optim.vision-learning-rate", "1e-4"),
        *("--optim.accumulate", "1", "--run.max-new-tokens", "1"),
    ]
    sums = []
    for name, ends in (("at_once", [6]), ("later", [2, 6])):
        for end in ends:
            done = run(folder, folder / name, *options, "--run.max-steps", str(end))
            assert done.status == 0, done.err
        sums.append(done.summary["params_sha256"])
    assert sums[0] == sums[1]


def test_a_finished_run_may_be_started_again(
    whole: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """It answers the held-out questions again and trains no step."""

    def refused(*_: object) -> None:
        raise AssertionError("a step is trained")

    shutil.copytree(whole.path, folder / "again")
    monkeypatch.setattr(finetune, "add_batch", refused)
    monkeypatch.setattr(finetune, "update", refused)
    again = run(folder, folder / "again")
    assert again.status == 0
    assert f"{STEPS} are done: nothing is left to train" in again.out
    before, after = whole.summary, again.summary
    assert after.pop("seconds") >= whole.metrics[-1]["seconds"]
    before.pop("seconds")
    assert after == before
    assert again.metrics == whole.metrics
    assert (again.path / "loss.png").exists()


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and theirs (from Linux's /proc)."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_signals_leave_a_run_that_goes_on_and_no_processes(whole: Run, folder: Path):
    """Ctrl-C, then a kill that cannot be caught, then the rest in this process."""
    path = folder / "killed"
    options = ["--config", f"{folder}/config.py", "--run-dir", str(path), "--data.workers", "2"]

    def saved() -> set[str]:
        return {step.name for step in path.glob("checkpoints/[0-9]*") if step.name.isdigit()}

    def run_until_saved(name: str) -> tuple[subprocess.Popen, list[int]]:
        before = saved()
        process = subprocess.Popen(
            [sys.executable, "-m", "train.finetune", *options],
            stdout=(folder / f"{name}.out").open("w"),
            stderr=(folder / f"{name}.err").open("w"),
            start_new_session=True,
        )
        while process.poll() is None and not saved() - before:
            time.sleep(0.005)
        children = descendants(process.pid)
        assert len(children) >= 2
        return process, children

    def wait_for_end(processes: Sequence[int]) -> None:
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in processes):
            assert time.monotonic() < deadline, "data processes are left behind"
            time.sleep(0.05)

    process, children = run_until_saved("interrupted")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    assert process.wait(60) == 130
    wait_for_end(children)
    err = (folder / "interrupted.err").read_text()
    assert err.rstrip().endswith(f"interrupted: the same command goes on from what {path} holds")
    assert "Traceback" not in err
    interrupted_at = max(map(int, saved()))

    process, children = run_until_saved("killed")
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    wait_for_end(children)
    out = (folder / "killed.out").read_text()
    assert f"resumed at step {interrupted_at}" in out
    assert not (path / "summary.json").exists()

    rest = run(folder, path)
    assert "resumed at step" in rest.out
    assert rest.summary["params_sha256"] == whole.summary["params_sha256"]
    steps = [row["step"] for row in rest.metrics]
    assert steps == sorted(set(steps))
    losses = {row["step"]: row["loss"] for row in rest.metrics}
    assert {step: losses[step] for step in (1, 4, STEPS)} == {
        row["step"]: row["loss"] for row in whole.metrics if row["step"] in (1, 4, STEPS)
    }


def test_a_signal_is_a_request_and_a_second_ctrl_c_an_interrupt():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with stop_request() as stop:
            assert stop.signal is None
            signal.raise_signal(number)
            assert stop.signal == number
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_more_sigterms_change_nothing():
    """Schedulers send several, and the checkpoint is being written."""
    with stop_request() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM


def test_an_interrupt_is_not_lost_where_exceptions_are_ignored():
    inside = []

    def _xla_gc_callback() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            inside.append(True)

    with sure_interrupt():
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            _xla_gc_callback()
            time.sleep(10)
        assert inside == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_another_configuration_is_refused_by_name(whole: Run, folder: Path):
    before = (whole.path / "summary.json").stat().st_mtime_ns
    refused = run(folder, whole.path, "--optim.learning-rate", "1", "--data.batch-size", "2")
    assert "data.batch_size is 2, it was 4; optim.learning_rate is 1.0, it was 0.003" in (
        refused.error
    )
    assert (whole.path / "summary.json").stat().st_mtime_ns == before


def test_other_samples_are_refused(own: Path):
    assert run(own, own / "run", "--run.max-steps", "1").status == 0
    records = json.loads((own / "train.json").read_text())
    write_records(own / "train.json", records[:-1])
    refused = run(own, own / "run")
    assert "began with other training samples than there are now" in refused.error
    write_records(own / "train.json", records)
    assert run(own, own / "run", "--run.max-steps", "2").status == 0


def test_media_mended_meanwhile_do_not_keep_a_run_from_resuming(own: Path):
    """Its samples stay those that it began with."""
    (own / "media/0.png").rename(own / "media/away.png")
    began = run(own, own / "run", "--run.max-steps", "2")
    assert began.summary["bad_samples"]["count"] == 2
    (own / "media/away.png").rename(own / "media/0.png")
    ended = run(own, own / "run", "--run.max-steps", "4")
    assert ended.status == 0
    assert ended.summary["bad_samples"]["count"] == 2
    never = own / "never"
    (own / "media/0.png").rename(own / "media/away.png")
    assert run(own, never, "--run.max-steps", "4").status == 0
    assert (
        json.loads((never / "summary.json").read_text())["params_sha256"]
        == (ended.summary["params_sha256"])
    )
    (own / "media/away.png").rename(own / "media/0.png")
    assert run(own, own / "new", "--run.max-steps", "1").summary["bad_samples"]["count"] == 0


def test_a_run_without_steps_may_change(own: Path):
    """One that ended on an error in its data, say."""
    (own / "train.json").rename(own / "other.json")
    assert "cannot be read" in run(own, own / "run").error
    options = ("--data.train-json", f"{own}/other.json", "--run.max-steps", "1")
    assert run(own, own / "run", *options).status == 0
