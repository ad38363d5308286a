"""What a run shows and writes: progress bar, metrics.jsonl, TensorBoard, loss.png, summary.json."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from tensorboardX import SummaryWriter
from tqdm import tqdm

from train.data.loader import Batch
from train.rows import read_rows, write_rows
from train.run.distributed import gather, is_first
from train.run.evaluate import ALL
from vxl_jax.planning.cards import card_of
from vxl_jax.progress import progress_bar


class StepMeans:
    """Means of the metrics of several steps.

    Gradient norms count once a step; all other metrics (the loss, the accuracy, the sums of an own
    loss function) are weighted by labelled tokens. A step without labelled tokens has made no
    update. It is in no mean; only its learning rate is noted.
    """

    def __init__(self) -> None:
        self.sums = dict.fromkeys(("loss", "accuracy", "gradient_norm", "tokens", "steps"), 0.0)
        self.learning_rate: float | None = None

    def add(self, metrics: dict[str, float]) -> None:
        """Add one step: the metrics that `train.run.step.update` returns."""
        self.learning_rate, tokens = metrics["learning_rate"], metrics["tokens"]
        for name, value in metrics.items():
            if name not in ("tokens", "learning_rate"):
                weight = 1 if name.startswith(GRADIENT_NORM) else tokens
                self.sums[name] = self.sums.get(name, 0.0) + (value * weight if tokens else 0.0)
        self.sums["tokens"] += tokens
        self.sums["steps"] += tokens > 0

    def means(self) -> dict[str, float | None]:
        """Loss, accuracy and gradient norms, None without a labelled token; and the learning rate
        of the last step.
        """
        found: dict[str, float | None] = {}
        for name, value in self.sums.items():
            if name not in ("tokens", "steps"):
                count = self.sums["steps" if name.startswith(GRADIENT_NORM) else "tokens"]
                found[name] = value / count if count else None
        return found | {"learning_rate": self.learning_rate}


GRADIENT_NORM = "gradient_norm"


class RunLog:
    """Metrics of the steps of one run, on the terminal and in its directory.

    A row of metrics is the mean of the steps since the row before. Only the row of a run's last
    step, where no row would be due otherwise, begins no new mean: a run that is continued past it
    (with a larger `run.max_steps`) writes the rows of one that went through.

    unlogged.jsonl has, for every checkpoint, the sums that no row has yet; steps_without_labels:
    how many of all steps had no labelled token.
    """

    def __init__(
        self,
        run_dir: Path,
        start: int,
        steps: int,
        log_every: int,
        began: float,
        counted_share: float,
        flops_of: Callable[[Batch], int],
    ):
        """start: steps that are done already; metrics written after it are dropped.

        began: `time.perf_counter` when this piece of the run began. counted_share: part of what
        this process loads that it counts, where others load the same. flops_of: floating-point
        operations that a batch needs.
        """
        self.counted_share, self.flops_of = counted_share, flops_of
        card = card_of(jax.devices()[0].device_kind)
        self.peak = card.flops if card else None
        self.path, self.log_every, self.steps = run_dir / "metrics.jsonl", log_every, steps
        self.history = [row for row in read_rows(self.path) if row["step"] <= start]
        write_rows(self.path, self.history)
        self.began = began - (self.history[-1]["seconds"] if self.history else 0.0)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
        self.progress = progress_bar(
            total=steps, initial=start, desc="training", unit="step", show=is_first()
        )
        self.evaluations = run_dir / "evaluations.jsonl"
        write_rows(self.evaluations, [r for r in read_rows(self.evaluations) if r["step"] <= start])
        self.unlogged, self.steps_without_labels = run_dir / "unlogged.jsonl", 0
        self.steps_since = StepMeans()
        self._read_unlogged(start)
        self._start_counting()

    @property
    def seconds(self) -> float:
        """Wall time of all pieces of the run, without steps that an interruption has undone."""
        return round(time.perf_counter() - self.began, 1)

    @property
    def final_loss(self) -> float | None:
        """The loss of the last row that has one."""
        return next((row["loss"] for row in self.history[::-1] if row["loss"] is not None), None)

    def _read_unlogged(self, start: int) -> None:
        rows = [row for row in read_rows(self.unlogged) if row["step"] <= start]
        write_rows(self.unlogged, rows)
        if not rows:  # of a run that begins, or was saved before there was such a file
            return
        self.steps_without_labels = rows[-1]["steps_without_labels"]
        if rows[-1]["step"] == start:
            self.steps_since.sums.update(rows[-1]["sums"])
            self.steps_since.learning_rate = rows[-1]["learning_rate"]

    def keep_unlogged(self, step: int) -> None:
        """Write down what no row has yet, before the checkpoint of a step: a run that goes on from
        there writes the same rows.
        """
        row = {
            "step": step,
            "steps_without_labels": self.steps_without_labels,
            "learning_rate": self.steps_since.learning_rate,
            "sums": self.steps_since.sums,
        }
        with self.unlogged.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _start_counting(self) -> None:
        self.counts = dict.fromkeys(("samples", "tokens", "frames", "places", "flops"), 0)
        self.waited = 0.0
        self.since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time in it as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves the time in it out of the rates of training."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def count(self, batch: Batch) -> None:
        """Add what a batch has."""
        self.counts["samples"] += sum(sample is not None for sample in batch.samples)
        self.counts["tokens"] += batch.tokens
        self.counts["frames"] += batch.frames
        self.counts["places"] += batch.token_places
        self.counts["flops"] += self.flops_of(batch)

    def add(self, metrics: dict[str, float]) -> None:
        """Add the metrics of a step to those of the next row."""
        self.steps_since.add(metrics)
        self.steps_without_labels += not metrics["tokens"]

    def due(self, step: int) -> bool:
        """Whether a row is to be written after this step."""
        return self._regular(step) or step == self.steps

    def _regular(self, step: int) -> bool:
        return step % self.log_every == 0 or step == 1

    def log(self, step: int) -> None:
        """Write one row, with rates of all processes since the row before."""
        metrics = self.steps_since.means()
        if self._regular(step):
            self.steps_since = StepMeans()
        seconds = time.perf_counter() - self.since
        counts = [self.counted_share * count for count in self.counts.values()]
        sums = gather(*counts, self.waited).sum(0)
        total = dict(zip((*self.counts, "waited"), map(float, sums), strict=True))
        places, flops = total.pop("places"), total.pop("flops") / seconds / jax.device_count()
        waited = total.pop("waited") / jax.process_count()
        rates = {f"{name}_per_second": count / seconds for name, count in total.items()}
        row = {
            "step": step,
            **metrics,
            **rates,
            "tflops_per_device": flops / 1e12,
            **({"peak_share": flops / self.peak} if self.peak else {}),
            "data_wait": waited / seconds,
            "padding": 1 - total["tokens"] / places if places else 0.0,
            "seconds": self.seconds,
        }
        self._start_counting()
        self.history.append(row)
        self._write(self.path, row)
        self.progress.set_postfix(
            refresh=False,
            loss="no labels" if metrics["loss"] is None else f"{metrics['loss']:.3f}",
            lr=f"{metrics['learning_rate'] or 0.0:.1e}",
            **{f"{name}/s": f"{rates[f'{name}_per_second']:.0f}" for name in total},
        )

    def evaluated(self, step: int, found: dict[str, dict[str, float]]) -> float | None:
        """Write what held-out questions have shown.

        Returns the share of right answers, None where no question could be read.
        """
        self._write(self.evaluations, {"step": step, **found}, prefix="heldout/")
        if is_first():
            kinds = ", ".join(f"{name} {share:.0%}" for name, share in found["modality"].items())
            tqdm.write(f"step {step:,}: held-out questions: {kinds or 'none could be read'}")
        return found["accuracy"].get(ALL)

    def _write(self, path: Path, row: dict[str, Any], prefix: str = "") -> None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in flatten_dict(row, sep="/").items():
            if value is not None:
                self.board.add_scalar(prefix + name, value, row["step"])

    def close(self) -> None:
        """Flush everything and end the progress bar."""
        self.progress.close()
        self.board.close()


PROFILED = 3
"""Steps in a trace; it begins after as many, when most is compiled."""


class Trace:
    """A trace of the steps `first` to `first + PROFILED - 1`, counted from 0, written to a folder;
    none without a folder.
    """

    def __init__(self, folder: Path | None, first: int):
        self.folder, self.first, self.running = folder, first, False

    def before(self, step: int) -> None:
        """Begin or end the trace, if it is time."""
        if self.folder is not None and step == self.first:
            jax.profiler.start_trace(self.folder)
            self.running = True
        if step == self.first + PROFILED:
            self.close()

    def close(self) -> None:
        """End the trace and say where it is."""
        if self.running:
            jax.profiler.stop_trace()
            tqdm.write(f"wrote a trace to {self.folder}: tensorboard --logdir {self.folder}")
        self.running = False


def draw_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Picture of loss and learning rate over the steps; a row without a loss leaves a gap."""
    from matplotlib.figure import Figure  # leaves the backend of a notebook as it is

    steps = [row["step"] for row in history]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    losses = [math.nan if row["loss"] is None else row["loss"] for row in history]
    axis.plot(steps, losses, color="tab:blue", label="loss")
    axis.set(xlabel="step", ylabel="loss (nats per labelled token)", yscale="log")
    rate = axis.twinx()
    rate.plot(steps, [row["learning_rate"] for row in history], color="tab:grey", alpha=0.5)
    rate.set_ylabel("learning rate")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_accuracy(results: dict[str, dict[str, float]], path: Path) -> None:
    """Draw the accuracy on held-out questions by their type, with the guessing baselines.

    results: `heldout_accuracy`, `blank_accuracy` and `chance`, each by question type.
    """
    from matplotlib.figure import Figure  # leaves the backend of a notebook as it is

    names = list(results["heldout_accuracy"])
    bars = {
        "heldout_accuracy": ("accuracy", "tab:blue"),
        "blank_accuracy": ("blank media", "tab:orange"),
        "chance": ("chance", "tab:grey"),
    }
    figure = Figure(figsize=(8, 0.9 + 0.45 * len(names)), layout="constrained")
    axis = figure.subplots()
    for i, (key, (label, color)) in enumerate(bars.items()):
        places = [place + 0.26 * (i - 1) for place in range(len(names))]
        shares = [100 * results[key].get(name, 0.0) for name in names]
        axis.barh(places, shares, height=0.24, color=color, label=label)
    axis.set(xlabel="right answers (%)", xlim=(0, 100))
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)
