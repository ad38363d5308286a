"""What a training run has come to, as a checkpoint."""

import shutil
from contextlib import closing
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import vxl_jax
import vxl_jax.presets
from convert import convert_to_hf
from tests.support.checkpoints import MICRO, a_run, run_config, tensors_in
from train.config import ModelSection
from train.config.resume import save_config
from train.run.checkpoints import Checkpoints, Position
from train.run.step import split_parts
from vxl_jax.errors import CheckpointError


def test_a_run_that_trained_a_part(tmp_path):
    base = tmp_path / "base"
    convert_to_hf(MICRO, base, dtype="bfloat16")
    _, trained, _ = split_parts(vxl_jax.load_network(base), ("projector", "beacon"))
    trained = jax.tree.map(lambda x: 1.0001 * x, trained)  # float32: nothing in bfloat16
    section = ModelSection(checkpoint=str(base), tokenizer=None, pool_stride=1, ratios=(4,))
    run = a_run(tmp_path / "run", section, trained)
    before = tensors_in(base)
    for dtype in ("float32", None):
        out = tmp_path / str(dtype)
        convert_to_hf(run, out, dtype=dtype)
        ours = tensors_in(out)
        assert ours.keys() == before.keys()
        for name, value in before.items():
            expected = value.astype(np.float32)
            if "beacon" in name or "mm_projector" in name:
                expected = np.float32(2) * (np.float32(1.0001) * expected)
            expected = expected.astype(dtype or ml_dtypes.bfloat16)
            np.testing.assert_array_equal(ours[name], expected, err_msg=name)
        config = vxl_jax.load_network(out).config
        assert (config.pool_stride, config.ratios) == (1, (4,))


def test_a_run_from_random_weights(tmp_path, demo_data):
    section = ModelSection(preset="tiny", tokenizer=str(demo_data / "tokenizer"))
    config = vxl_jax.presets.tiny()
    model = nnx.jit(lambda: vxl_jax.VideoXL(config, rngs=nnx.Rngs(0)))()
    everything = ("vision", "projector", "language", "beacon")
    _, trained, _ = split_parts(model, everything)
    run = a_run(tmp_path / "run", section, trained)
    convert_to_hf(run, tmp_path / "out")
    loaded = vxl_jax.load_network(tmp_path / "out")
    preprocessing = run_config(section).data.preprocessing
    assert loaded.config == replace(config, preprocessing=preprocessing)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    np.testing.assert_array_equal(
        loaded.language.head.kernel[...], 2 * model.language.head.kernel[...]
    )
    _, trained, _ = split_parts(model, ("projector",))
    with pytest.raises(CheckpointError, match="began with random weights and did not train lang"):
        convert_to_hf(a_run(tmp_path / "some", section, trained), tmp_path / "none")


def test_a_run_that_diverged_is_not_exported(tmp_path):
    _, trained, _ = split_parts(vxl_jax.load_network(MICRO), ("projector",))
    trained["projector"]["up"]["bias"] = trained["projector"]["up"]["bias"].at[3].set(jnp.inf)
    run = a_run(tmp_path / "run", ModelSection(checkpoint=str(MICRO)), trained)
    with pytest.raises(CheckpointError, match=r"model\.mm_projector\.0\.bias has NaN or infinite"):
        convert_to_hf(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_step_of_a_run_can_be_chosen(tmp_path):
    """By its number, or the one with most held-out questions right."""
    _, trained, _ = split_parts(vxl_jax.load_network(MICRO), ("projector",))
    config = run_config(ModelSection(checkpoint=str(MICRO)))
    path = tmp_path / "run"
    path.mkdir()
    save_config(config, path / "config.json")
    run = replace(config.run, keep_checkpoints=3)
    with closing(Checkpoints(path, replace(config, run=run))) as checkpoints:
        for step, accuracy in ((3, None), (6, 0.75), (9, 0.5)):
            params = jax.tree.map(lambda x, step=step: step * x, trained)
            checkpoints.save(step, params, {}, Position(0, ""), accuracy)
    name = "model.mm_projector.0.bias"
    one = tensors_in(MICRO)[name]
    for chosen, factor in ((None, 9), ("3", 3), (9, 9), ("best", 6)):
        out = tmp_path / f"out-{chosen}"
        convert_to_hf(path, out, step=chosen)
        np.testing.assert_array_equal(tensors_in(out)[name], np.float32(factor) * one)
    with pytest.raises(CheckpointError, match="has no step 4; it has 3, 6, 9, and best"):
        convert_to_hf(path, tmp_path / "none", step=4)
    with pytest.raises(CheckpointError, match="has no steps to choose from"):
        convert_to_hf(MICRO, tmp_path / "none", step=4)
    shutil.rmtree(path / "checkpoints/6")
    shutil.rmtree(path / "checkpoints/9")
    with pytest.raises(CheckpointError, match=r"no step has a score; train with run\.eval_every"):
        convert_to_hf(path, tmp_path / "none", step="best")


def test_runs_without_a_step_or_configuration(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        convert_to_hf(tmp_path, tmp_path / "out")
    save_config(run_config(ModelSection(checkpoint="x")), tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="no step has been saved yet"):
        convert_to_hf(tmp_path, tmp_path / "out")
