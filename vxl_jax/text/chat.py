"""Encode chat text as token ids and labels, as the training code of each family does.

A conversation is a list of turns {"from": "human" | "gpt", "value": text}, as in LLaVA's data
files. The text `<image>` in a human turn is a visual mark: one image or one video. In the ids
each mark is the single id `IMAGE_TOKEN`, which the model's data code replaces by the visual block.

Text is tokenised piece by piece (`vxl_jax.text.template`), so that no token spans two pieces.
Control tokens that a text spells out, such as `<|im_end|>`, become these tokens by default,
as in the published code. With `control_tokens=False` they stay letters: use it for text from people
who are not trusted. `vxl_jax.Model` does so for every question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vxl_jax.errors import ConversationError
from vxl_jax.text.template import (
    IGNORE,
    IMAGE_MARK,
    IMAGE_TOKEN,
    TEMPLATES,
    LabelledIds,
    Template,
    Tokenizer,
    join_pieces,
    make_writer,
)
from vxl_jax.typing import Family

DEFAULT_SYSTEM = "You are a helpful assistant."

_ROLES = {"human": "user", "gpt": "assistant"}

Turn = Mapping[str, Any]


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
    family: Family = "video_xl",
) -> EncodedText:
    """Encode a training conversation as token ids and labels.

    A system turn, then each turn as `<|im_start|>role`, newline, text, `<|im_end|>`, newline.
    Leading gpt turns are dropped. In human turns

    - a single mark that is not at the start is moved there, before a newline and the stripped rest;
    - Video-XL: marks at the start become as many visual blocks, then a newline, then the rest as it
      stands (which usually begins with a newline). Several marks that are not all at the start stay
      where they are, the text between them unchanged and no newline added (the published code
      garbles these turns);
    - LLaVA-Video: nothing is added.

    Labels: all text of gpt turns; in all turns `<|im_start|>`, `<|im_end|>` and the last newline.
    LLaVA-Video has those of all of a gpt turn, role included, and of every token that is a newline
    alone.

    Args:
      conversations: turns with "from" (human or gpt, in alternation) and "value" (text).
      tokenizer: a transformers tokenizer with <|im_start|> and <|im_end|>.
      system: text of the system turn.
      control_tokens: encode control tokens that texts spell out as these tokens; False: as letters.
      family: of the model, see `vxl_jax.text.template`.

    Raises:
      ConversationError: no turns or no answer, an unknown role, roles that do not alternate, a
        missing key, a value or system text that is not valid text, an empty answer, a mark in an
        answer, or a tokenizer without the two tokens.
    """
    turns = _checked(conversations)
    if not any(turn["from"] == "gpt" for turn in turns):
        raise ConversationError("the conversation has no answer: add a turn from gpt")
    template = TEMPLATES[family](tokenizer, control_tokens)
    return _encoded(_encode_turns(turns, template, system))


def encode_prompt(
    turns: str | Sequence[Turn],
    tokenizer: Tokenizer,
    system: str = DEFAULT_SYSTEM,
    control_tokens: bool = True,
    family: Family = "video_xl",
) -> np.ndarray:
    """Encode a prompt for generation: the turns, then the start of an answer.

    The ids are those of training up to the answer, so that for Video-XL `"<image>\\n" + question`
    gives two newlines after the visual block. Its published demonstration has one there: write
    `"<image>" + question` for it.

    Args:
      turns: one question, or turns as for `encode_conversation` (earlier questions with their
        answers) of which the last is human.
      tokenizer: a transformers tokenizer with <|im_start|> and <|im_end|>.
      system: text of the system turn.
      control_tokens: as for `encode_conversation`.
      family: as there.

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
    template = TEMPLATES[family](tokenizer, control_tokens)
    turns_before = _encode_turns(checked, template, system)
    return _encoded(join_pieces([turns_before, template.head("assistant")])).ids


def encode_follow_up(
    question: str,
    tokenizer: Tokenizer,
    control_tokens: bool = True,
    family: Family = "video_xl",
) -> np.ndarray:
    """Encode a follow-up question: the end of the last answer's turn, the question, and the start
    of its answer.

    The ids are those that `encode_prompt` gives for all turns together. Other arguments as there.

    Raises:
      ConversationError: a tokenizer without <|im_start|> and <|im_end|>.
    """
    template = TEMPLATES[family](tokenizer, control_tokens)
    pieces = [template.tail(), template.turn("user", question), template.head("assistant")]
    return _encoded(join_pieces(pieces)).ids


def with_marks(blocks: int, question: str, family: Family = "video_xl") -> str:
    """Put the marks of visual blocks before a question, as a model's training data has them.

    LLaVA-Video's have a newline after the last mark; Video-XL's template adds one by itself.
    """
    between = ""
    if family == "llava_video" and blocks and not question.startswith("\n"):
        between = "\n"
    return IMAGE_MARK * blocks + between + question


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
    text = make_writer(tokenizer, control_tokens)(caption + "\n")
    return _encoded(([IMAGE_TOKEN, *text], [IGNORE, *text]))


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


def _encode_turns(turns: Sequence[Turn], template: Template, system: str) -> LabelledIds:
    if not isinstance(system, str):
        raise ConversationError(f"the system text must be text, got {type(system).__name__}")
    _check_unicode("the system text", system)
    pieces = [template.turn("system", system)]
    pieces += [template.turn(_ROLES[turn["from"]], turn["value"]) for turn in turns]
    return join_pieces(pieces)


def _encoded(piece: LabelledIds) -> EncodedText:
    ids, labels = piece
    return EncodedText(np.array(ids, np.int32), np.array(labels, np.int32))
