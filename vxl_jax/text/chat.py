"""Encode chat text as token ids and labels, as Video-XL's training code does.

A conversation is a list of turns {"from": "human" | "gpt", "value": text}, as in LLaVA's data
files. The text `<image>` in a human turn is a visual mark: one image or one video. In the ids
each mark is the single id `IMAGE_TOKEN`, which the model's data code replaces by the visual block.

Text is tokenised piece by piece (role, newline, text between marks), so that no token spans two
pieces. Control tokens that a text spells out, such as `<|im_end|>`, become these tokens by default,
as in the published code. With `control_tokens=False` they stay letters: use it for text from people
who are not trusted. `vxl_jax.Model` does so for every question.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vxl_jax.errors import ConversationError

IMAGE_MARK = "<image>"
IMAGE_TOKEN = -200
IGNORE = -100
DEFAULT_SYSTEM = "You are a helpful assistant."

_ROLES = {"human": "user", "gpt": "assistant"}
_LEADING_MARKS = re.compile(f"(?:{IMAGE_MARK})+")

Turn = Mapping[str, Any]


class Tokenizer(Protocol):
    """Methods needed from a transformers tokenizer; it must have <|im_start|> and <|im_end|>."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def convert_ids_to_tokens(self, ids: int) -> Any: ...


@dataclass(frozen=True, eq=False)
class EncodedText:
    """Token ids and labels of one sample.

    Attributes:
      ids: int32 [T]; `IMAGE_TOKEN` at each visual mark.
      labels: int32 [T]; the ids that are learned, `IGNORE` elsewhere. Not rotated: label t belongs
        to id t, and the loss compares it with the prediction at t - 1.
    """

    ids: np.ndarray
    labels: np.ndarray


def count_marks(conversations: Sequence[Turn], first: int = 0) -> int:
    """Count the visual blocks of a conversation.

    Leading gpt turns do not count: they are dropped.

    Args:
      conversations: as for `encode_conversation`.
      first: number of the first turn in error messages.

    Raises:
      ConversationError: as `encode_conversation`, apart from missing answers.
    """
    return sum(turn["value"].count(IMAGE_MARK) for turn in _checked(conversations, first))


def encode_conversation(
    conversations: Sequence[Turn],
    tokenizer: Tokenizer,
    system: str = DEFAULT_SYSTEM,
    control_tokens: bool = True,
) -> EncodedText:
    """Encode a training conversation as token ids and labels.

    A system turn, then each turn as `<|im_start|>role`, newline, text, `<|im_end|>`, newline.
    Leading gpt turns are dropped. In human turns

    - marks at the start become as many visual blocks, then a newline, then the rest as it stands
      (which usually begins with a newline);
    - a single mark elsewhere is moved to the start, before a newline and the stripped rest;
    - several marks that are not all at the start stay where they are, the text between them
      unchanged and no newline added (the published code garbles these turns).

    Labels: `<|im_start|>`, `<|im_end|>` and the last newline of every turn, and all text of gpt
    turns after the newline that follows the role.

    Args:
      conversations: turns with "from" (human or gpt, in alternation) and "value" (text).
      tokenizer: a transformers tokenizer with <|im_start|> and <|im_end|>.
      system: text of the system turn.
      control_tokens: encode control tokens that texts spell out as these tokens; False: as letters.

    Raises:
      ConversationError: no turns or no answer, an unknown role, roles that do not alternate, a
        missing key, a value or system text that is not valid text, an empty answer, a mark in an
        answer, or a tokenizer without the two tokens.
    """
    turns = _checked(conversations)
    if not any(turn["from"] == "gpt" for turn in turns):
        raise ConversationError("the conversation has no answer: add a turn from gpt")
    return _concatenate(_encode_turns(turns, _Template(tokenizer, control_tokens), system))


def encode_prompt(
    turns: str | Sequence[Turn],
    tokenizer: Tokenizer,
    system: str = DEFAULT_SYSTEM,
    control_tokens: bool = True,
) -> np.ndarray:
    """Encode a prompt for generation: the turns, then the start of an answer.

    The ids are those of training up to the answer, so that `"<image>\\n" + question` gives two
    newlines after the visual block. The published demonstration has one there: write
    `"<image>" + question` for it.

    Args:
      turns: one question, or turns as for `encode_conversation` (earlier questions with their
        answers) of which the last is human.
      tokenizer: a transformers tokenizer with <|im_start|> and <|im_end|>.
      system: text of the system turn.
      control_tokens: as for `encode_conversation`.

    Returns:
      int32 [T]; `IMAGE_TOKEN` at each visual mark.

    Raises:
      ConversationError: as `encode_conversation`, or the last turn is not human.
    """
    if isinstance(turns, str):
        turns = [{"from": "human", "value": turns}]
    checked = _checked(turns)
    if checked[-1]["from"] != "human":
        raise ConversationError("the last turn is from gpt: a prompt must end with a human turn")
    template = _Template(tokenizer, control_tokens)
    pieces = _encode_turns(checked, template, system)
    return _concatenate([*pieces, template.head("assistant")]).ids


def encode_follow_up(
    question: str, tokenizer: Tokenizer, control_tokens: bool = True
) -> np.ndarray:
    """Encode a follow-up question: the end of the last answer's turn, the question, and the start
    of its answer.

    The ids are those that `encode_prompt` gives for all turns together. control_tokens: as for
    `encode_conversation`.

    Raises:
      ConversationError: a tokenizer without <|im_start|> and <|im_end|>.
    """
    template = _Template(tokenizer, control_tokens)
    pieces = [template.tail(), template.head("user"), template.question(question)]
    return _concatenate([*pieces, template.tail(), template.head("assistant")]).ids


