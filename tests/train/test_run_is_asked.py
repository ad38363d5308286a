"""What a run's evaluation answers, its checkpoint answers when it is loaded and asked."""

import json
from pathlib import Path
from typing import Any

import pytest

import vxl_jax
from convert import convert_to_hf
from tests.support.data import section
from tests.support.runs import Run, add_kinds, make_folder, run
from train.config import RunSection
from train.data.dataset import open_dataset
from train.run.evaluate import answer_questions, eval_ratios
from vxl_jax.inference.model import Model
from vxl_jax.presets import PRESETS
from vxl_jax.text.template import IMAGE_MARK

RUN = RunSection(run_dir="unused", max_new_tokens=3)


@pytest.fixture(scope="module")
def folder_of_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_kinds(make_folder(tmp_path_factory.mktemp("kinds")))


DATA: dict[str, dict[str, Any]] = {
    "demo": {"min_tiles": 1, "max_frames": 4, "time_prompt": True, "max_length": 2048},
    "demo_llava": {
        **{"image_grids": "(1x1),...,(2x2)", "frame_sampling": "strided"},
        **{"min_tiles": 1, "max_frames": 4, "time_prompt": True, "max_length": 2048},
    },
}
"""The data section of a run of each preset, where it differs from the defaults."""
OPTIONS = {
    "demo": (),
    "demo_llava": (
        *("--model.preset", "demo_llava", "--optim.train", "vision", "projector", "language"),
        *("--data.image-grids", "(1x1),...,(2x2)", "--data.frame-sampling", "strided"),
    ),
}


@pytest.fixture(scope="module", params=OPTIONS)
def preset(request: pytest.FixtureRequest) -> str:
    """A preset of each family."""
    return str(request.param)


@pytest.fixture(scope="module")
def trained(folder_of_kinds: Path, preset: str) -> Run:
    """A run on pictures of one tile, videos and text, with other pixels than a published model."""
    folder = folder_of_kinds
    done = run(
        folder,
        folder / f"run_{preset}",
        *OPTIONS[preset],
        *("--data.train-json", str(folder / "mixed.json"), "--data.eval-json"),
        *(str(folder / "asked.json"), "--data.max-frames", "4", "--run.max-steps", "12"),
        *("--data.time-prompt", "True", "--data.max-length", "2048", "--data.shapes", "2"),
    )
    assert done.status == 0, done.err
    return done


@pytest.fixture(scope="module")
def model(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("loaded") / "hf"
    convert_to_hf(trained.path, directory)
    return vxl_jax.load(directory)


def test_its_answers_are_those_of_the_run(
    folder_of_kinds: Path, trained: Run, model: Model, preset: str
):
    config = json.loads((trained.path / "config.json").read_text())["data"]
    assert (config["min_tiles"], config["max_frames"], config["time_prompt"]) == (1, 4, True)
    data = section(folder_of_kinds / "media", **DATA[preset])
    assert model.config.preprocessing == data.preprocessing_for(PRESETS[preset]().preprocessing)
    path = folder_of_kinds / "asked.json"
    ratios = eval_ratios(model.config, RUN)
    assert ratios == (() if preset == "demo_llava" else (model.default_ratio,))
    with open_dataset(
        [str(path)], data, model.config, model.tokenizer, prompts=True, ratios=ratios
    ) as dataset:
        answers, _ = answer_questions(model.network, dataset, model.tokenizer, RUN)
    by_question = {(a.sample.name, a.sample.question): a.answer for a in answers}
    assert len(by_question) == len(answers) == 9
    records: list[dict[str, Any]] = json.loads(path.read_text())
    for i, record in enumerate(records):
        (name,) = (n for n in by_question if n[0].startswith(f"{path}[{i}]"))
        file = record.get("image", record.get("video"))
        media = [] if file is None else [folder_of_kinds / "media" / file]
        question = record["conversations"][0]["value"].replace(IMAGE_MARK, "")
        memory = model.watch(media)
        assert model.ask(memory, question, max_new_tokens=3) == by_question[name], record
