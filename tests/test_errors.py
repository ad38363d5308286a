"""Errors that a user can correct are one line; faults of the program keep their traceback."""

import ast
import builtins
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest

import vxl_jax
from configs.demo import CONFIG as DEMO
from convert import command, convert_from_hf, parity
from train import errors as train_errors, finetune, inspect_data
from train.run.setup import prepare_data
from vxl_jax import errors
from vxl_jax.checkpoints import orbax_tree
from vxl_jax.errors import ArgumentError, CheckpointError, ConfigError, VxlError, is_file_fault
from vxl_jax.inference import cli as generate

ROOT = Path(__file__).parents[1]
MICRO = ROOT / "tests" / "golden" / "micro"
PACKAGES = ("vxl_jax", "train", "convert")

# The classes.

NO_VXL_ERROR = {
    "ProgramFault": "a fault of the program that a data process found",
    "ProcessError": "between a process that decodes and its parent, who turns it into a MediaError",
}
"""Exception classes that do not derive from `VxlError`, and why. Their subclasses are the same."""

PLAIN_VALUE_ERRORS = {
    "train/demo/data.py": "amounts that the caller fixes in its source",
    "train/demo/tokenizer.py": "words that the caller fixes in its source",
    "vxl_jax/inference/decode.py": "arrays that do not belong to the plan of a stream",
    "vxl_jax/planning/flops.py": "a name that the caller fixes in its source",
    "vxl_jax/inference/entries.py": "a capacity that the caller reserves",
    "vxl_jax/inference/memory_file.py": "turned into a CheckpointError in the same file",
    "vxl_jax/models/lora.py": "a model that has updates already",
    "vxl_jax/media/sampling.py": "numbers that are checked where a user gives them",
    "vxl_jax/media/tiles.py": "numbers that are checked where a user gives them",
    "vxl_jax/models/functions.py": "a capacity that the caller computes",
    "vxl_jax/nn/attention/__init__.py": "shapes that the caller makes",
    "vxl_jax/nn/few_rows.py": "shapes that the caller makes",
    "vxl_jax/nn/sharding.py": "a parameter without a row in the table",
    "vxl_jax/stream/visual.py": "tokens that the caller has counted",
    "vxl_jax/stream/batch.py": "arguments that the caller computes",
    "vxl_jax/stream/plan.py": "arguments that the caller computes and checks",
    "vxl_jax/checkpoints/safetensors_read.py": "turned into a CheckpointError in the same file",
}
"""Files that raise a plain ValueError, and why a user cannot cause it: for most of them, a caller
breaks the contract of a function."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    """All modules of the packages, by path."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def exceptions(modules: Iterator[tuple[str, ast.Module]]) -> dict[str, set[str]]:
    """All classes that derive from an exception, with the names of all their ancestors."""
    bases = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for _, module in modules
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
    }

    def ancestors(name: str) -> set[str]:
        return set().union(*({base} | ancestors(base) for base in bases.get(name, ())))

    def is_builtin(name: str) -> bool:
        kind = getattr(builtins, name, None)
        return isinstance(kind, type) and issubclass(kind, BaseException)

    found = {name: ancestors(name) for name in bases}
    return {name: of for name, of in found.items() if any(map(is_builtin, of))}


def outside(found: Mapping[str, set[str]]) -> list[str]:
    """Those that derive neither from `VxlError` nor from a class that is listed."""
    allowed = {"VxlError", *NO_VXL_ERROR}
    return sorted(name for name, of in found.items() if not allowed & (of | {name}))


def test_every_exception_class_derives_from_vxl_error_or_is_listed():
    found = exceptions(sources())
    assert {"VxlError", "MediaError", "PartlyWatched", "WorkerError", "Hung"} <= found.keys()
    assert outside(found) == []
    assert found.keys() >= NO_VXL_ERROR.keys()
    assert not any("VxlError" in found[name] for name in NO_VXL_ERROR)


def test_a_new_exception_class_has_to_be_listed():
    code = """
class VxlError(ValueError): pass
class Good(VxlError): pass
class Better(vxl_jax.errors.Good): pass
class Data: pass
class New(KeyError): pass
class Newer(module.New): pass
"""
    assert outside(exceptions(iter([("x.py", ast.parse(code))]))) == ["New", "Newer"]


def plain_value_errors(module: ast.Module) -> int:
    """How many times a module raises a plain ValueError."""
    raised = (node.exc for node in ast.walk(module) if isinstance(node, ast.Raise))
    return sum(
        isinstance(exc, ast.Call) and ast.unparse(exc.func) == "ValueError" for exc in raised
    )


def test_plain_value_errors_are_raised_by_the_listed_files_alone():
    assert plain_value_errors(ast.parse("if x:\n    raise ValueError('x')\nraise KeyError(1)")) == 1
    files = {path for path, module in sources() if plain_value_errors(module)}
    assert files == PLAIN_VALUE_ERRORS.keys()


