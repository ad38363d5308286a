"""Which annotation files a run trains on: files, patterns of files, and mixtures in YAML.

A mixture is LLaVA's: `datasets:`, a list of `{json_path, sampling_strategy}`, here also with
`media_root`, `weight`, `repeat` and `allow_outside_root`.
"""

import difflib
import glob
import itertools
import math
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from train.data.index import SUFFIXES
from train.errors import DataError

MIXTURE_SUFFIXES = (".yaml", ".yml")

_MIXTURE_KEYS = ("datasets", "media_root", "allow_outside_root")
_DATASET_KEYS = (
    "json_path",
    "sampling_strategy",
    "media_root",
    "weight",
    "repeat",
    "allow_outside_root",
)

_STRATEGY = re.compile(r"all|(first|end|random):(?:([0-9]+)|([0-9]+(?:\.[0-9]+)?)%)")
_STRATEGIES = "all, or first, end or random with :N or :P% (N at least 1, P above 0, at most 100)"


@dataclass(frozen=True)
class Source:
    """An annotation file of a mixture and how it is used."""

    path: Path
    """Annotation file: .json, .jsonl or .parquet."""
    media_root: Path
    """Directory below which its media paths start."""
    strategy: str = "all"
    """Which of its records are used, for `select`."""
    weight: float | None = None
    """Share of the mixture, relative to the other sources'; None: by number of records."""
    repeat: float = 1.0
    """Times that its records are used in one pass over the mixture."""
    allow_outside: bool = False
    """Whether media may lie outside of media_root."""
    entry: int = 0
    """Position, among the paths that were given, of the one that it comes from."""


def find_sources(
    paths: Sequence[str], media_root: str, allow_outside: bool = False
) -> list[Source]:
    """The annotation files that paths stand for, in their order.

    A path is an annotation file, a mixture (.yaml, .yml), or a pattern of such: `{a,b}` as in a
    shell, in the order given, and `*`, `?`, `[…]`, `**`, sorted. A file of just that name comes
    first. Relative paths in a mixture start at its folder.

    media_root, allow_outside: for files that no mixture says other for.

    Raises: DataError naming path, dataset and field; for a mixture with all its problems.
    """
    sources: list[Source] = []
    for entry, text in enumerate(paths):
        for path in _find_files(text, Path(), (*SUFFIXES, *MIXTURE_SUFFIXES)):
            plain = Source(path, Path(media_root), allow_outside=allow_outside, entry=entry)
            mixture = path.suffix.lower() in MIXTURE_SUFFIXES
            sources += _read_mixture(path, plain) if mixture else [plain]
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        other = next(source for source in sources if source.weight is None)
        raise DataError(
            f"{other.path}: has no weight, but {weighted[0].path} has; give all datasets one or "
            "none, in a YAML file"
        )
    return sources


def select(strategy: str, count: int, seed: int) -> np.ndarray:
    """Which of a file's records are used: int64 [N], sorted, distinct.

    strategy: `all`; `first`, `end` or `random` with `:N` (all if there are fewer) or `:P%` (rounded
    up). count: records of the file. seed: of `random`, not negative.

    Raises: DataError if there is no such strategy.
    """
    match = _match_strategy(strategy)
    if match is None:
        raise DataError(f"sampling_strategy is {strategy!r}; it must be {_STRATEGIES}")
    kind, number, percent = match.groups()
    if kind is None:
        return np.arange(count)
    used = int(number) if number else math.ceil(Fraction(percent) * count / 100)
    used = min(used, count)
    if kind == "random":
        return np.sort(np.random.default_rng([seed, count]).permutation(count)[:used])
    return np.arange(used) if kind == "first" else np.arange(count - used, count)


def _match_strategy(strategy: str) -> re.Match[str] | None:
    match = _STRATEGY.fullmatch(strategy)
    if match and match[1]:
        number, percent = match[2], match[3]
        if not (int(number) >= 1 if number else 0 < Fraction(percent) <= 100):
            return None
    return match


# Files and patterns.


def _find_files(text: str, folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files that a path or pattern stands for.

    folder: where relative ones start. Raises: DataError naming the path.
    """
    found: list[Path] = []
    # os.path answers no where Path would refuse a name that is too long, as a pattern may be.
    for name in [text] if os.path.exists(folder / text) else _expand_braces(text):
        if os.path.exists(folder / name):
            found.append(folder / name)
        elif glob.has_magic(name):
            # Not folder / name: the folder's own name may look like a pattern.
            names = sorted(glob.glob(name, root_dir=folder, recursive=True))
            files = [folder / name for name in names if (folder / name).is_file()]
            if not files:
                raise DataError(f"{folder / name}: matches no file; check the pattern")
            found += files
        else:
            raise DataError(
                f"{folder / name}: cannot be read (No such file or directory); check the path"
            )
    for path in found:
        if path.is_dir():
            raise DataError(f"{path}: is a directory; give its files, {path / '*.json'}")
        if path.suffix.lower() not in suffixes:
            raise DataError(f"{path}: is not one of {', '.join(suffixes)}")
    return found


def _expand_braces(text: str) -> list[str]:
    """`x{a,b}` as `xa`, `xb`, as a shell does: in order, nested, and braces without comma stay."""
    start = text.find("{")
    if start < 0:
        return [text]
    cuts, depth = [start], 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0 or (depth == 1 and text[i] == ","):
            cuts.append(i)
        if depth == 0:
            break
    if depth > 0 or len(cuts) == 2:
        return [text[: start + 1] + tail for tail in _expand_braces(text[start + 1 :])]
    parts = [text[a + 1 : b] for a, b in itertools.pairwise(cuts)]
    tails = _expand_braces(text[cuts[-1] + 1 :])
    inner = [choice for part in parts for choice in _expand_braces(part)]
    return [text[:start] + choice + tail for choice in inner for tail in tails]


# Mixtures.


class _Loader(yaml.SafeLoader):
    """YAML's safe types, and no key twice: a forgotten dash would lose a dataset."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if isinstance(name, str) and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name} is there twice", key.start_mark
                )
            if isinstance(name, str):
                seen.add(name)
        return super().construct_mapping(node, deep)


