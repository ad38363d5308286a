"""What SIGKILL costs a training run: killed at random moments, and started again each time.

    python -m benchmarks.kill_resume                 # 50 kills, about half an hour on two cores
    python -m benchmarks.kill_resume --kills 5 --seed 1 --out /tmp/kill_resume.json

A small run (images, videos and text, data workers, steps of two batches, checkpoints of which the
best is kept, held-out questions) is made twice without interruption; the second tells how long its
parts take. Then it is made again and again in new directories, and its process killed, alone, as
the kernel does when memory runs out, until there were enough kills. A seed draws their moments:
some time after the process starts, or begins to make the data, after its first step, after a
checkpoint or an evaluation is begun, after the last step. After each kill

- all checkpoints are read;
- metrics.jsonl has a row for each step, in order, but for a last one that was being written;
- no more steps are lost than two checkpoints are apart: those since the last one, and those that
  were made while the next was being written;
- the data workers end by themselves, and nobody has printed an error.

Every run that gets to its end has to have the parameters, the metrics, the answers and the files of
the uninterrupted one. Anything else ends the benchmark with a message and status 1, and leaves the
directory to look at. Needs Linux (/proc).
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.core import RESULTS, machine, write_results
from benchmarks.kill_outcome import Failure, compare_outcomes, outcome, read_checkpoint, saved_steps
from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig
from train.demo.data import Amounts, make_demo_data
from train.rows import read_rows
from train.run.base import versions
from vxl_jax.progress import progress_bar

# This file is the configuration of the runs, too.

FILES = ("tile", "wide", "grid", "needle", "pair")
TRAIN = Amounts(dict.fromkeys(FILES, 8), dict.fromkeys((*FILES, "set", "text"), 16))
EVAL_EVERY = 20
HELDOUT = Amounts(dict.fromkeys(FILES, 8), dict.fromkeys((*FILES[1:], "set", "text"), 2))

CONFIG = TrainConfig(
    model=ModelSection(
        preset="demo", tokenizer="{run_dir}/data/tokenizer", dtype="float32", remat="none"
    ),
    data=DataSection(
        train_json=("{run_dir}/data/train.json",),
        epochs=(8,),
        eval_json=("{run_dir}/data/heldout.json",),
        media_root="{run_dir}/data/media",
        min_tiles=1,
        max_frames=8,
        max_length=512,
        batch_size=8,
        shapes=4,
        workers=2,
    ),
    optim=OptimSection(learning_rate=2e-3, accumulate=2),
    run=RunSection(
        run_dir="runs/kill_resume",
        log_every=1,
        save_every=4,
        keep_best=1,
        eval_every=EVAL_EVERY,
        max_new_tokens=2,
    ),
)


def prepare(config: TrainConfig) -> None:
    """Make the data set on first use."""
    make_demo_data(Path(config.run.run_dir) / "data", config.run.seed, TRAIN, HELDOUT)


ROOT = Path(__file__).parents[1]
MARK = "VXL_KILL_RESUME"
"""Environment variable by which the processes of a run are known."""
POLL_SECONDS = 0.003
HANG_SECONDS = 900.0
"""A process that takes longer than this hangs."""
WORKER_SECONDS = 10.0
"""Time for data workers to end once their training process is gone."""

PHASES = (
    "making the data",
    "measuring the data",
    "starting, restoring",
    "before the first step",
    "steps",
    "writing a checkpoint",
    "evaluation",
    "after the last step",
)


class Moment(NamedTuple):
    """When to kill: seconds after an event."""

    event: str
    seconds: float


class Life(NamedTuple):
    """Seconds of a process from its start: to its first step, to its last, to its end."""

    first_step: float
    last_step: float
    end: float


@dataclass(frozen=True)
class Kill:
    """One kill and what was found after it.

    seconds: from the process's start. resumed_at, step: steps that had been done when the process
    started, and when it was killed. lost: those that have to be done again. workers: data workers
    that were alive. workers_seconds: until they had ended.
    """

    run: int
    moment: Moment
    phase: str
    seconds: float
    resumed_at: int
    step: int
    lost: int
    workers: int
    workers_seconds: float


class Process:
    """One process of a run, from its start to its end or to its kill."""

    def __init__(self, run_dir: Path, number: int):
        """number: of the process among those of the run."""
        self.run_dir = run_dir
        self.log = run_dir.with_name(f"{run_dir.name}-{number}.log")
        self.resumed_at = saved_steps(run_dir)[-1]
        self.began, clock = time.perf_counter(), time.time()
        self.launched = clock - 0.01  # times of files are a little behind
        command = [sys.executable, "-m", "train.finetune", "--config", __file__]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--run-dir", str(run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={
                    **os.environ,
                    "JAX_PLATFORMS": "cpu",
                    "JAX_COMPILATION_CACHE_DIR": str(run_dir.with_name("compiled")),
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                    "PYTHONUNBUFFERED": "1",
                    MARK: str(run_dir),
                },
            )

    ended: float
    workers: int

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.perf_counter() - self.began

    def rows(self) -> list[dict[str, Any]] | None:
        """The run's metrics, None as long as this process has not opened them."""
        path = self.run_dir / "metrics.jsonl"
        return read_rows(path) if self._is_new(path) else None

    def last_row(self) -> int:
        """The last step of the metrics, 0 as long as this process has not opened them."""
        rows = self.rows()
        return rows[-1]["step"] if rows else 0

    def _is_new(self, path: Path) -> bool:
        with suppress(OSError):
            return path.stat().st_ctime > self.launched
        return False

    def writes(self) -> bool:
        """Whether it has begun a checkpoint that is not whole."""
        # An older process's may be here as well: it is cleared away before the first step.
        return self.last_row() > self.resumed_at and any(
            map(self._is_new, self.run_dir.glob("checkpoints/*.orbax-checkpoint-tmp*"))
        )

    def has_come(self, event: str, last_step: int) -> bool:
        """Whether an event of `draw_moment` is there."""
        if event == "start":
            return True
        if event == "data":
            return any(self.run_dir.glob("data*"))
        if event == "checkpoint":
            return self.writes()
        step = self.last_row()
        if event == "evaluation":
            return step > self.resumed_at and step % EVAL_EVERY == 0
        return step > self.resumed_at if event == "first step" else step == last_step

    def run(self, moment: Moment | None, last_step: int) -> bool:
        """Let it run until the moment, and kill it then; returns whether it was killed.

        Raises: Failure if it ends with an error, or hangs.
        """
        due = None
        try:
            while self.process.poll() is None and (due is None or self.seconds < due):
                if due is None and moment and self.has_come(moment.event, last_step):
                    due = self.seconds + moment.seconds
                if self.seconds > HANG_SECONDS:
                    raise Failure(f"a process did not end in {HANG_SECONDS:g} s; see {self.log}")
                time.sleep(POLL_SECONDS)
            self.ended = self.seconds
            self.workers = len(processes_of(self.run_dir)) - 1
        finally:
            self.process.kill()
            status = self.process.wait()
        if status not in (0, -signal.SIGKILL):
            raise Failure(f"a process ended with status {status}; see {self.log}")
        return status != 0

    def wait_for_workers(self) -> float:
        """Seconds until all processes of the run have ended, by themselves.

        Raises: Failure if they do not, or if one has printed an error.
        """
        began = time.perf_counter()
        while left := processes_of(self.run_dir):
            if time.perf_counter() - began > WORKER_SECONDS:
                raise Failure(f"processes are left after {WORKER_SECONDS:g} s: {left}")
            time.sleep(0.05)
        for line in re.split(r"[\r\n]", self.log.read_text()):
            if re.search(r"traceback|error|warning", line, re.IGNORECASE):
                raise Failure(f"{self.log} has {line.strip()!r}")
        return time.perf_counter() - began