def test_all_errors_of_the_library_are_exported():
    names = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, VxlError)
    }
    assert names == {name for name in vxl_jax.__all__ if name.endswith("Error")} | {"PartlyWatched"}
    for name in names:
        assert getattr(vxl_jax, name) is getattr(errors, name)
    assert issubclass(VxlError, ValueError)  # `except ValueError` of users


# The command lines.

USERS = {
    "ArgumentError": ArgumentError("ratio is 0"),
    "WorkerError": train_errors.WorkerError("the data processes were ended"),
    "VxlError": VxlError("anything"),
    "OSError": FileNotFoundError(2, "No such file or directory", "x.json"),
}
"""Errors that a user can correct."""

FAULTS = [
    ValueError("cannot reshape array of size 3 into shape (2,)"),
    TypeError("dot_general requires contracting dimensions to have the same shape"),
    ImportError("cannot import name 'x'"),
    jax.errors.JaxRuntimeError("INTERNAL: the compiler is wrong"),
]
"""Faults of the program."""


def run_generate(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any], folder: Path) -> int:
    monkeypatch.setattr(generate, "answer_all", work)
    return generate.main(["--model", "hf", "--video", "x.mp4", "--prompt", "a"])


def run_plan(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any], folder: Path) -> int:
    monkeypatch.setattr(generate, "print_inference_plan", work)
    return generate.main(["--model", "hf", "--plan"])


def run_convert(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any], folder: Path) -> int:
    def convert(destination: str) -> None:
        work(destination)

    return command.run_command(convert, "convert.from_hf", "Convert.", ["out"])


def run_parity(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any], folder: Path) -> int:
    monkeypatch.setattr(parity, "load_network", work)
    return parity.main([str(MICRO / "hf"), str(MICRO)])


def run_finetune(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any], folder: Path) -> int:
    monkeypatch.setattr(finetune, "print_training_plan", work)
    return finetune.main(["--config", "demo", "--plan", "--run-dir", str(folder)])


def run_inspect(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any], folder: Path) -> int:
    monkeypatch.setattr(inspect_data, "prepare_data", work)
    return inspect_data.main(["--config", "demo", "--out", str(folder / "out")])


RUNS = [run_generate, run_plan, run_convert, run_parity, run_finetune, run_inspect]


