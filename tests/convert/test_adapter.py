"""Adapters in peft's layout: refused as a model, merged into their base, written from a run."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vxl_jax
from convert import convert_from_hf, convert_to_hf, from_hf, to_hf
from convert.sources import open_source
from tests.support.checkpoints import MICRO, run_config, tensors_in
from tests.support.lora import noisy
from train.config import ModelSection
from train.config.cli import load_config
from train.run.checkpoints import Checkpoints, Position
from train.run.setup import start_directory
from train.run.step import split_parts
from vxl_jax.checkpoints.hf_config import read_config
from vxl_jax.config import LoRAConfig
from vxl_jax.errors import CheckpointError
from vxl_jax.media.preprocessing import tile_grids
from vxl_jax.models.lora import LORA_NAMES, add_lora

PREFIX = "base_model.model."
Q = "model.layers.{}.self_attn.q_proj"
FC = "model.vision_tower.vision_tower.vision_model.encoder.layers.{}.mlp.fc1"
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "checkpoints/Video_XL",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],
    "bias": "none",
    "alpha_pattern": {},
    "rank_pattern": {},
}


def update_of(name: str, rank: int = 4, end: str = "") -> dict[str, np.ndarray]:
    """Both matrices of an update, as peft names them."""
    out, inputs = load_file(MICRO / "model.safetensors")[f"{name}.weight"].shape
    rng = np.random.default_rng(len(name) + rank)
    shapes = {"A": (rank, inputs), "B": (out, rank)}
    return {
        f"{PREFIX}{name}.lora_{side}{end}.weight": rng.normal(size=shape).astype(np.float32)
        for side, shape in shapes.items()
    }


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an adapter's folder."""

    def write(tensors: dict[str, np.ndarray], **fields: Any) -> Path:
        directory = tmp_path / "adapter"
        directory.mkdir(exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(CONFIG | fields))
        if tensors:
            save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
        return directory

    return write


# As a model.


@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_is_not_a_model_and_says_what_to_do(
    has_config: bool, adapter: Callable[..., Path], tmp_path: Path
):
    directory = adapter(update_of(Q.format(0)))
    if has_config:  # as LLaVA's training leaves it
        shutil.copy(MICRO / "config.json", directory)
        (directory / "non_lora_trainables.bin").write_bytes(b"PK")
    readers = [
        read_config,
        vxl_jax.load_network,
        vxl_jax.load,
        open_source,
        lambda path: convert_from_hf(path, tmp_path / "out"),
        lambda path: convert_to_hf(path, tmp_path / "out"),
    ]
    for reader in readers:
        with pytest.raises(CheckpointError) as error:
            reader(directory)
        first, second = str(error.value).split("\n")
        assert first.startswith(f"{directory}: holds a peft adapter of checkpoints/Video_XL (adap")
        command = f"python -m convert.from_hf checkpoints/Video_XL DST --adapter {directory}"
        assert second.strip() == command


def test_an_adapter_with_pickled_weights_is_not_a_model(adapter: Callable[..., Path]):
    directory = adapter({})
    (directory / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="holds a peft adapter"):
        vxl_jax.load_network(directory)
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors; pickle files"):
        convert_from_hf(MICRO, directory / "out", adapter=directory)


def test_a_merged_model_beside_the_configuration_of_its_adapter_is_a_model(tmp_path: Path):
    shutil.copytree(MICRO, tmp_path / "hf")
    shutil.copytree(MICRO.parent / "clip-vision", tmp_path / "hf/vision_tower")
    (tmp_path / "hf/adapter_config.json").write_text(json.dumps(CONFIG))
    read_config(tmp_path / "hf")


# Merging.


def merged_by_hand(tensors: dict[str, np.ndarray], factor: float) -> dict[str, np.ndarray]:
    """The base with updates added as peft's documentation says: W + factor B A."""
    expected = load_file(MICRO / "model.safetensors")
    for name, up in tensors.items():
        if ".lora_B" in name:
            down = tensors[name.replace(".lora_B", ".lora_A")]
            kernel = name.removeprefix(PREFIX).partition(".lora_B")[0] + ".weight"
            expected[kernel] = expected[kernel] + np.float32(factor) * (up @ down)
    return expected


@pytest.mark.parametrize(
    ("fields", "factor"), [({}, 6 / 4), ({"use_rslora": True}, 6 / 2), ({"lora_alpha": 1}, 1 / 4)]
)
@pytest.mark.parametrize("end", ["", ".default"])
def test_an_adapter_is_merged_into_its_base(
    fields: dict[str, Any], factor: float, end: str, adapter: Callable[..., Path], tmp_path: Path
):
    tensors: dict[str, np.ndarray] = {}
    for name in (Q.format(0), Q.format(2), "model.mm_projector.2", "lm_head", FC.format(1)):
        tensors |= update_of(name, end=end)
    tensors |= update_of(FC.format(3), end=end)  # a layer that is never run
    directory = adapter(tensors, **fields)
    convert_from_hf(MICRO, tmp_path / "out", adapter=directory)
    convert_to_hf(tmp_path / "out", tmp_path / "back")
    ours, before = tensors_in(tmp_path / "back"), tensors_in(MICRO)
    for name, expected in merged_by_hand(tensors, factor).items():
        if name == f"{FC.format(3)}.weight":
            expected = before[name]
        np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    changed = [name for name in before if not np.array_equal(ours[name], before[name])]
    assert len(changed) == 5


