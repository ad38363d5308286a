"""Low-rank updates: what they compute, what trains, merging, and a run from end to end."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import vxl_jax
from convert import convert_to_hf, to_hf
from convert.sources import open_source
from tests.test_convert import MICRO, a_run, run_config, tensors_in
from train.config import ModelSection, OptimSection, load_config, part_of, save_config
from train.demo_data import demo_words
from train.demo_drawing import COLOURS, SHAPES, Thing, draw_tile, write_png
from train.demo_tokenizer import save_tokenizer
from train.finetune import main
from train.optimizer import Optimizer
from train.setup import make_model, read_model_config
from train.step import add_batch, split_parts, update
from vxl_jax.config import LoRAConfig, LoRATarget, VideoXLConfig, demo, tiny
from vxl_jax.errors import CheckpointError
from vxl_jax.lora import (
    LORA_NAMES,
    LoRALinear,
    add_lora,
    lora_path,
    lora_shapes,
    merge_lora,
)
from vxl_jax.model import VideoXL, decode_step, prefill
from vxl_jax.names import table
from vxl_jax.stream import IGNORE, IMAGE_TOKEN, Stream, batch_streams, plan_stream

pytestmark = pytest.mark.usefixtures("exact_products")

TARGETS: tuple[LoRATarget, ...] = get_args(LoRATarget)
ALL = LoRAConfig(rank=4, alpha=6.0, targets=TARGETS)

Arrays = dict[tuple[str, ...], Any]


def arrays_of(model: VideoXL) -> Arrays:
    """All parameters by path, on the host."""
    flat = flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    return {path: np.array(value) for path, value in flat.items()}


def with_arrays(model: VideoXL, arrays: Arrays) -> VideoXL:
    """The model with other parameters."""
    arrays = jax.tree.map(jnp.asarray, unflatten_dict(arrays))
    return nnx.merge(nnx.graphdef(model), arrays)


def noisy(arrays: Arrays, names: Sequence[str] | None = None) -> Arrays:
    """Noise added to all parameters, or to those of some names."""
    rng = np.random.default_rng(1)
    noise = {path: rng.normal(scale=0.2, size=x.shape) for path, x in arrays.items()}
    return {
        path: (x + noise[path]).astype(x.dtype) if names is None or path[-1] in names else x
        for path, x in arrays.items()
    }


@cache
def new_model(config: VideoXLConfig) -> tuple[Any, Any]:
    """Graph and parameters of a random model."""
    return nnx.split(nnx.jit(lambda: VideoXL(config, rngs=nnx.Rngs(0)))())


def plain_model(**changes: Any) -> VideoXL:
    """A small model in which no two linears and no two layers are alike."""
    model = nnx.merge(*new_model(tiny(remat="none", **changes)))
    return with_arrays(model, noisy(arrays_of(model)))


def lora_model(config: LoRAConfig = ALL, seed: int = 0, **changes: Any) -> VideoXL:
    """The same model with updates that have not been trained."""
    model = plain_model(**changes)
    add_lora(model, config, seed)
    return model


def trained_model(config: LoRAConfig = ALL, **changes: Any) -> VideoXL:
    """The same model with updates that change it."""
    model = lora_model(config, **changes)
    return with_arrays(model, noisy(arrays_of(model), LORA_NAMES))


@pytest.fixture(scope="module")
def trained() -> VideoXL:
    return trained_model()


@partial(jax.jit, static_argnums=0)
def training_form(graph: Any, params: Any, streams: Any, pixels: Any) -> Any:
    """Logits of all tokens."""
    model = nnx.merge(graph, params)
    return model.logits(model(streams, model.encode(pixels)))


def watched(config: VideoXLConfig) -> tuple[Stream, np.ndarray]:
    """A video with beacons of all ratios, and text after it that has labels."""
    ids, tokens = [1, 2, 3, IMAGE_TOKEN, 4, 5], 10 * config.tokens_per_frame
    labels = [IGNORE] * 4 + [4, 5]
    stream = plan_stream(ids, [tokens], window=config.window, ratio=[2, 8, 4], labels=labels)
    shape = (1, 10, config.vision.image_size, config.vision.image_size, 3)
    return stream, np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def outputs(model: VideoXL) -> list[np.ndarray]:
    """Logits: in the form for training; then after the prompt watched a window at a time, and after
    two more tokens.
    """
    stream, pixels = watched(model.config)
    graph, params = nnx.split(model)
    found = [training_form(graph, params, batch_streams([stream]), pixels)]
    streams = batch_streams([stream], windows_per_group=1)
    logits, memory = prefill(graph, params, streams, pixels, 64)
    found.append(logits)
    for token in (7, 8):
        logits, memory = decode_step(graph, params, memory, jnp.array([token], jnp.int32))
        found.append(logits)
    return [np.asarray(logits) for logits in found]


# What an update computes.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_update_changes_no_bit(dtype: str):
    expected = outputs(plain_model(dtype=dtype))
    ours = lora_model(dtype=dtype)
    assert isinstance(ours.language.layers.attention.beacon_q, LoRALinear)
    for a, b in zip(outputs(ours), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    merge_lora(ours)
    before = arrays_of(plain_model(dtype=dtype))
    for path, value in arrays_of(ours).items():
        np.testing.assert_array_equal(value, before[path], err_msg=str(path))


def test_updates_equal_merged_kernels(trained: VideoXL):
    """In every target by itself, and in all together."""
    arrays = arrays_of(trained)
    plain = outputs(lora_model())
    for chosen in (*((target,) for target in TARGETS), TARGETS):
        b = {path: 0 * x for path, x in arrays.items() if path[-1] == "lora_b"}
        for target in chosen:
            path = (*lora_path(target), "lora_b")
            b[path] = arrays[path]
        model = with_arrays(trained, {**arrays, **b})
        ours = outputs(model)
        merge_lora(model)
        for a, expected, without in zip(ours, outputs(model), plain, strict=True):
            assert np.linalg.norm(a - expected) < 1e-5 * np.linalg.norm(expected), chosen
            assert np.linalg.norm(a - without) > 1e-3 * np.linalg.norm(expected), chosen


def test_merged_kernels_are_those_of_the_paper(trained: VideoXL):
    """W + (alpha / r) A B, in every layer; nothing else changes, and the model is a plain one."""
    before = arrays_of(trained)
    model = with_arrays(trained, before)
    merge_lora(model)
    merged, plain = arrays_of(model), plain_model()
    assert nnx.graphdef(model) == nnx.graphdef(plain)
    assert merged.keys() == arrays_of(plain).keys()
    changed = {path for path, value in merged.items() if not np.array_equal(value, before[path])}
    assert changed == {(*lora_path(target), "kernel") for target in TARGETS}
    for *path, _ in changed:
        a, b = (before[*path, name].astype(np.float64) for name in LORA_NAMES)
        for layer, kernel in enumerate(before[*path, "kernel"]):
            expected = kernel + 6.0 / 4 * a[layer] @ b[layer]
            np.testing.assert_allclose(merged[*path, "kernel"][layer], expected, atol=1e-5)


@pytest.mark.parametrize("trained_in", [np.float32, ml_dtypes.bfloat16])
def test_half_precision(trained_in: Any):
    """Updates are float32; they are computed in the model's dtype, and merged in float32."""
    config = LoRAConfig(4, targets=("q", "down"))
    model = trained_model(config, dtype="bfloat16", param_dtype="bfloat16")
    before = arrays_of(model)
    dtypes = {
        name: {x.dtype.name for p, x in before.items() if p[-1] == name}
        for name in ("kernel", *LORA_NAMES)
    }
    assert dtypes == {"kernel": {"bfloat16"}, "lora_a": {"float32"}, "lora_b": {"float32"}}
    linear = nnx.Linear(3, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    linear = LoRALinear(linear, jnp.ones((3, 4)), jnp.ones((4, 5)), 1.0)
    assert linear(jnp.zeros((2, 3))).dtype == jnp.bfloat16
    before = {p: x.astype(trained_in) if p[-1] in LORA_NAMES else x for p, x in before.items()}
    model = with_arrays(model, before)
    merge_lora(model)
    after = arrays_of(model)
    for target in config.targets:
        path = lora_path(target)
        kernel, a, b = (before[*path, name].astype(np.float32) for name in ("kernel", *LORA_NAMES))
        expected = (kernel + 4 * (a @ b)).astype(ml_dtypes.bfloat16)
        same = after[*path, "kernel"] == expected
        assert same.mean() > 0.999  # a last bit of the product may round the other way
    assert all(x.dtype == ml_dtypes.bfloat16 for x in after.values())


# What an update starts from.


def test_a_start_depends_on_seed_and_name_alone():
    def updates(targets: tuple[LoRATarget, ...], seed: int) -> Arrays:
        arrays = arrays_of(lora_model(LoRAConfig(4, targets=targets), seed))
        return {path: x for path, x in arrays.items() if path[-1] in LORA_NAMES}

    everything, other = updates(TARGETS, 0), updates(TARGETS, 1)
    for targets in [("v",), ("down", "beacon_q", "q")]:
        some = updates(targets, 0)
        assert {path[:-1] for path in some} == set(map(lora_path, targets))
        for path, value in some.items():
            np.testing.assert_array_equal(value, everything[path])
    starts = [x for arrays in (everything, other) for p, x in arrays.items() if p[-1] == "lora_a"]
    numbers = np.concatenate([x.ravel() for x in starts])
    assert len(np.unique(numbers)) > 0.99 * len(numbers)  # no two are alike, nor any two layers
    for path, value in everything.items():
        bound = 32**-0.5 if path[-2] != "down" else 48**-0.5
        if path[-1] == "lora_a":
            assert 0.95 * bound < np.abs(value).max() <= bound
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        else:
            assert not value.any()


def test_a_start_is_the_same_however_it_is_made():
    config = tiny(remat="none")

    def make() -> VideoXL:
        model = VideoXL(config, rngs=nnx.Rngs(0))
        add_lora(model, ALL, 3)
        return model

    model, in_place = (nnx.merge(*new_model(config)) for _ in range(2))
    plain_shapes = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in arrays_of(model).items()}
    add_lora(model, ALL, 3)
    expected = arrays_of(model)
    nnx.jit(lambda model: add_lora(model, ALL, 3))(in_place)
    pure = jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())))()
    for arrays in (arrays_of(in_place), flatten_dict(pure)):
        assert arrays.keys() == expected.keys()
        for path, value in arrays.items():
            np.testing.assert_array_equal(value, expected[path], err_msg=str(path))

    abstract = nnx.eval_shape(make)
    assert nnx.graphdef(abstract) == nnx.graphdef(model)
    shapes = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for path, x in flatten_dict(nnx.to_pure_dict(nnx.state(abstract))).items()
    }
    assert shapes == plain_shapes | lora_shapes(plain_shapes, ALL)
    assert lora_shapes(plain_shapes, LoRAConfig()) == {}


