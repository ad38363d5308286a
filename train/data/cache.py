"""What is made from a file once and kept, until the file changes."""

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from train.errors import DataError, unreadable

CACHE_FORMAT = 1
"""Version of what is in a cache folder; another one is rebuilt."""

KEY_FILE = "key.json"

LEFTOVER_SECONDS = 24 * 3600
"""Age at which a folder that was never finished belongs to a builder that was killed."""


def cached(
    source: Path,
    cache_dir: Path | None,
    name: str,
    key: dict[str, Any],
    build: Callable[[Path], None],
) -> Path:
    """A folder with what `build(folder)` makes from a file, built only if no valid one exists.

    It is kept next to the source in `.FILE.vxl/NAME`, or where that cannot be written in
    `vxl-jax/HASH-FILE/NAME` of the user's cache; with cache_dir in `HASH-FILE/NAME` there. It fits
    as long as the source's size and time and the key (JSON) are the same. A key that differs
    replaces it: what runs at the same time with different keys needs different names.

    It is built in a temporary folder and then renamed: nobody sees half of it, whoever builds at
    the same time, and a killed builder leaves nothing that counts.

    Raises: DataError if the source cannot be read or no such folder can be written; what `build`
    raises. An OSError of `build` is taken for a cache that cannot be written.
    """
    try:
        stat = source.stat()
    except OSError as error:
        raise unreadable(source, error) from error
    wanted = {
        "format": CACHE_FORMAT,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "key": json.loads(json.dumps(key)),
    }
    folders = [parent / name for parent in _cache_parents(source, cache_dir)]
    for folder in folders:
        if _fits(folder, wanted):
            return folder
    problems = []
    for folder in folders:
        try:
            _build(folder, wanted, build)
            return folder
        except OSError as error:
            problems.append(f"{folder}: cannot be written ({error.strerror or error})")
    raise DataError("; ".join(problems) + "; set data.cache_dir to a directory that can")


def forget(folder: Path) -> None:
    """Invalidate a cache folder."""
    (folder / KEY_FILE).unlink(missing_ok=True)


def _cache_parents(source: Path, cache_dir: Path | None) -> list[Path]:
    absolute = os.path.abspath(source)
    hashed = f"{hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]}-{source.name}"
    if cache_dir is not None:
        return [cache_dir / hashed]
    parents = [source.parent / f".{source.name}.vxl"]
    with suppress(RuntimeError):  # a user without a home
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        parents.append(Path(home, "vxl-jax", hashed))
    return parents


def _fits(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether a folder is whole and was built for this source and key."""
    try:
        found = json.loads((folder / KEY_FILE).read_text())
        sizes = {name: (folder / name).stat().st_size for name in found["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return found == {**wanted, "files": sizes}


def _build(folder: Path, wanted: dict[str, Any], build: Callable[[Path], None]) -> None:
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent)
    new, old = (parent / f".{uuid.uuid4().hex}.tmp" for _ in range(2))
    new.mkdir()
    try:
        build(new)
        files = [file for file in new.rglob("*") if file.is_file()]
        sizes = {str(file.relative_to(new)): file.stat().st_size for file in files}
        (new / KEY_FILE).write_text(json.dumps({**wanted, "files": sizes}))
        with _locked(parent):
            if not _fits(folder, wanted):  # else another builder was faster
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _remove_leftovers(parent: Path) -> None:
    for leftover in parent.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among threads and processes, where the file system has locks; a kill frees it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
