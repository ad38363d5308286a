"""Fixtures for all tests."""

import os
from pathlib import Path

# Most of the suite's time is compilation, and most of that is optimization that small models do not
# need. Set before jax is imported; the processes that tests start inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the checkout; tests that need it skip without."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip(f"reference material is not at {folder}: nothing to compare with")
    return folder


@pytest.fixture(scope="module")
def exact_products():
    """Matrix products in full float32 wherever the tests run."""
    import jax

    with jax.default_matmul_precision("highest"):
        yield


MEDIA = ("tile", "wide", "grid", "needle", "pair")


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo data set: frames.json, train.json, heldout.json, media/ and tokenizer/."""
    from train.demo_data import Amounts, make_demo_data

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
