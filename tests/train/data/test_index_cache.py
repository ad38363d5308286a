"""The cache of indices: what is kept, and when it is built again."""

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tests.support.data import INDEXED, write_indexed
from train.data.cache import KEY_FILE, LEFTOVER_SECONDS, cached
from train.data.index import SPANS, RecordIndex, open_index
from train.errors import DataError


def cache_folder(path: Path) -> Path:
    return path.parent / f".{path.name}.vxl" / "index"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_an_index_is_used_until_the_file_changes(suffix: str, tmp_path: Path):
    path = write_indexed(tmp_path / f"x{suffix}", INDEXED[:2])
    open_index(path)
    made = (cache_folder(path) / SPANS).stat().st_ino
    assert open_index(path)[0] == INDEXED[0]
    assert (cache_folder(path) / SPANS).stat().st_ino == made
    write_indexed(path, INDEXED[2:])
    assert [record["id"] for record in open_index(path)] == [INDEXED[2]["id"]]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_change_of_the_same_size_is_seen(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text("[1, 22, 3]")
    assert list(open_index(path)) == [1, 22, 3]
    path.write_text("[11, 2, 3]")
    os.utime(path, ns=(0, 1))
    assert list(open_index(path)) == [11, 2, 3]


@pytest.mark.parametrize("opened", [True, False])
def test_a_file_that_changes_in_use(opened: bool, tmp_path: Path):
    path = write_indexed(tmp_path / "x.json", INDEXED)
    index = open_index(path)
    if opened:
        assert index[0] == INDEXED[0]
    path.write_text("[]")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            index[1]
        assert str(caught.value) == f"{path}: was changed while in use; start again"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_replaced_in_use(tmp_path: Path):
    path = write_indexed(tmp_path / "x.json", INDEXED)
    index = open_index(path)
    assert index[0] == INDEXED[0]
    write_indexed(tmp_path / "y.json", INDEXED[:1]).rename(path)
    assert index[1] == INDEXED[1]  # the old file is still open
    with pytest.raises(DataError, match="was changed while in use"):
        pickle.loads(pickle.dumps(index))[0]
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        pickle.loads(pickle.dumps(index))[0]


def test_a_key_that_changes(tmp_path: Path):
    source = write_indexed(tmp_path / "x.json", INDEXED)
    built: list[int] = []

    def make(value: int) -> Path:
        def build(folder: Path) -> None:
            built.append(value)
            (folder / "deep").mkdir()
            (folder / "deep" / "value").write_text(str(value))

        return cached(source, None, "thing", {"value": value, "pair": (1, 2)}, build)

    for value in (1, 1, 2, 2, 1):
        assert (make(value) / "deep" / "value").read_text() == str(value)
    assert built == [1, 2, 1]


def _damage(folder: Path, kind: str) -> None:
    if kind == "no key":
        (folder / KEY_FILE).unlink()
    elif kind == "no spans":
        (folder / SPANS).unlink()
    elif kind == "short spans":
        (folder / SPANS).write_bytes((folder / SPANS).read_bytes()[:-16])
    elif kind == "other format":
        key = json.loads((folder / KEY_FILE).read_text())
        (folder / KEY_FILE).write_text(json.dumps({**key, "format": 0}))
    else:
        (folder / KEY_FILE).write_text(kind)


@pytest.mark.parametrize(
    "kind",
    ["no key", "no spans", "short spans", "other format", "", "{", "[]", '{"files": 3}', "null"],
)
def test_a_damaged_index_is_made_anew(kind: str, tmp_path: Path):
    path = write_indexed(tmp_path / "x.json", INDEXED)
    open_index(path)
    _damage(cache_folder(path), kind)
    assert list(open_index(path)) == INDEXED
    assert len(list(cache_folder(path).parent.iterdir())) == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data").mkdir()
    path = write_indexed(tmp_path / "data" / "x.json", INDEXED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    mkdir = Path.mkdir

    def read_only(self: Path, *args: Any, **options: Any) -> None:
        if self.is_relative_to(tmp_path / "data"):
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert list(open_index(path)) == INDEXED
    (folder,) = (tmp_path / "home" / "vxl-jax").iterdir()
    assert re.fullmatch(r"[0-9a-f]{16}-x\.json", folder.name)
    assert (folder / "index" / SPANS).is_file()
    assert os.listdir(tmp_path / "data") == ["x.json"]
    (tmp_path / "home" / "vxl-jax").rename(tmp_path / "moved")
    (tmp_path / "home" / "vxl-jax").write_text("in the way")
    with pytest.raises(DataError) as caught:
        open_index(path)
    assert str(caught.value) == (
        f"{cache_folder(path)}: cannot be written (Read-only file system); "
        f"{tmp_path}/home/vxl-jax/{folder.name}/index: cannot be written (Not a directory); "
        "set data.cache_dir to a directory that can"
    )


def test_a_cache_directory_of_choice(tmp_path: Path):
    (tmp_path / "data").mkdir()
    path = write_indexed(tmp_path / "data" / "x.json", INDEXED)
    assert list(open_index(path, tmp_path / "cache" / "deep")) == INDEXED
    assert os.listdir(tmp_path / "data") == ["x.json"]
    (folder,) = (tmp_path / "cache" / "deep").iterdir()
    assert re.fullmatch(r"[0-9a-f]{16}-x\.json", folder.name)
    with pytest.raises(DataError) as caught:
        open_index(path, path)
    assert str(caught.value) == (
        f"{path}/{folder.name}/index: cannot be written (Not a directory); set data.cache_dir to "
        "a directory that can"
    )


def test_a_build_that_fails_leaves_nothing(tmp_path: Path):
    source = write_indexed(tmp_path / "x.json", INDEXED)

    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise DataError("no good")

    with pytest.raises(DataError, match="no good"):
        cached(source, None, "thing", {}, build)
    assert os.listdir(tmp_path / ".x.json.vxl") == []


def test_a_killed_builder_leaves_nothing_that_counts(tmp_path: Path):
    source = write_indexed(tmp_path / "x.json", INDEXED)
    code = (
        "import pathlib, time\n"
        "from train.data.cache import cached\n"
        "def build(folder):\n"
        "    (folder / 'value').write_text('half')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        f"cached(pathlib.Path({str(source)!r}), None, 'thing', {{}}, build)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    parent = tmp_path / ".x.json.vxl"
    (leftover,) = parent.iterdir()
    assert leftover.name.endswith(".tmp")

    def build(folder: Path) -> None:
        (folder / "value").write_text("whole")

    assert (cached(source, None, "thing", {}, build) / "value").read_text() == "whole"
    assert leftover.exists()  # its builder might still be at work
    old = time.time() - LEFTOVER_SECONDS - 60
    os.utime(leftover, (old, old))
    cached(source, None, "other", {}, build)
    assert sorted(os.listdir(parent)) == ["other", "thing"]


def _read_all(path: Path) -> list[Any]:
    return list(open_index(path))


def test_processes_that_build_at_once(tmp_path: Path):
    path = write_indexed(tmp_path / "x.json", INDEXED * 5000)
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        for got in pool.map(_read_all, [path] * 4):
            assert got == INDEXED * 5000
    assert os.listdir(tmp_path / ".x.json.vxl") == ["index"]


def test_threads_that_replace_a_stale_index_at_once(tmp_path: Path):
    path = tmp_path / "x.json"
    start = threading.Barrier(6)

    def read() -> RecordIndex:
        start.wait()
        return open_index(path)

    with ThreadPoolExecutor(6) as pool:
        for i in range(30):
            path.write_text(json.dumps([i] * (i + 1)))
            for future in [pool.submit(read) for _ in range(6)]:
                assert list(future.result()) == [i] * (i + 1)
    assert os.listdir(tmp_path / ".x.json.vxl") == ["index"]
