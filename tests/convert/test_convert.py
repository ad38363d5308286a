"""Conversion in all directions: bit for bit, everything accounted for, whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import pytest

import vxl_jax
from convert import convert_from_hf, convert_to_hf, parity
from tests.support.checkpoints import (
    GOLDEN,
    MICRO,
    assert_same,
    assert_same_model,
    tensors_in,
    where,
)
from vxl_jax.checkpoints.names import LINEAR, SAME, name_rows
from vxl_jax.checkpoints.safetensors_read import INDEX_FILE
from vxl_jax.errors import CheckpointError

# There and back.


def test_there_and_back_is_the_same_bit_for_bit(converted, tmp_path):
    convert_to_hf(converted, tmp_path / "back")
    assert_same(tensors_in(tmp_path / "back"), tensors_in(MICRO))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (MICRO / "config.json").read_text()
    )


def test_shards_in_bfloat16_there_and_back(sharded, tmp_path):
    directory, _ = sharded
    assert len(list(directory.glob("*.safetensors"))) >= 4
    assert max(file.stat().st_size for file in directory.glob("*.safetensors")) < 160_000
    index = json.loads((directory / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors_in(directory).values())
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "bfloat16"
    expected = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors_in(MICRO).items()}
    ours = tensors_in(directory)
    assert_same(ours, expected)
    convert_from_hf(directory, tmp_path / "model")
    convert_to_hf(tmp_path / "model", tmp_path / "back", shard_size=150_000)
    assert_same(tensors_in(tmp_path / "back"), ours)
    assert where(tmp_path / "back") == where(directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_ways_of_loading_give_one_model(dtype, converted, tmp_path):
    direct = vxl_jax.load_network(MICRO, param_dtype=dtype, dtype=dtype)
    assert_same_model(vxl_jax.load_network(converted, param_dtype=dtype, dtype=dtype), direct)
    convert_from_hf(MICRO, tmp_path / "model", dtype=dtype)
    model = vxl_jax.load_network(tmp_path / "model")
    assert model.config == direct.config
    assert_same_model(model, direct)


def test_parity_runs_on_a_converted_checkpoint(converted):
    assert parity.main([str(converted), str(GOLDEN)]) == 0


def test_a_converted_checkpoint_stands_by_itself(converted, tmp_path):
    """It can be moved, and everything that is needed besides the weights is there."""
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(converted, moved)
    assert vxl_jax.load_network(moved).config == vxl_jax.load_network(MICRO).config
    assert (moved / "generation_config.json").exists()
    assert (moved / "vision_tower" / "preprocessor_config.json").exists()


# Killed in the middle.


@pytest.mark.parametrize(
    "moment", [".out.vxl-part", ".out.vxl-part/config.json", ".out.vxl-part/params*"]
)
def test_killed_at_any_moment_nothing_or_all_is_there(moment, tmp_path):
    command = [sys.executable, "-m", "convert.from_hf", str(MICRO), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not list(tmp_path.glob(f".out.vxl-part{moment}")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if (tmp_path / "out").exists():
        assert_same_model(vxl_jax.load_network(tmp_path / "out"), vxl_jax.load_network(MICRO))
        return
    assert (tmp_path / ".out.vxl-part").exists()
    # Leftovers do not stand in the way of the next.
    convert_from_hf(MICRO, tmp_path / "out")
    assert_same_model(vxl_jax.load_network(tmp_path / "out"), vxl_jax.load_network(MICRO))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_that_write_the_same_do_not_mix(tmp_path):
    from convert.writing import new_directory

    with (
        new_directory(tmp_path / "out", 1, overwrite=False),
        pytest.raises(CheckpointError, match="another process is writing it"),
        new_directory(tmp_path / "out", 1, overwrite=False),
    ):
        pass


# On a mesh.

ON_EIGHT_DEVICES = """
import sys
import jax, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import vxl_jax

assert len(jax.devices()) == 8
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

def placement(path, shape):
    divisible = [axis for axis, size in enumerate(shape) if size % 4 == 0]
    axes = [None] * len(shape)
    if divisible:
        axes[max(divisible, key=lambda axis: shape[axis])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*axes))

one = vxl_jax.load_network(sys.argv[1])
for directory in sys.argv[1:]:
    model = vxl_jax.load_network(directory, placement=placement)
    split = 0
    for ours, expected in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(one)), strict=True
    ):
        shards = {shard.data.size for shard in ours.addressable_shards}
        assert len(ours.addressable_shards) == 8
        split += shards == {ours.size // 4}
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))
    print(directory, split)
    assert split > 40, split
"""


def test_each_device_of_a_mesh_reads_its_part(converted):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, str(MICRO), str(converted)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_the_documentation_has_every_row_of_the_table():
    text = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text()
    for row in name_rows(vxl_jax.VideoXLConfig()):
        layout = {id(LINEAR): "transposed", id(SAME): ""}.get(id(row.layout), "patch")
        assert f"| `{row.theirs}` | `{'.'.join(row.ours)}` | {layout} |" in text