def test_modules_that_were_trained_whole_take_the_place_of_the_bases(
    adapter: Callable[..., Path], tmp_path: Path
):
    """In the base's dtype."""
    convert_to_hf(MICRO, tmp_path / "base", dtype="bfloat16")
    names = [f"model.mm_projector.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
    held = tensors_in(MICRO)
    tensors = {f"{PREFIX}{name}": 3 * held[name] for name in names}
    directory = adapter(tensors | update_of(Q.format(1)), modules_to_save=["mm_projector"])
    convert_from_hf(tmp_path / "base", tmp_path / "out", adapter=directory)
    convert_to_hf(tmp_path / "out", tmp_path / "back")
    ours = tensors_in(tmp_path / "back")
    for name in names:
        np.testing.assert_array_equal(ours[name], (3 * held[name]).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"lora_alpha": "6"}, "lora_alpha is '6'; it must be a number"),
    ],
)
def test_an_adapter_that_is_applied_in_another_way_is_refused(
    fields: dict[str, Any], message: str, adapter: Callable[..., Path], tmp_path: Path
):
    directory = adapter(update_of(Q.format(0)), **fields)
    with pytest.raises(CheckpointError, match=message):
        convert_from_hf(MICRO, tmp_path / "out", adapter=directory)
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit_the_base_are_listed(adapter: Callable[..., Path], tmp_path: Path):
    good = update_of(Q.format(0))
    a, b = sorted(good)
    wrong = {
        a: good[a][:, :-1],
        b: good[b],
        f"{PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight": good[a],
        f"{PREFIX}model.embed_tokens.lora_embedding_A": good[a],
        f"{PREFIX}model.norm.weight": np.ones(3, np.float32),
        f"{PREFIX}{Q.format(1)}.lora_A.weight": good[a],
        f"{PREFIX}{Q.format(1)}.lora_magnitude_vector": good[a][0],
    }
    with pytest.raises(CheckpointError) as error:
        convert_from_hf(MICRO, tmp_path / "out", adapter=adapter(wrong))
    text = str(error.value)
    assert "6 problems" in text
    for part in ("layers.9.self_attn.q_proj.lora_A", "lora_embedding_A", "lora_magnitude_vector"):
        assert f"{part}" in text
    assert f"the update of {Q.format(0)}.weight (64, 64) has shapes" in text
    assert f"the update of {Q.format(1)}.weight (64, 64) has shapes" in text
    assert f"tensor {PREFIX}model.norm.weight has shape (3,), the base has (64,)" in text


def test_weights_of_an_adapter_that_are_not_finite_are_refused(
    adapter: Callable[..., Path], tmp_path: Path
):
    tensors = update_of(Q.format(0))
    next(iter(tensors.values()))[0, 0] = np.nan
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A.* has NaN or infinite weights"):
        convert_from_hf(MICRO, tmp_path / "out", adapter=adapter(tensors))


# From a run.


