"""What the directory of a killed run holds."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from train.rows import read_rows


class Failure(Exception):
    """What must not happen after a kill."""


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints, in order; 0, the beginning, is always among them."""
    names = [path.name for path in run_dir.glob("checkpoints/*")]
    return sorted({0, *(int(name) for name in names if name.isdigit())})


def read_checkpoint(path: Path) -> None:
    """Read all of a checkpoint.

    Raises: Failure if that cannot be done.
    """
    import orbax.checkpoint as ocp

    try:
        position = json.loads((path / "position" / "metadata").read_text())
        with ocp.StandardCheckpointer() as reader:
            state = reader.restore(path / "state")
    except Exception as error:  # Orbax raises anything
        raise Failure(f"{path} cannot be read: {error}") from error
    if position["batch"] <= 0 or state.keys() != {"params", "opt_state"}:
        raise Failure(f"{path} has {list(state)} and the position {position}")


class Outcome(NamedTuple):
    """What a run has come to."""

    sha256: str
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    files: list[str]


def outcome(run_dir: Path) -> Outcome:
    """All that must be the same however often a run was interrupted."""
    text = (run_dir / "summary.json").read_text()
    summary = json.loads(text.replace(str(run_dir), "RUN_DIR"))
    del summary["seconds"]
    values = ("step", "loss", "accuracy", "gradient_norm", "learning_rate")
    rows = read_rows(run_dir / "metrics.jsonl")
    folders = ("", "samples", "data", "data/media")
    return Outcome(
        summary.pop("params_sha256"),
        summary,
        [{name: row[name] for name in values} for row in rows],
        read_rows(run_dir / "evaluations.jsonl"),
        sorted(str(p.relative_to(run_dir)) for f in folders for p in (run_dir / f).iterdir()),
    )


def compare_outcomes(run_dir: Path, whole: Path) -> int:
    """See that a run has come to the same as one without kills, and can read its checkpoints.

    Returns the checkpoints that it has besides: a kill between the last one's end and the deletion
    of one before it leaves that one. Raises: Failure naming what is different.
    """
    found, expected = outcome(run_dir), outcome(whole)
    if found.sha256 != expected.sha256:
        raise Failure(f"{run_dir} has params_sha256 {found.sha256}, not {expected.sha256}")
    for name, value, wanted in zip(Outcome._fields, found, expected, strict=True):
        if value != wanted:
            raise Failure(f"{run_dir} has other {name} than without kills: {value}, not {wanted}")
    names, wanted = ({p.name for p in (d / "checkpoints").iterdir()} for d in (run_dir, whole))
    if not wanted <= names or not all(map(str.isdigit, names)):
        raise Failure(f"{run_dir} has the checkpoints {names}, not {wanted}")
    for name in wanted:
        read_checkpoint(run_dir / "checkpoints" / name)
    return len(names - wanted)
