"""Make the demo data set: real PNG and MP4 files, LLaVA-format JSON files and a tokenizer.

What is drawn is known, so questions and answers follow from it. A data set is a directory of

- `frames.json`: the first lesson: what appears on single tiles;
- `train.json`: every type of question, several questions a record (`question_types`);
- `heldout.json`: one question a record (`question_type`), on media that no training record uses;
- `media/train/`, `media/heldout/`: pictures and videos; paths in the JSON start below `media/`;
- `tokenizer/`: byte-level BPE in which every word of the demo is one token;
- `data.json`: the seed and the amounts that all of it was made from.

Types of question: `colour`, `shape` and `count` (one picture), `which` (several pictures), `order`
and `needle` (a video) need the media. `text` has none.
"""

import importlib.util
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from train.demo.drawing import COLOURS, SHAPES, Thing, draw_tile, write_mp4, write_png
from train.demo.tokenizer import save_tokenizer
from vxl_jax.progress import progress_bar

NUMBERS = ("one", "two", "three", "four")
PLACES = ("first", "second", "third", "fourth")
CLASSES = {
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "number": NUMBERS,
    "position": PLACES,
}
"""The four classes of words in questions of type `text`."""

THINGS = len(COLOURS) * len(SHAPES)

VIDEO_FRAMES = (4, 8)
"""Lengths of videos, drawn uniformly; few of them, so that few programs have to be compiled."""
SET_SIZES = (2, 2, 3)
"""Pictures of a training record with several, drawn uniformly; held-out ones have three. No two are
of the same colour or shape."""

CHAT_WORDS = ("You", "are", "a", "helpful", "assistant", "system", "user")
"""Words that the chat template puts around every conversation."""


@dataclass(frozen=True)
class Amounts:
    """How much of everything one half of the data (training, held-out) has.

    Kinds of media: `tile` (a picture of one tile with a shape), `wide` (two tiles, one empty),
    `grid` (four tiles, one to four with a shape), `needle` (a video with one shape in one frame),
    `pair` (a video with two shapes, at least a quarter of it apart). Kinds of records are the same
    and `set` (several of the tiles) and `text` (no media).
    """

    files: Mapping[str, int]
    """Media files of each kind."""
    records: Mapping[str, int]
    """Records of each kind; there may be several of one file."""


TRAIN = Amounts(
    files={"tile": 768, "wide": 200, "grid": 400, "needle": 160, "pair": 500},
    records={
        "tile": 768,
        "wide": 320,
        "grid": 800,
        "needle": 320,
        "pair": 2200,
        "set": 1400,
        "text": 480,
    },
)
HELDOUT = Amounts(
    files={"tile": 48, "wide": 40, "grid": 40, "needle": 40, "pair": 40},
    records={"wide": 40, "grid": 40, "needle": 40, "pair": 40, "set": 80, "text": 80},
)


class DemoFile(NamedTuple):
    """One file and what is on each of its tiles or frames."""

    path: str
    things: tuple[Thing | None, ...]

    @property
    def shown(self) -> list[Thing]:
        """The shapes, in their order."""
        return [thing for thing in self.things if thing is not None]


class DemoQuestion(NamedTuple):
    """A question of some type, its answer, and among how many equally likely ones that is."""

    type: str
    question: str
    answer: str
    choices: int


def make_demo_data(
    directory: Path, seed: int, train: Amounts = TRAIN, heldout: Amounts = HELDOUT
) -> None:
    """Write the data set, or return at once if `directory` holds it already.

    The same seed and amounts give the same bytes (with the same versions of the libraries).
    Everything is written to a sibling of `directory` first, so that `directory` is always complete.

    Raises: FileExistsError if `directory` holds something else. ModuleNotFoundError without PyAV.
    """
    made_from = {"seed": seed, "train": asdict(train), "heldout": asdict(heldout)}
    if directory.exists():
        info = directory / "data.json"
        if info.is_file() and json.loads(info.read_text()) == made_from:
            return
        raise FileExistsError(
            f"{directory} exists and is not the demo data that seed {seed} makes; remove it or use "
            "another directory"
        )
    if importlib.util.find_spec("av") is None:
        raise ModuleNotFoundError("the demo data's videos need PyAV: pip install av")
    part = directory.with_name(directory.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)

    total = sum(train.files.values()) + sum(heldout.files.values())
    with progress_bar(total=total, desc="making demo data", unit="file") as progress:
        train_media = _make_media(part / "media", "train", seed, train, progress)
        heldout_media = _make_media(part / "media", "heldout", seed, heldout, progress)
    rng = _rng(seed, "records")
    lessons = [_record([tile], _ask(rng, "tile", tile), True) for tile in train_media["tile"]]
    _write_json(part / "frames.json", _numbered("frame", lessons))
    records = list(_train_records(rng, train, train_media))
    _write_json(part / "train.json", _numbered("train", records))
    records = list(_heldout_records(rng, heldout, heldout_media))
    _write_json(part / "heldout.json", _numbered("heldout", records))
    save_tokenizer(part / "tokenizer", demo_words())
    _write_json(part / "data.json", made_from)
    part.rename(directory)


