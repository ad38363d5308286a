"""`python -m train.finetune` from end to end, on small data: what it leaves, resuming, refusals."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.runs import STEPS, Run, arguments, run, write_records
from train import finetune
from train.config import load_config
from train.demo_tokenizer import save_tokenizer
from train.optimizer import Optimizer
from train.signals import stop_request, sure_interrupt
from train.step import _add_batch

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


# Starting again.


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


# Bad samples.


def cut_in_half(path: Path) -> bytes:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole


def test_bad_samples_are_left_out_named_and_counted(own: Path):
    records = json.loads((own / "train.json").read_text())
    records[3]["image"] = "gone.png"
    records[5] = {"id": "five", "image": records[5]["image"]}
    records[7]["conversations"][0]["value"] = "no mark"
    write_records(own / "train.json", records)
    cut_in_half(own / "media/0.png")  # only decoding shows it, in two samples
    cut_in_half(own / "media/wide_2.png")

    ended = run(own, own / "run", "--run.max-steps", "3", "--data.max-bad-share", "0.3")
    assert ended.status == 0
    bad = ended.summary["bad_samples"]
    assert bad["count"] == 6
    assert bad["by_file"] == {f"{own}/train.json": 5, f"{own}/heldout.json": 1}
    expected = {
        f"{own}/train.json[0] colour_of_0.png": "0.png: image cannot be decoded",
        f"{own}/train.json[1] shape_of_0.png": "0.png: image cannot be decoded",
        f"{own}/train.json[3] shape_of_1.png": "gone.png: no such file",
        f"{own}/train.json[5] five": "the record has no conversations",
        f"{own}/train.json[7] shape_of_3.png": "0 <image> marks but 1 media files",
        f"{own}/heldout.json[2] colour_of_wide_2.png": "wide_2.png: image cannot be decoded",
    }
    assert bad["reasons"].keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in bad["reasons"][name]
        assert f"bad sample left out: {name}: " in ended.out
    assert ended.summary["steps"] == 3
    assert ended.summary["heldout_accuracy"].keys() == {"all", "colour"}

    # They are kept over a resume, once each.
    more = run(own, own / "run", "--run.max-steps", "5", "--data.max-bad-share", "0.3")
    assert more.summary["bad_samples"] == bad


def test_too_many_bad_records_stop_before_training(own: Path):
    records = json.loads((own / "train.json").read_text())
    for record in records[:5]:
        record["conversations"] = []
    write_records(own / "train.json", records)
    stopped = run(own, own / "run")
    assert stopped.error == (
        "error: 5 of 24 samples are bad, more than data.max_bad_share 0.2 allows; "
        f"{own}/run/bad_samples.jsonl lists them with reasons"
    )
    assert "training:" not in stopped.err
    rows = (own / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0] * 5


def test_too_many_undecodable_files_stop_the_run_until_mended(whole: Run, own: Path):
    files = [own / f"media/{i}.png" for i in range(3)]
    contents = [cut_in_half(file) for file in files]
    stopped = run(own, own / "run")
    assert "of 24 samples are bad, more than data.max_bad_share 0.2 allows" in stopped.error
    assert "training:" in stopped.err
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    mended = run(own, own / "run")
    assert mended.status == 0
    assert mended.summary["bad_samples"]["count"] == 0
    assert mended.summary["params_sha256"] == whole.summary["params_sha256"]


def test_undecodable_questions_do_not_lose_a_trained_run(own: Path):
    for i in range(6):
        cut_in_half(own / f"media/wide_{i}.png")
    ended = run(own, own / "run", "--run.max-steps", "1")
    assert ended.status == 0
    assert ended.summary["bad_samples"]["by_file"] == {
        f"{own}/train.json": 0,
        f"{own}/heldout.json": 6,
    }
    assert len(ended.summary["params_sha256"]) == 64


def test_a_file_without_one_good_record_is_an_error(own: Path):
    write_records(own / "train.json", [{"id": i} for i in range(3)])
    stopped = run(own, own / "run", "--data.max-bad-share", "1")
    assert stopped.error == (
        f"error: {own}/train.json: none of its 3 records can be used; the first: the record has no "
        "conversations (or messages); its fields are ['id']"
    )


# Refusals and failures: one line, status 2.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.train-json", "gone.json"], "gone.json: cannot be read (No such file"),
        (["--data.eval-json", "gone.json"], "gone.json: cannot be read (No such file"),
        (["--data.media-root", "gone"], "data.media_root gone: there is no such directory"),
        (["--model.tokenizer", "gone"], "model.tokenizer gone: there is no such directory"),
        (["--model.preset", "tiny"], "tokens but LanguageConfig.vocab_size is 96"),
        (["--optim.learning-rate", "1e30"], ": the update was not made, and step "),
    ],
)
def test_faults_are_one_line(options: list[str], message: str, folder: Path, tmp_path: Path):
    assert message in run(folder, tmp_path / "run", *options, "--run.log-every", "1").error


def test_the_run_directory_may_not_be_a_file(folder: Path, tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    for path in (tmp_path / "run", tmp_path / "run" / "below"):
        assert f"--run-dir {path}: cannot be made" in run(folder, path).error


def test_a_damaged_configuration_of_the_run_is_an_error(folder: Path, tmp_path: Path):
    assert run(folder, tmp_path / "run", "--run.max-steps", "1").status == 0
    (tmp_path / "run" / "config.json").write_text("{")
    assert "config.json cannot be read" in run(folder, tmp_path / "run").error


@pytest.mark.parametrize("fault", ["empty", "damaged", "without chat tokens"])
def test_unusable_tokenizers(fault: str, folder: Path, tmp_path: Path):
    path = tmp_path / "tokenizer"
    if fault == "empty":
        path.mkdir()
    else:
        save_tokenizer(path, ["a"])
        text = (path / "tokenizer.json").read_text()
        damaged = text.replace("<|im_start|>", "<|start|>") if "chat" in fault else text[:100]
        (path / "tokenizer.json").write_text(damaged)
    error = run(folder, tmp_path / "run", "--model.tokenizer", str(path)).error
    assert f"model.tokenizer {path}: cannot be loaded (" in error


@pytest.mark.parametrize(
    "failure",
    [
        "FileExistsError('data exists and is something else')",
        "ModuleNotFoundError('videos need PyAV')",
        "FileNotFoundError(2, 'No such file', 'x')",
    ],
)
def test_data_that_cannot_be_made_is_an_error(failure: str, own: Path):
    config = (own / "config.py").read_text()
    (own / "config.py").write_text(f"{config}\n\ndef prepare(config):\n    raise {failure}\n")
    error = run(own, own / "run").error
    assert error.startswith("error: the data cannot be made: ")
    assert failure.split("'")[1] in error


# A device out of memory.


def allocate_too_much() -> None:
    """Ask the device for more than any has."""
    jax.jit(lambda: jnp.zeros(2**46))().block_until_ready()


@pytest.mark.parametrize(
    ("name", "call", "where"),
    [
        ("make_model", 1, "training"),
        ("add_batch", 6, "training"),  # the second batch of step 3
        ("update", 3, "training"),
        ("evaluate", 1, "evaluation"),
        ("evaluate_at_end", 1, "evaluation"),
    ],
)
def test_out_of_device_memory_is_one_line_and_keeps_checkpoints(
    name: str, call: int, where: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = ["--run.max-steps", "3", "--run.save-every", "1", "--run.eval-every", "2"]
    calls, real = itertools.count(1), getattr(finetune, name)

    def failing(*args: object, **named: object) -> object:
        if next(calls) == call:
            allocate_too_much()
        return real(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, name, failing)
        ended = run(folder, tmp_path / "run", *options)
    assert ended.error.startswith(f"error: out of device memory in {where} (RESOURCE_EXHAUSTED: ")
    advice = ["data.max_frames", "data.batch_size", "data.max_tokens_per_batch", "model.remat"]
    for word in ["--plan", *advice] if where == "training" else ["run.eval_batch_size"]:
        assert word in ended.error
    assert "mesh.fsdp" in ended.error
    saved = {"make_model": 0, "evaluate": 1, "evaluate_at_end": 3}.get(name, 2)
    assert max(ended.saved, default=0) == saved
    if name in ("update", "evaluate"):
        again = run(folder, tmp_path / "run", *options)
        assert f"resumed at step {saved}" in again.out
        assert again.summary["steps"] == 3


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory\nmore", True),
        ("INTERNAL: Failed to allocate 9 bytes: CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
        ("INTERNAL: the compiler is wrong", False),
    ],
)
def test_other_errors_of_jax_keep_their_traceback(
    message: str,
    is_memory: bool,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def failing(*_: object) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(finetune, "update", failing)
    if is_memory:
        first = message.partition("\n")[0]
        assert f"out of device memory in training ({first}): lower" in (
            run(folder, tmp_path / "run").error
        )
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match="the compiler is wrong"):
            run(folder, tmp_path / "run")


def test_the_command_line_ends_with_status_2(folder: Path, tmp_path: Path):
    command = [sys.executable, "-m", "train.finetune", "--config", f"{folder}/config.py"]
    options = ["--run-dir", str(tmp_path / "run"), "--data.train-json", "gone.json"]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert (
        ended.stderr
        == "error: gone.json: cannot be read (No such file or directory); check the path\n"
    )


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