def raising(error: Exception) -> Callable[..., Any]:
    def work(*_: Any, **__: Any) -> Any:
        raise error

    return work


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("run", RUNS)
def test_a_users_fault_is_one_line(
    run: Callable[..., int],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    error = USERS[name]
    assert run(monkeypatch, raising(error), tmp_path) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert ("x.json" if name == "OSError" else str(error)) in printed


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("run", RUNS)
def test_a_fault_of_the_program_is_not_caught(
    run: Callable[..., int],
    fault: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    with pytest.raises(type(fault)) as caught:
        run(monkeypatch, raising(fault), tmp_path)
    assert caught.value is fault
    assert capsys.readouterr().err == ""


def test_a_device_without_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")
    assert run_generate(monkeypatch, raising(error), tmp_path) == 2
    assert capsys.readouterr().err == (
        "error: out of device memory (RESOURCE_EXHAUSTED: Out of memory); --plan shows what fits\n"
    )


@pytest.mark.parametrize(
    ("raised", "status", "last"),
    [
        ("ValueError('internal')", 1, "ValueError: internal"),
        ("vxl_jax.MediaError('x.mp4: no such file')", 2, "error: x.mp4: no such file"),
    ],
)
def test_exit_statuses(raised: str, status: int, last: str):
    code = f"""
import sys, vxl_jax
from vxl_jax.inference import cli as generate

def run(options):
    raise {raised}

generate.answer_all = run
sys.exit(generate.main(["--model", "hf", "--video", "x.mp4", "--prompt", "a"]))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == status
    lines = child.stderr.splitlines()
    assert lines[-1] == last
    assert lines[0].startswith("Traceback") == (status == 1)


def test_a_question_that_cannot_be_used_leaves_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    class Lines:
        lines = iter(["bad\n", "good\n", ""])

        def isatty(self) -> bool:
            return False

        def readline(self) -> str:
            return next(self.lines)

    def answer(question: str) -> None:
        if question == "bad":
            raise ArgumentError("the question has no text")
        print("answer")

    monkeypatch.setattr("sys.stdin", Lines())
    generate.converse(answer)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("answer\n", "error: the question has no text\n")
    Lines.lines = iter(["bad\n", ""])
    with pytest.raises(ValueError, match="internal"):
        generate.converse(raising(ValueError("internal")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "-1"], "ratio -1: it must be a whole number from 1 to"),
        (["--ratio", "0"], "ratio 0: it must be a whole number from 1 to"),
        (["--memory-gb", "nan"], "--memory-gb nan: give a positive number"),
        (["--memory-gb", "inf"], "--memory-gb inf: give a positive number"),
        (["--memory-gb", "-1"], "--memory-gb -1.0: give a positive number"),
    ],
)
def test_a_plan_of_numbers_that_cannot_be(
    options: list[str], message: str, capsys: pytest.CaptureFixture
):
    assert generate.main(["--model", "demo", "--plan", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_options_of_pixels_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture):
    options = ["--video", "x.mp4", "--prompt", "a", "--decoder", "decord", "--tone-map"]
    assert generate.main(["--model", str(MICRO / "hf"), *options]) == 2
    assert capsys.readouterr().err == "error: square_pixels and tone_map need the decoder pyav\n"
    pixels = ["--data.decoder", "decord", "--data.tone-map", "True"]
    with pytest.raises(SystemExit) as ended:
        finetune.main(["--config", "demo", "--run-dir", str(tmp_path), "--plan", *pixels])
    assert ended.value.code == 2
    assert "data.decoder is 'decord'; it must be pyav with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ImportError("x"), train_errors.DataError),
        (OSError("x"), train_errors.DataError),
        (ConfigError("x"), train_errors.DataError),
        (ValueError("x"), ValueError),
        (KeyError("x"), KeyError),
    ],
)
def test_what_a_configuration_raises_as_it_prepares_its_data(
    error: Exception, expected: type[Exception]
):
    with pytest.raises(expected) as caught:
        prepare_data(DEMO, raising(error))
    assert type(caught.value) is expected
    assert error in (caught.value, caught.value.__cause__)


# The loaders.


def raised_in(module: str, error: Exception) -> Exception:
    """The error, raised by a function of a module with this name."""
    space = {"__name__": module, "error": error}
    exec("def work():\n    raise error", space)
    with pytest.raises(type(error)) as caught:
        space["work"]()
    return caught.value


@pytest.mark.parametrize(
    ("module", "error", "expected"),
    [
        ("vxl_jax.checkpoints.load", OSError("x"), True),
        ("vxl_jax.checkpoints.load", ValueError("x"), True),  # of TensorStore, which has no frames
        ("vxl_jax.checkpoints.load", Exception("x"), True),  # of tokenizers, in Rust
        ("orbax.checkpoint", KeyError("x"), True),
        ("transformers.tokenization_utils", TypeError("x"), True),
        ("transformers.tokenization_utils", AttributeError("x"), True),
        ("vxl_jax.checkpoints.load", KeyError("x"), False),
        ("vxl_jax.checkpoints.load", TypeError("x"), False),
        ("vxl_jax", AttributeError("x"), False),
        ("orbax.checkpoint", RuntimeError("x"), False),
        ("orbax.checkpoint", NameError("x"), False),
        ("transformers", ImportError("x"), False),
        ("orbax.checkpoint", MemoryError(), False),
        ("orbax.checkpoint", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x"), False),
    ],
)
def test_what_damaged_files_raise(module: str, error: Exception, expected: bool):
    assert is_file_fault(raised_in(module, error)) is expected


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "model"
    convert_from_hf(MICRO / "hf", path)
    return path / "params"


def first(converted: Path) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """One of the parameters, as `read_params` takes them."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    path, struct = min(orbax_tree.stored_shapes(converted).items())
    return {path: jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=device)}


def test_a_damaged_tree_is_the_cause_of_the_error(converted: Path, tmp_path: Path):
    params = Path(shutil.copytree(converted, tmp_path / "params"))
    target = first(params)
    (path,) = target
    zarr = params / ".".join(path) / "zarr.json"
    zarr.write_text(zarr.read_text()[:50])
    with pytest.raises(CheckpointError, match=r"params: cannot be read \(") as caught:
        orbax_tree.read_params(params, target)
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(CheckpointError, match=r"params: cannot be read \(") as caught:
        orbax_tree.part_reader(params)(path, (slice(0, 1),))
    assert isinstance(caught.value.__cause__, ValueError)
    metadata = params / "_METADATA"
    metadata.write_text(metadata.read_text().replace('"use_zarr3"', '"zarr3"'))
    with pytest.raises(CheckpointError, match=r"_METADATA: has no field 'use_zarr3'"):
        orbax_tree.part_reader(params)(path, (slice(0, 1),))
    metadata.unlink()
    with pytest.raises(CheckpointError, match="has no metadata of Orbax"):
        orbax_tree.stored_shapes(params)
    with pytest.raises(CheckpointError, match="has no params"):
        orbax_tree.stored_shapes(converted, "params")


def test_a_fault_in_reading_a_tree_is_not_hidden(converted: Path, monkeypatch: pytest.MonkeyPatch):
    target = first(converted)
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    monkeypatch.setattr(ocp.Checkpointer, "restore", raising(full))
    with pytest.raises(jax.errors.JaxRuntimeError):
        orbax_tree.read_params(converted, target)
    monkeypatch.setattr(ocp.Checkpointer, "restore", lambda self, directory: None)
    with pytest.raises(TypeError, match="args"):
        orbax_tree.read_params(converted, target)
