"""Tokenizers of local directories: those of transformers, read without PyTorch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from train.demo.tokenizer import save_tokenizer
from vxl_jax.config import LanguageConfig
from vxl_jax.errors import ConfigError
from vxl_jax.presets import demo
from vxl_jax.text.tokenizer import load_tokenizer

TEXTS = (
    "what is the colour",
    "Hello w\u00f6rld \u4f60\u597d \u0645\u0631\u062d\u0628\u0627 \U0001f600",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    " don't I'll we've 12345 3.14 \t\n\n  x  ",
    "e\u0301 \u00e9 \ufb03 \u00a0 \u200b",
    "",
)


def assert_same(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    for name in ("eos_token_id", "pad_token_id", "all_special_ids"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        for skip in (True, False):
            options = {"skip_special_tokens": skip}
            assert ours.decode(ids, **options) == theirs.decode(ids, **options), text


def test_it_is_that_of_auto_tokenizer(demo_data: Path):
    directory = demo_data / "tokenizer"
    assert_same(
        load_tokenizer(directory, demo().language), AutoTokenizer.from_pretrained(directory)
    )


def test_qwen2s_is_that_of_auto_tokenizer(shared: Path):
    directory = shared / "tokenizer" / "qwen2"
    ours = load_tokenizer(directory, LanguageConfig())
    assert_same(ours, AutoTokenizer.from_pretrained(directory))


def test_a_vocabulary_with_merges_will_do(demo_data: Path, tmp_path: Path):
    held = json.loads((demo_data / "tokenizer/tokenizer.json").read_text())
    vocabulary = held["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in held["added_tokens"]}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [
        " ".join(pair) if isinstance(pair, list) else pair for pair in held["model"]["merges"]
    ]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    config = json.loads((demo_data / "tokenizer/tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Qwen2Tokenizer"
    config["added_tokens_decoder"] = {str(t.pop("id")): t for t in held["added_tokens"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path, demo().language)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == vocabulary["<|im_end|>"]


def test_a_directory_without_a_vocabulary_is_refused(demo_data: Path, tmp_path: Path):
    """transformers makes a tokenizer of three tokens of it."""
    config = json.loads((demo_data / "tokenizer/tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Qwen2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"neither tokenizer.json nor vocab.json and merges.txt"):
        load_tokenizer(tmp_path, demo().language)


def test_loading_one_does_not_import_pytorch(demo_data: Path):
    code = (
        "import sys; from pathlib import Path; from vxl_jax.presets import demo;"
        "from vxl_jax.text.tokenizer import load_tokenizer;"
        f"load_tokenizer(Path({str(demo_data / 'tokenizer')!r}), demo().language);"
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# Damage and faults.


def raising(error: Exception) -> Callable[..., Any]:
    def work(*_: Any, **__: Any) -> Any:
        raise error

    return work


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "tokenizer", ["a"])
    return tmp_path / "tokenizer"


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("tokenizer.json", "{", ValueError),
        ("tokenizer.json", "[]", TypeError),
        ("tokenizer.json", '{"added_tokens": []}', Exception),
        ("tokenizer.json", "{}", KeyError),
        ("tokenizer_config.json", "3", TypeError),
    ],
)
def test_a_damaged_tokenizer_is_the_cause_of_the_error(
    name: str, text: str, cause: type[Exception], tokenizer: Path
):
    (tokenizer / name).write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer: cannot be loaded \(") as caught:
        load_tokenizer(tokenizer, demo().language)
    assert isinstance(caught.value.__cause__, cause)


@pytest.mark.parametrize("fault", [NameError, ImportError, RuntimeError])
def test_a_fault_in_loading_a_tokenizer_is_not_hidden(
    fault: type[Exception], tokenizer: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", raising(fault("x")))
    with pytest.raises(fault):
        load_tokenizer(tokenizer, demo().language)


def test_a_wrong_call_of_transformers_is_not_hidden(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda directory: None)
    with pytest.raises(TypeError, match="local_files_only"):
        load_tokenizer(tokenizer, demo().language)
