"""The index of annotation files: the records that json.loads gives, and every fault is named."""

import json
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.data import INDEXED, write_indexed
from train.data.index import open_index
from train.errors import DataError

# Reading.


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".JSON"])
def test_formats_give_the_same_records(suffix: str, tmp_path: Path):
    path = tmp_path / f"x{suffix.lower()}"
    keys = {key for record in INDEXED for key in record}
    # A table has all columns; a null says that a record has nothing there.
    tabled = [{key: record.get(key) for key in sorted(keys)} for record in INDEXED]
    write_indexed(path, tabled if suffix == ".parquet" else INDEXED)
    path = path.rename(tmp_path / f"x{suffix}")
    index = open_index(path)
    assert list(index) == INDEXED
    assert len(index) == 3
    assert index.path == path
    assert index[-1] == INDEXED[-1]
    with pytest.raises(IndexError):
        index[3]


@pytest.mark.parametrize(
    "content",
    [
        '[{"a": "]}[{\\"\\\\"}]',
        '["\\\\", "\\"", "a\\\\\\"]", "[{"]',
        '[null, true, -1.5e3, "text", [], {}, [[1, [2]], {"a": [{}]}], NaN]',
        " \r\n\t[ \n1\t,\r2 \n]\n \n",
        '[{"é": "中😀\u2028"}]',
        '[{"a": 1}]',
        "[1]",
        '\ufeff [{"a": 1}, 2]',
        "[" + "[" * 500 + "]" * 500 + "]",
        '["' + "a" * 100_000 + '\\n" , {"b": "' + "\\n\\\\" * 50_000 + '"}]',
    ],
)
def test_odd_lists(content: str, tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text(content, newline="")
    # As text, since NaN does not equal itself.
    assert repr(list(open_index(path))) == repr(json.loads(content.removeprefix("\ufeff")))


def test_lines_with_marks_and_blanks(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n \t\n{"a": "\xc3\xa9"}\r\n\r\n[1, 2] \n null')
    assert list(open_index(path)) == [{"a": "é"}, [1, 2], None]


def test_tables_keep_what_json_has_no_word_for(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    import datetime

    import pyarrow.parquet as pq

    rows = [{"day": datetime.date(2024, 1, 2), "empty": None, "turns": [{"a": None}]}]
    pq.write_table(pa.Table.from_pylist(rows * 5000), tmp_path / "x.parquet")
    index = open_index(tmp_path / "x.parquet")
    assert len(index) == 5000
    assert index[4999] == {"day": "2024-01-02", "turns": [{"a": None}]}


def random_value(rng: np.random.Generator, depth: int) -> Any:
    kind = rng.integers(7 if depth else 5)
    if kind >= 5:
        values = [random_value(rng, depth - 1) for _ in range(rng.integers(4))]
        return values if kind == 5 else {str(i) + '"}': value for i, value in enumerate(values)}
    text = "".join(rng.choice(list('ab"\\[]{},: \n\té中😀\x00/'), rng.integers(8)))
    return [None, bool(rng.integers(2)), int(rng.integers(-99, 99)), float(rng.normal()), text][
        kind
    ]


def test_random_files_give_what_json_gives(tmp_path: Path):
    rng = np.random.default_rng(0)
    outcomes = {"whole": 0, "refused": 0}
    for i in range(400):
        values = [random_value(rng, 3) for _ in range(rng.integers(1, 6))]
        text = json.dumps(
            values,
            ensure_ascii=bool(rng.integers(2)),
            indent=[None, 0, 2][rng.integers(3)],
            separators=[None, (",", ":"), (" ,\n", "\t: ")][rng.integers(3)],
        )
        content = text.encode()
        if i % 2:  # damage: a byte is lost, put in or doubled, or the end is cut off
            at, byte = int(rng.integers(len(content))), bytes([rng.choice(list(b'"\\[]{},1 \xff'))])
            tails = content[at + 1 :], byte + content[at:], content[at : at + 1] + content[at:], b""
            content = content[:at] + tails[rng.integers(4)]
        path = tmp_path / f"{i}.json"
        path.write_bytes(content)
        try:
            expected = json.loads(content.decode())
            whole = isinstance(expected, list) and expected != []
        except ValueError:
            whole = False
        if whole:
            assert repr(list(open_index(path))) == repr(expected), content
        else:
            with pytest.raises(DataError, match=re.escape(str(path))):
                list(open_index(path))
        outcomes["whole" if whole else "refused"] += 1
    assert min(outcomes.values()) > 100


def test_pickled_it_is_small_and_reads_in_another_process(tmp_path: Path):
    path = write_indexed(tmp_path / "x.json", [{"i": i} for i in range(10_000)])
    index = open_index(path)
    assert index[7] == {"i": 7}  # its file is open
    content = pickle.dumps(index)
    assert len(content) < 1000
    code = "import pickle, sys; x = pickle.load(sys.stdin.buffer); print(len(x), x[9999])"
    result = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True)
    assert result.stdout.split() == [b"10000", b"{'i':", b"9999}"], result.stderr


def test_threads_share_an_index(tmp_path: Path):
    index = open_index(write_indexed(tmp_path / "x.json", [{"i": i} for i in range(1000)]))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(index.__getitem__, range(1000))) == [{"i": i} for i in range(1000)]


def test_files_are_closed(tmp_path: Path):
    path = write_indexed(tmp_path / "x.json", INDEXED)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        assert open_index(path)[0] == INDEXED[0]
    assert len(os.listdir("/proc/self/fd")) <= before


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    record = json.dumps({"id": 1, "conversations": [{"from": "gpt", "value": "word " * 10}] * 12})
    (tmp_path / "x.json").write_text("[" + ",\n".join([record] * 100_000) + "]")
    code = (
        "import pathlib, re, train.data.index\n"
        # Not ru_maxrss: it starts at the peak of the process that started this one.
        "status = pathlib.Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', status.read_text())[1])\n"
        "before = peak()\n"
        f"index = train.data.index.open_index(pathlib.Path({str(tmp_path / 'x.json')!r}))\n"
        "assert len(index) == 100_000 and [index[i]['id'] for i in (0, 99_999)] == [1, 1]\n"
        "print((peak() - before) / 1024)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert float(result.stdout) < 70, result.stderr  # MB; the file alone has 100


# Refusals.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", None, "cannot be read (No such file or directory); check the path"),
        ("x.txt", b"[]", "is not one of .json, .jsonl, .parquet; convert or rename it"),
        ("x.json", b"", "has no records"),
        ("x.json", b"\xef\xbb\xbf \n", "has no records"),
        ("x.json", b" [ ] ", "has no records"),
        ("x.jsonl", b"", "has no records"),
        ("x.jsonl", b"\n \r\n\t", "has no records"),
        (
            "x.json",
            b'{"id": 1}\n{"id": 2}\n',
            "must hold a list of records; a file with a record a line is named .jsonl",
        ),
        (
            "x.json",
            b"null",
            "must hold a list of records; a file with a record a line is named .jsonl",
        ),
        (
            "x.json",
            b'[{"id": "caf\xe9"}]',
            "is not valid JSON (byte 12 is not UTF-8); save it as UTF-8",
        ),
        ("x.jsonl", b'"\xc3', "is not valid JSON (byte 1 is not UTF-8); save it as UTF-8"),
        (
            "x.json",
            b" " * (2**22 - 1) + "[é".encode()[:-1] + b"]",
            "is not valid JSON (byte 4194304 is not UTF-8); save it as UTF-8",
        ),
        (
            "x.json",
            b'[1, {"a": "b',
            "is not valid JSON (record 1, from byte 4 on, does not end); a quote or bracket is "
            "missing, or the file is cut off",
        ),
        (
            "x.json",
            b'["a", "b]',
            "is not valid JSON (record 1, from byte 6 on, does not end); a quote or bracket is "
            "missing, or the file is cut off",
        ),
        (
            "x.json",
            b"[" * 100_000,
            "is not valid JSON (record 0, from byte 1 on, does not end); a quote or bracket is "
            "missing, or the file is cut off",
        ),
        (
            "x.json",
            b"[",
            "is not valid JSON (it ends before its list does); fetch or make it again",
        ),
        (
            "x.json",
            b"[{}, ",
            "is not valid JSON (it ends before its list does); fetch or make it again",
        ),
        (
            "x.json",
            b"[{}, {} ",
            "is not valid JSON (it ends before its list does); fetch or make it again",
        ),
        ("x.json", b"[{}, ]", "is not valid JSON (no record at byte 5); fix it there"),
        ("x.json", b"[{},,{}]", "is not valid JSON (no record at byte 4); fix it there"),
        ("x.json", b"[,{}]", "is not valid JSON (no record at byte 1); fix it there"),
        (
            "x.json",
            b"[{} {}]",
            "is not valid JSON (no comma or ] at byte 4, after record 0); fix it there",
        ),
        (
            "x.json",
            b"[1, 2 3]",
            "is not valid JSON (no comma or ] at byte 6, after record 1); fix it there",
        ),
        (
            "x.json",
            b"[{}}]",
            "is not valid JSON (no comma or ] at byte 3, after record 0); fix it there",
        ),
        (
            "x.json",
            b"[{}]\n[{}]",
            "is not valid JSON (its list has ended before byte 5); fix it there",
        ),
        (
            "x.json",
            b"[{}],",
            "is not valid JSON (its list has ended before byte 4); fix it there",
        ),
    ],
)
def test_unusable_files(name: str, content: bytes | None, message: str, tmp_path: Path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for _ in range(2):  # a failed attempt leaves nothing that is taken for an index
        with pytest.raises(DataError) as caught:
            open_index(path)
        assert str(caught.value) == f"{path}: {message}"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("suffix", [".json", ".parquet", ""])
def test_folders_are_no_files(suffix: str, tmp_path: Path):
    path = tmp_path / f"x{suffix}"
    path.mkdir()
    with pytest.raises(DataError) as caught:
        open_index(path)
    assert str(caught.value) == f"{path}: cannot be read (Is a directory); check the path"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("x.json", '[1, {"a": 1]]', "Expecting ',' delimiter: line 1 column 8 (char 7)"),
        ("x.json", "[1, word]", "Expecting value: line 1 column 1 (char 0)"),
        ("x.json", '[1, "a\nb"]', "Invalid control character at: line 1 column 3 (char 2)"),
        ("x.json", "[1, " + "[" * 10**5 + "]" * 10**5 + "]", "maximum recursion depth exceeded"),
        ("x.jsonl", '1\n{"a":', "Expecting value: line 1 column 6 (char 5)"),
    ],
)
def test_a_bad_record_leaves_its_neighbours(name: str, content: str, fault: str, tmp_path: Path):
    path = tmp_path / name
    path.write_text(content)
    index = open_index(path)
    assert index[0] == 1
    for i in (1, -1):
        with pytest.raises(DataError) as caught:
            index[i]
        assert str(caught.value).startswith(f"{path}[1]: is not valid JSON ({fault}")


def test_tables_with_pictures_are_refused(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    for record, column in [
        ({"id": "a", "image": {"bytes": b"png", "path": "a.png"}}, "image.bytes"),
        ({"id": "a", "picture": b"png"}, "picture"),
        ({"id": "a", "all": [{"data": b"png"}]}, "all.list.element.data"),
    ]:
        pq.write_table(pa.Table.from_pylist([record]), path)
        with pytest.raises(DataError) as caught:
            open_index(path)
        assert str(caught.value) == (
            f"{path}: column {column} holds bytes; save the images as files and give their paths"
        )


def test_unusable_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match=re.escape(f"{path}: has no records")):
        open_index(path)
    write_indexed(path, INDEXED)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=re.escape(f"{path}: is not valid Parquet (")):
        open_index(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError) as caught:
        open_index(path)
    assert str(caught.value) == (
        f'{path}: needs pyarrow to be read; pip install "vxl-jax[parquet]"'
    )