def _rng(seed: int, *names: object) -> np.random.Generator:
    """Make a generator for a name: the amount of one kind does not change the draws of another."""
    return np.random.default_rng([seed, *"/".join(map(str, names)).encode()])


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


# Media: what is drawn, then the files.


def _thing(i: int) -> Thing:
    """Counts through all combinations: each eight from a multiple of eight have every colour."""
    colour, block = i % len(COLOURS), i // len(COLOURS)
    return Thing(list(COLOURS)[colour], list(SHAPES)[(colour + block) % len(SHAPES)])


def _other_thing(i: int) -> Thing:
    """Of another colour and shape than `_thing(i)`; each eight again have every colour."""
    colour, block = i % len(COLOURS), i // len(COLOURS)
    other = (colour + 1 + block % (len(COLOURS) - 1)) % len(COLOURS)
    return Thing(list(COLOURS)[other], list(SHAPES)[(colour + block + 1) % len(SHAPES)])


def _plan(rng: np.random.Generator, kind: str, i: int) -> tuple[Thing | None, ...]:
    """What is on each tile or frame of the i-th file of a kind."""
    if kind == "tile":
        return (_thing(i),)
    if kind == "grid":
        tiles = rng.permutation(4)[: i % 4 + 1]
        return _spread(4, {int(tile): _thing(int(rng.integers(THINGS))) for tile in tiles})
    if kind == "wide":
        return _spread(2, {int(rng.integers(2)): _thing(i)})
    count = int(rng.choice(VIDEO_FRAMES))
    if kind == "needle":
        return _spread(count, {int(rng.integers(count)): _thing(i)})
    apart = math.ceil(count / 4)
    first = int(rng.integers(count - apart))
    last = int(rng.integers(first + apart, count))
    return _spread(count, {first: _thing(i), last: _other_thing(i)})


def _spread(count: int, things: dict[int, Thing]) -> tuple[Thing | None, ...]:
    return tuple(things.get(i) for i in range(count))


def _make_media(
    root: Path, split: str, seed: int, amounts: Amounts, progress: tqdm
) -> dict[str, list[DemoFile]]:
    """Draw and write all files of one half below `root`."""
    (root / split).mkdir(parents=True)
    media: dict[str, list[DemoFile]] = {}
    for kind, count in amounts.files.items():
        media[kind] = []
        for i in range(count):
            rng = _rng(seed, split, kind, i)
            things = _plan(rng, kind, i)
            tiles = [draw_tile(rng, thing) for thing in things]
            video = kind in ("needle", "pair")
            path = f"{split}/{kind}_{i:04}.{'mp4' if video else 'png'}"
            if video:
                write_mp4(root / path, tiles)
            else:
                write_png(root / path, tiles, columns=min(2, len(tiles)))
            media[kind].append(DemoFile(path, things))
            progress.update()
    return media


# Questions and answers.


def _shuffled(rng: np.random.Generator, items: list[Any]) -> list[Any]:
    return [items[i] for i in rng.permutation(len(items))]


def _describe(rng: np.random.Generator, thing: Thing) -> list[DemoQuestion]:
    return _shuffled(
        rng,
        [
            DemoQuestion("colour", "what is the colour", thing.colour, len(COLOURS)),
            DemoQuestion("shape", "what is the shape", thing.shape, len(SHAPES)),
        ],
    )


def _appeared(thing: Thing) -> DemoQuestion:
    return DemoQuestion("needle", "what appeared", f"{thing.colour} {thing.shape}", THINGS)


def _ask(rng: np.random.Generator, kind: str, media: DemoFile) -> list[DemoQuestion]:
    """All questions about one file, in random order."""
    if kind == "wide":
        return _describe(rng, media.shown[0])
    if kind == "grid":
        return [
            DemoQuestion("count", "how many shapes", NUMBERS[len(media.shown) - 1], len(NUMBERS))
        ]
    if kind in ("needle", "tile"):  # a tile is the shortest video with a needle
        return [_appeared(media.shown[0])]
    first, last = media.shown
    return _shuffled(
        rng,
        [
            DemoQuestion("order", "which colour came first", first.colour, len(COLOURS)),
            DemoQuestion("order", "which colour came last", last.colour, len(COLOURS)),
        ],
    )


def _ask_set(rng: np.random.Generator, pictures: list[DemoFile]) -> list[DemoQuestion]:
    """One question about each picture of a set, in random order."""
    things = [pictures[i].shown[0] for i in rng.permutation(len(pictures))]
    return [_which(thing, bool(rng.integers(2))) for thing in things]


