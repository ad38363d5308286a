"""The pieces of the sheet of samples."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.data import assert_png
from train.data.records.sample import Sample, VisualBlock
from train.inspect.figures import general
from train.inspect.pictures import (
    CONTEXT,
    LEFT_OUT,
    LOSS,
    MEDIA,
    KindLengths,
    SheetSample,
    _wrap,
    draw_lengths,
    draw_samples,
)
from train.inspect.sheet import choose_samples, shown_frames, text_pieces
from vxl_jax.text.chat import encode_conversation


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([(1, False)], ["1 of 1"]),
        ([(9, False)], [f"{i} of 9" for i in range(1, 7)]),
        ([(101, True)], [f"{i} of 101" for i in (1, 21, 41, 61, 81, 101)]),
        ([(3, True)], ["1 of 3", "2 of 3", "3 of 3"]),
        ([(1, False), (9, False)], ["1: 1 of 1", *(f"2: {i} of 9" for i in range(1, 6))]),
        ([(2, False)] * 8, [f"{i}: 1 of 2" for i in range(1, 7)]),
        ([], []),
    ],
)
def test_shown_frames(blocks: list[tuple[int, bool]], expected: list[str]) -> None:
    """At most six, of every file if there is room, a video's from first to last."""
    shown = shown_frames([VisualBlock(Path("x"), *block) for block in blocks])
    assert [caption for _, caption in shown] == expected
    starts = np.cumsum([0, *(frames for frames, _ in blocks)])
    for i, caption in shown:  # the caption says which row of the pixels it is
        block, _, number = caption.rpartition(": ")
        assert i == starts[int(block or 1) - 1] + int(number.split()[0]) - 1


def _sample(tokenizer: Any, *turns: str, files: int = 0) -> Sample:
    roles = ("human", "gpt")
    conversation = [{"from": roles[i % 2], "value": turn} for i, turn in enumerate(turns)]
    encoded = encode_conversation(conversation, tokenizer)
    blocks = tuple(VisualBlock(Path(f"dir/{i}.png"), i + 1) for i in range(files))
    return Sample("n", encoded.ids, encoded.labels, blocks, "", "", "")


def test_text_pieces(demo_tokenizer: Any) -> None:
    """Labelled text, other text and marks, all of it in order."""
    sample = _sample(demo_tokenizer, "<image><image>\nwhich is red", "cross ü 🙂", files=2)
    pieces = text_pieces(sample, demo_tokenizer)
    assert pieces == [
        ("<|im_start|>", LOSS),
        ("system↵You are a helpful assistant.", CONTEXT),
        ("<|im_end|>↵\n<|im_start|>", LOSS),
        ("user↵", CONTEXT),
        ("⟨0.png: 1 tile⟩", MEDIA),
        ("⟨1.png: 2 tiles⟩", MEDIA),
        ("↵↵which is red", CONTEXT),
        ("<|im_end|>↵\n<|im_start|>", LOSS),
        ("assistant↵", CONTEXT),
        ("cross ü 🙂<|im_end|>↵\n", LOSS),
    ]


@pytest.mark.parametrize("answer", [1, 400])
@pytest.mark.parametrize("question", [1, 400])
def test_long_text(question: int, answer: int, demo_tokenizer: Any) -> None:
    """Of a long text the middle is left out, wherever it falls; the note counts its tokens."""
    sample = _sample(demo_tokenizer, "red" + " red" * question, "blue" + " blue" * answer)
    pieces = text_pieces(sample, demo_tokenizer)
    notes = [text for text, style in pieces if style == LEFT_OUT]
    left = len(sample.ids) - 340
    assert notes == ([f" [{left:,} tokens left out] "] if left > 0 else [])
    shown = "".join(text for text, style in pieces if style != LEFT_OUT)
    tokens = demo_tokenizer.encode(shown.replace("↵\n", "\n").replace("↵", "\n"))
    assert len(tokens) == min(340, len(sample.ids))


ODD = (
    "$\\nope{$ \\alpha \\frac{ {} %s 日本語 🙂👩‍👩‍👧 שלום مرحبا नमस्ते \u202e override \u2066 "
    "\x00\x07\t\r e\u0301 Z\u0338\u0328 \ue000 \U0010ffff \ufffd \u2028 ﷽"
)


def test_any_text_is_drawn(tmp_path: Path) -> None:
    """Formulas, right-to-left, controls, emoji, very long words: no failure, and no warnings."""
    frame = np.zeros((336, 336, 3), np.uint8)
    pieces = [(ODD * 3, LOSS), ("x" * 5000, CONTEXT), ("\n" * 50, MEDIA), (ODD, LEFT_OUT)]
    pictures = [
        SheetSample(ODD * 5, "video", ODD[:80], [("1 of 1", frame)] * 6, pieces),
        SheetSample("", "text", "", [], [("", LOSS)]),
        SheetSample("", "images", "", [], []),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_samples(pictures, ODD[:40], tmp_path / "a.png")
        draw_samples([], "none", tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 1640
        assert 600 < image.height < 1200  # long text is bounded


def test_wrapping() -> None:
    """No line is wider than the columns; nothing is lost; words stay whole where they can."""
    pieces = [("one two three ", CONTEXT), ("four" * 5, LOSS), (" 日本語日本語日本語", CONTEXT)]
    lines = _wrap(pieces, 10)
    assert lines[0] == [("one two ", CONTEXT)]
    assert "".join(text for line in lines for text, _ in line) == "".join(t for t, _ in pieces)
    wide = [sum(2 if ord(c) > 0x3000 else 1 for t, _ in line for c in t) for line in lines]
    assert max(wide) == 10


@pytest.mark.parametrize("longest", [5, 300, 100_000])
def test_lengths_of_any_range(tmp_path: Path, longest: int) -> None:
    """Short and very long samples, text alone, one sample: each is a picture."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, longest, 200) if longest > 5 else np.array([4])
    text = KindLengths(tokens, np.zeros(len(tokens), int), [longest])
    video = KindLengths(tokens, tokens, [longest // 2, longest])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_lengths({"text": text}, tmp_path / "a.png")
        draw_lengths({"text": text, "video": video}, tmp_path / "b.png")
    assert_png(tmp_path / "b.png", (1000, 2000), (300, 1000))


def test_reasons_are_grouped() -> None:
    """What differs from sample to sample is left out of a reason."""
    assert general("/a/b.png: no such file; check the sample") == general(
        "/c d/e: no such file; check the sample"
    )
    assert general("12,000 tokens (3 frames or tiles) are over data.max_length 512") == (
        "… tokens (… frames or tiles) are over data.max_length …"
    )
    assert general("the record has no conversations") == "the record has no conversations"


class _Fake:
    """As much of a dataset as `choose_samples` reads: two sources of 100 and 10 samples."""

    ranges = (range(0, 100), range(100, 110))
    kind = np.array([1] * 95 + [3] * 5 + [0] * 10, np.uint8)


def test_choice_of_samples() -> None:
    """All sources and kinds in turn, the same for the same seed, all if there are few."""
    data: Any = _Fake()
    chosen = choose_samples(data, 9, seed=1)
    groups = Counter((i >= 100, int(data.kind[i])) for i in chosen)
    assert set(groups.values()) == {3}
    assert chosen == sorted(set(chosen)) == choose_samples(data, 9, seed=1)
    assert chosen != choose_samples(data, 9, seed=2)
    assert choose_samples(data, 200, seed=0) == list(range(110))
