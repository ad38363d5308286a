"""What a run shows and writes: progress bar, metrics.jsonl, TensorBoard, loss.png, summary.json."""

import json
import os
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from train.records import BadSample


class RunLog:
    """Metrics of the steps of one run, on the terminal and in its directory."""

    def __init__(self, run_dir: Path, start: int, steps: int, log_every: int):
        """start: steps that are done already; metrics written after it are dropped."""
        self.path, self.log_every, self.steps = run_dir / "metrics.jsonl", log_every, steps
        self.history = [row for row in read_metrics(self.path) if row["step"] <= start]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.history))
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start)
        self.progress = tqdm(total=steps, initial=start, desc="training", unit="step")
        self.counts = dict.fromkeys(("samples", "tokens", "frames"), 0)
        self.since = time.perf_counter()

    def count(self, **counts: int) -> None:
        """Add what a batch had: samples, tokens, frames."""
        for name, count in counts.items():
            self.counts[name] += count

    def due(self, step: int) -> bool:
        """Whether metrics of this step are to be read from the device and logged."""
        return step % self.log_every == 0 or step in (1, self.steps)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one row, with rates since the row before."""
        now = time.perf_counter()
        rates = {f"{k}_per_second": n / (now - self.since) for k, n in self.counts.items()}
        row = {"step": step, **metrics, **rates}
        self.counts, self.since = dict.fromkeys(self.counts, 0), now
        self.history.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            self.board.add_scalar(name, value, step)
        self.progress.set_postfix(
            loss=f"{metrics['loss']:.3f}",
            lr=f"{metrics['learning_rate']:.1e}",
            **{f"{k}/s": f"{rates[f'{k}_per_second']:.0f}" for k in self.counts},
        )

    def close(self) -> None:
        """Flush everything and end the progress bar."""
        self.progress.close()
        self.board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that was cut off is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_text(path: Path, text: str) -> None:
    """Replace a file whole: a reader, or a run that is killed, never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def draw_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Picture of loss and learning rate over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row["step"] for row in history]
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axis.plot(steps, [row["loss"] for row in history], color="tab:blue", label="loss")
    axis.set(xlabel="step", ylabel="loss (nats per labelled token)", yscale="log")
    rate = axis.twinx()
    rate.plot(steps, [row["learning_rate"] for row in history], color="tab:grey", alpha=0.5)
    rate.set_ylabel("learning rate")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


class BadSamples:
    """Samples that were left out, by name, kept in bad_samples.jsonl."""

    def __init__(self, run_dir: Path, samples: int, max_share: float):
        """samples: records in all data files together."""
        self.path, self.samples, self.max_share = run_dir / "bad_samples.jsonl", samples, max_share
        self.reasons = {row["name"]: row["reason"] for row in read_metrics(self.path)}

    def add(self, bad: list[BadSample]) -> None:
        """Name and count new ones.

        Raises: TooManyBadSamples if they are more than the allowed share.
        """
        for sample in bad:
            if sample.name not in self.reasons:
                self.reasons[sample.name] = sample.reason
                with self.path.open("a") as file:
                    file.write(json.dumps({"name": sample.name, "reason": sample.reason}) + "\n")
                tqdm.write(f"bad sample left out: {sample.name}: {sample.reason}")
        if len(self.reasons) > self.max_share * self.samples:
            raise TooManyBadSamples(
                f"{len(self.reasons)} of {self.samples} samples are bad, more than "
                f"data.max_bad_share {self.max_share:g} allows; {self.path} lists them with reasons"
            )


class TooManyBadSamples(ValueError):
    """More bad samples than the configuration allows."""
