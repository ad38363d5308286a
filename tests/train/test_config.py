"""The training configuration: the command line, refusals, published recipes, resume checks."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from train.config import (
    DataSection,
    MeshSection,
    ModelSection,
    OptimSection,
    RunSection,
    TrainConfig,
)
from train.config.cli import load_config
from train.config.resume import CHANGEABLE, config_changes, config_to_dict, save_config
from vxl_jax.config import LoRAConfig
from vxl_jax.errors import ConfigError
from vxl_jax.presets import PRESETS

FIELDS = [
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(TrainConfig)
    for field in dataclasses.fields(section.type)  # type: ignore[arg-type]
]

MINIMAL = TrainConfig(
    model=ModelSection(preset="tiny", tokenizer="tok"),
    data=DataSection(train_json=("a.json",), media_root="media"),
    optim=OptimSection(),
    run=RunSection(run_dir="runs/x"),
)


def _refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one message with which a command line is refused, unwrapped."""
    with pytest.raises(SystemExit) as stop:
        load_config(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return re.sub(r"[\s│╭╮╰╯─]+", " ", captured.err)


# Overrides.


def test_the_default_is_the_demo():
    loaded = load_config([])
    assert loaded.config.model.preset == "demo"
    assert loaded.prepare is not None
    assert load_config(["--config", "pretrain"]).prepare is None


def test_overrides_have_the_types_of_their_fields():
    config = load_config(
        [
            "--run-dir", "elsewhere",
            "--model.ratios", "4", "8",
            "--model.tokenizer", "tok",
            "--model.dtype", "bfloat16",
            "--data.train_json", "a.json", "b.json", "c.json",
            "--data.epochs", "3",
            "--data.sequential", "False",
            "--optim.learning-rate=1e-4",
            "--optim.train", "projector", "beacon",
            "--run.max-steps", "7",
            "--lora.alpha", "8",
            "--run.eval_ratio", "None",
        ]
    ).config  # fmt: skip
    assert config.run.run_dir == "elsewhere"
    assert config.model.ratios == (4, 8)
    assert config.model.tokenizer == "tok"
    assert config.model.dtype == "bfloat16"
    assert config.data.train_json == ("a.json", "b.json", "c.json")
    assert config.data.epochs == (3,)
    assert config.data.sequential is False
    assert config.optim.learning_rate == 1e-4
    assert config.optim.train == ("projector", "beacon")
    assert config.run.max_steps == 7
    assert config.run.eval_ratio is None
    assert config.lora == LoRAConfig(alpha=8.0)


def test_lora_on_the_command_line():
    argv = ["--lora.rank", "64", "--lora.targets", "q", "beacon_q", "--optim.train", "lora"]
    assert load_config(argv).config.lora == LoRAConfig(64, targets=("q", "beacon_q"))


def test_no_ratio_means_no_compression():
    argv = ["--model.ratios", "--optim.train", "language"]
    assert load_config(argv).config.model.ratios == ()
    assert load_config(["--model.ratios", "None"]).config.model.ratios is None


def test_run_dir_replaces_its_mark_in_paths():
    config = load_config(["--run-dir", "/r"]).config
    assert config.data.media_root.startswith("{run_dir}/")
    resolved = config.resolved()
    assert resolved.data.media_root.startswith("/r/")
    assert all(path.startswith("/r/") for path in resolved.data.train_json)
    assert resolved.model.tokenizer is not None
    assert resolved.model.tokenizer.startswith("/r/")
    assert "{run_dir}" not in json.dumps(config_to_dict(resolved))


def test_help_lists_every_field_with_type_default_and_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")  # a wide terminal shows options side by side
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    assert stop.value.code == 0
    text = re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().out)
    for name in [*FIELDS, "config", "run_dir"]:
        option = f" --{name.replace('_', '-')} "
        assert option in text
        type_and_meaning, default = text.split(option, 1)[1].split("(default: ", 1)
        assert len(type_and_meaning.split()) > 3, option
        section, _, field = name.rpartition(".")
        empty = bool(section) and getattr(getattr(load_config([]).config, section), field) == ()
        assert default.startswith(")") == empty, option


