"""The part of a tokenizer that data workers need, without transformers."""

import copy
from functools import lru_cache
from typing import Any

from train.errors import DataError


class FastTokenizer:
    """The Rust half of a transformers tokenizer: what data workers need, without transformers."""

    def __init__(self, tokenizer: Any):
        """tokenizer: of transformers. Raises: DataError if it has no such half."""
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self.backend is None:
            raise DataError("the tokenizer has no tokenizer.json; save it as a fast tokenizer")
        # A copy that never cuts or pads, which tokenizer.json may say, or others turn on.
        self.backend = copy.deepcopy(self.backend)
        self.backend.no_truncation()
        self.backend.no_padding()

    @property
    def backend_tokenizer(self) -> Any:
        """The tokenizer in Rust, under the name that transformers gives it."""
        return self.backend

    def __getstate__(self) -> Any:
        return self.backend

    def __setstate__(self, backend: Any) -> None:
        self.backend = backend

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text."""
        if len(text) <= 32:  # roles, newlines and the system turn come again and again
            return list(self._short(text))
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    @lru_cache(maxsize=2**12)  # noqa: B019
    def _short(self, text: str) -> tuple[int, ...]:
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """The token of an id."""
        return self.backend.id_to_token(ids)
