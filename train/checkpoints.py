"""Checkpoints of a run: written in the background, whole or not at all, restored onto any mesh."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from train.config import TrainConfig, config_to_dict
from train.distributed import is_first
from train.errors import DataError, TrainingError
from vxl_jax.checkpoint import CHUNK_BYTES, weights_digest
from vxl_jax.errors import ConfigError
from vxl_jax.progress import progress_bar
from vxl_jax.published import PARAMS, read_config
from vxl_jax.tensors import read_json

PACKAGES = ("vxl-jax", "jax", "flax", "optax", "orbax-checkpoint")

BIN = "deleted"
"""Where checkpoints that are not kept lie until the next one is written. They get there whole: a
run that is killed while one is deleted leaves no half of it among the others."""


BASE = "base.json"
"""In a run's directory: what its base checkpoint was, and how its files looked on the disk then."""


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data: batches taken, of the data with this fingerprint."""

    batch: int
    data: str


def _score(metrics: dict[str, float] | None) -> float:
    return (metrics or {}).get("accuracy", -1.0)


@dataclass(frozen=True)
class _MostAccurate(managers.PreservationPolicy):
    """Keeps `count` checkpoints with the highest accuracy; of equal ones the newest."""

    count: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        scored = [info for info in checkpoints if _score(info.metrics) >= 0]
        best = sorted(scored, key=lambda info: (_score(info.metrics), info.step))[-self.count :]
        return [info in best for info in checkpoints]


def quiet_orbax() -> ExitStack:
    """Suppress what Orbax and asyncio print about a checkpoint that cannot be written.

    The error is raised as well. Without this, hundreds of lines come with it: Orbax logs it in each
    of its threads, asyncio logs task exceptions that were never retrieved, Python warns of
    coroutines that were never awaited, and TensorStore calls event loops that are closed. Threads
    go on after the error was raised, so some lines come later, until the process ends.

    Returns a context manager that restores the settings at its end; a call without `with` changes
    them for good.
    """
    restore = ExitStack()
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        restore.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def show_but_closed_loops(ignored: Any) -> None:
        if str(ignored.exc_value) != "Event loop is closed":
            show(ignored)

    restore.callback(setattr, sys, "unraisablehook", show)
    sys.unraisablehook = show_but_closed_loops
    restore.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    return restore


class Checkpoints:
    """The folder `checkpoints/` of a run, one folder a step.

    A step has `state` (trained parameters and optimizer state, an Orbax tree), `position`, `about`
    (the run's configuration, the versions of the code, and digests of the base checkpoint and the
    tokenizer, see `describe_base`), and `metrics` where it has a score. All
    that is random follows from the configuration's seed and from the numbers of the step and of the
    batch.

    Loggers, warning filters and hooks of the process stay as they are: see `quiet_orbax`.
    """

    def __init__(self, run_dir: Path, config: TrainConfig):
        """What is kept: the newest `run.keep_checkpoints`, every `run.keep_every`-th step, and the
        `run.keep_best` most accurate.

        Raises: ConfigError if a run that has steps began with another base checkpoint or tokenizer;
            TrainingError if the folder cannot be opened.
        """
        run = config.run
        kept: list[Any] = [managers.LatestN(run.keep_checkpoints)]
        if run.keep_every is not None:
            kept.append(managers.EveryNSteps(run.keep_every))
        if run.keep_best:
            kept.append(_MostAccurate(run.keep_best))
        self.run_dir = run_dir
        base = _check_own_base(run_dir, config)
        self.about = {"config": config_to_dict(config), "versions": versions(), "base": base}
        self.last: int | None = None
        self._empty_bin()
        with self._failing("opened"):
            self.manager = ocp.CheckpointManager(
                (run_dir / "checkpoints").resolve(),  # without `..`, which TensorStore refuses
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=managers.AnyPreservationPolicy(kept),
                    cleanup_tmp_directories=True,  # of a process that was killed
                    todelete_subdir=BIN,
                    best_fn=_score,  # or the scores would be forgotten when the run starts again
                ),
            )
            self.last = self.manager.latest_step()

    def save(
        self,
        step: int,
        trained: Any,
        opt_state: Any,
        position: Position,
        accuracy: float | None = None,
    ) -> None:
        """Write a checkpoint in the background; a step that is there already is left as it is.

        The arrays are copied to the host before this returns, and may be given up.

        Raises: TrainingError if this one or the one before cannot be written.
        """
        if step == self.last:
            return
        state = {"params": trained, "opt_state": opt_state}
        # `convert.to_hf` reads part by part: from chunks, and not the whole parameter each time.
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
        self.wait()
        self._empty_bin()
        with self._failing("written"):
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state, save_args=chunks),
                    position=ocp.args.JsonSave(asdict(position)),
                    about=ocp.args.JsonSave(self.about),
                ),
                metrics={} if accuracy is None else {"accuracy": accuracy},
            )
        self.last = step

    def check(self) -> None:
        """See, between steps, that what is written in the background has not failed.

        Raises: TrainingError.
        """
        if not self.manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until what is being written is there.

        Raises: TrainingError if it cannot be.
        """
        with self._failing("written"):
            self.manager.wait_until_finished()

    def restore(
        self, step: int, trained: Any, opt_state: Any, start: Position
    ) -> tuple[Any, Any, Position]:
        """Read a checkpoint into arrays like the given ones, each device its own part.

        trained, opt_state: arrays, or shapes with shardings. start: the beginning of the data that
        there is now. The order of samples follows from their number and lengths: with others, a run
        that starts again would train on some twice and on some never.

        Raises: DataError if the data is not what the run began with; TrainingError if the
            checkpoint cannot be read.
        """
        like = jax.tree.map(
            ocp.utils.to_shape_dtype_struct, {"params": trained, "opt_state": opt_state}
        )
        with self._failing("read"):
            found = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore()
                ),
            )
        position = Position(**found["position"])
        if position.data != start.data:
            raise DataError(
                f"{self.run_dir} holds a run that began with other training samples than there are "
                "now; restore its data, or use another --run-dir"
            )
        return found["state"]["params"], found["state"]["opt_state"], position

    def close(self) -> None:
        """Wait until all is written.

        Raises: TrainingError if it cannot be.
        """
        try:
            with self._failing("written"):
                self.manager.close()
        finally:
            self._empty_bin()

    def _empty_bin(self) -> None:
        if is_first():
            shutil.rmtree(self.run_dir / "checkpoints" / BIN, ignore_errors=True)

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise anything
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
                raise  # of the device, not of the disk
            folder = self.run_dir / "checkpoints"
            whole = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
            intact = f"; the checkpoint of step {max(whole)} is intact" if whole else ""
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            room = "see that there is room on the disk; " if what == "written" else ""
            raise TrainingError(
                f"{self.run_dir}/checkpoints cannot be {what} ({reason}){intact}; {room}the same "
                "command goes on from what is there"
            ) from error