# Refusals.


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--optim.learning-rte", "--optim.learning-rate"),
        ("--optim.learning_rates=3", "--optim.learning-rate"),
        ("--learning-rate", "--optim.learning-rate"),
        ("--model.accumulate", "--optim.accumulate"),
        ("--rundir", "--run-dir"),
        ("--confi", "--config"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(
    option: str, nearest: str, capsys: pytest.CaptureFixture[str]
):
    assert f"did you mean {nearest}?" in _refusal(capsys, option, "1")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--optim.learning-rate abc", "optim.learning-rate"),
        ("--optim.train tower", "'vision', 'projector', 'language', 'beacon'"),
        ("--data.template chatty", "data.template"),
        ("--run.max-steps", "run.max-steps"),
        ("--optim.learning-rate 0", "optim.learning_rate is 0.0; it must be more than 0"),
        ("--optim.optimizer sgd", "'adamw', 'adafactor'"),
        (
            "--optim.train projector --optim.vision-learning-rate 1e-6",
            "optim.vision_learning_rate is 1e-06; it must be None where optim.train does not have "
            "'vision'; it is ('projector',)",
        ),
        ("--model.preset huge", "model.preset is 'huge'; it must be one of video_xl_7b"),
        ("--model.ratios 4 100", "model.ratios [100] must be between 1 and the window 16"),
        ("--model.ratios", "optim.train has 'beacon', but model.ratios is ()"),
        ("--model.pool-stride 9", "model.pool_stride 9 is larger than the tower's grid"),
        ("--data.epochs 1 2 3", "data.epochs is (1, 2, 3); it must be one number"),
        ("--lora.rank 8", "lora.rank is 8; to train with LoRA, 'lora' must be in optim.train"),
        ("--optim.train lora", "optim.train is ('lora',) and lora.rank is 0; to train with LoRA"),
        (
            "--optim.train lora --lora.rank 8 --lora.targets q beacon_q --model.ratios",
            "lora.targets has beacon_q, but model.ratios is ()",
        ),
        ("--lora.targets head", "'beacon_q', 'beacon_k', 'beacon_v'"),
        ("extra", "extra"),
        ("--config", "--config"),
    ],
)
def test_a_bad_value_is_refused(argv: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert message in _refusal(capsys, *argv.split())


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "tokenizer", None),
        ("model", "ratios", (4, 0)),
        ("model", "pool_stride", 0),
        ("data", "train_json", ()),
        ("data", "epochs", ()),
        ("data", "epochs", (0,)),
        ("data", "min_tiles", 0),
        ("data", "max_tiles", 1),
        ("data", "max_frames", 0),
        ("data", "video_fps", 0.0),
        ("data", "max_length", 0),
        ("data", "batch_size", 0),
        ("data", "shapes", 0),
        ("data", "workers", -1),
        ("data", "cache_mb", -1),
        ("data", "max_bad_share", 1.5),
        ("optim", "learning_rate", float("nan")),
        ("optim", "warmup_share", 1.0),
        ("optim", "weight_decay", -0.1),
        ("optim", "b1", 1.0),
        ("optim", "b2", -0.1),
        ("optim", "clip_norm", 0.0),
        ("optim", "accumulate", 0),
        ("optim", "train", ()),
        ("optim", "vision_learning_rate", 0.0),
        ("optim", "beacon_learning_rate", float("nan")),
        ("optim", "lora_learning_rate", 1e-4),  # not trained
        ("run", "run_dir", ""),
        ("run", "seed", -1),
        ("run", "max_steps", 0),
        ("run", "log_every", 0),
        ("run", "save_every", 0),
        ("run", "keep_checkpoints", 0),
        ("run", "answers_shown", -1),
        ("run", "eval_batch_size", 0),
        ("run", "max_new_tokens", 0),
        ("run", "eval_ratio", 0),
        ("lora", "rank", -1),
        ("lora", "alpha", 0.0),
        ("lora", "alpha", float("nan")),
        ("lora", "targets", ()),
        ("lora", "targets", ("q", "q")),
        ("lora", "targets", ("q", "head")),
        ("run", "eval_every", 0),
        ("run", "keep_every", 0),
        ("run", "keep_every", 750),  # save_every is 500
        ("run", "keep_best", -1),
        ("run", "keep_best", 1),  # of what no one finds out
        ("mesh", "data", 0),
        ("mesh", "fsdp", 0),
        ("mesh", "tensor", 0),
    ],
)
def test_an_impossible_value_is_refused_by_name(section: str, name: str, value: Any):
    with pytest.raises(ConfigError, match=rf"^{section}\.{name} is "):
        dataclasses.replace(getattr(MINIMAL, section), **{name: value})


# Configurations by name and by file.


def test_an_unknown_configuration_is_refused_with_the_list(capsys: pytest.CaptureFixture[str]):
    message = _refusal(capsys, "--config", "dmo")
    names = "demo, demo_llava, finetune_image, finetune_video, full_7b, llava_video_7b, "
    assert f"beacon_7b, {names}llava_video_lora_7b, lora_7b, pretrain" in message


