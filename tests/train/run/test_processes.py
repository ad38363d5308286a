"""One run in several processes: how they find each other, fail together, stop and go on."""

import json
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.support.runs import Processes, Run, arguments, read_lines, run, write_records
from train.run.distributed import LAUNCHERS, VARIABLES, start_processes
from vxl_jax.errors import ConfigError

# How they find each other.


def set_variables(monkeypatch: pytest.MonkeyPatch, *values: str | None) -> None:
    for name, value in zip(VARIABLES, values, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            (None, "2", "0"),
            "the environment has JAX_NUM_PROCESSES, JAX_PROCESS_ID but not "
            "JAX_COORDINATOR_ADDRESS; a run of several processes needs all three, a single one "
            "none",
        ),
        (("host:1", None, "0"), "has JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID but not JAX_NUM_PROC"),
        (("host:1", "2", None), "has JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES but not JAX_PROC"),
        (("host:1", None, None), "but not JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        (("host:1", "two", "0"), "'two' processes, of which this is '0': both must be"),
        (("host:1", "2", "1.0"), "'2' processes, of which this is '1.0': both must be"),
        (("host:1", "2", "-1"), "'2' processes, of which this is '-1': both must be whole numbers"),
        (("host:1", "2", "2"), "of 2 processes this is number 2; they count from 0"),
        (("host:1", "0", "0"), "of 0 processes this is number 0; they count from 0"),
    ],
)
def test_variables_that_make_no_sense(
    values: Sequence[str | None],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    set_variables(monkeypatch, *values)
    assert message in run(folder, tmp_path / "run").error
    assert not (tmp_path / "run").exists()


SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
OWN = dict(zip(VARIABLES, ("host:1", "2", "1"), strict=True))


@pytest.mark.parametrize(
    ("variables", "expected", "device"),
    [
        ({}, None, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None, None),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, (None, 4, 3), None),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, (None, 4, 3), 1),
        ({**SLURM, VARIABLES[0]: "host:1"}, ("host:1", 4, 3), 1),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "5"}, (None, 4, 3), None),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "4,5"}, (None, 4, 3), 1),
        ({**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, (None, 2, 0), None),
        ({**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (None, 2, 0), 0),
        ({**SLURM, **OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, (None, 2, 0), None),
        (OWN, ("host:1", 2, 1), None),
        ({**SLURM, **OWN}, ("host:1", 2, 1), None),
    ],
)
def test_what_jax_is_told(
    variables: dict[str, str], expected: Any, device: int | None, monkeypatch: pytest.MonkeyPatch
):
    """Several on a machine that see all of its devices have one each; else a process has all.

    `jax.distributed.initialize` is replaced: real launches by `srun` or `mpirun` are untested.
    """
    names = [*VARIABLES, "CUDA_VISIBLE_DEVICES"]
    for name in [*names, *(name for launcher in LAUNCHERS for name in launcher)]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told: list[Any] = []
    updates: dict[str, Any] = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *who, **how: told.append((who, how)))
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    start_processes()
    assert [who for who, _ in told] == ([] if expected is None else [expected])
    for who, how in told:
        assert how["local_device_ids"] == device
        assert (how["cluster_detection_method"] == "deactivate") == (who[0] is not None)
        assert updates.pop("jax_enable_preemption_service") is False
        assert updates == ({"jax_cuda_visible_devices": "all"} if device is None else {})