def test_rank_zero_adds_nothing_and_a_second_update_is_refused():
    model = plain_model()
    graph = nnx.graphdef(model)
    add_lora(model, LoRAConfig(), 0)
    assert nnx.graphdef(model) == graph
    add_lora(model, LoRAConfig(2, targets=("k",)), 0)
    with pytest.raises(ValueError, match="k have updates already"):
        add_lora(model, LoRAConfig(2, targets=("q", "k")), 0)


# Training.


def one_step(model: VideoXL, optim: OptimSection) -> tuple[Arrays, Arrays]:
    """Trained parameters before and after a step."""
    stream, pixels = watched(model.config)
    graph, trained, frozen = split_parts(model, optim.train, optim.param_dtype)
    before = flatten_dict(jax.tree.map(np.array, trained))
    sums = add_batch(graph, trained, frozen, None, batch_streams([stream]), pixels)
    assert flatten_dict(sums["gradients"]).keys() == before.keys()
    trained = jax.tree.map(jnp.array, trained)  # the model's own must not be donated
    optimizer = Optimizer(optim, 10, 0)
    trained, *_ = update(optimizer, trained, jax.jit(optimizer.init)(trained), sums)
    return before, flatten_dict(jax.tree.map(np.array, trained))


def test_updates_alone_are_trained(trained: VideoXL):
    whole = arrays_of(trained)
    assert {part_of(path) for path in whole} == {
        *("vision", "projector", "language", "beacon", "lora")
    }
    optim = OptimSection(1e-3, 0.0, train=("lora",))
    before, after = one_step(trained, optim)
    assert before.keys() == {(*lora_path(t), name) for t in TARGETS for name in LORA_NAMES}
    for path, value in after.items():
        changed = (value != before[path]).any(axis=(1, 2))  # in every layer, but
        last = path[-2] != "beacon_q"  # no token sees what a beacon sees in the last one
        assert changed.tolist() == [True, True, last], path
    for path, value in arrays_of(trained).items():
        np.testing.assert_array_equal(value, whole[path], err_msg=str(path))

    _, others, updates = split_parts(trained, ("vision", "projector", "language", "beacon"))
    assert flatten_dict(updates).keys() == before.keys()
    assert flatten_dict(others).keys() == whole.keys() - before.keys()


