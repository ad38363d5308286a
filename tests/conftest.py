"""Fixtures for all tests."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Most of the suite's time is compilation, and most of that is optimization that small models do not
# need (`make test` runs some tests a second time with it). Programs are kept from one module, one
# process and one run of the suite to the next. Set before jax is imported; the processes that tests
# start inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest  # noqa: E402

OPTIMIZED = (
    "tests/nn/test_attention.py",
    "tests/models/test_llava_oracle.py",
    "tests/inference/test_decode.py",
    "tests/train/run/test_step.py",
)
"""Files whose tests run again with all of XLA's optimizations: one for each kind of program."""

SLOW = {
    "tests/checkpoints/test_compression.py",
    "tests/checkpoints/test_damage.py",
    "tests/convert/test_adapter.py",
    "tests/convert/test_convert.py",
    "tests/convert/test_llava.py",
    "tests/convert/test_parity.py",
    "tests/convert/test_refused.py",
    "tests/convert/test_runs.py",
    "tests/inference/test_as_trained.py",
    "tests/inference/test_chat.py",
    "tests/inference/test_cli.py",
    "tests/inference/test_decode.py",
    "tests/inference/test_inference.py",
    "tests/inference/test_memory_threads.py",
    "tests/inference/test_refusals.py",
    "tests/inference/test_small_windows.py",
    "tests/inference/test_starved.py",
    "tests/media/children/test_decoding.py",
    "tests/media/children/test_process.py",
    "tests/media/children/test_process_end.py",
    "tests/media/test_film.py",
    "tests/media/video/test_fuzz.py",
    "tests/media/video/test_truncated.py",
    "tests/media/video/test_video.py",
    "tests/models/test_int8.py",
    "tests/models/test_llava_oracle.py",
    "tests/models/test_lora.py",
    "tests/models/test_plug_ins.py",
    "tests/models/test_video_xl.py",
    "tests/nn/test_attention.py",
    "tests/nn/test_network.py",
    "tests/nn/test_precision.py",
    "tests/planning/test_flops.py",
    "tests/planning/test_inference_bytes.py",
    "tests/test_public.py",
    "tests/test_quickstart.py",
    "tests/text/test_user_text.py",
    "tests/train/data/test_loader.py",
    "tests/train/data/test_workers.py",
    "tests/train/data/test_workers_end.py",
    "tests/train/run/test_base.py",
    "tests/train/run/test_checkpoints.py",
    "tests/train/run/test_fit.py",
    "tests/train/run/test_mesh.py",
    "tests/train/run/test_optimizer.py",
    "tests/train/run/test_processes.py",
    "tests/train/run/test_step.py",
    "tests/train/test_failures.py",
    "tests/train/test_finetune.py",
    "tests/train/test_heldout.py",
    "tests/train/test_inspect.py",
    "tests/train/test_lora_run.py",
    "tests/train/test_resume.py",
    "tests/train/test_run_is_asked.py",
}
"""Files that `make quick` leaves out: those that took ten seconds or more of a whole run."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their files."""
    for item in items:
        path = item.path.relative_to(ROOT).as_posix()
        if path.startswith(OPTIMIZED):
            item.add_marker("optimized")
        if path in SLOW:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material next to the checkout; tests that need it skip without."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip(f"reference material is not at {folder}: nothing to compare with")
    return folder


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Each compiled program maps memory, and Linux allows a process 65,530 maps (the default of
    `vm.max_map_count`): the whole suite has more, and XLA crashes at the end of them.
    """
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where pytest runs in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def exact_products():
    """Matrix products in full float32 wherever the tests run."""
    import jax

    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and configuration of runs (`tests.support.runs`) that no test changes."""
    from tests.support.runs import make_folder

    return make_folder(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def whole(folder: Path):
    """A run that was not interrupted."""
    from tests.support.runs import run

    return run(folder, folder / "whole")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Data and configuration of one test."""
    from tests.support.runs import make_folder

    return make_folder(tmp_path)


MEDIA = ("tile", "wide", "grid", "needle", "pair")


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo data set: frames.json, train.json, heldout.json, media/ and tokenizer/."""
    from train.demo.data import Amounts, make_demo_data

    directory = tmp_path_factory.mktemp("demo") / "data"
    amounts = Amounts(
        files=dict.fromkeys(MEDIA, 8), records=dict.fromkeys((*MEDIA, "set", "text"), 8)
    )
    heldout = Amounts(
        files=dict.fromkeys(MEDIA, 8), records=dict.fromkeys((*MEDIA[1:], "set", "text"), 8)
    )
    make_demo_data(directory, 0, amounts, heldout)
    return directory


@pytest.fixture(scope="session")
def demo_tokenizer(demo_data: Path):
    """The tokenizer of the demo: every word of the demo, and every byte, is a token."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_data / "tokenizer")