def test_a_configuration_can_be_a_file(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\n"
        "from configs.demo import CONFIG as DEMO\n"
        "optim = dataclasses.replace(DEMO.optim, accumulate=3)\n"
        "CONFIG = dataclasses.replace(DEMO, optim=optim)\n"
        "def prepare(config):\n"
        "    print(config.run.run_dir)\n"
    )
    loaded = load_config(["--config", str(file), "--run.seed", "5"])
    assert loaded.config.optim.accumulate == 3
    assert loaded.config.run.seed == 5
    assert loaded.prepare is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "has no CONFIG"),
        ("CONFIG = {}", "CONFIG of type dict"),
        ("CONFIG = (", "SyntaxError"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        (
            "from train.config import OptimSection\nOptimSection(accumulate=0)",
            "optim.accumulate is 0",
        ),
        (None, "there is no such file"),
    ],
)
def test_a_file_without_a_configuration_is_refused(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
    refusal = _refusal(capsys, "--config", str(file))
    assert message in refusal
    assert "mine.py" in refusal


@pytest.mark.parametrize("name", ["demo", "pretrain", "finetune_image", "finetune_video"])
def test_a_configuration_begins_with_the_command_to_run_it(name: str):
    module = __import__(f"configs.{name}", fromlist=["__doc__"])
    assert f"python -m train.finetune --config {name} --run-dir runs/{name}\n" in module.__doc__
    assert name in load_config(["--config", name]).config.run.run_dir


def test_published_recipes_have_the_published_numbers():
    def numbers(name: str) -> tuple[Any, ...]:
        config = load_config(["--config", name]).config
        model = PRESETS[config.model.preset](**config.model.changes())
        assert model.vision == PRESETS["video_xl_7b"]().vision
        assert model.language == PRESETS["video_xl_7b"]().language
        assert (model.window, model.dtype) == (1440, "bfloat16")
        assert (config.data.max_length, config.data.video_fps) == (32768, 1.0)
        assert config.data.max_tiles == 49
        assert (config.optim.warmup_share, config.optim.weight_decay) == (0.03, 0.0)
        return (
            set(config.optim.train),
            config.optim.learning_rate,
            (config.data.batch_size, config.optim.accumulate),
            config.data.epochs,
            model.ratios,
            model.layout.count(1),
            (config.data.template, config.data.image_mode),
            config.data.max_frames,
        )

    everything = {"vision", "projector", "language", "beacon"}
    chat = ("chat", "anyres")
    assert numbers("pretrain") == (
        {"projector"}, 5e-4, (8, 4), (1,), (), 576, ("caption", "square"), 4,
    )  # fmt: skip
    assert numbers("finetune_image")[:-1] == (
        everything, 1e-5, (1, 8), (1,), (2, 4, 8, 12, 16), 144, chat,
    )  # fmt: skip
    assert numbers("finetune_video") == (
        everything, 1e-5, (1, 8), (3,), (2, 4, 8), 144, chat, 128,
    )  # fmt: skip


# Resume.


def test_a_saved_configuration_is_the_same(tmp_path: Path):
    save_config(MINIMAL, tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved == config_to_dict(MINIMAL)
    assert config_changes(MINIMAL, saved) == []


def test_differences_that_change_the_result_are_named():
    saved = config_to_dict(MINIMAL)
    optim = dataclasses.replace(MINIMAL.optim, learning_rate=1.0)
    data = dataclasses.replace(MINIMAL.data, train_json=("a.json", "b.json"), workers=7)
    run = dataclasses.replace(MINIMAL.run, max_steps=3, log_every=1, run_dir="moved")
    mesh = MeshSection(data=2, fsdp=2, tensor=2)
    changed = dataclasses.replace(MINIMAL, optim=optim, data=data, run=run, mesh=mesh)
    assert config_changes(changed, saved) == [
        "data.train_json is ['a.json', 'b.json'], it was ['a.json']",
        "optim.learning_rate is 1.0, it was 1e-05",
    ]


def test_a_field_that_only_one_side_has_is_a_difference():
    saved = config_to_dict(MINIMAL)
    saved["optim"]["schedule"] = "linear"
    del saved["data"]["media_root"]
    assert config_changes(MINIMAL, saved) == [
        "data.media_root is 'media', it was None",
        "optim.schedule is None, it was 'linear'",
    ]


def test_a_field_that_is_new_since_had_its_default():
    saved = config_to_dict(MINIMAL)
    del saved["lora"], saved["run"]["seed"]
    assert config_changes(MINIMAL, saved) == []
    optim = dataclasses.replace(MINIMAL.optim, train=("lora",))
    changed = dataclasses.replace(MINIMAL, optim=optim, lora=LoRAConfig(8, targets=("q", "v")))
    everything = ["vision", "projector", "language", "beacon"]
    assert config_changes(changed, saved) == [
        "lora.rank is 8, it was 0",
        "lora.targets is ['q', 'v'], it was ['q', 'k', 'v', 'o', 'gate', 'up', 'down']",
        f"optim.train is ['lora'], it was {everything}",
    ]


def test_changeable_fields_exist():
    assert set(FIELDS) >= CHANGEABLE


@pytest.mark.parametrize(("before", "now"), [(True, "full"), (False, "none")])
def test_a_run_that_knew_two_kinds_of_remat_goes_on(before: bool, now: str):
    config = load_config(["--model.remat", now]).config
    saved = config_to_dict(config)
    saved["model"]["remat"] = before
    assert config_changes(config, saved) == []
    saved["model"]["remat"] = not before
    assert [line.split()[0] for line in config_changes(config, saved)] == ["model.remat"]