def a_run(
    run_dir: Path, base: Path, lora: LoRAConfig, parts: tuple[Any, ...], dtype: str = "float32"
) -> None:
    config = run_config(ModelSection(checkpoint=str(base)))
    config = replace(config, lora=lora, optim=replace(config.optim, train=parts))
    config = replace(config, data=replace(config.data, max_tiles=5, time_prompt=True))
    config = replace(config, run=replace(config.run, run_dir=str(run_dir)))
    start_directory(config, run_dir)
    with closing(Checkpoints(run_dir, config)) as checkpoints:
        model = vxl_jax.load_network(base)
        add_lora(model, lora, 0)
        _, trained, _ = split_parts(model, parts, dtype)
        flat = jax.tree_util.tree_flatten_with_path(trained)[0]
        changed = noisy(
            {tuple(x.key for x in path): leaf for path, leaf in flat},
            (*LORA_NAMES, "kernel", "bias", "beacon_embed"),
        )
        leaves = [changed[tuple(x.key for x in path)] for path, _ in flat]
        trained = jax.tree.unflatten(jax.tree.structure(trained), leaves)
        checkpoints.save(1, trained, {}, Position(0, ""))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_is_written_as_an_adapter_that_peft_can_read(dtype: str, tmp_path: Path):
    lora = LoRAConfig(3, 7.0, ("q", "down", "beacon_v"))
    a_run(tmp_path / "run", MICRO, lora, ("lora", "projector", "beacon"), dtype)
    convert_to_hf(tmp_path / "run", tmp_path / "adapter", adapter=True)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "vxl_model.json")
    }
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 7)
    assert config["base_model_name_or_path"] == str(MICRO)
    held = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {x.dtype.name for x in held.values()} == {dtype}
    before = tensors_in(MICRO)
    assert_peft_finds(config, held, before)
    saved = ["beacon_embed_tokens", "beacon_k_proj", "beacon_q_proj", "beacon_v_proj"]
    assert config["modules_to_save"] == [*saved, "mm_projector"]

    convert_from_hf(MICRO, tmp_path / "merged", adapter=tmp_path / "adapter")
    convert_to_hf(tmp_path / "merged", tmp_path / "back")
    convert_to_hf(tmp_path / "run", tmp_path / "whole")
    merged = read_config(tmp_path / "merged")
    assert merged == read_config(tmp_path / "whole")
    assert merged.preprocessing.grids == tile_grids(2, 5)
    assert merged.preprocessing.time_prompt
    fields = json.loads((tmp_path / "adapter/vxl_model.json").read_text())
    for change, message in (
        ({"num_hidden_layers": 1}, "has num_hidden_layers, which a run does not change"),
        ({"beacon_ratio": [1000]}, r"vxl_model.json: Compression.ratios \[1000\]"),
        ({"image_aspect_ratio": "crop"}, "only 'anyres' or 'square' or 'pad' is implemented"),
    ):
        (tmp_path / "adapter/vxl_model.json").write_text(json.dumps(fields | change))
        with pytest.raises(CheckpointError, match=message):
            convert_from_hf(MICRO, tmp_path / "none", adapter=tmp_path / "adapter")
    assert not (tmp_path / "none").exists()
    ours, expected = tensors_in(tmp_path / "back"), tensors_in(tmp_path / "whole")
    tolerance = 1e-5 if dtype == "float32" else 1e-2  # beacon_v, trained and with an update
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
    changed = [name for name in before if not np.array_equal(ours[name], before[name])]
    assert len(changed) == 2 * 3 + 6 * 3 + 1 + 4  # q, down; beacons with bias; the projector


def assert_peft_finds(
    config: dict[str, Any], held: dict[str, np.ndarray], base: dict[str, np.ndarray]
) -> None:
    """What peft does with its configuration: `target_modules` is matched with whole names of
    modules, `modules_to_save` with their ends; each tensor belongs to a module that it found.
    """
    import re

    modules = {name.rpartition(".")[0] for name in base}
    modules |= {name.rpartition(".")[0] for name in modules}
    targets = {name for name in modules if re.fullmatch(config["target_modules"], name)}
    saved = [n for n in modules if any(n.endswith(end) for end in config["modules_to_save"] or ())]
    expected = {f"{PREFIX}{m}.lora_{side}.weight" for m in targets for side in "AB"}
    expected |= {
        PREFIX + name for name in base if any(name.startswith(f"{module}.") for module in saved)
    }
    assert held.keys() == expected
    for name, value in held.items():
        kernel = re.sub(r"\.lora_[AB]", "", name).removeprefix(PREFIX)
        out, *inputs = base[kernel].shape
        r = config["r"]
        shapes = {"A": (r, *inputs), "B": (out, r)}
        side = re.search(r"lora_([AB])", name)
        assert value.shape == (shapes[side[1]] if side else base[kernel].shape), name


def test_updates_alone_have_no_modules_that_were_saved(tmp_path: Path):
    a_run(tmp_path / "run", MICRO, LoRAConfig(2, targets=("k", "beacon_q")), ("lora",))
    convert_to_hf(tmp_path / "run", tmp_path / "adapter", adapter=True, dtype="bfloat16")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    held = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert config["modules_to_save"] is None
    assert {x.dtype.name for x in held.values()} == {"bfloat16"}
    assert_peft_finds(config, held, tensors_in(MICRO))
    convert_to_hf(tmp_path / "run", tmp_path / "adapter", adapter=True, overwrite=True)


def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path):
    a_run(tmp_path / "run", MICRO, LoRAConfig(2, targets=("k",)), ("lora", "vision"))
    with pytest.raises(CheckpointError, match="has trained vision as a whole"):
        convert_to_hf(tmp_path / "run", tmp_path / "out", adapter=True)
    with pytest.raises(CheckpointError, match=r"written from a run with lora\.rank and model"):
        convert_to_hf(MICRO, tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_the_repository_can_be_an_adapter():
    config = load_config(["--config", "lora_7b"]).config
    assert set(config.optim.train) == {"lora", "projector", "beacon"}


def test_the_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a_run(tmp_path / "run", MICRO, LoRAConfig(2, targets=("k",)), ("lora",))
    out = str(tmp_path / "adapter")
    assert to_hf.main([str(tmp_path / "run"), out, "--adapter", "--base", str(MICRO)]) == 0
    assert from_hf.main([str(MICRO), str(tmp_path / "merged"), "--adapter", out]) == 0
    assert from_hf.main([out, str(tmp_path / "none")]) == 2
    assert "holds a peft adapter" in capsys.readouterr().err