def processes_of(run_dir: Path) -> list[int]:
    """All processes that were started for a run, whoever their parent is now."""
    mark, found = f"\0{MARK}={run_dir}\0".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is another user's
            if mark in b"\0" + path.read_bytes():
                found.append(int(path.parent.name))
    return found


# The kills.


def live(run_dir: Path) -> Life:
    """Make a run without interruption."""
    process = Process(run_dir, 0)
    process.run(None, 0)
    process.wait_for_workers()
    first, *_, last = read_rows(run_dir / "metrics.jsonl")
    last_step = (run_dir / "metrics.jsonl").stat().st_mtime - process.launched
    return Life(last_step - (last["seconds"] - first["seconds"]), last_step, process.ended)


def draw_moment(rng: np.random.Generator, life: Life, new: bool) -> Moment:
    """When to kill next. new: the data is not there yet."""
    longest = {
        "start": life.first_step,
        "data": 2.0,
        "first step": (life.last_step - life.first_step) / 4,  # so that some runs get on
        "checkpoint": 0.3,
        "evaluation": 0.5,
        "last step": life.end - life.last_step,
    }
    often = np.array([6, 30 * new, 6, 6, 3, 4])
    event = str(rng.choice(list(longest), p=often / often.sum()))
    return Moment(event, float(rng.uniform(0, longest[event])))


