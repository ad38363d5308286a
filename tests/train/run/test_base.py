"""What a run began with: noted by digest, found where it was, and compared when it goes on."""

import json
import os
import shutil
from contextlib import closing
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import train.run.base
import train.run.checkpoints
import vxl_jax
from convert import convert_from_hf, convert_to_hf
from convert.writing import published_config, write_tower
from tests.support.checkpoints import GOLDEN, MICRO, run_config, tensors_in
from tests.support.runs import run
from train.config import ModelSection, TrainConfig
from train.config.cli import load_config
from train.config.resume import config_changes, config_to_dict
from train.run.base import BASE, describe_base, read_about, versions
from train.run.checkpoints import Checkpoints, Position
from train.run.setup import random_model, start_directory
from train.run.step import split_parts
from vxl_jax.checkpoints.digest import weights_digest
from vxl_jax.checkpoints.json_files import write_json
from vxl_jax.checkpoints.names import to_published
from vxl_jax.errors import CheckpointError, ConfigError
from vxl_jax.presets import demo

BIAS = "model.layers.1.self_attn.beacon_k_proj.bias"
UNUSED = "model.vision_tower.vision_tower.vision_model.post_layernorm.bias"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint in the published layout."""
    shutil.copytree(GOLDEN, tmp_path / "model", ignore=shutil.ignore_patterns("golden*"))
    return tmp_path / "model" / "hf"


def change_one(directory: Path, name: str = BIAS) -> None:
    """One weight becomes another number."""
    path = directory / "model.safetensors"
    held = load_file(path)
    held[name].flat[0] += 1
    save_file(held, path, {"format": "pt"})


# Digests.


def test_a_digest_is_that_of_the_weights_however_they_are_stored(base: Path, tmp_path: Path):
    before = weights_digest(base)
    convert_to_hf(base, tmp_path / "sharded", shard_size="100KB")
    convert_from_hf(base, tmp_path / "converted")
    assert {weights_digest(tmp_path / name) for name in ("sharded", "converted")} == {before}
    convert_to_hf(base, tmp_path / "bf16", dtype="bfloat16")
    convert_from_hf(tmp_path / "bf16", tmp_path / "converted bf16")
    other = weights_digest(tmp_path / "bf16")
    assert other == weights_digest(tmp_path / "converted bf16") != before


@pytest.mark.parametrize("name", [BIAS, "lm_head.weight", "model.mm_projector.2.weight"])
def test_one_weight_changes_the_digest(name: str, base: Path):
    before = weights_digest(base)
    change_one(base, name)
    assert weights_digest(base) != before


def test_a_weight_that_is_never_read_does_not_change_the_digest(base: Path):
    before = weights_digest(base)
    change_one(base, UNUSED)
    assert weights_digest(base) == before


def test_weights_are_read_again_only_when_files_have_changed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read = []

    def count(directory: Path, progress: Any) -> str:
        read.append(directory)
        return weights_digest(directory, progress)

    monkeypatch.setattr(train.run.base, "weights_digest", count)
    note, weights = tmp_path / "note.json", base / "model.safetensors"
    found = [describe_base(base, base, note) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert len(read) == 1
    times = weights.stat()
    change_one(base)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` does
    assert describe_base(base, base, note)["weights"] != found[0]["weights"]
    note.write_text("{")
    describe_base(base, base, note)
    assert len(read) == 3


# A run that goes on.


def a_config(run_dir: Path, section: ModelSection, **changes: Any) -> TrainConfig:
    config = run_config(section)
    return replace(config, run=replace(config.run, run_dir=str(run_dir), **changes))


def save_step(config: TrainConfig, step: int = 1) -> None:
    """What training the projector leaves, twice what it was."""
    run_dir = Path(config.run.run_dir)
    start_directory(config, run_dir)
    config = config.resolved()
    assert config.model.checkpoint is not None
    with closing(Checkpoints(run_dir, config)) as checkpoints:
        _, trained, _ = split_parts(vxl_jax.load_network(config.model.checkpoint), ("projector",))
        checkpoints.save(step, jax.tree.map(lambda x: 2 * x, trained), {}, Position(0, ""))


def open_again(config: TrainConfig) -> None:
    """As `train.finetune` does."""
    run_dir = Path(config.run.run_dir)
    start_directory(config, run_dir)
    Checkpoints(run_dir, config.resolved()).close()


def test_a_run_notes_its_base_and_refuses_another(base: Path, tmp_path: Path):
    config = a_config(tmp_path / "run", ModelSection(checkpoint=str(base)))
    save_step(config)
    noted = read_about(tmp_path / "run/checkpoints", 1)["base"]
    assert noted["weights"] == weights_digest(base)
    assert noted["directory"] == str(base)
    assert noted["model"]["language.rope_theta"] == 1e6
    open_again(config)
    change_one(base)
    with pytest.raises(ConfigError, match=rf"{base} is not what it was .its weights are others"):
        open_again(config)
    with pytest.raises(CheckpointError, match=r"its weights are others\); restore what the run"):
        convert_to_hf(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_that_config_json_gives_are_part_of_the_base(base: Path, tmp_path: Path):
    config = a_config(tmp_path / "run", ModelSection(checkpoint=str(base)))
    save_step(config)
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-5}))
    message = "language.norm_eps was 1e-06 and is 1e-05"
    with pytest.raises(ConfigError, match=message):
        open_again(config)
    with pytest.raises(CheckpointError, match=message):
        convert_to_hf(tmp_path / "run", tmp_path / "out")


def test_another_tokenizer_in_its_place_is_refused(base: Path, tmp_path: Path, demo_tokenizer: Any):
    demo_tokenizer.save_pretrained(tmp_path / "tokenizer")
    section = ModelSection(checkpoint=str(base), tokenizer=str(tmp_path / "tokenizer"))
    config = a_config(tmp_path / "run", section)
    save_step(config)
    path = tmp_path / "tokenizer/tokenizer.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values, indent=1))
    open_again(config)
    a, b = list(values["model"]["vocab"])[:2]
    vocab = values["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"tokenizer has another vocabulary than it had"):
        open_again(config)


def forget(run_dir: Path, step: int = 1) -> None:
    """Make a run one of a version that noted nothing."""
    path = run_dir / f"checkpoints/{step}/about/metadata"
    about = json.loads(path.read_text())
    del about["base"]
    path.write_text(json.dumps(about))
    (run_dir / BASE).unlink()


def test_a_run_from_before_goes_on_and_notes_its_base(base: Path, tmp_path: Path):
    config = a_config(tmp_path / "run", ModelSection(checkpoint=str(base)), keep_checkpoints=2)
    save_step(config)
    forget(tmp_path / "run")
    convert_to_hf(tmp_path / "run", tmp_path / "out")
    save_step(config, 2)
    assert read_about(tmp_path / "run/checkpoints", 2)["base"]["weights"] == weights_digest(base)
    change_one(base)
    with pytest.raises(ConfigError, match="its weights are others"):
        open_again(config)


def test_a_base_that_has_moved_needs_the_switch_and_the_same_weights(base: Path, tmp_path: Path):
    config = a_config(tmp_path / "run", ModelSection(checkpoint=str(base)))
    save_step(config)
    convert_from_hf(base, tmp_path / "moved")
    shutil.rmtree(base)
    there = a_config(tmp_path / "run", ModelSection(checkpoint=str(tmp_path / "moved")))
    with pytest.raises(ConfigError, match=r"model\.checkpoint is .* or --moved if the same files"):
        open_again(there)
    moved = replace(there, run=replace(there.run, moved=True, keep_checkpoints=2))
    open_again(moved)
    with pytest.raises(CheckpointError, match=r"model\.checkpoint .* is not a directory .*--base"):
        convert_to_hf(tmp_path / "run", tmp_path / "out")
    convert_to_hf(tmp_path / "run", tmp_path / "out", base=tmp_path / "moved")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "out", other)  # with the trained projector
    with pytest.raises(CheckpointError, match="its weights are others"):
        convert_to_hf(tmp_path / "run", tmp_path / "none", base=other)
    away = ModelSection(checkpoint=str(other))
    with pytest.raises(ConfigError, match="its weights are others"):
        open_again(replace(moved, model=away))
    save_step(moved, 2)
    convert_to_hf(tmp_path / "run", tmp_path / "found")  # where the last step has noted it
    forget(tmp_path / "run", 2)
    with pytest.raises(ConfigError, match=r"noted no digest of model\.checkpoint"):
        open_again(moved)


def test_what_the_switch_allows():
    config = run_config(ModelSection(checkpoint="a"))
    saved = config_to_dict(config)
    there = replace(
        config,
        model=ModelSection(checkpoint="b"),
        data=replace(config.data, train_json=("b.json",), media_root="elsewhere"),
    )
    assert len(config_changes(there, saved)) == 3
    moved = replace(there, run=replace(there.run, moved=True))
    assert config_changes(moved, saved) == []
    changed = replace(moved, data=replace(moved.data, batch_size=7))
    assert config_changes(changed, saved) == ["data.batch_size is 7, it was 1"]
    random = replace(moved, model=ModelSection(tokenizer="t"))
    assert [x.split()[0] for x in config_changes(random, saved)] == [
        "model.checkpoint",
        "model.tokenizer",
    ]
    assert load_config(["--config", "demo", "--moved"]).config.run.moved
    assert not load_config(["--config", "demo"]).config.run.moved


# Where the base is.


def export(run_dir: str | Path, out: Path) -> None:
    """See that a run is exported over its base."""
    convert_to_hf(run_dir, out)
    name = "model.mm_projector.0.bias"
    np.testing.assert_array_equal(tensors_in(out)[name], 2 * tensors_in(MICRO)[name])


def test_a_base_in_the_runs_directory_is_exported(base: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    shutil.move(base.parent, run_dir)
    save_step(a_config(run_dir, ModelSection(checkpoint="{run_dir}/hf")))
    export(run_dir, tmp_path / "out")
    shutil.move(run_dir, tmp_path / "elsewhere")
    export(tmp_path / "elsewhere", tmp_path / "again")


def test_a_relative_base_is_found_from_another_directory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    save_step(a_config(Path("runs/a"), ModelSection(checkpoint="model/hf")))
    export("runs/a", tmp_path / "0")
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    export("../runs/a", tmp_path / "1")
    there = a_config(Path("../runs/a"), ModelSection(checkpoint="../model/hf"), moved=True)
    save_step(there, 2)
    forget(tmp_path / "runs/a", 2)
    export(tmp_path / "runs/a", tmp_path / "2")  # from the place of the run
    shutil.move(tmp_path / "runs/a", other / "a")
    with pytest.raises(CheckpointError, match=r"model\.checkpoint .model/hf. is not a directory"):
        convert_to_hf(other / "a", tmp_path / "3")
    monkeypatch.chdir(tmp_path)
    export(other / "a", tmp_path / "4")


def test_a_destination_that_is_the_base_is_refused(base: Path, tmp_path: Path):
    save_step(a_config(tmp_path / "run", ModelSection(checkpoint=str(base))))
    with pytest.raises(CheckpointError, match="which is read; choose another"):
        convert_to_hf(tmp_path / "run", base, overwrite=True)
    assert (base / "model.safetensors").is_file()


def test_a_head_of_tied_embeddings_that_were_trained_is_not_exported(base: Path, tmp_path: Path):
    """It would be the embedding as it was, and would be taken for a head with its own weights."""
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    held = load_file(base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].copy()
    save_file(held, base / "model.safetensors", {"format": "pt"})
    config = a_config(tmp_path / "run", ModelSection(checkpoint=str(base)))
    start_directory(config, tmp_path / "run")
    with closing(Checkpoints(tmp_path / "run", config)) as checkpoints:
        _, trained, _ = split_parts(vxl_jax.load_network(base), ("language",))
        checkpoints.save(1, jax.tree.map(lambda x: 2 * x, trained), {}, Position(0, ""))
    convert_to_hf(tmp_path / "run", tmp_path / "out")
    assert "lm_head.weight" not in tensors_in(tmp_path / "out")
    assert vxl_jax.load_network(tmp_path / "out").config.language.tie_embeddings


# Versions.


def test_a_checkout_that_is_not_installed_has_its_projects_version(
    monkeypatch: pytest.MonkeyPatch,
):
    def missing(name: str) -> str:
        if name in ("vxl-jax", "optax"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(train.run.base, "version", missing)
    found = versions()
    text = (Path(__file__).parents[3] / "vxl_jax/version.py").read_text()
    assert f'"{found["vxl-jax"]}"' in text
    assert (found["optax"], found["jax"]) == (None, "1.0")


# Whole runs.


def make_base(directory: Path, tokenizer: Path, seed: int) -> Path:
    """A checkpoint of the demo's size with random weights."""
    config = demo()
    shutil.copytree(tokenizer, directory)
    write_json(directory / "config.json", published_config(config))
    write_tower(config.vision, directory)
    params = nnx.to_pure_dict(nnx.state(random_model(config, seed)))
    save_file(to_published(params, config), directory / "model.safetensors", {"format": "pt"})
    return directory


