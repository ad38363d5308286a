"""Small files that are replaced whole, and files of JSON lines."""

import json
import os
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, if there is one; a last line that was cut off is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a JSON-lines file."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Replace a file whole: a reader, or a run that is killed, never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
