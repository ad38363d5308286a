"""`--plan`: bytes and operations of a step that nobody has to run."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from train.config import TrainConfig
from train.config.cli import load_config
from train.finetune import main
from train.run.fit import (
    SAMPLE_LABELS,
    SAMPLE_TEXT,
    StepEstimate,
    StepEstimator,
    device_bytes,
    longest,
    planned_model,
)
from train.run.optimizer import Optimizer
from train.run.setup import make_model
from train.run.step import split_parts
from vxl_jax.nn.attention.tiled import tile_bytes
from vxl_jax.nn.backend import made_for
from vxl_jax.nn.sharding import make_mesh
from vxl_jax.planning.flops import PassSize, step_flops
from vxl_jax.text.template import IGNORE


def demo(*options: str) -> TrainConfig:
    """The demo's configuration, with its data of 8 frames at most."""
    return load_config(["--config", "demo", "--data.batch-size", "2", *options]).config


@pytest.fixture(scope="module")
def planner() -> StepEstimator:
    config = demo("--optim.train", "projector", "language", "lora", "--lora.rank", "4")
    return StepEstimator(config, planned_model(config)[0], make_mesh(1, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def steps(planner: StepEstimator) -> dict[int, StepEstimate]:
    return {frames: planner.step(frames) for frames in (0, 8, 4096, 8192, 16384, 32768)}


def test_bytes_at_rest_are_those_of_the_arrays_of_a_run(planner: StepEstimator, steps):
    model = make_model(planner.config, planner.model)
    optim = planner.config.optim
    _, trained, frozen = split_parts(model, optim.train, optim.param_dtype)
    state = Optimizer(optim, 10, 0).init(trained)

    def size(tree) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    plan = steps[8]
    assert (plan.trained, plan.frozen) == (size(trained), size(frozen))
    assert plan.gradients == plan.trained  # one batch a step
    assert plan.optimizer == size(state)
    side = planner.model.vision.image_size
    assert plan.batch > 2 * 8 * side**2 * 3  # two samples, and their streams
    rest = plan.trained + plan.frozen + plan.gradients + plan.optimizer
    assert plan.peak == rest + max(plan.batch + plan.activations, plan.update)


def test_sums_of_several_batches_are_float32():
    config = demo("--optim.param-dtype", "bfloat16", "--optim.accumulate", "2")
    planner = StepEstimator(
        config, planned_model(config)[0], make_mesh(1, devices=jax.devices()[:1])
    )
    assert device_bytes(planner.sums["gradients"]) == 2 * device_bytes(planner.trained)


def test_activations_grow_in_proportion_to_frames(steps):
    """A line through two sizes tells the third within 10 % (blocks are of whole tokens)."""
    a, b, c = (steps[frames].activations for frames in (8192, 16384, 32768))
    assert c == pytest.approx(b + 2 * (b - a), rel=0.1)


def test_the_sample_is_one_video_with_text(planner: StepEstimator, steps):
    stream = planner.stream(8)
    tokens = planner.model.layout.count(8)
    beacons = tokens // min(planner.model.ratios)
    assert stream.length == steps[8].tokens == tokens + beacons + SAMPLE_TEXT
    assert np.sum(stream.target != IGNORE) == SAMPLE_LABELS
    assert planner.stream(0).length == SAMPLE_TEXT
    assert steps[0].batch < steps[8].batch / 2  # no pixels


def test_operations_are_those_of_all_samples_of_a_step(planner: StepEstimator, steps):
    work = PassSize.of(planner.stream(8), 8)
    rank = planner.config.lora.rank
    c = planner.model.language
    q = o = c.width + c.width
    k = v = c.width + c.kv_heads * c.head_size
    mlp = c.width + c.mlp_width
    adapters = c.layers * rank * (q + k + v + o + 3 * mlp)
    one = step_flops(planner.model, work, planner.config.optim.train, adapters).total
    assert steps[8].flops == 2 * one


def test_the_longest_sample_fits_and_not_much_more_would(planner: StepEstimator, steps):
    memory = (steps[4096].peak + steps[8192].peak) // 2
    for start in (8, 4096, 8192):  # one that fits, and one that does not
        found = longest(planner, steps[start], memory)
        assert found is not None
        assert 0.9 * memory < found.peak <= memory
    assert longest(planner, steps[8], steps[8].trained) is None


def test_a_budget_of_tokens_bounds_the_samples_of_a_batch(planner: StepEstimator):
    data = replace(planner.config.data, batch_size=8, max_tokens_per_batch=2000)
    config = replace(planner.config, data=data)
    mesh = make_mesh(1, devices=jax.devices()[:1])
    small = StepEstimator(config, planner.model, mesh)
    assert small.samples(small.stream(8)) == 2000 // small.stream(8).length
    assert small.samples(small.stream(1000)) == 1  # a longer one is alone


def test_tiles_of_a_plan_are_those_of_a_gpu():
    own = tile_bytes()
    with made_for("gpu"):
        assert tile_bytes() == 2**28
    assert tile_bytes() == own


# The command.


def test_the_plan_is_printed_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # devices are there already
    argv = ["--plan", "--memory-gb", "1", "--run-dir", str(tmp_path / "run")]
    assert main([*argv, "--data.batch-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "sizes: preset demo; trains vision, projector, language, beacon with adamw" in out
    assert "mesh: data 1 x fsdp 1 x tensor 1, one h100 each" in out
    assert "a batch of 2 sample(s) of 8 frames and 512 tokens of text" in out
    assert "it fits" in out
    assert "longest sample: " in out
    assert "steps/s" in out
    assert not (tmp_path / "run").exists()


def test_an_unknown_card_is_refused_with_the_list(capsys: pytest.CaptureFixture[str]):
    assert main(["--plan", "--card", "h1000"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --card h1000: unknown card; choose from b200, ")


def test_a_checkpoint_that_is_not_here_has_the_sizes_of_the_preset():
    config = load_config(["--config", "lora_7b"]).config
    model, sizes = planned_model(config)
    assert sizes == "preset video_xl_7b (data/checkpoints/video_xl is not here)"
    assert (model.language.width, model.param_dtype, model.ratios) == (3584, "bfloat16", (2, 4, 8))