def test_a_run_goes_on_where_all_its_files_have_moved(folder: Path, tmp_path: Path):
    """And arrives where one that stayed arrives."""
    base = make_base(tmp_path / "base", folder / "tokenizer", 0)
    options = ["--lora.rank", "2", "--optim.train", "lora", "--optim.accumulate", "1"]
    options += ["--data.eval-json", "--run.save-every", "1"]

    def train_to(step: int, name: str, *more: str) -> Any:
        return run(folder, tmp_path / name, *options, "--run.max-steps", str(step), *more)

    at = ["--model.checkpoint", str(base)]
    assert train_to(2, "stayed", *at).status == 0
    assert train_to(1, "run", *at).status == 0
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.move(base, moved / "base")
    shutil.copy(folder / "train.json", moved / "train.json")
    shutil.copytree(folder / "media", moved / "media")
    there = ["--model.checkpoint", f"{moved}/base", "--data.train-json", f"{moved}/train.json"]
    there += ["--data.media-root", f"{moved}/media"]
    assert "or --moved if the same files are in another place" in train_to(2, "run", *there).error
    went_on = train_to(2, "run", *there, "--moved")
    assert went_on.status == 0, went_on.err
    shutil.move(moved / "base", base)
    assert train_to(2, "stayed", *at).summary["params_sha256"] == went_on.summary["params_sha256"]
    shutil.rmtree(base)
    make_base(base, folder / "tokenizer", 1)
    error = train_to(3, "stayed", *at).error
    assert f"model.checkpoint {base} is not what it was (its weights are others)" in error
    records = json.loads((moved / "train.json").read_text())
    (moved / "train.json").write_text(json.dumps(records[::-1]))
    shutil.rmtree(base)
    make_base(moved / "base", folder / "tokenizer", 0)
    assert "other training samples" in train_to(3, "run", *there, "--moved").error
