"""Conversions that are refused."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vxl_jax
from convert import convert_from_hf, convert_to_hf, from_hf
from tests.support.checkpoints import (
    GOLDEN,
    MICRO,
    assert_same,
    assert_same_model,
    tensors_in,
    where,
)
from vxl_jax.checkpoints.safetensors_read import INDEX_FILE
from vxl_jax.errors import CheckpointError


def test_every_problem_is_in_one_error(sharded, tmp_path):
    directory, change = sharded
    norm, gate = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"
    up, bias = "model.layers.0.mlp.up_proj.weight", "model.mm_projector.0.bias"
    embed = "model.embed_tokens.weight"
    held = tensors_in(directory)
    nan = held[embed].copy()
    nan[3, 5] = np.nan
    at = where(directory)
    change(at[norm], **{norm: None})
    change(at[gate], **{gate: held[gate][:-1].copy()})
    change(at[up], **{up: held[up].astype(np.float32)})
    change(at[bias], **{bias: np.zeros(64, np.int32)})
    change(at[embed], **{embed: nan, "model.extra": np.zeros(2, np.float32)})
    other = next(file for file in sorted(set(at.values())) if file != at["lm_head.weight"])
    change(other, **{"lm_head.weight": held["lm_head.weight"]})
    with pytest.raises(CheckpointError) as caught:
        convert_from_hf(directory, tmp_path / "out")
    message = str(caught.value)
    for part in (
        f"missing tensor {norm}",
        f"{INDEX_FILE} has tensor {norm} in {at[norm]}, which does not hold it",
        f"tensor {gate} has shape (127, 64), config.json asks for (128, 64)",
        f"tensor {up} has dtype F32, not bfloat16",
        f"tensor {bias} has dtype I32, which is not one of weights",
        f"tensor {embed} in {at[embed]} has NaN or infinite weights",
        f"unexpected tensor model.extra in {at[embed]}",
        f"{INDEX_FILE} does not have tensor model.extra",
        "tensor lm_head.weight is in ",
    ):
        assert part in message, message
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.k_proj.bias"])
def test_weights_that_are_not_finite_are_refused(name, value, sharded, tmp_path):
    directory, change = sharded
    held = tensors_in(directory)[name].copy()
    held.flat[-1] = value
    change(where(directory)[name], **{name: held})
    with pytest.raises(CheckpointError, match=f"tensor {name} in .* has NaN or infinite weights"):
        convert_from_hf(directory, tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"tensor {name} in .* has NaN or infinite weights"):
        vxl_jax.load_network(directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded"]


def test_largest_finite_weights_are_taken(sharded, tmp_path):
    directory, change = sharded
    norm = np.full(64, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), ml_dtypes.bfloat16)
    change(where(directory)["model.norm.weight"], **{"model.norm.weight": norm})
    convert_from_hf(directory, tmp_path / "out")


def test_tensors_are_left_out_only_where_that_is_asked_for(tmp_path, capsys):
    shutil.copytree(GOLDEN, tmp_path / "set")
    path = tmp_path / "set" / "hf" / "model.safetensors"
    save_file({**load_file(path), "model.extra.weight": np.zeros(2, np.float32)}, path)
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.extra\.weight in model"):
        convert_from_hf(path.parent, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"--ignore '\(': not a regular expression"):
        convert_from_hf(path.parent, tmp_path / "out", ignore="(")
    convert_from_hf(path.parent, tmp_path / "out", ignore=r"model\.extra\..*")
    assert "left out model.extra.weight (--ignore)" in capsys.readouterr().err
    convert_to_hf(tmp_path / "out", tmp_path / "back")
    assert_same(tensors_in(tmp_path / "back"), tensors_in(MICRO))


def test_float16_is_converted_only_where_a_dtype_is_given(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "set")
    path = tmp_path / "set" / "hf" / "model.safetensors"
    save_file({name: x.astype(np.float16) for name, x in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match="has dtype F16, not float32; say which dtype"):
        convert_from_hf(path.parent, tmp_path / "out")
    convert_from_hf(path.parent, tmp_path / "out", dtype="float32")
    model = vxl_jax.load_network(tmp_path / "out")
    expected = load_file(path)["model.norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(model.language.norm.scale[...], expected)


def test_truncated_and_pickled_files_are_refused(sharded, tmp_path, capsys):
    directory, _ = sharded
    first = sorted(directory.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-100])
    command = [str(directory), str(tmp_path / "out")]
    assert from_hf.main(command) == 2
    assert f"{first.name}: cannot be read as safetensors" in capsys.readouterr().err
    for file in directory.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    assert from_hf.main(command) == 2
    error = capsys.readouterr().err
    assert "pickle files (.bin, .pt) are not read because" in error
    assert "safe_serialization=True" in error


def test_what_is_there_is_not_overwritten_unasked(converted, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match="exists already; choose another, or --overwrite it"):
        convert_from_hf(MICRO, out)
    with pytest.raises(CheckpointError, match="is not a checkpoint, so it is not overwritten"):
        convert_from_hf(MICRO, out, overwrite=True)
    assert (out / "mine.txt").read_text() == "kept"
    shutil.rmtree(out)
    convert_to_hf(converted, out)
    with pytest.raises(CheckpointError, match="exists already"):
        convert_from_hf(MICRO, out)
    convert_from_hf(MICRO, out, overwrite=True)
    assert [file.name for file in out.glob("*.safetensors")] == ["unused.safetensors"]
    assert_same_model(vxl_jax.load_network(out), vxl_jax.load_network(MICRO))
    (out / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="is not a checkpoint, so it is not overwritten"):
        from_hf.convert_from_hf(MICRO, out, overwrite=True)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(CheckpointError, match="is a link; name the directory itself"):
        convert_from_hf(MICRO, tmp_path / "link", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_what_a_kill_between_the_renames_left_is_put_back(converted, tmp_path):
    convert_to_hf(converted, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.vxl-old")
    with pytest.raises(CheckpointError, match="exists already"):
        convert_from_hf(MICRO, tmp_path / "out")
    assert_same(tensors_in(tmp_path / "out"), tensors_in(MICRO))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", "x"),
        ("beacon_param", 5),
        ("beacon_ratio", 4),
        ("beacon_ratio", ["a"]),
        ("rope_theta", None),
        ("hidden_size", "64"),
        ("num_hidden_layers", 2.0),
        ("mm_vision_tower", None),
        ("mm_spatial_pool_stride", None),
        ("mm_vision_select_layer", "a"),
    ],
)
def test_fields_of_the_wrong_type_are_named(field, value, sharded, tmp_path, capsys):
    directory, change = sharded
    change(config={field: value})
    assert from_hf.main([str(directory), str(tmp_path / "out")]) == 2
    assert f"config.json: {field} is {value!r}; it must be" in capsys.readouterr().err


@pytest.mark.parametrize("place", [".", ".."])
def test_nothing_is_written_over_what_is_read(place, tmp_path):
    source = tmp_path / "outer" / "hf"
    convert_to_hf(MICRO, source)
    before = sorted(source.rglob("*"))
    for write in (convert_from_hf, convert_to_hf):
        with pytest.raises(CheckpointError, match="which is read; choose another"):
            write(source, source / place, overwrite=True)
    assert sorted(source.rglob("*")) == before


def test_a_disk_that_is_too_small_is_noticed_first(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(CheckpointError, match=r"0\.00 GB will be written, and the disk has 0\.00"):
        convert_from_hf(MICRO, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["", "5 bananas", "0", "-1GB"])
def test_shard_sizes_that_are_none(size, tmp_path):
    with pytest.raises(CheckpointError, match="use a number of bytes, or one such as 5GB"):
        convert_to_hf(MICRO, tmp_path / "out", shard_size=size)


def test_a_damaged_converted_checkpoint_is_refused(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["intermediate_size"] = 96
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"(?s)3 problems.*has shape \(3, 64, 128\), config"):
        vxl_jax.load_network(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "params" / "projector.up.kernel")
    with pytest.raises(CheckpointError, match="params: cannot be read"):
        vxl_jax.load_network(tmp_path / "model")
    with pytest.raises(CheckpointError, match="neither a converted checkpoint"):
        convert_to_hf(tmp_path, tmp_path / "out")
