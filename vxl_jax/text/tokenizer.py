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
    """The tokenizer of a local directory; nothing is downloaded.

    name: of the directory, for messages.

    Raises: ConfigError if it is missing, damaged, not Qwen2's, or larger than the vocabulary.
    """
    # transformers advises to install torch when it is imported without it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    if not directory.is_dir():
        raise ConfigError(f"{name} {directory}: there is no such directory")
    verbosity = logging.get_verbosity()
    try:
        with warnings.catch_warnings():  # of a config.json that is not transformers' own
            warnings.simplefilter("ignore", FutureWarning)
            logging.set_verbosity_error()
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        encode_prompt("", tokenizer)  # refuses one without the chat template's tokens
    except Exception as error:
        if not is_file_fault(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{name} {directory}: cannot be loaded ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
    check_vocabulary(config, len(tokenizer), f"{name} {directory}")
    return tokenizer
