"""Checkpoints of a run: what they hold, which are kept, and how a run ends that is stopped, breaks
off or finds the disk full.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.support.runs import STEPS, Run, arguments, read_lines, run
from train import finetune
from train.config import TrainConfig
from train.config.cli import load_config
from train.config.resume import config_to_dict
from train.errors import DataError, TrainingError
from train.run import distributed, step as step_module
from train.run.checkpoints import Checkpoints, Position, quiet_orbax
from train.run.step import fingerprint

POSITION = Position(7, "of this data")


def demo_config(*options: str) -> TrainConfig:
    return load_config(["--config", "demo", *options]).config


def small(value: float) -> dict[str, Any]:
    return {"a": jnp.full(3, value)}


# What they hold.


def test_a_checkpoint_holds_what_was_saved_though_the_buffers_are_given_up(tmp_path: Path):
    """It is written in the background, while steps go on and reuse the memory."""
    checkpoints = Checkpoints(tmp_path, demo_config())
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x - 1, tree), donate_argnums=0)
    expected = np.arange(4_000_000, dtype=np.float32)
    trained, state = {"a": jnp.array(expected)}, {"b": jnp.array(expected)}
    checkpoints.save(1, trained, state, POSITION)
    for _ in range(5):
        trained, state = overwrite((trained, state))
    checkpoints.manager.wait_until_finished()
    assert trained["a"][0] == -5
    *trees, found_position = checkpoints.restore(1, trained, state, POSITION)
    assert found_position == POSITION
    for tree in trees:
        (found,) = jax.tree.leaves(tree)
        np.testing.assert_array_equal(found, expected)
    checkpoints.close()


def test_a_step_that_is_saved_already_is_left_as_it_is(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, demo_config())
    for value in (1.0, 2.0):
        checkpoints.save(1, small(value), small(value), POSITION)
    checkpoints.close()
    again = Checkpoints(tmp_path, demo_config())
    assert again.last == 1
    again.save(1, small(3.0), small(3.0), POSITION)
    trained, _, _ = again.restore(1, small(0.0), small(0.0), POSITION)
    assert trained["a"][0] == 1
    again.close()


def test_other_data_is_refused(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, demo_config())
    checkpoints.save(1, small(1.0), small(1.0), POSITION)
    with pytest.raises(DataError, match="began with other training samples"):
        checkpoints.restore(1, small(0.0), small(0.0), Position(0, "of other data"))
    checkpoints.close()


def test_a_damaged_checkpoint_is_one_error(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, demo_config())
    checkpoints.save(1, small(1.0), small(1.0), POSITION)
    checkpoints.close()
    shutil.rmtree(tmp_path / "checkpoints/1/state")
    again = Checkpoints(tmp_path, demo_config())
    with pytest.raises(TrainingError, match=rf"{tmp_path}/checkpoints cannot be read \("):
        again.restore(1, small(0.0), small(0.0), POSITION)
    again.close()


def test_configuration_and_versions_are_in_it(whole: Run, folder: Path):
    about = json.loads((whole.path / f"checkpoints/{STEPS}/about/metadata").read_text())
    config = load_config(arguments(folder, whole.path)).config
    assert about["config"] == config_to_dict(config)
    versions = about["versions"]
    assert versions.keys() == {
        *("vxl-jax", "jax", "flax", "optax", "orbax-checkpoint", "commit"),
    }
    assert versions["jax"] == version("jax")
    if (Path(__file__).parents[3] / ".git").exists() and shutil.which("git"):
        assert len(versions["commit"].removesuffix("-dirty")) == 40


# Which are kept.


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ("--run.keep-checkpoints 1", [12]),
        ("--run.keep-checkpoints 3", [8, 10, 12]),
        ("--run.keep-checkpoints 1 --run.keep-every 4", [4, 8, 12]),
        ("--run.keep-checkpoints 1 --run.keep-best 1", [6, 12]),
        ("--run.keep-checkpoints 1 --run.keep-best 2 --run.keep-every 8", [2, 6, 8, 12]),
        ("--run.keep-checkpoints 1 --run.keep-best 9", [2, 6, 10, 12]),
    ],
)
def test_newest_regular_and_best_are_kept(options: str, kept: list[int], tmp_path: Path):
    """Steps 2, 6 and 10 were scored."""
    scores = {2: 0.5, 6: 0.75, 10: 0.25}
    given = ["--run.save-every", "2", "--run.eval-every", "4", *options.split()]
    for steps in ((2, 4, 6), (8, 10, 12)):  # with a restart between
        checkpoints = Checkpoints(tmp_path, demo_config(*given))
        for step in steps:
            checkpoints.save(step, small(step), small(step), POSITION, scores.get(step))
        checkpoints.close()
    folders = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(map(int, folders)) == kept


def test_a_run_keeps_its_best(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint is written where held-out questions are asked, though none is due there."""
    shares = iter([0.2, 0.9, 0.4])

    def scored(*_: Any) -> dict[str, dict[str, float]]:
        return {"accuracy": {"all": next(shares)}, "modality": {}}

    monkeypatch.setattr(finetune, "evaluate", scored)
    options = "--run.max-steps 12 --run.save-every 100 --run.eval-every 3 --run.keep-checkpoints 1"
    ended = run(folder, tmp_path / "run", *options.split(), "--run.keep-best", "1")
    assert ended.status == 0
    assert ended.saved == [6, 12]
    found = [row["accuracy"]["all"] for row in read_lines(ended.path / "evaluations.jsonl")]
    assert found == [0.2, 0.9, 0.4]