def _which(thing: Thing, by_colour: bool) -> DemoQuestion:
    if by_colour:
        return DemoQuestion("which", f"which shape is {thing.colour}", thing.shape, len(SHAPES))
    return DemoQuestion("which", f"which colour is the {thing.shape}", thing.colour, len(COLOURS))


def _choose_set(rng: np.random.Generator, tiles: list[DemoFile], size: int) -> list[DemoFile]:
    """Tiles of which no two have the same colour or shape."""
    chosen: list[DemoFile] = []
    for tile in _shuffled(rng, tiles):
        (thing,) = tile.shown
        others = [other.shown[0] for other in chosen]
        if all(thing.colour != o.colour and thing.shape != o.shape for o in others):
            chosen.append(tile)
        if len(chosen) == size:
            return chosen
    raise ValueError(f"{len(tiles)} tiles are too few for {size} of different colours and shapes")


def _ask_text(rng: np.random.Generator, first: str | None = None) -> list[DemoQuestion]:
    """Four words of four classes, and a question for each class; `first` is the first one asked."""
    word = {name: str(rng.choice(words)) for name, words in CLASSES.items()}
    classes = _shuffled(rng, list(CLASSES))
    if first is not None:
        classes = [first, *(name for name in classes if name != first)]
    text = " ".join(_shuffled(rng, list(word.values())))
    questions = [f"which is the {name}" for name in classes]
    questions[0] = f"{text} : {questions[0]}"
    return [
        DemoQuestion("text", question, word[name], len(CLASSES))
        for question, name in zip(questions, classes, strict=True)
    ]


# Records in LLaVA's format.


def _train_records(
    rng: np.random.Generator, amounts: Amounts, media: Mapping[str, list[DemoFile]]
) -> Iterator[dict[str, Any]]:
    for kind, count in amounts.records.items():
        for i in range(count):
            if kind == "text":
                yield _record([], _ask_text(rng), True)
            elif kind == "set":
                pictures = _choose_set(rng, media["tile"], int(rng.choice(SET_SIZES)))
                yield _record(pictures, _ask_set(rng, pictures), True)
            else:
                file = media[kind][i % len(media[kind])]
                turns = _ask(rng, kind, file)
                # Whoever knows which colour came first knows the last without having seen an order.
                yield _record([file], turns[:1] if kind == "pair" else turns, True)


def _heldout_records(
    rng: np.random.Generator, amounts: Amounts, media: Mapping[str, list[DemoFile]]
) -> Iterator[dict[str, Any]]:
    """One question a record. The answers of each type are spread as evenly as they can be, so that
    the best blind guess is right as seldom as possible.
    """
    for kind, count in amounts.records.items():
        for i in range(count):
            if kind == "text":
                yield _record([], _ask_text(rng, list(CLASSES)[i % 4])[:1], False)
            elif kind == "set":
                pictures = _choose_set(rng, media["tile"], max(SET_SIZES))
                yield _record(
                    pictures, [_which(pictures[i // 2 % len(pictures)].shown[0], i % 2 == 0)], False
                )
            elif kind == "pair":
                # Eight files in a row have every colour first, and every colour last.
                file = media[kind][i]
                turns = sorted(_ask(rng, kind, file), key=lambda turn: turn.question)
                yield _record([file], [turns[i // 8 % 2]], False)
            else:
                for turn in _ask(rng, kind, media[kind][i]):
                    yield _record([media[kind][i]], [turn], False)


def _record(media: list[DemoFile], turns: list[DemoQuestion], training: bool) -> dict[str, Any]:
    """Marks stand before the first question, one for each file."""
    conversation = []
    for i, turn in enumerate(turns):
        marks = "<image>" * len(media) + "\n" if media and i == 0 else ""
        conversation.append({"from": "human", "value": marks + turn.question})
        conversation.append({"from": "gpt", "value": turn.answer})
    record: dict[str, Any] = {"conversations": conversation}
    paths = [file.path for file in media]
    if len(paths) == 1:
        record["video" if paths[0].endswith(".mp4") else "image"] = paths[0]
    elif paths:
        record["image"] = paths
    if training:
        record["question_types"] = [turn.type for turn in turns]
    else:
        record["question_type"] = turns[0].type
        record["choices"] = turns[0].choices
    return record


def _numbered(name: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": f"{name}_{i:05}", **record} for i, record in enumerate(records)]


def demo_words() -> list[str]:
    """Every word of the questions, the answers and the chat template."""
    questions = (
        "what is the colour of shape appeared how many shapes which came first last image has"
        " number position"
    )
    words = [*CHAT_WORDS, *questions.split(), *(w for words in CLASSES.values() for w in words)]
    return list(dict.fromkeys(words))
