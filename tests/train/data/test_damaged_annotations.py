"""Damaged annotation files cost their own records alone."""

import contextlib
import datetime
import io
import json
import random
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.damage import (
    GONE,
    Cases,
    account,
    data_section,
    flipped,
    overwritten,
    sound_files,
    truncated,
)
from train.data.dataset import open_dataset
from train.errors import DataError
from vxl_jax.presets import tiny

TALK = [{"from": "human", "value": "what is the colour"}, {"from": "gpt", "value": "red"}]


SOUND = [
    {"id": f"n{i}", "conversations": TALK} | ({"image": "a.png"} if i % 2 else {}) for i in range(6)
]


STRANGE: tuple[str, ...] = (
    *("null", "true", "0", "-1", "3.5", "1e308", "1e400", "-0.0", "NaN", "Infinity", "1" * 400),
    *("1" * 5000, '""', '" "', '"a.png"', '"<image>"', '"\\u0000"', '"\\ud83d"', '"\\udc00x"'),
    *("[]", "{}", "[[]]", "[{}]", "[null]", '["a.png"]', '["a.png", null]', "[1, 2]", '[""]'),
    *(
        '{"a": 1}',
        '"..\u002f..\u002fetc"',
        '"/etc/passwd"',
        '"' + "x" * 5000 + '"',
        "[" * 900 + "]" * 900,
    ),
    *(
        '[["a.png"]]',
        '{"from": "human"}',
        '"a.png\\u0000b"',
        '"."',
        '"~"',
        "[true]",
        "[-1]",
        "[1e308]",
    ),
)
"""JSON values for fields that want another."""


def wrong_records() -> list[str]:
    """Records of which one field is another type or a strange value, as JSON."""
    made = []
    plain = {
        "id": '"x"',
        "image": '"a.png"',
        "conversations": json.dumps(SOUND[1]["conversations"]),
    }
    film = {**plain, "video": '"a.mp4"'}
    del film["image"]
    fields: list[tuple[dict[str, str], str]] = [
        *((plain, name) for name in (*plain, "video", "start", "question_type", "choices")),
        *((film, name) for name in ("video", "start", "end", "fps")),
    ]
    for base, field in fields:
        for value in STRANGE:
            texts = {**base, field: value}
            made.append("{" + ", ".join(f'"{k}": {v}' for k, v in texts.items()) + "}")
    for value in STRANGE:
        made.append(value)  # the whole record
        for turns in (
            '[{"from": %s, "value": "a"}, {"from": "gpt", "value": "b"}]',
            '[{"from": "human", "value": %s}, {"from": "gpt", "value": "b"}]',
            '[{"from": "human", "value": "a"}, {"from": "gpt", "value": %s}]',
            '[{"from": "human", "value": "a"}, %s]',
        ):
            made.append('{"conversations": ' + turns % value + "}")
    return made


