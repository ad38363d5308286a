"""A run with low-rank updates, from end to end."""

import contextlib
import io
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import vxl_jax
from convert import convert_to_hf
from tests.support.checkpoints import a_run, tensors_in
from tests.support.lora import new_model, outputs
from train.config import ModelSection
from train.config.cli import load_config
from train.demo.data import demo_words
from train.demo.drawing import COLOURS, SHAPES, Thing, draw_tile, write_png
from train.demo.tokenizer import save_tokenizer
from train.finetune import main
from train.run.setup import make_model, read_model_config
from train.run.step import split_parts
from vxl_jax.presets import demo

pytestmark = pytest.mark.usefixtures("exact_products")


CONFIG = """
from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig
from vxl_jax.config import LoRAConfig

CONFIG = TrainConfig(
    model=ModelSection(checkpoint="FOLDER/base", dtype="float32", remat="none"),
    data=DataSection(("FOLDER/train.json",), "FOLDER", epochs=(4,), min_tiles=1, workers=0,
                     batch_size=4),
    optim=OptimSection(1e-2, train=("lora", "projector")),
    lora=LoRAConfig(8, targets=("q", "o", "down", "beacon_k")),
    run=RunSection(run_dir="FOLDER/unused", log_every=1, save_every=100),
)
"""


STEPS = 8


def run(folder: Path, name: str, *options: str) -> tuple[Path, str]:
    """Train in this process: the run's directory, and what was printed."""
    argv = ["--config", f"{folder}/config.py", "--run-dir", f"{folder}/{name}", *options]
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = main(argv)
    assert status == 0, err.getvalue()
    return folder / name, out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions about pictures, a checkpoint in the published layout, a configuration."""
    folder = tmp_path_factory.mktemp("lora")
    save_tokenizer(folder / "tokenizer", demo_words())
    records = []
    for i, (colour, shape) in enumerate(zip(COLOURS, 2 * list(SHAPES), strict=False)):
        tile = draw_tile(np.random.default_rng(i), Thing(colour, shape))
        write_png(folder / f"{i}.png", [tile], 1)
        question = {"from": "human", "value": "<image>\nwhat is the colour"}
        turns = [question, {"from": "gpt", "value": colour}]
        records.append({"image": f"{i}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))
    _, params = new_model(demo())
    half = jax.tree.map(lambda x: x / 2, nnx.to_pure_dict(params))  # a_run doubles it
    section = ModelSection(preset="demo", tokenizer=f"{folder}/tokenizer")
    convert_to_hf(a_run(folder / "began", section, half), folder / "base")
    (folder / "config.py").write_text(CONFIG.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Path, str]:
    return run(folder, "whole")


def test_a_run_learns_and_its_export_is_the_same_model(whole: tuple[Path, str], folder: Path):
    path, out = whole
    lines = (path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == STEPS
    assert losses[-1] < 0.9 * losses[0]
    assert "trains lora, projector;" in out

    config = load_config(["--config", f"{folder}/config.py"]).config
    model = make_model(config, read_model_config(config))
    graph, _, frozen = split_parts(model, config.optim.train)
    manager = ocp.CheckpointManager(path / "checkpoints")
    restore = ocp.args.Composite(state=ocp.args.StandardRestore())
    own = nnx.merge(graph, manager.restore(STEPS, args=restore).state["params"], frozen)
    manager.close()

    convert_to_hf(path, folder / "out")
    before, ours = tensors_in(folder / "base"), tensors_in(folder / "out")
    assert ours.keys() == before.keys()
    changed = {name for name in ours if not np.array_equal(ours[name], before[name])}
    assert len(changed) == 4 * 4 + 4  # four targets in four layers, and the projector
    models = (vxl_jax.load_network(folder / "out"), own, vxl_jax.load_network(folder / "base"))
    for a, b, start in zip(*map(outputs, models), strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)
        assert np.linalg.norm(a - start) > 1e-2 * np.linalg.norm(b)


def test_a_run_in_two_pieces_equals_a_whole_one(whole: tuple[Path, str], folder: Path):
    def sha(path: Path) -> str:
        return json.loads((path / "summary.json").read_text())["params_sha256"]

    first, _ = run(folder, "pieces", "--run.max-steps", "3")
    assert sha(first) != sha(whole[0])
    second, out = run(folder, "pieces")
    assert "resumed at step 3" in out
    assert sha(second) == sha(whole[0])