def encode_caption(caption: str, tokenizer: Tokenizer, control_tokens: bool = True) -> EncodedText:
    """Encode an image-text pair of stage 1 as ids and labels: `<image>`, caption, newline.

    No chat template is applied. Caption and newline, tokenised together, are labelled.
    control_tokens: as for `encode_conversation`.

    Raises:
      ConversationError: the caption is not text, is empty, or holds a mark.
    """
    if not isinstance(caption, str) or not caption.strip():
        raise ConversationError(f"the caption must be text and not empty, got {caption!r}")
    if IMAGE_MARK in caption:
        raise ConversationError(f"the caption holds {IMAGE_MARK}: give the caption alone")
    text = _writer(tokenizer, control_tokens)(caption + "\n")
    return _concatenate([([IMAGE_TOKEN], [IGNORE]), (text, text)])


# --- Checks ----------------------------------------------------------------------------------


def _checked(conversations: Sequence[Turn], number: int = 0) -> list[Turn]:
    """Check the turns and return them from the first human turn on.

    number: of the first turn, for messages.
    """
    if isinstance(conversations, (str, Mapping)) or not isinstance(conversations, Sequence):
        raise ConversationError(
            f"a conversation must be a list of turns, got {type(conversations).__name__}"
        )
    for i, turn in enumerate(conversations, number):
        _check_turn(i, turn)
    first = next((i for i, turn in enumerate(conversations) if turn["from"] == "human"), None)
    if first is None:
        raise ConversationError("the conversation is empty: it has no turn from human")
    turns = list(conversations[first:])
    for i, turn in enumerate(turns):
        _check_place(number + first + i, turn, "gpt" if i % 2 else "human")
    return turns


def _check_turn(i: int, turn: Turn) -> None:
    if not isinstance(turn, Mapping):
        raise ConversationError(f"turn {i} must be an object, got {type(turn).__name__}")
    for key in ("from", "value"):
        if key not in turn:
            raise ConversationError(f"turn {i} has no {key!r}; its keys are {list(turn)}")
        if not isinstance(turn[key], str):
            raise ConversationError(
                f"turn {i}: {key!r} must be text, got {type(turn[key]).__name__}"
            )
        _check_unicode(f"turn {i}: {key!r}", turn[key])
    if turn["from"] not in _ROLES:
        raise ConversationError(f"turn {i}: unknown role {turn['from']!r}; use human or gpt")


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ConversationError(f"{name} is not valid Unicode ({error})") from None


def _check_place(i: int, turn: Turn, expected: str) -> None:
    if turn["from"] != expected:
        raise ConversationError(
            f"turn {i} is from {turn['from']}, expected {expected}: roles must alternate"
        )
    if expected == "gpt" and not turn["value"].strip():
        raise ConversationError(f"turn {i}: the answer is empty")
    if expected == "gpt" and IMAGE_MARK in turn["value"]:
        raise ConversationError(f"turn {i}: an answer cannot hold {IMAGE_MARK}")


# --- Template --------------------------------------------------------------------------------

# Ids with their labels, of equal length.
_Piece = tuple[list[int], list[int]]


class _Template:
    """The pieces of a turn, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, control_tokens: bool = True):
        """control_tokens: as for `encode_conversation`."""
        self._tokenizer = tokenizer
        self._write = _writer(tokenizer, control_tokens)
        self._start = self._special("<|im_start|>")
        self._end = self._special("<|im_end|>")
        self._newline = self.encode("\n")

    def head(self, role: str) -> _Piece:
        """`<|im_start|>role` and newline; the first token is labelled."""
        rest = self.encode(role) + self._newline
        return [self._start, *rest], [self._start] + [IGNORE] * len(rest)

    def tail(self) -> _Piece:
        """`<|im_end|>` and newline, both labelled."""
        ids = [self._end, *self._newline]
        return ids, ids

    def text(self, text: str, labelled: bool) -> _Piece:
        """Text of a system or gpt turn."""
        ids = self._write(text)
        return ids, ids if labelled else [IGNORE] * len(ids)

    def question(self, text: str) -> _Piece:
        """Text and marks of a human turn, without labels."""
        if text.count(IMAGE_MARK) == 1 and not text.startswith(IMAGE_MARK):
            rest = text.replace(IMAGE_MARK, "").strip()
            text = f"{IMAGE_MARK}\n{rest}".strip()
        ids: list[int] = []
        leading = _LEADING_MARKS.match(text)
        if leading and IMAGE_MARK not in text[leading.end() :]:
            ids = [IMAGE_TOKEN] * text.count(IMAGE_MARK) + self._newline
            text = text[leading.end() :]
        for i, part in enumerate(text.split(IMAGE_MARK)):
            ids += [IMAGE_TOKEN] * (i > 0) + self._write(part)
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


def _writer(tokenizer: Tokenizer, control_tokens: bool) -> Callable[[str], list[int]]:
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


def _encode_turns(turns: Sequence[Turn], template: _Template, system: str) -> list[_Piece]:
    if not isinstance(system, str):
        raise ConversationError(f"the system text must be text, got {type(system).__name__}")
    _check_unicode("the system text", system)
    pieces = [template.head("system"), template.text(system, labelled=False), template.tail()]
    for turn in turns:
        pieces.append(template.head(_ROLES[turn["from"]]))
        if turn["from"] == "human":
            pieces.append(template.question(turn["value"]))
        else:
            pieces.append(template.text(turn["value"], labelled=True))
        pieces.append(template.tail())
    return pieces


def _concatenate(pieces: Sequence[_Piece]) -> EncodedText:
    return EncodedText(
        ids=np.array([token for ids, _ in pieces for token in ids], np.int32),
        labels=np.array([label for _, labels in pieces for label in labels], np.int32),
    )
