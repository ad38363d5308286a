"""Checkpoints of a run: written in the background, whole or not at all, restored onto any mesh."""

import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from train.config import TrainConfig
from train.config.resume import config_to_dict
from train.errors import DataError, TrainingError
from train.run.base import check_own_base, versions
from train.run.distributed import is_first
from vxl_jax.checkpoints.orbax_tree import CHUNK_BYTES

BIN = "deleted"
"""Where checkpoints that are not kept lie until the next one is written. They get there whole: a
run that is killed while one is deleted leaves no half of it among the others."""


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
        base = check_own_base(run_dir, config)
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
            room = "make room on the disk; " if what == "written" else ""
            raise TrainingError(
                f"{self.run_dir}/checkpoints cannot be {what} ({reason}){intact}; {room}the same "
                "command resumes from the last whole one"
            ) from error
