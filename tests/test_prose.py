"""Words that the prose rule of CONTRIBUTING.md leaves out: docstrings, comments, errors and docs.

    python tests/test_prose.py PATH…

lists what is found in some files.
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = ("vxl_jax", "train", "convert", "configs", "benchmarks", "tests")

WORDS = (
    *(r"\b[Mm]end(s|ed|ing)?\b", r"\b[Ss]o many\b", r"\bis none\b"),
    *(r"(?<!here )\bis no\b", r"(?<!here )\bare no\b"),
    *(r"\bthat there (is|are)\b", r"\b[Ww]hatever\b", r"\b[Aa]new\b", r"\b[Bb]eside\b"),
    *(r"\bof (its|their|his) own\b", r"\b[Ww]hat is (no|not|left|neither|more|else|there)\b"),
)
PATTERN = re.compile("|".join(WORDS))

ALLOWED = re.compile(r"\bis no longer\b|\bno (more|fewer|less) than\b")
"""Idioms that a pattern finds and the rule allows."""


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of prose with their numbers: comments and strings of Python, all of other files."""
    text = path.read_text()
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
        if token.type in kinds:
            yield from enumerate(token.string.splitlines(), token.start[0])


def offences(path: Path) -> list[str]:
    """`FILE:LINE: word` for every word of the list."""
    found = []
    for number, line in prose_of(path):
        for match in PATTERN.finditer(ALLOWED.sub("", line)):
            place = f"{path.relative_to(ROOT)}:{number}"
            found.append(f"{place}: {match[0].strip()!r} in {line.strip()}")
    return found


def files() -> list[Path]:
    """All files with prose, but this one."""
    code = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "pyproject.toml"]
    rule = {Path(__file__).resolve(), ROOT / "CONTRIBUTING.md"}
    return sorted({*code, *pages} - rule)


def test_prose_has_none_of_the_words():
    found = [offence for path in files() for offence in offences(path)]
    assert not found, "\n".join(found)


def test_the_words_are_found(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "a.py"
    path.write_text('"""It is no file, built anew."""\nx = 1  # mend it\nanew = "so many words"\n')
    assert [line.split(":")[1] for line in offences(path)] == ["1", "1", "2", "3"]
    path.write_text('"""It is no longer there."""\nx = None is None\n')
    assert offences(path) == []


if __name__ == "__main__":
    given = [Path(name).resolve() for name in sys.argv[1:]] or files()
    listed = [p for g in given for p in (sorted(g.rglob("*.py")) if g.is_dir() else [g])]
    print("\n".join(line for path in listed for line in offences(path)))