def _read_mixture(path: Path, default: Source) -> list[Source]:
    """The datasets of a YAML file; what they do not say is as in `default`."""
    try:
        mixture = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(mixture, dict):
        raise DataError(f"{path}: must hold datasets:, a list of {{json_path: FILE}}")
    checker = _Checker(path.parent)
    checker.check_keys("", mixture, _MIXTURE_KEYS)
    default = checker.defaults("", mixture, default)
    datasets = mixture.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        checker.refuse("datasets", datasets, "a list of at least one {json_path: FILE}")
        datasets = []
    sources = [
        source
        for i, dataset in enumerate(datasets)
        for source in checker.sources(f"datasets[{i}]", dataset, default)
    ]
    weighted = [isinstance(dataset, dict) and "weight" in dataset for dataset in datasets]
    if any(weighted) and not all(weighted):
        checker.problems.append(
            f"datasets[{weighted.index(False)}] has no weight, but datasets"
            f"[{weighted.index(True)}] has; give all datasets one or none"
        )
    _raise_problems(path, checker.problems)
    return sources


def _raise_problems(where: Path, problems: list[str]) -> None:
    """One error for all of them. Raises: DataError if there is any problem."""
    if len(problems) == 1:
        raise DataError(f"{where}: {problems[0]}")
    if problems:
        raise DataError(f"{where}: {len(problems)} problems\n  " + "\n  ".join(problems))


class _Checker:
    """Reads the fields of a mixture and collects what is wrong with them.

    folder: where relative paths start.
    """

    def __init__(self, folder: Path):
        self.folder, self.problems = folder, list[str]()

    def refuse(self, field: str, value: Any, rule: str) -> None:
        self.problems.append(f"{field} is {value!r}; it must be {rule}")

    def check_keys(self, prefix: str, fields: dict[Any, Any], known: Sequence[str]) -> None:
        for key in fields:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                advice = f"do you mean {near[0]}" if near else f"there are {', '.join(known)}"
                self.problems.append(f"{prefix}{key}: there is no such field; {advice}?")

    def defaults(self, prefix: str, fields: dict[str, Any], default: Source) -> Source:
        """A source with the fields that a mixture may give as a whole or for each dataset."""
        root, allow = default.media_root, default.allow_outside
        if "media_root" in fields:
            if isinstance(fields["media_root"], str) and fields["media_root"]:
                root = self.folder / fields["media_root"]
            else:
                self.refuse(f"{prefix}media_root", fields["media_root"], "a directory")
        if "allow_outside_root" in fields:
            allow = fields["allow_outside_root"]
            if not isinstance(allow, bool):
                self.refuse(f"{prefix}allow_outside_root", allow, "true or false")
        return Source(default.path, root, allow_outside=allow, entry=default.entry)

    def sources(self, name: str, dataset: Any, default: Source) -> list[Source]:
        """The files of one dataset."""
        if not isinstance(dataset, dict):
            self.refuse(name, dataset, "fields: {json_path: FILE}")
            return []
        prefix = f"{name}."
        self.check_keys(prefix, dataset, _DATASET_KEYS)
        common = self.defaults(prefix, dataset, default)
        strategy = dataset.get("sampling_strategy", "all")
        if not isinstance(strategy, str) or _match_strategy(strategy) is None:
            self.refuse(f"{prefix}sampling_strategy", strategy, _STRATEGIES)
        weight = self.positive(prefix, dataset, "weight")
        repeat = self.positive(prefix, dataset, "repeat") or 1.0
        if weight is not None and repeat != 1:
            self.problems.append(f"{name} has both weight and repeat; use one of them")
        paths = self.files(f"{prefix}json_path", dataset.get("json_path"))
        if weight is not None and len(paths) > 1:
            self.problems.append(
                f"{prefix}json_path is {dataset['json_path']!r}, {len(paths)} files, and they "
                "cannot share a weight; make each a dataset"
            )
        return [
            Source(
                path,
                common.media_root,
                strategy,
                weight,
                repeat,
                common.allow_outside,
                common.entry,
            )
            for path in paths
        ]

    def positive(self, prefix: str, dataset: dict[str, Any], field: str) -> float | None:
        """A number above 0, or None if it is not given or wrong."""
        if field not in dataset:
            return None
        value = dataset[field]
        if isinstance(value, int | float) and value is not True and 0 < value < math.inf:
            return float(value)
        self.refuse(f"{prefix}{field}", value, "a number above 0")
        return None

    def files(self, field: str, value: Any) -> list[Path]:
        """The files of a json_path."""
        if not isinstance(value, str) or not value:
            self.refuse(field, value, f"a file or pattern ({', '.join(SUFFIXES)})")
            return []
        try:
            return _find_files(value, self.folder, SUFFIXES)
        except DataError as error:
            self.problems.append(f"{field}: {error}")
            return []
