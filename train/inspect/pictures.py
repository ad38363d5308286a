"""Pictures of a data set: histograms of its lengths, and a sheet of samples as the model gets them.

matplotlib alone, drawn to files.
"""

import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

KIND_COLOURS = {
    "text": "#7f8c8d",
    "image": "#2a78b5",
    "images": "#1b9e8a",
    "video": "#d4762c",
    "videos": "#a8485f",
}
"""Of the kinds of samples, in both pictures."""

BINS = 60
"""Bars of a histogram, about."""


# Lengths.


@dataclass(frozen=True)
class KindLengths:
    """Tokens and frames of all samples of one kind, and where its buckets end, in tokens."""

    tokens: np.ndarray
    frames: np.ndarray
    ends: Sequence[int]


def draw_lengths(kinds: Mapping[str, KindLengths], path: Path) -> None:
    """Histograms of tokens and frames, a row for each kind of samples."""
    plt = _pyplot()
    rows = len(kinds)
    figure, axes = plt.subplots(
        rows, 2, figsize=(12, 0.9 + 2.3 * rows), squeeze=False, layout="constrained"
    )
    with_media = [k for name, k in kinds.items() if name != "text"]
    tokens = [part for k in kinds.values() for part in (k.tokens, np.array(k.ends))]
    edges = _edges(tokens), _edges([k.frames for k in with_media])
    for row, (name, lengths) in zip(axes, kinds.items(), strict=True):
        for axis, values, bins in zip(row, (lengths.tokens, lengths.frames), edges, strict=True):
            if name == "text" and axis is row[1]:
                axis.set_axis_off()
                continue
            axis.hist(values, bins, color=KIND_COLOURS[name], zorder=2)
            if bins[-1] > 20 * bins[0]:
                axis.set_xscale("log")
            axis.set_xlim(bins[0], bins[-1])
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.xaxis.set_minor_formatter("")
            axis.yaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.25, zorder=0)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_title(f"{name} · {len(lengths.tokens):,} samples", loc="left", fontsize=10.5)
        row[0].set_ylabel("samples")
        for end in lengths.ends:
            line = row[0].axvline(end + 0.5, color="black", linewidth=0.8, linestyle="--", zorder=3)
    figure.legend([line], ["ends of buckets"], loc="outside upper right", fontsize=9, frameon=False)
    axes[-1][0].set_xlabel("tokens of a sample (text, visual and beacons)")
    axes[-1][1].set_xlabel("frames or tiles of a sample")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _edges(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Bars that are whole numbers wide; wider and wider where lengths differ by a lot."""
    values = np.concatenate(parts) if parts else np.ones(1)
    low, high = int(values.min()), int(values.max())
    if high - low < BINS:
        return np.arange(low, high + 2) - 0.5
    if high > 20 * low:
        return np.unique(np.round(np.geomspace(low, high + 1, BINS + 1))) - 0.5
    step = -(-(high + 1 - low) // BINS)
    return np.arange(low, high + 1 + step, step) - 0.5


# Samples.

CONTEXT, LOSS, MEDIA, LEFT_OUT = range(4)
"""Styles of pieces of text: not learned, learned, the place of a medium, a note."""


@dataclass(frozen=True)
class SheetSample:
    """One sample on the sheet.

    frames: uint8 [S, S, 3] each, with its caption. pieces: its text in order, each with a style.
    """

    name: str
    kind: str
    line: str
    frames: Sequence[tuple[str, np.ndarray]]
    pieces: Sequence[tuple[str, int]]
    fault: str | None = None


DPI = 100
WIDTH, MARGIN = 1640, 28
THUMB, GAP, THUMBS = 112, 5, 6
FRAMES_AT = WIDTH - MARGIN - THUMBS * (THUMB + GAP) + GAP
TEXT_WIDTH = FRAMES_AT - 24 - MARGIN
"""Text is to the left, frames are to the right; in pixels."""
TITLE_HEIGHT, HEAD_HEIGHT, LINE_HEIGHT, FOOT_HEIGHT = 58, 50, 18, 16
MOST_LINES = 30
"""Lines of text of one sample at most."""

_COLOURS = {CONTEXT: "#7a7f85", LOSS: "#0b5d2e", MEDIA: "#1f5fa8", LEFT_OUT: "#b0561c"}
_MEDIA_BOXES = {LOSS: "#d3f2dc", MEDIA: "#e1edfb"}
_FALLBACKS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei")


def draw_samples(pictures: Sequence[SheetSample], title: str, path: Path) -> None:
    """A sheet with a row for each sample: its text as the model gets it, and some of its frames."""
    plt = _pyplot()
    figure = plt.figure(figsize=(WIDTH / DPI, 1), dpi=DPI)
    sheet = _Sheet(figure)
    columns = int(TEXT_WIDTH / sheet.cell)
    wrapped = [_wrap(picture.pieces, columns) for picture in pictures]
    heights = [
        max(HEAD_HEIGHT + len(lines) * LINE_HEIGHT, (THUMB + 14) * (len(picture.frames) > 0))
        + FOOT_HEIGHT
        for picture, lines in zip(pictures, wrapped, strict=True)
    ]
    height = TITLE_HEIGHT + sum(heights)
    figure.set_size_inches(WIDTH / DPI, height / DPI)
    canvas = np.full((height, WIDTH, 3), 255, np.uint8)
    sheet.open(height)
    sheet.text(MARGIN, 34, title, size=13, weight="bold")
    x = sheet.piece(WIDTH - MARGIN - 46 * sheet.cell, 34, "tokens that carry loss", LOSS)
    sheet.piece(x + 2 * sheet.cell, 34, "tokens that carry none", CONTEXT)
    top = TITLE_HEIGHT
    for picture, lines, room in zip(pictures, wrapped, heights, strict=True):
        canvas[top : top + 1, MARGIN:-MARGIN] = 205
        sheet.text(MARGIN, top + 21, picture.kind, KIND_COLOURS[picture.kind], weight="bold")
        x = MARGIN + 8 * sheet.cell
        sheet.text(x, top + 21, shorten(_plain(picture.name), columns - 8), weight="bold")
        sheet.text(x, top + 39, picture.line, "#444444", size=8.5)
        for i, (caption, pixels) in enumerate(picture.frames):
            x, y = FRAMES_AT + i * (THUMB + GAP), top + 12
            canvas[y : y + THUMB, x : x + THUMB] = _thumb(pixels)
            sheet.text(x + 5, y + THUMB - 7, caption, "white", 7.5, box="#000000a0")
        for i, line in enumerate(lines):
            sheet.line(MARGIN, top + HEAD_HEIGHT + 13 + i * LINE_HEIGHT, line)
        top += room
    sheet.axis.imshow(canvas, extent=(0, WIDTH, len(canvas), 0), interpolation="nearest")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        figure.savefig(path, dpi=DPI)
    plt.close(figure)


class _Sheet:
    """Text at pixels of a figure, counted from its upper left corner."""

    def __init__(self, figure: Any):
        from matplotlib import font_manager

        installed = {font.name for font in font_manager.fontManager.ttflist}
        self.fonts = ["DejaVu Sans Mono", *(name for name in _FALLBACKS if name in installed)]
        self.figure = figure
        ruler = figure.text(0, 0, "0" * 100, family=self.fonts, size=9)
        self.cell = ruler.get_window_extent(figure.canvas.get_renderer()).width / 100
        ruler.remove()

    def open(self, height: int) -> None:
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axis.set_axis_off()

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: str = "#222222",
        size: float = 9,
        weight: str = "normal",
        box: str | None = None,
    ) -> None:
        """y is that of the base line."""
        if any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text):
            text = "\N{LEFT-TO-RIGHT MARK}" + text  # or a line that begins with it would run so
        patch = {"facecolor": box, "edgecolor": "none", "pad": 2} if box else None
        # A dollar sign does not begin a formula.
        self.axis.text(
            x,
            y,
            text,
            color=colour,
            size=size,
            weight=weight,
            family=self.fonts,
            bbox=patch,
            parse_math=False,
        )

    def piece(self, x: float, y: float, text: str, style: int) -> float:
        """Text in a style; returns where it ends."""
        from matplotlib.patches import Rectangle

        width = sum(map(_cells, text)) * self.cell
        if style in _MEDIA_BOXES:
            corner = (x, y - LINE_HEIGHT + 5)
            self.axis.add_patch(
                Rectangle(corner, width, LINE_HEIGHT - 1, facecolor=_MEDIA_BOXES[style], zorder=2)
            )
        self.text(x, y, text, _COLOURS[style])
        return x + width

    def line(self, x: float, y: float, pieces: Sequence[tuple[str, int]]) -> None:
        for text, style in pieces:
            x = self.piece(x, y, text, style)


def _thumb(pixels: np.ndarray) -> np.ndarray:
    small = len(pixels) < THUMB
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(pixels).resize((THUMB, THUMB), method))


def shorten(text: str, most: int) -> str:
    """The text with its middle left out, if it is longer than `most`."""
    if len(text) <= most:
        return text
    head = most // 2 - 1
    return text[:head] + "…" + text[len(text) - (most - head - 1) :]


def _plain(text: str) -> str:
    """Text without what draws nothing or moves other text: controls and marks of direction."""
    kept = []
    for letter in text:
        category = unicodedata.category(letter)
        if category == "Cf":
            continue
        kept.append("·" if category[0] == "C" and letter != "\n" else letter)
    return "".join(kept)


def _cells(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _wrap(pieces: Sequence[tuple[str, int]], columns: int) -> list[list[tuple[str, int]]]:
    """Lines of pieces, broken at newlines and between words; the middle left out if too many."""
    letters = [(letter, style) for text, style in pieces for letter in _plain(text)]
    lines: list[list[tuple[str, int]]] = []
    start = used = 0
    i = 0
    while i < len(letters):
        letter = letters[i][0]
        if letter == "\n":
            lines.append(letters[start:i])
            start, used = i + 1, 0
        elif used + _cells(letter) > columns:
            words = [j for j in range(max(start + 1, i - 30), i) if letters[j - 1][0] == " "]
            end = words[-1] if words else i
            lines.append(letters[start:end])
            start, used = end, sum(_cells(letters[j][0]) for j in range(end, i + 1))
        else:
            used += _cells(letter)
        i += 1
    if start < len(letters):
        lines.append(letters[start:])
    if len(lines) > MOST_LINES:
        half = MOST_LINES // 2
        note = [(f"[{len(lines) - 2 * half:,} lines left out]", LEFT_OUT)]
        lines = [*lines[:half], note, *lines[-half:]]
    return [_joined(line) for line in lines]


def _joined(letters: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Neighbours of one style as one piece."""
    pieces: list[tuple[str, int]] = []
    for text, style in letters:
        if pieces and pieces[-1][1] == style:
            pieces[-1] = pieces[-1][0] + text, style
        else:
            pieces.append((text, style))
    return pieces


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