@pytest.fixture(scope="module")
def small_media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.png and a.mp4."""
    folder = tmp_path_factory.mktemp("media")
    sound = sound_files(folder, np.random.default_rng(1))
    for kind in ("png", "mp4"):
        (folder / f"a.{kind}").write_bytes(sound[kind])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_wrong_fields_cost_their_own_records_alone(
    workers: int, tmp_path: Path, small_media: Path, demo_tokenizer: Any
):
    records = wrong_records()
    assert len(records) > 500
    records = [text for i in records for text in (i, json.dumps(SOUND[0]))]
    path = tmp_path / "all.json"
    path.write_text("[" + ",\n".join(records) + "]")
    data = replace(data_section(small_media), workers=workers)
    with at_most(60), open_dataset((str(path),), data, tiny(), demo_tokenizer) as dataset:
        delivered, bad = account(dataset, data)
    assert sorted([*delivered, *(number for number, _ in bad)]) == list(range(len(records)))
    assert set(range(1, len(records), 2)) <= delivered.keys()
    # Each is refused in words, not by what happened to fail.
    assert not [reason for _, reason in bad if re.match(r"\w+(Error|Exception) \(", reason)]
    assert not [reason for _, reason in bad if GONE.search(reason)]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """A table."""
    import pyarrow
    from pyarrow.parquet import write_table

    file = io.BytesIO()
    write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def damaged_annotations(seed: int) -> Cases:
    """Damaged annotation files, by file name."""
    rng = random.Random(seed)
    texts = {
        "json": json.dumps(SOUND, indent=1).encode(),
        "jsonl": b"".join(json.dumps(record).encode() + b"\n" for record in SOUND),
        "parquet": parquet([{"image": None, **record} for record in SOUND]),
    }
    made: Cases = {}
    for kind, content in texts.items():
        for name, damaged in (
            *truncated(content, 30, rng),
            *flipped(content, 60, rng, range(max(0, len(content) - 800), len(content))),
            *overwritten(content, 30, rng),
        ):
            made[f"{name}.{kind}"] = damaged
        for other, damaged in texts.items():
            if other != kind:
                made[f"as-{other}.{kind}"] = damaged
    one = json.dumps(SOUND[0])
    whole = {
        **{f"strange-{i}": value.encode() for i, value in enumerate(STRANGE)},
        **{f"list-of-{i}": f"[{value}]".encode() for i, value in enumerate(STRANGE)},
        **{f"next-to-{i}": f"[{one},\n{value}]".encode() for i, value in enumerate(STRANGE)},
        "empty": b"",
        "space": b" \n\t\n ",
        "nul": bytes(1000),
        "nul-inside": f"[{one}, ".encode() + b'"\0"' + b"]",
        "nul-between": f"[{one}\0,{one}]".encode(),
        "latin-1": b'[{"id": "caf\xe9"}]',
        "utf-16": f"[{one}]".encode("utf-16"),
        "utf-32": f"[{one}]".encode("utf-32"),
        "mark": b"\xef\xbb\xbf" + f"[{one}]".encode(),
        "half-mark": b"\xef\xbb" + f"[{one}]".encode(),
        "surrogate": b'["\xed\xa0\x80"]',
        "deep": b"[" * 200_000,
        "deep-closed": b"[" * 200_000 + b"]" * 200_000,
        "deep-record": b"[" + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]",
        "deep-next-to": f"[{one}, ".encode() + b"[" * 100_000 + b"]" * 100_000 + b"]",
        "long-string": f'[{one}, "{"x" * 20_000_000}"]'.encode(),
        "long-escapes": f"[{one}, ".encode() + b'"' + b"\\\\" * 5_000_000 + b'"]',
        "long-open": f'[{one}, "{"x" * 20_000_000}'.encode(),
        "long-number": f"[{one}, {'1' * 5_000_000}]".encode(),
        "long-space": b"[" + b" " * 20_000_000 + f"{one}]".encode(),
        "quotes": b'["' * 100_000,
        "commas": b"[" + b"," * 100_000 + b"]",
        "noise": rng.randbytes(100_000),
        "zip": b"PK\3\4" + rng.randbytes(1000),
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    }
    for name, content in whole.items():
        made |= {f"{name}.{kind}": content for kind in ("json", "jsonl")}
    tables: dict[str, list[dict[str, Any]]] = {
        "numbers": [{"conversations": 1}],
        "texts": [{"conversations": "what"}],
        "bytes": [{"conversations": TALK, "image": {"bytes": b"x", "path": "a.png"}}],
        "nothing": [{"conversations": None}],
        "huge": [{"id": 2**63 - 1, "conversations": TALK}],
        "times": [{"id": datetime.datetime(2020, 1, 1), "conversations": TALK}],
        "floats": [{"id": float("nan"), "conversations": TALK, "start": float("inf")}],
        "no-columns": [{}],
    }
    made |= {f"table-{name}.parquet": parquet(rows) for name, rows in tables.items()}
    return made


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail where the time is over."""

    def stop(*_: object) -> None:
        raise AssertionError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_damaged_annotations_are_refused_or_used(
    tmp_path: Path, small_media: Path, demo_tokenizer: Any
):
    cases = damaged_annotations(seed=0)
    assert len(cases) >= 500
    data = replace(data_section(small_media), workers=0, cache_dir=str(tmp_path / "cache"))
    refused = 0
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with at_most(20):
            try:
                dataset = open_dataset((str(path),), data, tiny(), demo_tokenizer)
            except DataError as error:
                shown = str(error)
                assert str(path) in shown, (name, shown)
                str(error).encode()  # it can be printed
                refused += 1
                continue
            with dataset:
                delivered, bad = account(dataset, data)
        numbers = sorted([*delivered, *(number for number, _ in bad)])
        assert numbers == list(range(dataset.counts[0].records)), name
        assert delivered, name
        path.unlink()
    assert len(cases) / 5 < refused < len(cases) * 4 / 5, refused
