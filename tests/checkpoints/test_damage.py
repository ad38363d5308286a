"""Checkpoints damaged in every way: each damage to each kind of tensor, with its exact message."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import convert_from_hf, convert_to_hf
from vxl_jax.checkpoints.safetensors_read import INDEX_FILE, NO_PICKLE, find_tensors
from vxl_jax.errors import CheckpointError

MICRO = Path(__file__).parents[1] / "golden" / "micro" / "hf"

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.beacon_k_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.norm.weight",
    "model.mm_projector.2.weight",
    "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight",
)
"""One of each layout, stacked and single, of every part of the model."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sound") / "hf"
    convert_to_hf(MICRO, directory, shard_size="150KB")
    return directory


@pytest.fixture
def damaged(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "hf"))


def at(directory):
    """File of every tensor, as the index says."""
    return json.loads((directory / INDEX_FILE).read_text())["weight_map"]


def write_weight_map(directory, values):
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": values}))


def change(directory, name, value):
    """Put another array in the place of a tensor, or none."""
    path = directory / at(directory)[name]
    held = load_file(path)
    old = held.pop(name)
    held |= {} if value is None else {name: value(old)}
    save_file(held, path)


def other_file(directory, name):
    return next(file for file in sorted(at(directory).values()) if file != at(directory)[name])


def set_last(x, value):
    x = x.copy()
    x.flat[-1] = value
    return x


# Every damage takes a directory and a name, and returns the lines of the message.


def missing(directory, name):
    change(directory, name, None)
    file = at(directory)[name]
    return [
        f"{INDEX_FILE} has tensor {name} in {file}, which does not hold it",
        f"missing tensor {name}",
    ]


def unexpected(directory, name):
    path = directory / at(directory)[name]
    held = load_file(path)
    save_file({**held, f"{name}_too": held[name]}, path)
    return [
        f"{INDEX_FILE} does not have tensor {name}_too of {path.name}",
        f"unexpected tensor {name}_too in {path.name}",
    ]


def in_two_shards(directory, name):
    other, file = other_file(directory, name), at(directory)[name]
    held = load_file(directory / file)[name]
    save_file({**load_file(directory / other), name: held}, directory / other)
    first, last = sorted((file, other))
    lines = [f"tensor {name} is in {first} and in {last}"]
    if last != file:
        lines.append(f"{INDEX_FILE} has tensor {name} in {file}, it is in {last}")
    return lines


def too_short(directory, name):
    shape = load_file(directory / at(directory)[name])[name].shape
    change(directory, name, lambda x: x[1:].copy())
    cut = (shape[0] - 1, *shape[1:])
    return [f"tensor {name} has shape {cut}, config.json asks for {shape}"]


def one_axis_more(directory, name):
    shape = load_file(directory / at(directory)[name])[name].shape
    change(directory, name, lambda x: x[None])
    return [f"tensor {name} has shape {(1, *shape)}, config.json asks for {shape}"]


def empty(directory, name):
    shape = load_file(directory / at(directory)[name])[name].shape
    change(directory, name, lambda x: x[:0])
    return [f"tensor {name} has shape {(0, *shape[1:])}, config.json asks for {shape}"]


def integers(directory, name):
    change(directory, name, lambda x: x.astype(np.int32))
    return [f"tensor {name} has dtype I32, which is not one of weights"]


def another_dtype(directory, name):
    change(directory, name, lambda x: x.astype(np.float16))
    return [f"tensor {name} has dtype F16, not float32; say which dtype to load as"]


def not_a_number(directory, name):
    change(directory, name, lambda x: set_last(x, np.nan))
    return [f"tensor {name} in {at(directory)[name]} has NaN or infinite weights"]


def infinite(directory, name):
    change(directory, name, lambda x: set_last(x, -np.inf))
    return [f"tensor {name} in {at(directory)[name]} has NaN or infinite weights"]


def index_says_another(directory, name):
    file, other = at(directory)[name], other_file(directory, name)
    write_weight_map(directory, {**at(directory), name: other})
    return [f"{INDEX_FILE} has tensor {name} in {other}, it is in {file}"]


def not_in_the_index(directory, name):
    file = at(directory)[name]
    write_weight_map(directory, {k: v for k, v in at(directory).items() if k != name})
    return [f"{INDEX_FILE} does not have tensor {name} of {file}"]


def only_in_the_index(directory, name):
    file = at(directory)[name]
    write_weight_map(directory, {**at(directory), f"{name}_too": file})
    return [f"{INDEX_FILE} has tensor {name}_too in {file}, which does not hold it"]


DAMAGE = (
    missing,
    unexpected,
    in_two_shards,
    too_short,
    one_axis_more,
    empty,
    integers,
    another_dtype,
    not_a_number,
    infinite,
    index_says_another,
    not_in_the_index,
    only_in_the_index,
)


def message_of(directory, tmp_path):
    """The message with which a directory is refused; nothing may be left behind."""
    with pytest.raises(CheckpointError) as caught:
        convert_from_hf(directory, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [directory.name]
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tensor_is_named(damage, name, damaged, tmp_path):
    lines = damage(damaged, name)
    message = message_of(damaged, tmp_path)
    if len(lines) == 1:
        assert message == f"{damaged}: {lines[0]}"
    else:
        assert message == f"{damaged}: {len(lines)} problems\n  " + "\n  ".join(lines)


def header_twice(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + size].rstrip()
    entry = b'"model.norm.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = header[:-1] + b"," + entry + b"," + entry + b"}"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:4]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
        lambda path: path.write_bytes(path.read_bytes()[:8] + b"]" + path.read_bytes()[9:]),
        lambda path: path.write_bytes(b"PK\3\4" + path.read_bytes()),
        header_twice,
    ],
)
def test_a_damaged_file_is_named(damage, damaged, tmp_path):
    path = sorted(damaged.glob("*.safetensors"))[0]
    held = load_file(path)
    damage(path)
    message = message_of(damaged, tmp_path)
    assert f"  {path}: cannot be read as safetensors (" in message
    for name in held:  # with everything that follows from it
        assert f"  {INDEX_FILE} has tensor {name} in {path.name}, which does not hold it" in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", f"{{directory}}/{INDEX_FILE}: is not valid JSON"),
        ("[]", f"{{directory}}/{INDEX_FILE}: must hold a JSON object"),
        ("{}", f"{INDEX_FILE} has no weight_map"),
        ('{"weight_map": []}', f"{INDEX_FILE} has no weight_map"),
    ],
)
def test_a_damaged_index_is_named_with_the_rest(text, line, damaged, tmp_path):
    change(damaged, "model.norm.weight", None)
    (damaged / INDEX_FILE).write_text(text)
    message = message_of(damaged, tmp_path)
    assert line.format(directory=damaged) in message
    assert "missing tensor model.norm.weight" in message


def test_a_tensor_that_is_never_read_has_its_shape_checked(damaged, tmp_path):
    tensors, _ = find_tensors(damaged)
    name = next(name for name in tensors if "encoder.layers.3" in name and "fc1.weight" in name)
    change(damaged, name, lambda x: x[1:].copy())
    assert f"tensor {name} has shape" in message_of(damaged, tmp_path)


def test_pickle_files_are_refused_with_the_way_round(damaged, tmp_path):
    for path in damaged.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    assert message_of(damaged, tmp_path) == f"{damaged}: no *.safetensors file; {NO_PICKLE}"
