"""The text around the turns of a conversation as token ids with labels, by family.

A turn is `<|im_start|>role`, newline, text, `<|im_end|>`, newline. Families differ in how its text
is cut into pieces before it is tokenised, in what is added next to marks, and in what is learned.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vxl_jax.errors import ConversationError
from vxl_jax.typing import Family

IMAGE_MARK = "<image>"
IMAGE_TOKEN = -200
IGNORE = -100

_LEADING_MARKS = re.compile(f"(?:{IMAGE_MARK})+")


class Tokenizer(Protocol):
    """Methods needed from a transformers tokenizer; it must have <|im_start|> and <|im_end|>."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def convert_ids_to_tokens(self, ids: int) -> Any: ...


LabelledIds = tuple[list[int], list[int]]
"""Ids with their labels, of equal length."""


class Template:
    """Pieces of a conversation for one tokenizer, as Video-XL makes them.

    Labels: `<|im_start|>`, `<|im_end|>` and the last newline of every turn, and all text of gpt
    turns after the newline that follows the role.
    """

    def __init__(self, tokenizer: Tokenizer, control_tokens: bool = True):
        """control_tokens: as for `vxl_jax.text.chat.encode_conversation`."""
        self._tokenizer = tokenizer
        self.write = make_writer(tokenizer, control_tokens)
        self._start = self._special("<|im_start|>")
        self._end = self._special("<|im_end|>")
        self._newline = self.encode("\n")

    def head(self, role: str) -> LabelledIds:
        """`<|im_start|>role` and newline; the first token is labelled."""
        rest = self.encode(role) + self._newline
        return [self._start, *rest], [self._start] + [IGNORE] * len(rest)

    def tail(self) -> LabelledIds:
        """`<|im_end|>` and newline, both labelled."""
        ids = [self._end, *self._newline]
        return ids, ids

    def turn(self, role: str, text: str) -> LabelledIds:
        """A whole turn; role: system, user or assistant."""
        if role == "user":
            middle = self._question(text)
        else:
            ids = self.write(text)
            middle = ids, ids if role == "assistant" else [IGNORE] * len(ids)
        return join_pieces([self.head(role), middle, self.tail()])

    def _question(self, text: str) -> LabelledIds:
        """Text and marks of a human turn, without labels."""
        text = with_mark_first(text)
        ids: list[int] = []
        leading = _LEADING_MARKS.match(text)
        if leading and IMAGE_MARK not in text[leading.end() :]:
            ids = [IMAGE_TOKEN] * text.count(IMAGE_MARK) + self._newline
            text = text[leading.end() :]
        for i, part in enumerate(text.split(IMAGE_MARK)):
            ids += [IMAGE_TOKEN] * (i > 0) + self.write(part)
        return ids, [IGNORE] * len(ids)

    def encode(self, text: str) -> list[int]:
        """Ids of the template's own text, or of a control token."""
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def _special(self, token: str) -> int:
        ids = self.encode(token)
        # Asked back, since an unknown token may be encoded as the one id of <unk>.
        if len(ids) != 1 or self._tokenizer.convert_ids_to_tokens(ids[0]) != token:
            raise ConversationError(
                f"the tokenizer does not know {token} as one token; use Qwen2's"
            )
        return ids[0]


class LlavaTemplate(Template):
    """Pieces of a conversation as LLaVA-Video makes them: the texts of a turn as they stand.

    Role, newline and text are tokenised together, up to a mark. Labels: all of gpt turns; elsewhere
    `<|im_start|>`, `<|im_end|>` and every token that is a newline alone.
    """

    def turn(self, role: str, text: str) -> LabelledIds:
        """A whole turn; role: system, user or assistant."""
        if role == "user":
            text = with_mark_first(text.replace(_LEFT_OUT, ""))
        ids = [self._start]
        whole = f"{role}\n{text}"
        for i, part in enumerate(whole.split(IMAGE_MARK) if role == "user" else [whole]):
            ids += [IMAGE_TOKEN] * (i > 0) + self.write(part)
        ids += [self._end, *self._newline]
        if role == "assistant":
            return ids, ids
        everywhere = {self._start, self._end, *self._newline}
        return ids, [number if number in everywhere else IGNORE for number in ids]


_LEFT_OUT = "QA_GT_caption_based_noisy"
"""A note in some records of LLaVA-Video-178K."""

TEMPLATES: dict[Family, type[Template]] = {"video_xl": Template, "llava_video": LlavaTemplate}


def with_mark_first(text: str) -> str:
    """Move the only mark of a turn to its start, if it stands elsewhere."""
    if text.count(IMAGE_MARK) != 1 or text.startswith(IMAGE_MARK):
        return text
    rest = text.replace(IMAGE_MARK, "").strip()
    return f"{IMAGE_MARK}\n{rest}".strip()


def join_pieces(pieces: Sequence[LabelledIds]) -> LabelledIds:
    """Put pieces one after another."""
    ids = [token for ids, _ in pieces for token in ids]
    return ids, [label for _, labels in pieces for label in labels]


def make_writer(tokenizer: Tokenizer, control_tokens: bool) -> Callable[[str], list[int]]:
    """Returns what encodes the texts of people; see `encode_conversation`."""
    if control_tokens:
        return lambda text: tokenizer.encode(text, add_special_tokens=False) if text else []
    return _Letters(tokenizer).encode


class _Letters:
    """Encodes text without control tokens: what spells one is encoded by its letters.

    Control tokens are those that were added to the tokenizer's vocabulary, special or not. The ids
    of special ones are those of transformers' `split_special_tokens=True`.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:  # a tokenizer of transformers that is written in Python
            added = tokenizer.added_tokens_decoder
            options = {"add_special_tokens": False, "split_special_tokens": True}
            self._ids: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, **options)
            unknown = getattr(tokenizer, "unk_token", None)
        else:
            added = backend.get_added_tokens_decoder()
            # The same model without added tokens. A setting of the tokenizer itself
            # (encode_special_tokens) would be seen by other threads.
            plain = type(backend)(backend.model)
            plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
            self._ids = lambda text: plain.encode(text, add_special_tokens=False).ids
            unknown = getattr(backend.model, "unk_token", None)
        names = {number: token.content for number, token in added.items()}
        self._control = {number: name for number, name in names.items() if name != unknown}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
          ConversationError: the vocabulary has no letters for a control token in the text.
        """
        ids = self._ids(text) if text else []
        if self._control.keys().isdisjoint(ids):
            return ids
        # A vocabulary of whole words may hold the control token itself: cut it in two.
        cuts = [f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in self._control.values()]
        ids = [number for part in re.split("|".join(cuts), text) for number in self._ids(part)]
        for number in ids:
            if number in self._control:
                raise ConversationError(
                    f"the text holds the control token {self._control[number]}, which this "
                    "tokenizer cannot encode as letters; remove it"
                )
        return ids