# SIGTERM.


def at_step(
    monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None], accumulate: int = 2
) -> None:
    """Do something while the batches of a step are added."""
    add_batch, calls = step_module.add_batch, iter(range(10**6))

    def acting(*args: Any) -> Any:
        if next(calls) // accumulate == step - 1:
            act()
        return add_batch(*args)

    monkeypatch.setattr(finetune, "add_batch", acting)


@pytest.mark.parametrize("several", [False, True])
def test_sigterm_saves_exits_0_and_goes_on(
    several: bool, whole: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At a step that is not saved otherwise; with `several`, also while that is written."""
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))  # for each of two batches
        if several:
            save = Checkpoints.save

            def interrupted(self: Checkpoints, step: int, *rest: Any) -> None:
                if step == 7:
                    os.kill(os.getpid(), signal.SIGTERM)
                save(self, step, *rest)
                if step == 7:
                    os.kill(os.getpid(), signal.SIGTERM)

            patch.setattr(Checkpoints, "save", interrupted)
        stopped = run(folder, path)
    assert stopped.status == 0
    assert stopped.err.rstrip().endswith(
        f"stopped by SIGTERM, step 7 is saved: the same command goes on from what {path} holds"
    )
    assert stopped.saved == [4, 7]
    assert not (path / "summary.json").exists()
    rest = run(folder, path)
    assert "resumed at step 7" in rest.out
    assert rest.summary["params_sha256"] == whole.summary["params_sha256"]


def test_sigterm_in_the_last_step_lets_the_run_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    ended = run(folder, tmp_path / "run", "--run.max-steps", "3")
    assert ended.status == 0
    assert "SIGTERM" not in ended.err
    assert ended.summary["steps"] == 3


# A loss that is not finite.


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss", np.nan, "loss nan, gradient_norm "),
        ("loss", np.inf, "loss inf, gradient_norm "),
        ("gradients", np.nan, "gradient_norm nan: "),
        ("gradients", -np.inf, "gradient_norm inf: "),
    ],
)
def test_a_step_that_is_not_finite_is_not_made(
    name: str,
    value: float,
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Step 6 of a run that saves every fourth."""
    path, before = tmp_path / "run", {}
    batches: list[list[str]] = []
    with monkeypatch.context() as patch:
        add_batch, update, place = (
            step_module.add_batch,
            step_module.update,
            distributed.place_batch,
        )

        def spoiling(*args: Any) -> Any:
            sums = add_batch(*args)
            if len(batches) == 12:
                first = jax.tree.leaves(sums[name])[0]
                sums[name] = jax.tree.map(
                    lambda x: x.at[(0,) * x.ndim].set(value) if x is first else x, sums[name]
                )
            return sums

        def watched(optimizer: Any, trained: Any, *rest: Any) -> Any:
            before[len(batches) // 2] = fingerprint(trained)
            return update(optimizer, trained, *rest)

        def noted(batch: Any, *rest: Any) -> Any:
            batches.append([sample.name for sample in batch.samples])
            return place(batch, *rest)

        patch.setattr(finetune, "add_batch", spoiling)
        patch.setattr(finetune, "update", watched)
        patch.setattr(finetune, "place_batch", noted)
        broken = run(folder, path)

    samples = batches[10] + batches[11]
    assert broken.error.startswith("error: step 6: ")
    assert message in broken.error
    assert "the update was not made, and step 5 is saved" in broken.error
    assert f"Its samples: {', '.join(samples[:4])} and 4 more" in broken.error
    assert "--run.skip-steps 6 goes on without them" in broken.error
    noted_down = json.loads((path / "not_finite.json").read_text())
    assert (noted_down["step"], noted_down["samples"]) == (6, samples)
    assert broken.saved == [4, 5]
    assert saved_fingerprint(path, 5) == before[6]
    assert len(set(before.values())) == 5  # the first has a learning rate of 0

    skipped = run(folder, path, "--run.skip-steps", "6", "--run.max-steps", "8")
    assert skipped.status == 0
    assert "resumed at step 5" in skipped.out
    assert skipped.summary["steps"] == 8
    assert skipped.saved == [5, 8]


def saved_fingerprint(path: Path, step: int) -> str:
    """Of the parameters in a checkpoint."""
    with ocp.CheckpointManager(path / "checkpoints") as manager:
        found = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return fingerprint(found["state"]["params"])


def test_a_skipped_step_changes_no_parameter(folder: Path, tmp_path: Path):
    before = run(folder, tmp_path / "before", "--run.max-steps", "2")
    after = run(folder, tmp_path / "after", "--run.max-steps", "3", "--run.skip-steps", "3")
    assert after.summary["params_sha256"] == before.summary["params_sha256"]
    assert 3 not in after.losses


# A disk that is full.


LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
runpy.run_module("train.finetune", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_is_one_error_and_leaves_the_last_checkpoint(
    whole: Run, folder: Path, tmp_path: Path
):
    """No file may have more than 300 kB: a checkpoint has more."""
    path = tmp_path / "run"
    assert run(folder, path, "--run.max-steps", "6").saved == [4, 6]
    saved = saved_fingerprint(path, 6)
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments(folder, path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    full = Run(ended.returncode, ended.stdout, ended.stderr, path)
    assert full.error.startswith(f"error: {path}/checkpoints cannot be written (")
    assert "the checkpoint of step 6 is intact" in full.error
    assert "; make room on the disk; the same command resumes" in full.error
    assert 6 in full.saved
    assert saved_fingerprint(path, 6) == saved
    rest = run(folder, path)
    assert "resumed at step 6" in rest.out
    assert rest.summary["params_sha256"] == whole.summary["params_sha256"]


# What Orbax prints.


def process_settings() -> dict[str, Any]:
    """What decides which errors of Orbax and asyncio this process prints."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    return {
        "loggers": [(x.level, x.disabled, [*x.filters], [*x.handlers]) for x in loggers],
        "warnings": ([*warnings.filters], warnings.showwarning),
        "hook": sys.unraisablehook,
    }


def test_checkpoints_leave_the_settings_of_the_process(tmp_path: Path):
    before = process_settings()
    checkpoints = Checkpoints(tmp_path, demo_config())
    assert process_settings() == before
    checkpoints.save(1, small(1.0), small(1.0), POSITION)
    assert process_settings() == before
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints/1/state")
    with pytest.raises(TrainingError, match="cannot be read"):
        checkpoints.restore(1, small(0.0), small(0.0), POSITION)
    assert process_settings() == before
    checkpoints.close()
    assert process_settings() == before
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be opened"):
        Checkpoints(tmp_path / "file", demo_config())
    assert process_settings() == before


def test_quiet_orbax_hides_its_errors_and_no_others(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    shown: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda x: shown.append(str(x.exc_value)))

    def fail(text: str) -> None:
        """As threads do: log, let an exception be ignored, warn."""
        for name in ("absl", "asyncio", "another"):
            logging.getLogger(name).error(text)

        class Finalized:
            def __del__(self) -> None:
                raise RuntimeError(text)

        Finalized()
        for message in (text, "coroutine 'write' was never awaited"):
            warnings.warn(message, RuntimeWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        before = process_settings()
        with contextlib.suppress(KeyError), quiet_orbax():
            fail("Event loop is closed")
            fail("another error")
            raise KeyError
        assert process_settings() == before
    assert {record.name for record in caplog.records} == {"another"}
    assert shown == ["another error"]
    assert [str(x.message) for x in warned] == ["Event loop is closed", "another error"]

    caplog.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fail("Event loop is closed")
    assert {record.name for record in caplog.records} == {"absl", "asyncio", "another"}
    assert shown == ["another error", "Event loop is closed"]
    assert len(warned) == 2


def test_a_run_is_quiet_and_restores_the_settings(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    inside: list[Any] = []

    def failing(*_: Any, **__: Any) -> None:
        inside.append(process_settings())
        raise TrainingError("cannot be written")

    monkeypatch.setattr(finetune, "train", failing)
    before = process_settings()
    assert run(folder, tmp_path / "run").error == "error: cannot be written"
    assert process_settings() == before
    (found,) = inside
    assert [level for level, *_ in found["loggers"]] == [logging.CRITICAL] * 2
    assert found["hook"] is not before["hook"]


LATE = """
import atexit, logging, runpy
atexit.register(logging.getLogger("absl").error, "from a thread that ends late")
runpy.run_module("train.finetune", run_name="__main__", alter_sys=True)
"""


def test_nothing_is_printed_after_the_error(folder: Path, tmp_path: Path):
    """Threads of a write that failed log errors until the process ends."""
    options = arguments(folder, tmp_path / "run", "--data.train-json", "gone.json")
    ended = subprocess.run(
        [sys.executable, "-c", LATE, *options], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: gone.json: cannot be read")
