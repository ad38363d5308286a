"""Whole runs of `train.finetune` for tests: small data, in this process or in others."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from train.demo.data import demo_words
from train.demo.drawing import COLOURS, SHAPES, Thing, draw_tile, write_mp4, write_png
from train.demo.tokenizer import save_tokenizer
from train.finetune import main

STEPS = 40
"""Of `CONFIG` with the data of `make_folder`: 16 samples in batches of 4, two batches a step, 20
epochs.
"""

CONFIG = """
from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig

CONFIG = TrainConfig(
    model=ModelSection(preset="demo", tokenizer="FOLDER/tokenizer", dtype="float32", remat="none"),
    data=DataSection(
        train_json=("FOLDER/train.json",),
        eval_json=("FOLDER/heldout.json",),
        media_root="FOLDER/media",
        epochs=(20,),
        min_tiles=1,
        batch_size=4,
        workers=0,
        max_bad_share=0.2,
    ),
    optim=OptimSection(learning_rate=3e-3, accumulate=2),
    run=RunSection(run_dir="FOLDER/unused", log_every=4, save_every=4, max_new_tokens=3),
)
"""


class Run(NamedTuple):
    """A run that has ended: its status, what it printed, its directory."""

    status: int
    out: str
    err: str
    path: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "metrics.jsonl")

    @property
    def losses(self) -> dict[int, float]:
        """By step."""
        return {row["step"]: row["loss"] for row in self.metrics}

    @property
    def saved(self) -> list[int]:
        """Steps of its checkpoints."""
        steps = (path.name for path in (self.path / "checkpoints").iterdir())
        return sorted(int(step) for step in steps if step.isdigit())

    @property
    def error(self) -> str:
        """The one error; there may be progress bars before it."""
        assert self.status == 2, self.err
        assert "Traceback" not in self.err, self.err
        *before, last = self.err.strip().split("\n")
        assert last.startswith("error: "), self.err
        assert not any("error" in line for line in before), self.err
        return last


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# Data and configuration.


def make_folder(folder: Path) -> Path:
    """A tokenizer, a configuration, and data of one length: two questions about each of 8 pictures
    of one tile; held out are 8 pictures of two tiles.
    """
    (folder / "media").mkdir(parents=True)
    save_tokenizer(folder / "tokenizer", demo_words())
    rng = np.random.default_rng(0)
    records, heldout = [], []
    for i, (colour, shape) in enumerate(zip(COLOURS, 2 * list(SHAPES), strict=False)):
        tile = draw_tile(rng, Thing(colour, shape))
        write_png(folder / f"media/{i}.png", [tile], 1)
        write_png(folder / f"media/wide_{i}.png", [tile, draw_tile(rng, None)], 2)
        records += [ask(f"{i}.png", "colour", colour), ask(f"{i}.png", "shape", shape)]
        heldout.append(ask(f"wide_{i}.png", "colour", colour) | {"question_type": "colour"})
    write_records(folder / "train.json", records)
    write_records(folder / "heldout.json", heldout)
    (folder / "config.py").write_text(CONFIG.replace("FOLDER", str(folder)))
    return folder


def ask(image: str, what: str, answer: str) -> dict[str, Any]:
    """A record with one question."""
    question = {"from": "human", "value": f"<image>\nwhat is the {what}"}
    conversation = [question, {"from": "gpt", "value": answer}]
    return {"id": f"{what}_of_{image}", "image": image, "conversations": conversation}


def add_kinds(folder: Path) -> Path:
    """Adds mixed.json and asked.json to a folder: pictures of one and two tiles, text, videos of
    which some have more than a window.
    """
    rng = np.random.default_rng(1)
    mixed, asked = [], []
    for i, colour in enumerate(COLOURS):
        frames = [draw_tile(rng, Thing(colour, list(SHAPES)[j % 4])) for j in range(3 + i % 3)]
        write_mp4(folder / f"media/{i}.mp4", frames)
        video = ask(f"{i}.mp4", "colour", colour)
        video["video"] = video.pop("image")
        text = {"conversations": turns(f"which came first {colour} or red", colour)}
        one, wide = ask(f"{i}.png", "colour", colour), ask(f"wide_{i}.png", "colour", colour)
        mixed += [one, wide, video, text]
        if i < 3:
            asked += [one, video, text]
    write_records(folder / "mixed.json", mixed)
    write_records(folder / "asked.json", asked)
    return folder


def turns(*values: str) -> list[dict[str, str]]:
    """A conversation, from human and gpt by turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def write_records(path: Path, records: Sequence[Any]) -> None:
    """A data file."""
    path.write_text(json.dumps(records))


# Runs.


def arguments(folder: Path, path: Path, *options: str) -> list[str]:
    """The command line of a run."""
    return ["--config", f"{folder}/config.py", "--run-dir", str(path), *options]


def run(folder: Path, path: Path, *options: str) -> Run:
    """Train in this process: programs are compiled once for all tests."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = main(arguments(folder, path, *options))
    return Run(status, out.getvalue(), err.getvalue(), path)


class Processes:
    """Processes of one run, each with some devices; nothing of them outlives the `with` block.

    commands: what each runs after `python`, such as `["-m", "train.finetune", *options]`. inside:
    the folder that each works in.
    """

    def __init__(
        self,
        logs: Path,
        commands: Sequence[Sequence[str]],
        devices: int = 1,
        inside: Sequence[Path] = (),
    ):
        logs.mkdir(parents=True, exist_ok=True)
        root = str(Path(__file__).parents[2])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs, self.started = logs, []
        for index, command in enumerate(commands):
            flags = f"--xla_force_host_platform_device_count={devices}"
            environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": root}
            if len(commands) > 1:
                environment["JAX_COORDINATOR_ADDRESS"] = address
                environment["JAX_NUM_PROCESSES"] = str(len(commands))
                environment["JAX_PROCESS_ID"] = str(index)
            with (logs / f"{index}.out").open("w") as out, (logs / f"{index}.err").open("w") as err:
                self.started.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        stdout=out,
                        stderr=err,
                        env=environment,
                        cwd=inside[index] if inside else root,
                    )
                )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.kill()
            process.wait()

    def end(self, seconds: float = 300, only: int | None = None) -> list[Run]:
        """Wait for all of them, or for one and kill the others. One that hangs fails the test. The
        path is that of the logs.
        """
        deadline = time.monotonic() + seconds
        if only is not None:
            self._wait(only, deadline)
            self.__exit__()
        ended = []
        for index, process in enumerate(self.started):
            self._wait(index, deadline)
            out, err = (self._text(index, name) for name in ("out", "err"))
            ended.append(Run(process.returncode, out, err, self.logs))
        return ended

    def _wait(self, index: int, deadline: float) -> None:
        try:
            self.started[index].wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pytest.fail(f"process {index} hangs; {self._text(index, 'err')[-2000:]}")

    def _text(self, index: int, name: str) -> str:
        return (self.logs / f"{index}.{name}").read_text()


def run_on_four_devices(code: str) -> str:
    """What a program prints in a process with four CPU devices; it has to end well."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **flags},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def cut_in_half(path: Path) -> bytes:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole
