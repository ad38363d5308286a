"""Random access to the records of annotation files of any size, without holding them.

A file is indexed once: where each record starts and how long it is. The index is kept in a folder
next to the file, or in a cache directory, and used again until the file changes.
"""

import codecs
import json
import mmap
import os
import re
import weakref
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from train.data.cache import cached
from train.errors import DataError, unreadable
from vxl_jax.progress import progress_bar

SUFFIXES = (".json", ".jsonl", ".parquet")
"""Endings of annotation files: one list of records, a record a line, a table."""

SPANS = "spans.bin"
RECORDS = "records.jsonl"

STEP_BYTES = 2**25
"""Mapped pages are given back after this much, and the progress bar moves on."""

BAR_BYTES = 2**26
"""Files over this size get a progress bar."""

PARQUET_ROWS = 4096
"""Rows of a table that are held at once."""

# Possessive (++, *+), so that a string of any length costs no memory and one pass.
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb'%s|[^ \t\r\n,:"\[\]{}]++' % _STRING, re.DOTALL)
_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|%s)*+([\[\]{}])' % _STRING, re.DOTALL)
_LINE = re.compile(rb"[^ \t\r\n][^\n]*+")

Spans = Iterator[tuple[int, int]]
"""(first byte, bytes) of each record."""


class RecordIndex:
    """The records of one annotation file; each is read from the file when it is asked for.

    Safe in threads. Pickled it is a few paths: the other process opens the files itself.
    """

    def __init__(self, path: Path, data: Path, spans: Path, size: int, mtime_ns: int):
        """Open an index; `open_index` makes one.

        path: the annotation file; data: the file with its records as JSON (the same, or a copy);
        spans: file of uint64 [N, 2], first byte and bytes of each record in `data`; size (bytes)
        and mtime_ns: those of `data` when it was indexed.

        Raises: DataError if `spans` cannot be read.
        """
        self.path, self._data, self._file, self._version = path, data, spans, (size, mtime_ns)
        try:
            # A view as a plain array: indexing a memmap takes several times as long.
            self._spans = np.memmap(spans, "<u8", mode="r").reshape(-1, 2).view(np.ndarray)
        except (OSError, ValueError) as error:
            raise DataError(f"{spans}: cannot be read ({error}); delete its folder") from error
        self._descriptor: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordIndex, (self.path, self._data, self._file, *self._version)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, i: int) -> Any:
        """Record i as JSON gives it; it may be anything, not only an object.

        Raises: IndexError; DataError naming `FILE[i]` if it is not valid JSON, or if the file
        cannot be read or was changed since it was indexed.
        """
        i = range(len(self))[i]
        start, size = self._spans[i].tolist()
        descriptor = self._open()
        try:
            content = os.pread(descriptor, size, start)
        except OSError as error:
            raise unreadable(self.path, error) from error
        try:
            return json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            self._check_version(descriptor)
            raise DataError(f"{self.path}[{i}]: is not valid JSON ({error})") from error

    def _open(self) -> int:
        """A descriptor of the data file. Two threads may open two: each is closed with the index,
        and without a lock a fork cannot inherit a held one.
        """
        if self._descriptor is None:
            try:
                descriptor = os.open(self._data, os.O_RDONLY)
            except OSError as error:
                raise unreadable(self._data, error) from error
            try:
                self._check_version(descriptor)
            except DataError:
                os.close(descriptor)
                raise
            weakref.finalize(self, os.close, descriptor)
            self._descriptor = descriptor
            return descriptor
        return self._descriptor

    def _check_version(self, descriptor: int) -> None:
        stat = os.fstat(descriptor)
        if (stat.st_size, stat.st_mtime_ns) != self._version:
            raise DataError(f"{self.path}: was changed while in use; start again")


def open_index(path: Path, cache_dir: Path | None = None) -> RecordIndex:
    """The records of an annotation file, of a format that its suffix says (`SUFFIXES`).

    The first call reads the whole file, later ones nothing of it until it changes. Of the records
    themselves only the extent is checked here, the rest as each is read.

    cache_dir: where the index is kept; None: next to the file or in the user's cache (`cached`).

    Raises: DataError naming the file if it cannot be read, holds no list of records, or its index
    cannot be written.
    """
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
    except OSError as error:
        raise unreadable(path, error) from error
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: is not one of {', '.join(SUFFIXES)}; convert or rename it")
    if suffix == ".parquet":
        # Tables are read row group by row group; only text gives one record quickly.
        folder = cached(path, cache_dir, "index", {"suffix": suffix}, lambda f: _convert(path, f))
        data = folder / RECORDS
        try:
            stat = data.stat()
        except OSError as error:
            raise unreadable(data, error) from error
    else:
        spans = _list_spans if suffix == ".json" else _line_spans
        folder = cached(
            path, cache_dir, "index", {"suffix": suffix}, lambda f: _index(path, path, f, spans)
        )
        data = path
    return RecordIndex(path, data, folder / SPANS, stat.st_size, stat.st_mtime_ns)


# Where records start and end.


def _index(path: Path, data: Path, folder: Path, spans: Callable[[Path, mmap.mmap], Spans]) -> None:
    """Write the spans of a file's records. path: the name for messages; data: the file."""
    try:
        with data.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise DataError(f"{path}: has no records")
            _check_utf8(path, file)
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as error:  # not to be taken for a cache that cannot be written
        raise unreadable(path, error) from error
    bar = progress_bar(
        total=size,
        desc=f"indexing {path.name}",
        unit="B",
        unit_scale=True,
        disable=size < BAR_BYTES,
    )
    with mapped, bar, (folder / SPANS).open("wb") as file:
        values, done = array("Q"), 0
        for start, length in spans(path, mapped):
            values.extend((start, length))
            if start + length - done >= STEP_BYTES:
                mapped.madvise(mmap.MADV_DONTNEED)
                np.asarray(values, "<u8").tofile(file)
                values = array("Q")
                bar.update(start + length - done)
                done = start + length
        np.asarray(values, "<u8").tofile(file)
        bar.update(size - done)


def _check_utf8(path: Path, file: Any) -> None:
    position, rest = 0, b""
    while True:
        chunk = file.read(2**22)
        content = rest + chunk
        try:
            used = codecs.utf_8_decode(content, "strict", not chunk)[1]
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: is not valid JSON (byte {position + error.start} is not UTF-8); save it "
                "as UTF-8"
            ) from None
        position, rest = position + used, content[used:]
        if not chunk:
            return


def _after_mark(data: mmap.mmap) -> int:
    """Where the text starts: a byte order mark may precede it."""
    return len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0


def _line_spans(path: Path, data: mmap.mmap) -> Spans:
    """Lines that are not blank."""
    match = None
    for match in _LINE.finditer(data, _after_mark(data)):
        yield match.start(), match.end() - match.start()
    if match is None:
        raise DataError(f"{path}: has no records")


def _list_spans(path: Path, data: mmap.mmap) -> Spans:
    """Elements of the one list that the file holds."""

    def skip_space(position: int) -> int:
        match = _SPACE.match(data, position)
        return match.end() if match else position

    def fault(what: str, advice: str = "fix it there") -> DataError:
        if position >= len(data):
            what, advice = "it ends before its list does", "fetch or make it again"
        return DataError(f"{path}: is not valid JSON ({what}); {advice}")

    position = skip_space(_after_mark(data))
    if position == len(data):
        raise DataError(f"{path}: has no records")
    if data[position : position + 1] != b"[":
        raise DataError(
            f"{path}: must hold a list of records; a file with a record a line is named .jsonl"
        )
    position = skip_space(position + 1)
    separator = b"]" if data[position : position + 1] == b"]" else b","
    count = 0
    while separator == b",":
        end = _value_end(data, position)
        if end is None:
            raise fault(
                f"record {count}, from byte {position} on, does not end",
                "a quote or bracket is missing, or the file is cut off",
            )
        if end == position:
            raise fault(f"no record at byte {position}")
        yield position, end - position
        position = skip_space(end)
        separator = data[position : position + 1]
        if separator not in (b",", b"]"):
            raise fault(f"no comma or ] at byte {position}, after record {count}")
        count += 1
        position = skip_space(position + 1)
    if count == 0:
        raise DataError(f"{path}: has no records")
    if position < len(data):
        raise fault(f"its list has ended before byte {position}")


def _value_end(data: mmap.mmap, start: int) -> int | None:
    """The end of the value that starts here; `start` if none does, None if it has no end."""
    first = data[start : start + 1]
    if first not in (b"{", b"["):
        match = _SCALAR.match(data, start)
        return match.end() if match else None if first == b'"' else start
    end, depth = start, 0
    while match := _BRACKET.match(data, end):
        end = match.end()
        depth += 1 if match[1] in b"{[" else -1
        if depth == 0:
            return end
    return None


# Tables.


def _convert(path: Path, folder: Path) -> None:
    """Write a table's rows as JSON lines, and their spans."""
    with (folder / RECORDS).open("w", encoding="utf-8") as file:
        for row in _table_rows(path):
            # Tables have a null where a record has nothing. Times and the like become text.
            record = {name: value for name, value in row.items() if value is not None}
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    _index(path, folder / RECORDS, folder, _line_spans)


def _table_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(
            f'{path}: needs pyarrow to be read; pip install "vxl-jax[parquet]"'
        ) from None
    try:
        with ParquetFile(path) as table:
            for i in range(len(table.schema)):
                column = table.schema.column(i)
                binary = column.physical_type in {"BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"}
                if binary and column.logical_type.type == "NONE":
                    raise DataError(
                        f"{path}: column {column.path} holds bytes; save the images as files and "
                        "give their paths"
                    )
            bar = progress_bar(
                total=table.metadata.num_rows,
                desc=f"converting {path.name}",
                unit="record",
                disable=path.stat().st_size < BAR_BYTES,
            )
            with bar:
                for batch in table.iter_batches(PARQUET_ROWS):
                    yield from batch.to_pylist()
                    bar.update(len(batch))
    except DataError:
        raise
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: is not valid Parquet ({error})") from error