# What a run began with.


def describe_base(checkpoint: Path | None, tokenizer: Path, note: Path | None) -> dict[str, Any]:
    """Digests and sizes of the base checkpoint and the tokenizer of a run, and where they are.

    `weights` is the digest of all weights, `model` has the sizes that config.json gives. The
    weights are read only if the files have changed since `note` was written.

    note: file of an earlier description; written again if it is not up to date. None: no file.

    Raises: CheckpointError if the base checkpoint is not whole; OSError if a file cannot be read.
    """
    found: dict[str, Any] = {
        "tokenizer": _tokenizer_digest(tokenizer),
        "tokenizer_directory": str(tokenizer.absolute()),
    }
    if checkpoint is None:
        return found
    config = read_config(checkpoint)
    parts = {name: asdict(getattr(config, name)) for name in ("vision", "language")}
    sizes = {f"{part}.{name}": value for part in parts for name, value in parts[part].items()}
    sizes |= {name: getattr(config, name) for name in ("pool_stride", "window", "ratios")}
    found["model"] = json.loads(json.dumps(sizes))
    found["directory"] = str(checkpoint.absolute())
    before = _read_note(note)
    stamp, size = _stamp(checkpoint)
    if before.get("stamp") == stamp and "weights" in before:
        return found | {"weights": before["weights"]}
    with progress_bar(
        is_first(), desc="digest of the base checkpoint", total=size, unit="B", unit_scale=True
    ) as bar:
        found["weights"] = weights_digest(checkpoint, bar.update)
    if note is not None and is_first():
        with suppress(OSError):  # a run that may only be read: its weights are read next time too
            part = note.with_name(f"{note.name}.{os.getpid()}.part")
            part.write_text(json.dumps({**found, "stamp": stamp}, indent=2) + "\n")
            part.replace(note)
    return found


