"""Which checkpoints are kept, though the run was killed in between."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from train.config.cli import load_config
from train.run.checkpoints import Checkpoints, Position

SCORES = {1: 0.2, 2: None, 3: 0.9, 4: None, 5: 0.5, 6: None, 7: 0.1, 8: None}
"""Accuracies of steps; step 3 is the best."""


def save(run_dir: Path, *steps: int) -> None:
    """What one process of a run saves."""
    options = ("--run.keep-checkpoints", "2", "--run.keep-best", "1", "--run.eval-every", "2")
    checkpoints = Checkpoints(run_dir, load_config(["--config", "demo", *options]).config)
    for step in steps:
        tree = {"a": jnp.full(3, step)}
        checkpoints.save(step, tree, tree, Position(step, "data"), SCORES[step])
    checkpoints.close()


def steps_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("pieces", [[range(1, 9)], [range(1, 5), range(5, 7), range(7, 9)]])
def test_the_best_is_kept_over_all_processes_of_a_run(pieces: list[range], tmp_path: Path):
    for piece in pieces:
        save(tmp_path, *piece)
    assert steps_in(tmp_path) == ["3", "7", "8"]


def test_what_a_killed_process_had_begun_to_write_is_cleared_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    for step in (3, 4):  # one is written again, the other not
        shutil.copytree(folder / "2", folder / f"{step}.orbax-checkpoint-tmp")
    save(tmp_path, 3)
    assert caplog.records == []  # Orbax would warn of the temporary folder of step 3
    assert steps_in(tmp_path) == ["2", "3"]


def test_a_deletion_that_was_cut_short_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        save(tmp_path, 1, 2, 3)
        assert steps_in(tmp_path) == ["2", "3", "deleted"]
    (tmp_path / "checkpoints/deleted/1/_CHECKPOINT_METADATA").unlink()
    save(tmp_path)
    assert steps_in(tmp_path) == ["2", "3"]
