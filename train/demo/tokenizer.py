"""Make the tokenizer of the demo: byte-level BPE, without any download.

All 256 bytes are tokens, so any text is encoded without loss.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 512
"""Tokens at most, the 256 bytes and the special tokens included."""
PAD_TOKEN, START_TOKEN, END_TOKEN = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_tokenizer(directory: Path, words: Sequence[str]) -> None:
    """Make a tokenizer, in the files that `transformers.AutoTokenizer` reads.

    Each of the words is one token, with a space before it and without.

    Raises: ValueError if there are too many words for `VOCABULARY` tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
    )
    tokenizer.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    cut = [word for word in words if len(tokenizer.encode(f" {word}").ids) > 1]
    if cut:
        raise ValueError(f"{VOCABULARY} tokens are too few for the words {cut}")
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "pad_token": PAD_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