def look(process: Process, run: int, moment: Moment, last_step: int) -> Kill:
    """Look at what a killed process has left.

    Raises: Failure if that is not as it must be.
    """
    workers_seconds = process.wait_for_workers()
    run_dir, rows = process.run_dir, process.rows()
    _, *saved = saved_steps(run_dir)
    newest, steps = max(saved, default=0), [row["step"] for row in rows or ()]
    if steps != list(range(1, len(steps) + 1)):
        raise Failure(f"{run_dir}/metrics.jsonl has the steps {steps}")
    for step in saved:
        read_checkpoint(run_dir / "checkpoints" / str(step))
    done = max([process.resumed_at, *steps])
    if not process.resumed_at <= newest <= done <= newest + 2 * CONFIG.run.save_every:
        raise Failure(
            f"{run_dir} went on from step {process.resumed_at} and did step {done}; its newest "
            f"checkpoint is {newest}"
        )
    return Kill(
        run,
        moment,
        phase_of(process, last_step),
        process.ended,
        process.resumed_at,
        done,
        done - newest,
        process.workers,
        workers_seconds,
    )


def phase_of(process: Process, last_step: int) -> str:
    """What a killed process was doing, from the files it left."""
    run_dir, step = process.run_dir, process.last_row()
    if not (run_dir / "data").exists():
        return "making the data"
    if not (run_dir / "samples/0.npz").exists():
        return "measuring the data"
    if process.rows() is None:
        return "starting, restoring"
    if process.writes():
        return "writing a checkpoint"
    if step == last_step:
        return "after the last step"
    if step <= process.resumed_at:
        return "before the first step"
    evaluated = [row["step"] for row in read_rows(run_dir / "evaluations.jsonl")]
    return "evaluation" if step % EVAL_EVERY == 0 and step not in evaluated else "steps"


def torture(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Make runs in a folder, kill them `count` times, and let all come to their end.

    Returns the figures. Raises: Failure.
    """
    rng = np.random.default_rng(seed)
    print("two runs without interruption; the first compiles", flush=True)
    live(folder / "first")
    life = live(folder / "whole")
    compare_outcomes(folder / "first", folder / "whole")
    expected = outcome(folder / "whole")
    last_step = expected.summary["steps"]
    kills: list[Kill] = []
    run, processes, left_over = 1, 0, 0
    with progress_bar(total=count, desc="kills", unit="kill") as bar:
        while len(kills) < count or processes:
            run_dir = folder / f"run-{run}"
            process = Process(run_dir, processes)
            processes += 1
            new = not (run_dir / "samples/0.npz").exists()
            moment = draw_moment(rng, life, new) if len(kills) < count else None
            if process.run(moment, last_step) and moment:
                kills.append(look(process, run, moment, last_step))
                bar.update()
            else:
                process.wait_for_workers()
                left_over += compare_outcomes(run_dir, folder / "whole")
                run, processes = run + 1, 0
    phases = Counter(kill.phase for kill in kills)
    return {
        "seed": seed,
        "steps": last_step,
        "save_every": CONFIG.run.save_every,
        "life_seconds": life._asdict(),
        "kills": len(kills),
        "kills_by_phase": {name: phases[name] for name in PHASES},
        "most_steps_lost": {
            name: max(kill.lost for kill in kills if kill.phase == name)
            for name in PHASES
            if phases[name]
        },
        "kills_with_workers": sum(kill.workers > 0 for kill in kills),
        "workers_ended_within_seconds": max((k.workers_seconds for k in kills), default=0.0),
        "runs_finished": run - 1,
        "params_sha256": expected.sha256,
        "different_hashes": 0,
        "checkpoints_left_over": left_over,
        "each": [asdict(kill) for kill in kills],
    }


def main() -> int:
    """Run, print a table, write the results; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=RESULTS / "kill_resume.json")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    folder = Path(tempfile.mkdtemp(prefix="kill_resume-"))
    try:
        figures = torture(folder, options.kills, options.seed)
    except Failure as failure:
        print(f"error: {failure}\nall files are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(f"\n{'killed':24}{'kills':>7}{'most steps lost':>18}")
    for name, number in figures["kills_by_phase"].items():
        print(f"{name:24}{number:7}{figures['most_steps_lost'].get(name, '-'):>18}")
    print(
        f"\n{figures['runs_finished']} runs came to their end, all with the parameters "
        f"{figures['params_sha256'][:16]}...; data workers ended within "
        f"{figures['workers_ended_within_seconds']:.1f} s"
    )
    about = machine()
    about["versions"] |= versions()
    write_results(str(options.out.absolute().with_suffix("")), figures, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
