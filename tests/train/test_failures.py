"""Bad samples, refusals and failures of a run."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.support.runs import Run, cut_in_half, run, write_records
from train import finetune
from train.demo.tokenizer import save_tokenizer
from train.run import opening


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
    reason = "has neither tokenizer.json" if fault == "empty" else "cannot be loaded ("
    assert f"model.tokenizer {path}: {reason}" in error


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
    module = opening if name == "make_model" else finetune
    calls, real = itertools.count(1), getattr(module, name)

    def failing(*args: object, **named: object) -> object:
        if next(calls) == call:
            allocate_too_much()
        return real(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing)
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