def _read_note(note: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(note.read_text()) if note is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stamp(checkpoint: Path) -> tuple[str, int]:
    """A digest of names, sizes, times and inodes of the files that hold weights, and their bytes.

    The time of change (ctime) cannot be set, so that a copy with an old date is seen as well.
    """
    converted = (checkpoint / PARAMS).is_dir()
    files = (checkpoint / PARAMS).rglob("*") if converted else checkpoint.glob("*.safetensors")
    lines, size = [str(checkpoint.absolute())], 0
    for path in sorted(files):
        stat = path.stat()
        if path.is_file():
            seen = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            lines.append(f"{path.relative_to(checkpoint)} {seen}")
            size += stat.st_size
    return hashlib.sha256("\n".join(lines).encode()).hexdigest(), size


def _tokenizer_digest(directory: Path) -> str | None:
    """Digest of a tokenizer's vocabulary; None if the directory has none of the files."""
    digest, seen = hashlib.sha256(), False
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"):
        path = directory / name
        if not path.is_file():
            continue
        seen, content = True, path.read_bytes()
        if name == "tokenizer.json":  # its other parts are written differently from time to time
            values = read_json(path)
            kept = [values.get("model", {}).get("vocab"), values.get("added_tokens")]
            content = json.dumps(kept, sort_keys=True).encode()
        digest.update(f"{name} {len(content)}\n".encode() + content)
        if name == "tokenizer.json":
            break
    return digest.hexdigest() if seen else None


def compare_base(noted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is not as it was noted: weights, fields of config.json, the tokenizer.

    A digest or field that one of the two lacks is not compared: the note is of an older version.
    """
    old, new = noted.get("model", {}), found.get("model", {})
    changed = [
        f"{name} was {old[name]!r} and is {new[name]!r}"
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
    ]
    weights = [x.get("weights") for x in (noted, found)]
    if None not in weights and weights[0] != weights[1]:
        changed.insert(0, "its weights are others")
    where = f"model.checkpoint {found.get('directory')} is not what it was"
    problems = [f"{where} ({'; '.join(changed)})"] if changed else []
    tokenizers = [x.get("tokenizer") for x in (noted, found)]
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        problems.append(
            f"the tokenizer {found.get('tokenizer_directory')} has another vocabulary than it had"
        )
    return problems


def read_about(checkpoints: Path, step: int) -> dict[str, Any]:
    """What a saved step says of its run; empty if the file is missing.

    Raises: CheckpointError if the file cannot be read.
    """
    path = checkpoints / str(step) / "about" / "metadata"
    return read_json(path) if path.is_file() else {}


def _check_own_base(run_dir: Path, config: TrainConfig) -> dict[str, Any]:
    """The description of a run's base, compared with that of its last step.

    A run without a step begins: the first process describes the base.

    Raises: ConfigError if they differ, or if a directory has moved and nothing was noted.
    """
    folder = run_dir / "checkpoints"
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    about = read_about(folder, max(steps)) if steps else {}
    noted = about.get("base") or {}
    model = config.model
    checkpoint = Path(model.checkpoint) if model.checkpoint else None
    tokenizer = Path(model.tokenizer or model.checkpoint or "")
    if not is_first() and not noted:
        return {}
    before = _read_note(run_dir / "config.json").get("model", {}) if steps else {}
    for key, digest in (("checkpoint", "weights"), ("tokenizer", "tokenizer")):
        old, new = (before.get(key) or "").replace("{run_dir}", str(run_dir)), getattr(model, key)
        if config.run.moved and old and new and old != new and noted.get(digest) is None:
            raise ConfigError(
                f"{run_dir}: noted no digest of model.{key} {old}, so it cannot be told whether "
                f"{new} is the same; restore the old path (a link will do)"
            )
    found = describe_base(checkpoint, tokenizer, run_dir / BASE)
    if changed := compare_base(noted, found):
        raise ConfigError(
            f"{run_dir} holds a run that began with other files: {' and '.join(changed)}; restore "
            "what it began with, or use another --run-dir"
        )
    return found


def versions() -> dict[str, str | None]:
    """Versions of the packages that make the numbers, and the commit of a checkout.

    None for a package without metadata; a checkout that is not installed has its project's version.
    """
    root = Path(__file__).parents[1]
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = _project_version(root) if name == PACKAGES[0] else None
    if not (root / ".git").exists() or shutil.which("git") is None:
        return found | {"commit": None}
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    return found | {"commit": git.stdout.strip() or None}


def _project_version(root: Path) -> str | None:
    try:
        return tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    except (OSError, ValueError, KeyError):
        return None