def test_processes_that_do_not_come(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: 1/2 came\nand more")

    set_variables(monkeypatch, "host:1", "2", "0")
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(ConfigError) as refused:
        start_processes()
    assert str(refused.value) == (
        "process 0 of 2 has not found the others: DEADLINE_EXCEEDED: 1/2 came; set "
        "JAX_COORDINATOR_ADDRESS to HOST:PORT of the first, which all of them can reach"
    )


# How they wait for each other.


MEETINGS = """
import os, signal, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import jax
from jax.experimental import multihost_utils
from train.run import distributed
from train.run.evaluate import unread_anywhere
from train.errors import TrainingError

def refused(*_, **__):
    raise AssertionError("host work waits in a collective of the devices")

def worked(seconds=0, failing=False):
    time.sleep(seconds)
    if failing:
        raise ValueError("my own fault")
    return time.time()

def say(*words):
    print(*words, flush=True)

def wait_for(path):
    while not path.exists():
        time.sleep(0.1)

def tried(work, do=distributed.together):
    try:
        do(work)
        say("went on")
    except (TrainingError, ValueError) as error:
        say(type(error).__name__, error)

distributed.start_processes()
me, given_up, ended = jax.process_index(), *map(Path, sys.argv[1:])
multihost_utils.process_allgather = refused
say("worked", distributed.first_then_others(lambda: worked(2 * (me == 0))))
for bad in (0, 1):
    tried(lambda: worked(failing=me == bad), distributed.first_then_others)
time.sleep(me)  # the second takes longer to read its batch
read = ("ab.d", "a..d")[me]
say("unread", unread_anywhere(SimpleNamespace(samples=[None if x == "." else x for x in read])))
distributed.HOST_WORK_HOURS = 1 / 3600
if me:  # it comes too late
    wait_for(given_up)
tried(worked)
given_up.touch()
distributed.HOST_WORK_HOURS = 24
tried(worked)
if me:  # Ctrl-C while the first is at work
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        distributed.together(worked)
    except KeyboardInterrupt:
        say("interrupted")
    ended.touch()
else:
    wait_for(ended)
os._exit(0)
"""


def test_host_work_is_waited_for_outside_the_devices(tmp_path: Path):
    commands = [["-c", MEETINGS, str(tmp_path / "given_up"), str(tmp_path / "ended")]] * 2
    with Processes(tmp_path / "logs", commands) as processes:
        first, second = processes.end(120)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    (began, *ours), (then, *theirs) = (ended.out.splitlines() for ended in (first, second))
    assert float(began.removeprefix("worked ")) <= float(then.removeprefix("worked "))
    own, other = "ValueError my own fault", f"TrainingError {OTHERS.removeprefix('error: ')}"
    assert (ours[0], theirs[0]) == (own, other)
    assert (ours[1], theirs[1]) == (other, own)
    assert (ours[2], theirs[2]) == ("unread [1]", "unread []")
    for line in (ours[3], theirs[3]):
        assert line.startswith(
            "TrainingError another process of the run has not come within 0.000277778 hours, or "
            "has died; look at what it printed (DEADLINE_EXCEEDED: Barrier timed out."
        )
    assert (ours[4:], theirs[4:]) == (["went on"], ["went on", "interrupted"])


# Two of them. Each works in a separate folder, as on a separate machine, where the same paths
# may hold something else.


@pytest.fixture
def machines(folder: Path, tmp_path: Path) -> list[Path]:
    """Two machines with the same data."""
    return make_machines(folder, tmp_path)


def make_machines(folder: Path, path: Path) -> list[Path]:
    made = []
    for name in ("first", "second"):
        machine = path / name
        machine.mkdir(parents=True)
        for part in ("media", "tokenizer"):
            shutil.copytree(folder / part, machine / part)
        for part in ("train.json", "heldout.json"):
            shutil.copy(folder / part, machine / part)
        config = (folder / "config.py").read_text().replace(f"{folder}/", "")
        (machine / "config.py").write_text(config)
        made.append(machine)
    return made


def start(machines: list[Path], path: Path, *options: str) -> Processes:
    command = ["-m", "train.finetune", *arguments(Path(), path, *options)]
    logs = path.parent / f"logs of {path.name}" / str(time.monotonic_ns())
    return Processes(logs, [command] * 2, inside=machines)


def end(machines: list[Path], path: Path, *options: str) -> list[Run]:
    with start(machines, path, *options) as processes:
        return processes.end()


SHORT = ("--run.max-steps", "16")

OTHERS = "error: another process of the run cannot go on; its own message says why"


@pytest.mark.parametrize(
    ("bad", "gone", "message"),
    [
        (0, "heldout.json", "error: heldout.json: cannot be read (No such file"),
        (1, "heldout.json", "error: heldout.json: cannot be read (No such file"),
        (1, "tokenizer", "error: model.tokenizer tokenizer: there is no such directory"),
    ],
)
def test_one_that_fails_in_preparation_ends_both(
    bad: int, gone: str, message: str, machines: list[Path], tmp_path: Path
):
    (machines[bad] / gone).rename(machines[bad] / "away")
    errors = [ended.error for ended in end(machines, tmp_path / "run")]
    assert errors[bad].startswith(message)
    assert errors[1 - bad] == OTHERS


FAILING = """
import sys
from train import finetune
from train.errors import WorkerError

add_batch, calls = finetune.add_batch, iter(range(1000))

def failing(*args):
    if next(calls) == 5:
        raise WorkerError("the workers are gone")
    return add_batch(*args)

finetune.add_batch = failing
sys.exit(finetune.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("bad", [0, 1])
def test_one_that_fails_alone_does_not_wait(bad: int, machines: list[Path], tmp_path: Path):
    """While it trains, when the other waits for its gradients. JAX ends the other: at once where
    the first has failed; else it takes a hundred seconds, for which nobody waits here.
    """
    options = arguments(Path(), tmp_path / "run")
    commands = [["-m", "train.finetune", *options]] * 2
    commands[bad] = ["-c", FAILING, *options]
    with Processes(tmp_path / "logs", commands, inside=machines) as processes:
        ended = processes.end(only=None if bad == 0 else bad)
    assert ended[bad].status == 2
    assert "\nerror: the workers are gone\n" in ended[bad].err
    assert ended[1 - bad].status != 0


def test_different_configurations_are_refused(machines: list[Path], tmp_path: Path):
    config = (machines[1] / "config.py").read_text()
    (machines[1] / "config.py").write_text(config.replace("accumulate=2", "accumulate=3"))
    for ended in end(machines, tmp_path / "run"):
        assert ended.error == (
            "error: the processes of this run have different configurations; start all of them "
            "with the same command (only data.buffer_mb, data.cache_dir, data.cache_mb, "
            "data.sample_seconds, data.workers may differ)"
        )
    assert not (tmp_path / "run").exists()


def test_different_data_is_refused(machines: list[Path], tmp_path: Path):
    """Of the same lengths."""
    records = json.loads((machines[1] / "train.json").read_text())
    records[3], records[5] = records[5], records[3]
    write_records(machines[1] / "train.json", records)
    for ended in end(machines, tmp_path / "run"):
        assert ended.error.startswith("error: the processes of this run see different training")


@pytest.fixture(scope="module")
def damaged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two machines; on the second, a picture cannot be decoded."""
    machines = make_machines(folder, tmp_path_factory.mktemp("machines"))
    picture = machines[1] / "media/3.png"
    picture.write_bytes(picture.read_bytes()[:60])
    return machines


STEADY = """
import sys
from tests.support.clock import Clock
from train import finetune; from train.run import report

clock, update = Clock(), finetune.update
finetune.time = report.time = clock

def updated(*args):
    clock.now += 1
    return update(*args)

finetune.update = updated
sys.exit(finetune.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def both(damaged: list[Path]) -> Run:
    """A run in two processes that was not interrupted. By their clocks, a step takes 1 s."""
    path = damaged[0].parent / "both"
    command = ["-c", STEADY, *arguments(Path(), path, *SHORT)]
    with Processes(path.with_name("logs of both"), [command] * 2, inside=damaged) as processes:
        first, second = processes.end()
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "wrote " not in second.out
    return first._replace(path=path)


def test_bad_samples_of_the_second_are_in_the_summary(both: Run):
    assert "cpu x 2, 2 process(es)" in both.out
    found = read_lines(both.path / "processes/1/bad_samples.jsonl")
    assert {row["name"].split()[-1] for row in found} == {"colour_of_3.png", "shape_of_3.png"}
    assert (both.path / "bad_samples.jsonl").read_text() == ""
    summary = both.summary["bad_samples"]
    assert (summary["count"], summary["by_file"]) == (2, {"train.json": 2, "heldout.json": 0})
    assert summary["reasons"] == {row["name"]: row["reason"] for row in found}


def test_rates_and_metrics_are_those_of_both(both: Run):
    """The losses of both are equal, as are the rates, of all samples together: 8 a step, of which
    up to two cannot be decoded.
    """
    others = read_lines(both.path / "processes/1/metrics.jsonl")
    for ours, theirs in zip(both.metrics, others, strict=True):
        for name in ("step", "loss", "gradient_norm", "padding", "samples_per_second"):
            assert ours[name] == theirs[name]
        assert 6 <= ours["samples_per_second"] <= 8


def test_sigterm_to_one_stops_both_and_the_run_goes_on(both: Run, damaged: list[Path]):
    path = both.path.with_name("stopped")
    with start(damaged, path, *SHORT) as processes:
        deadline = time.monotonic() + 200
        while not (path / "checkpoints/4").exists():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes.started)
            time.sleep(0.01)
        processes.started[1].send_signal(signal.SIGTERM)
        first, second = processes.end()
    assert (first.status, second.status) == (0, 0), first.err + second.err
    stopped = Run(0, "", "", path)
    step = stopped.saved[-1]
    assert step < both.summary["steps"]
    assert f"stopped by SIGTERM, step {step} is saved: " in first.err
    assert "SIGTERM" not in second.err
    assert not (path / "summary.json").exists()

    first, second = end(damaged, path, *SHORT)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert f"resumed at step {step}" in first.out
    assert stopped.summary["params_sha256"] == both.summary["params_sha256"]
    assert stopped.summary["bad_samples"] == both.summary["bad_samples"]
