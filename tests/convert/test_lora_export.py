"""Runs with low-rank updates, as checkpoints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import vxl_jax
from convert import convert_to_hf, to_hf
from convert.sources import open_source
from tests.support.checkpoints import MICRO, a_run, run_config, tensors_in
from tests.support.lora import arrays_of, noisy, trained_model, with_arrays
from train.config import ModelSection
from train.config.resume import save_config
from train.run.step import split_parts
from vxl_jax.checkpoints.names import name_rows
from vxl_jax.config import LoRAConfig
from vxl_jax.errors import CheckpointError
from vxl_jax.models.lora import LORA_NAMES, add_lora, lora_path, merge_lora

pytestmark = pytest.mark.usefixtures("exact_products")


def a_lora_run(directory: Path, section: ModelSection, trained: Any, lora: LoRAConfig) -> Path:
    """A run's directory; what it has come to is twice the parameters given."""
    a_run(directory, section, trained)
    config = run_config(section)
    optim = dataclasses.replace(config.optim, train=("lora",))
    save_config(dataclasses.replace(config, optim=optim, lora=lora), directory / "config.json")
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_is_exported_with_merged_kernels(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, out = tmp_path / "base", tmp_path / "out"
    convert_to_hf(MICRO, base, dtype="bfloat16")
    model = vxl_jax.load_network(base)
    lora = LoRAConfig(3, 7.0, ("q", "beacon_v", "down"))
    add_lora(model, lora, 0)
    model = with_arrays(model, noisy(arrays_of(model), LORA_NAMES))
    _, trained, _ = split_parts(model, ("lora", "projector"), dtype)
    directory = a_lora_run(tmp_path / "run", ModelSection(checkpoint=str(base)), trained, lora)
    monkeypatch.setattr(to_hf, "CHUNK_BYTES", 2**11)  # several pieces a kernel
    convert_to_hf(directory, out, dtype="float32")

    before, ours = tensors_in(base), tensors_in(out)
    assert ours.keys() == before.keys()
    arrays = {path: 2 * np.float32(x) for path, x in flatten_dict(trained).items()}
    expected = {name: np.float32(value) for name, value in before.items()}
    names = ("self_attn.q_proj", "self_attn.beacon_v_proj", "mlp.down_proj")
    for target, name in zip(lora.targets, names, strict=True):
        a, b = (arrays[*lora_path(target), name] for name in LORA_NAMES)
        for layer in range(len(a)):
            expected[f"model.layers.{layer}.{name}.weight"] += (7 / 3 * a[layer] @ b[layer]).T
    for name, value in ours.items():
        if "mm_projector" in name:
            expected[name] *= 2
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)
    changed = {name for name in ours if not np.array_equal(ours[name], np.float32(before[name]))}
    assert len(changed) == 3 * len(a) + 4

    # Any part is the same part of the whole.
    source = open_source(directory)
    (row,) = (row for row in name_rows(source.config) if row.ours == (*lora_path("down"), "kernel"))
    whole = source.read(row, tuple(slice(0, size) for size in source.shapes[row.ours].shape))
    index = (slice(1, 3), slice(5, 9), slice(2, 30))
    np.testing.assert_allclose(source.read(row, index), whole[index], rtol=1e-6, atol=1e-6)


def test_a_run_from_random_weights(tmp_path: Path, demo_data: Path):
    section = ModelSection(preset="tiny", tokenizer=str(demo_data / "tokenizer"))
    lora = LoRAConfig(2, targets=("q",))
    model = trained_model(lora)
    everything = ("vision", "projector", "language", "beacon")
    _, trained, _ = split_parts(model, (*everything, "lora"))
    convert_to_hf(a_lora_run(tmp_path / "run", section, trained, lora), tmp_path / "out")
    twice = with_arrays(model, {path: 2 * x for path, x in arrays_of(model).items()})
    merge_lora(twice)
    loaded = arrays_of(vxl_jax.load_network(tmp_path / "out"))
    for path, value in arrays_of(twice).items():
        np.testing.assert_allclose(loaded[path], value, atol=1e-5, err_msg=str(path))

    _, trained, _ = split_parts(model, ("lora",))
    only = a_lora_run(tmp_path / "only", section, trained, lora)
    with pytest.raises(CheckpointError, match="began with random weights and did not train lang"):
        convert_to_hf(only, tmp_path / "none")


def test_a_run_that_does_not_hold_what_it_says_is_refused(tmp_path: Path):
    model = vxl_jax.load_network(MICRO)
    lora = LoRAConfig(3, targets=("q",))
    add_lora(model, lora, 0)
    _, trained, _ = split_parts(model, ("lora",))
    section = ModelSection(checkpoint=str(MICRO))
    directory = a_lora_run(tmp_path / "run", section, trained, lora)
    q = "language.layers.attention.q"
    config = json.loads((directory / "config.json").read_text())
    for values, message in [
        (None, f"unexpected parameter {q}.lora_a"),
        ({"rank": 4, "targets": ["q"]}, rf"parameter {q}.lora_a has shape \(.*, 3\), config.json"),
        (
            {"rank": 3, "targets": ["q", "k"]},
            "missing parameter language.layers.attention.k.lora_b",
        ),
        ({"rank": -3}, "is not the configuration of a run .lora.rank is -3"),
        ({"ranks": 3}, "is not the configuration of a run .*ranks"),
    ]:
        without = {name: value for name, value in config.items() if name != "lora"}
        changed = {**config, "lora": values} if values else without
        (directory / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            convert_to_hf(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