def test_a_new_update_begins_to_learn():
    """Its gradient reaches lora_b at once, and lora_a from the second step on."""
    before, after = one_step(lora_model(), OptimSection(1e-3, 0.0, train=("lora",)))
    changed = {path[-1] for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"lora_b"}


# Conversion.


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
    (row,) = (row for row in table(source.config) if row.ours == (*lora_path("down"), "kernel"))
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
        changed = {**config, "lora": values} if values else {"model": config["model"]}
        (directory / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            convert_to_hf(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# A run, from end to end.

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


# On a mesh.

ON_EIGHT_DEVICES = """
import sys
import jax, numpy as np
from flax import nnx
from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig
from train.setup import make_model, read_model_config
from vxl_jax.config import LoRAConfig
from vxl_jax.sharding import make_mesh, param_placement

assert len(jax.devices()) == 8
config = TrainConfig(
    ModelSection(checkpoint=sys.argv[1]), DataSection(("x",), "x"), OptimSection(train=("lora",)),
    RunSection("x"), lora=LoRAConfig(4, targets=("q", "o", "down")),
)
sizes = read_model_config(config)
one = make_model(config, sizes)
model = make_model(config, sizes, param_placement(make_mesh(2, 2, 2), sizes))
cut = []
states = (nnx.to_flat_state(nnx.state(x)) for x in (model, one))
for (path, ours), (_, expected) in zip(*states, strict=True):
    ours, expected = ours.get_value(), expected.get_value()
    assert len(ours.addressable_shards) == 8, path
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))
    if path[-1] in ("lora_a", "lora_b"):
        cut.append((*path[-2:], ours.size // ours.addressable_shards[0].data.size))
print(sorted(cut))
"""


def test_each_device_of_a_mesh_makes_its_part_of_the_same_updates():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, str(MICRO)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [(target, name, 2) for target in ("down", "o", "q") for name in LORA_NAMES]
    assert done.stdout.strip() == str(expected)
