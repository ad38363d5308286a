"""The tokenizer of a local directory."""

import os
import warnings
from pathlib import Path
from typing import Any

from vxl_jax.config import LanguageConfig
from vxl_jax.errors import ConfigError, is_file_fault
from vxl_jax.text.chat import encode_prompt


def check_vocabulary(config: LanguageConfig, tokens: int, source: str) -> None:
    """Refuse a tokenizer with more ids than the embedding has rows.

    Raises: ConfigError naming `source`.
    """
    if tokens > config.vocab_size:
        raise ConfigError(
            f"{source} has {tokens} tokens but LanguageConfig.vocab_size is {config.vocab_size}; "
            "use the tokenizer that belongs to the model, or a larger vocabulary"
        )


def load_tokenizer(directory: Path, config: LanguageConfig, name: str = "tokenizer") -> Any:
    """Load the tokenizer of a local directory; nothing is downloaded.

    Args:
      directory: has `tokenizer.json`, or `vocab.json` and `merges.txt`.
      config: of the language model that reads the tokens.
      name: of the directory, for messages.

    Returns:
      A fast tokenizer of transformers.

    Raises:
      ConfigError: missing, damaged, without Qwen2's control tokens, or larger than the vocabulary.
    """
    if not directory.is_dir():
        raise ConfigError(f"{name} {directory}: there is no such directory")
    whole = (directory / "tokenizer.json").is_file()
    if not whole and not all((directory / part).is_file() for part in ("vocab.json", "merges.txt")):
        # transformers would make an empty vocabulary of it.
        raise ConfigError(
            f"{name} {directory}: has neither tokenizer.json nor vocab.json and merges.txt; copy "
            "them from the model's repository"
        )
    try:
        tokenizer = _read_tokenizer(directory, whole)
        encode_prompt("", tokenizer)  # refuses one without the chat template's tokens
    except Exception as error:
        if not is_file_fault(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{name} {directory}: cannot be loaded ({reason})") from error
    check_vocabulary(config, len(tokenizer), f"{name} {directory}")
    return tokenizer


def _read_tokenizer(directory: Path, whole: bool) -> Any:
    """Read `tokenizer.json` as it is; transformers' AutoTokenizer, which imports PyTorch where that
    is installed, builds the same from it in another second and a half.
    """
    # transformers advises to install torch when it is imported without it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils import logging

    if whole:
        from transformers import PreTrainedTokenizerFast as Reader
    else:
        from transformers import AutoTokenizer as Reader  # type: ignore[assignment]
    verbosity = logging.get_verbosity()
    try:
        with warnings.catch_warnings():  # of a config.json that is not transformers' own
            warnings.simplefilter("ignore", FutureWarning)
            logging.set_verbosity_error()
            return Reader.from_pretrained(directory, local_files_only=True)
    finally:
        logging.set_verbosity(verbosity)
