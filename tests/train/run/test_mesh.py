"""One run on meshes of 8 devices and in two processes: the numbers of one device, and each device
with its part alone. Nothing here skips: without 8 devices the tests fail.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.on_meshes import FRAMES, watched
from tests.support.runs import Processes, Run, add_kinds, arguments, make_folder, run
from vxl_jax.presets import PRESETS

MESHES = ("8x1x1", "1x8x1", "2x2x2", "1x1x8")
ON_TWO = "1x8x1"
"""The mesh of the run in two processes of 4 devices."""
PIECES = ("1x8x1", "two processes")
"""Where the run is resumed that began on 2x2x2; on one device too."""
STEPS, SAVED, PLACES = 20, 8, 10
SAMPLES = 40
"""Of the batch of which only compiled programs are looked at. 40 and 40 * `FRAMES` are sizes that
nothing else has.
"""
MARK = "from here on, XLA is made to replicate an array"
MICRO = Path(__file__).parents[2] / "golden/micro/hf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_kinds(make_folder(tmp_path_factory.mktemp("mesh")))


def options(folder: Path, mesh: str = "1x1x1", evaluated: bool = False) -> list[str]:
    """Text, pictures of one and two tiles, videos. 10 places a batch: 8 devices do not divide them,
    nor are all batches full.
    """
    sizes = zip(("data", "fsdp", "tensor"), mesh.split("x"), strict=True)
    return [
        *(word for name, size in sizes for word in (f"--mesh.{name}", size)),
        *("--data.train-json", f"{folder}/mixed.json"),
        *("--data.eval-json", *([f"{folder}/asked.json"] if evaluated else [])),
        *("--data.batch-size", str(PLACES), "--data.shapes", "2", "--data.epochs", "6"),
        *("--optim.accumulate", "1", "--run.max-steps", str(STEPS), "--run.log-every", "1"),
        *("--run.save-every", str(SAVED), "--run.keep-checkpoints", "3"),
    ]


def start_jobs(folder: Path, name: str, jobs: Sequence[Any], processes: int = 1) -> Processes:
    """Do jobs of `tests.support.on_meshes` on 8 devices."""
    (folder / f"{name}.json").write_text(json.dumps(jobs))
    command = ["-m", "tests.support.on_meshes", f"{folder}/{name}.json"]
    return Processes(folder / name, [command] * processes, devices=8 // processes)


def job(folder: Path, path: Path, *given: str) -> dict[str, Any]:
    return {"arguments": arguments(folder, path, *given), "path": str(path)}


@pytest.fixture(scope="module")
def one(folder: Path) -> tuple[Run, dict[str, Any]]:
    """The run on one device, and where its arrays were."""
    with watched() as placed:
        return run(folder, folder / "one", *options(folder, evaluated=True)), placed


@pytest.fixture(scope="module")
def on_8(folder: Path) -> Path:
    """Runs in one process of 8 devices, some plans and a checkpoint: the folder they are in."""
    path = folder / "8"
    jobs = [job(folder, path / mesh, *options(folder, mesh)) for mesh in MESHES]
    plan = ["--config", f"{folder}/config.py", "--data.batch-size", str(SAMPLES)]
    for mesh in ("1x1x1", *MESHES[:3]):
        file = str(path / f"plan-{mesh}.json")
        shape = list(map(int, mesh.split("x")))
        given = [*plan, "--model.remat", "full", "--optim.accumulate", "1"]
        jobs.append({"plan": shape, "config": given, "path": file})
    jobs.append({"load": str(MICRO), "mesh": [1, 8, 1], "path": str(path / "loaded.json")})
    jobs.append({"replicate": MARK, "path": str(path / "replicated")})
    path.mkdir()
    with start_jobs(folder, "jobs-8", jobs) as processes:
        (ended,) = processes.end(900)
    assert ended.status == 0, ended.err[-3000:]
    (path / "err.txt").write_text(ended.err)
    return path


@pytest.fixture(scope="module")
def pieces(folder: Path, on_8: Path) -> Path:
    """The run of 2x2x2, gone on with from a checkpoint in other places: the folder they are in."""
    path = folder / "pieces"
    for name in ("one", *PIECES):
        shutil.copytree(on_8 / "2x2x2", path / name)
        for step in (path / name / "checkpoints").iterdir():
            if step.name != str(SAVED):
                shutil.rmtree(step)
    jobs = [job(folder, path / "1x8x1", *options(folder, "1x8x1"))]
    with start_jobs(folder, "jobs-again", jobs) as processes:
        (ended,) = processes.end(900)
    assert ended.status == 0, ended.err[-3000:]
    return path


@pytest.fixture(scope="module")
def on_two(folder: Path, pieces: Path) -> Path:
    """Runs in two processes of 4 devices: a whole one, and a piece of `pieces`."""
    path = folder / "two"
    jobs = [
        job(folder, path, *options(folder, ON_TWO, evaluated=True)),
        job(folder, pieces / "two processes", *options(folder, ON_TWO)),
    ]
    with start_jobs(folder, "jobs-two", jobs, processes=2) as processes:
        for ended in processes.end(900):
            assert ended.status == 0, ended.err[-3000:]
    return path


def ended_run(path: Path) -> Run:
    return Run(0, (path / "out.txt").read_text(), "", path)


def placed_by(path: Path, process: int = 0) -> dict[str, Any]:
    return json.loads((path / f"placed-{process}.json").read_text())


def same_losses(found: Run, expected: Run) -> None:
    assert list(expected.losses) == list(range(1, STEPS + 1))
    assert found.losses == pytest.approx(expected.losses, abs=1e-5, rel=0)


# The numbers of one device.


def test_the_run_learns_and_has_batches_of_all_kinds(one: Any):
    losses = list(one[0].losses.values())
    assert losses[0] > 5
    assert losses[-1] < 1
    arrays = [len(batch) for batch in one[1]["batches"]]
    assert set(arrays) == {2, 3}  # of text alone, and with pixels


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_are_those_of_one_device(mesh: str, one: Any, on_8: Path):
    found = ended_run(on_8 / mesh)
    same_losses(found, one[0])
    assert found.summary["parameters"] == one[0].summary["parameters"]


def test_losses_and_answers_of_two_processes_are_those_of_one_device(one: Any, on_two: Path):
    found = ended_run(on_two)
    same_losses(found, one[0])
    for name in ("heldout_accuracy", "blank_accuracy", "chance"):
        assert found.summary[name] == one[0].summary[name]
    assert found.summary["heldout_accuracy"].keys() >= {"all"}


def test_all_begin_with_the_same_parameters_bit_for_bit(one: Any, on_8: Path, on_two: Path):
    paths = [*(on_8 / mesh for mesh in MESHES), on_two]
    assert {placed_by(path)["began"] for path in paths} == {one[1]["began"]}
    assert placed_by(on_two, 1)["began"] == one[1]["began"]


@pytest.mark.parametrize("name", ["one", *PIECES])
def test_a_run_goes_on_elsewhere(name: str, folder: Path, one: Any, pieces: Path, on_two: Path):
    """It was saved on 2x2x2."""
    path = pieces / name
    found = run(folder, path, *options(folder)) if name == "one" else ended_run(path)
    assert found.status == 0
    assert f"resumed at step {SAVED}" in found.out
    same_losses(found, one[0])


# Each device has its part.


def parts(mesh: str) -> tuple[int, int, int]:
    data, fsdp, tensor = map(int, mesh.split("x"))
    return data, fsdp, tensor


@pytest.mark.parametrize("mesh", MESHES)
def test_8_devices_took_part(mesh: str, on_8: Path):
    data, fsdp, tensor = parts(mesh)
    line = f"mesh: data {data} x fsdp {fsdp} x tensor {tensor}; cpu x 8, 1 process(es)\n"
    assert line in ended_run(on_8 / mesh).out
    placed = placed_by(on_8 / mesh)
    for name in ("parameters", "gradients", "state"):
        for path, (_, _, devices) in placed[name].items():
            assert devices == 8, path
    rows = -(-PLACES // (data * fsdp))
    for batch in placed["batches"]:
        for array in batch:
            assert array == [rows * data * fsdp, rows, 8]


def test_devices_of_two_processes_took_part(on_two: Path):
    assert "cpu x 8, 2 process(es)\n" in ended_run(on_two).out
    for process in (0, 1):
        placed = placed_by(on_two, process)
        check_cut(placed, ON_TWO, devices=4)
        for batch in placed["batches"]:
            for array in batch:
                assert array == [16, 2, 4]


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_gradients_and_moments_are_cut(mesh: str, on_8: Path):
    check_cut(placed_by(on_8 / mesh), mesh, devices=8)


def check_cut(placed: dict[str, Any], mesh: str, devices: int) -> None:
    """Kernels are cut by fsdp and tensor, and so is what the optimizer keeps of them."""
    _, fsdp, tensor = parts(mesh)
    share = fsdp * tensor
    cut = {
        "language/layers/mlp/gate/kernel": share,
        "language/layers/mlp/down/kernel": share,
        "language/embed/embedding": share,
        "vision/layers/up/kernel": share,
        "vision/layers/up/bias": tensor,
        "language/norm/scale": 1,
    }
    for name in ("parameters", "gradients"):
        for path, parts_of_it in cut.items():
            total, most, count = placed[name][path]
            assert (most * parts_of_it, count) == (total, devices), (name, path)
    for path, parts_of_it in cut.items():
        moments = [x for name, x in placed["state"].items() if name.endswith(path)]
        assert len(moments) == 2
        for total, most, count in moments:
            assert (most * parts_of_it, count) == (total, devices), path
    if tensor == 1 and fsdp > 1:  # nothing of size is whole
        for name in ("parameters", "gradients", "state"):
            total, most, _ = map(sum, zip(*placed[name].values(), strict=True))
            assert most < 1.1 * total / fsdp


# What a compiled step holds.


def plan_of(on_8: Path, mesh: str) -> dict[str, Any]:
    return json.loads((on_8 / f"plan-{mesh}.json").read_text())


@pytest.mark.parametrize(
    ("mesh", "state", "activations"),
    [("8x1x1", 1, 1 / 8), ("1x8x1", 1 / 8, 1 / 8), ("2x2x2", 1 / 4, 1 / 4)],
)
def test_a_device_has_its_share_of_a_step(mesh: str, state: float, activations: float, on_8: Path):
    """Biases and norms are whole; parameters of a layer are put together for its turn."""
    one, found = plan_of(on_8, "1x1x1"), plan_of(on_8, mesh)
    assert found["samples"] == one["samples"] == SAMPLES
    for name in ("trained", "gradients", "optimizer"):
        assert found[name] <= 1.15 * state * one[name]
    assert found["batch"] == pytest.approx(one["batch"] * parts(mesh)[2] / 8)
    assert found["activations"] <= 1.15 * activations * one["activations"]


@pytest.mark.parametrize("mesh", ["8x1x1", "1x8x1", "2x2x2"])
def test_no_device_holds_anything_of_all_samples(mesh: str, on_8: Path):
    """But what it finds in its part of the width of the table of embeddings, for its copy."""
    data, fsdp, _ = parts(mesh)
    part_of_width = PRESETS["demo"]().language.width // fsdp if data == 1 else None

    def of_all_samples(mesh: str) -> list[list[int]]:
        plan = plan_of(on_8, mesh)
        each = (1, plan["tokens"], FRAMES, FRAMES * 16, FRAMES * 17)  # patches, and a class token
        whole = {SAMPLES * size for size in each}
        return [shape for shape in plan["arrays"] if whole & set(shape)]

    assert len(of_all_samples("1x1x1")) > 50
    assert [x for x in of_all_samples(mesh) if x[-1] != part_of_width] == []


def test_xla_replicates_nothing_as_a_last_resort(on_8: Path):
    """It would say so, as it does of the program that is compiled last."""
    ours, of_the_last = (on_8 / "err.txt").read_text().split(f"{MARK}\n")
    message = "Involuntary full rematerialization"
    assert message in of_the_last
    assert message not in ours


def test_a_checkpoint_is_read_in_parts(on_8: Path):
    found = json.loads((on_8 / "loaded.json").read_text())
    assert found["fingerprint"]
    for path, (total, most, devices) in found["where"].items():
        assert devices == 8
        assert 4 * found["most"][path] == most, path
        if path.endswith("kernel") and total > 2**13:
            assert most == total / 8, path
