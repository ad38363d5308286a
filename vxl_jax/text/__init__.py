"""Text: turns to token ids and labels, and tokenizers. No JAX in here.

In import order: `chat`, `tokenizer`.
"""
