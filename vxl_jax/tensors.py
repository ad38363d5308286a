"""The tensors of a checkpoint in safetensors files: finding, checking and reading them.

Everything is checked by name before any weight is read. The safetensors library checks the files;
weights are read from them piece by piece, since it maps files whole, and mapped pages count as
memory.
"""

import itertools
import json
import math
import mmap
import os
import re
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.errors import CheckpointError
from vxl_jax.names import LINEAR, SAME, Row, first_layer, is_unused, table

STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Dtypes of weights, as safetensors and as NumPy name them."""

NUMPY = {
    **{name: np.dtype(DTYPES.get(dtype, dtype)) for name, dtype in STORED.items()},
    **{"F64": np.dtype("f8"), "BOOL": np.dtype("?"), "U8": np.dtype("u1")},
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
}
"""NumPy dtypes of what safetensors may hold, by its names."""

STORED_NAME = {numpy: stored for stored, numpy in STORED.items()}

EXPONENT = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
"""Bits that are all set in a NaN or an infinity and in no other number."""

PIECE_BYTES = 2**22
"""Most that is read of a tensor at once: it stays in the cache until it is checked and placed."""

INDEX = "model.safetensors.index.json"


NO_PICKLE = (
    "pickle files (.bin, .pt) are not read because loading one can run any code, save the model "
    "with safe_serialization=True instead"
)


PICKLES = (".bin", ".pt", ".pth")
"""Suffixes of files that are refused without a look."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises: CheckpointError naming the file if it is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array of a dtype that safetensors names ("BF16", "BOOL", …)."""
    bits = re.search(r"\d+", dtype)
    return int(np.prod(shape)) * (int(bits[0]) // 8 if bits else 1)


@dataclass(frozen=True)
class Tensor:
    """One tensor: in a file, from byte `offset` on, or (`array`) in memory."""

    file: Path
    dtype: str  # of safetensors: "F32", "BF16", …
    shape: tuple[int, ...]
    offset: int = 0
    array: np.ndarray | None = None

    @property
    def bytes(self) -> int:
        """Bytes of its weights."""
        return bytes_of(self.dtype, self.shape)

    def rows(self, start: int, stop: int) -> "Tensor":
        """Some rows of the first axis as a tensor."""
        offset = self.offset + start * bytes_of(self.dtype, self.shape[1:])
        array = None if self.array is None else self.array[start:stop]
        return Tensor(self.file, self.dtype, (stop - start, *self.shape[1:]), offset, array)

    def read(self) -> np.ndarray:
        """Its values, in the stored dtype; in a buffer that this thread's next read overwrites.

        Raises: CheckpointError if the file cannot be read or has become shorter.
        """
        if self.array is not None:
            return self.array
        buffer = scratch(self.bytes)
        try:
            with self.file.open("rb", buffering=0) as file:
                got = 0
                while got < self.bytes and (
                    n := os.preadv(file.fileno(), [buffer[got:].data], self.offset + got)
                ):
                    got += n
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read ({error.strerror})") from error
        if got < self.bytes:
            raise CheckpointError(f"{self.file}: ends too early; fetch it again")
        return buffer.view(NUMPY[self.dtype]).reshape(self.shape)

    def pieces(self) -> Iterator[tuple[int, "Tensor"]]:
        """First row and tensor of pieces of at most `PIECE_BYTES`, or of one row."""
        if not self.shape:
            yield 0, self
            return
        step = max(1, PIECE_BYTES * self.shape[0] // max(1, self.bytes))
        for start in range(0, self.shape[0], step):
            yield start, self.rows(start, min(start + step, self.shape[0]))


_buffers = threading.local()


def scratch(size: int, use: str = "read") -> np.ndarray:
    """Bytes that this thread's next call for the same use gives out again: fresh memory costs more
    than its use.
    """
    held = getattr(_buffers, use, None)
    if held is None or len(held) < size:
        held = np.empty(size, np.uint8)
        setattr(_buffers, use, held)
    return held[:size]


def scratch_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that this thread's next call gives out again."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return scratch(size, "array").view(dtype).reshape(shape)


def as_dtype(values: np.ndarray, tensor: Tensor, dtype: str | None) -> np.ndarray:
    """Weights in another dtype; what is no weight (position ids), or None, leaves them."""
    return values if dtype is None or tensor.dtype not in STORED else values.astype(DTYPES[dtype])


def find_tensors(
    directory: Path, leave_out: Callable[[str], bool] = lambda name: False
) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors in the safetensors files of a directory, by name, and what is wrong with them.

    The second is a list of problems: files that cannot be opened, a tensor that is in two of them,
    an index that disagrees with its shards. leave_out: names that are passed over.

    Raises: CheckpointError if there is no safetensors file.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such directory")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no *.safetensors file; {NO_PICKLE}")
    found: dict[str, Tensor] = {}
    problems = []
    for path in files:
        try:
            here = tensors_of(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for name, tensor in here.items():
            if leave_out(name):
                continue
            if name in found:
                problems.append(f"tensor {name} is in {found[name].file.name} and in {path.name}")
            found[name] = tensor
    if (directory / INDEX).exists():
        try:
            problems += _against_index(read_json(directory / INDEX), found, leave_out)
        except CheckpointError as error:
            problems.append(str(error))
    return found, problems


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name.

    Raises: CheckpointError if it cannot be opened.
    """
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: {NO_PICKLE}")
    try:
        with safe_open(path, framework="numpy"):  # checks the header and the file's length
            pass
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size), object_pairs_hook=_once_each)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error
    return {
        name: Tensor(
            path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself beside its tensors.

    Raises: CheckpointError if it cannot be opened.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise ValueError(f"{', '.join(twice)}: more than once in its header")
    return dict(pairs)


def _against_index(
    index: dict[str, Any], found: dict[str, Tensor], leave_out: Callable[[str], bool]
) -> list[str]:
    where = index.get("weight_map")
    if not isinstance(where, dict):
        return [f"{INDEX} has no weight_map"]
    problems = []
    for name, file in sorted(where.items()):
        if leave_out(name):
            continue
        if name not in found:
            problems.append(f"{INDEX} has tensor {name} in {file}, which does not hold it")
        elif found[name].file.name != file:
            problems.append(
                f"{INDEX} has tensor {name} in {file}, it is in {found[name].file.name}"
            )
    problems += [
        f"{INDEX} does not have tensor {name} of {found[name].file.name}"
        for name in sorted(set(found) - set(where))
    ]
    return problems


def check_tensors(
    tensors: dict[str, Tensor],
    config: VideoXLConfig,
    shapes: Mapping[tuple[str, ...], Any],
    dtype: str | None,
) -> list[str]:
    """What is missing, unexpected, or of the wrong shape or dtype, by name.

    shapes: structs of our parameters, by path. dtype: what weights are converted to; None if they
    keep theirs, which then has to be one and the same.
    """
    problems = []
    expected = {}
    for row in table(config):
        shape = row.published_shape(shapes[row.ours].shape)
        expected.update(dict.fromkeys(row.names(), shape))
    stored = stored_dtype({name: tensors[name] for name in expected if name in tensors})
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"missing tensor {name}")
            continue
        tensor = tensors[name]
        if tensor.shape != shape:
            problems.append(f"tensor {name} has shape {tensor.shape}, config.json asks for {shape}")
        if tensor.dtype not in STORED:
            problems.append(f"tensor {name} has dtype {tensor.dtype}, which is not one of weights")
        elif dtype is None and STORED[tensor.dtype] != stored:
            problems.append(
                f"tensor {name} has dtype {tensor.dtype}, not {stored}; say which dtype to load as"
            )
    for name in sorted(set(tensors) - set(expected)):
        tensor = tensors[name]
        if not is_unused(name, config):
            problems.append(f"unexpected tensor {name} in {tensor.file.name}")
        elif tensor.dtype not in NUMPY:
            problems.append(f"tensor {name} has dtype {tensor.dtype}, which is not supported")
        elif (shape := expected.get(first_layer(name), tensor.shape)) != tensor.shape:
            problems.append(f"tensor {name} has shape {tensor.shape}, config.json asks for {shape}")
    return problems


def stored_dtype(tensors: dict[str, Tensor]) -> str:
    """The dtype that most tensors have, of those that a model can have; float32 without any."""
    counts = Counter(STORED.get(tensor.dtype) for tensor in tensors.values())
    return max(DTYPES, key=lambda dtype: counts[dtype])


def unused_tensors(tensors: dict[str, Tensor], config: VideoXLConfig) -> dict[str, Tensor]:
    """Those that the network never reads."""
    used = {name for row in table(config) for name in row.names()}
    return {name: tensor for name, tensor in tensors.items() if name not in used}


def raise_problems(where: Any, problems: list[str]) -> None:
    """One error for all of them.

    Raises: CheckpointError if there is any problem.
    """
    if len(problems) == 1:
        raise CheckpointError(f"{where}: {problems[0]}")
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} problems\n  " + "\n  ".join(problems))


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors that have NaN or infinite weights; reads them all."""
    problems: list[str] = []
    for name, tensor in tensors.items():
        for _, piece in tensor.pieces() if tensor.dtype in EXPONENT else ():
            check_finite(name, tensor, piece.read(), problems)
    return problems


Index = tuple[slice, ...]


def parts(shape: tuple[int, ...], part: tuple[int, ...]) -> Iterator[Index]:
    """The indices of an array's parts of one shape, in order; those at an end may be smaller."""
    starts = (range(0, size, step) for size, step in zip(shape, part, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, size))
            for start, step, size in zip(corner, part, shape, strict=True)
        )


def whole(shape: tuple[int, ...]) -> Index:
    """The index of all of an array."""
    return tuple(slice(0, size) for size in shape)


def read_part(
    row: Row,
    tensors: dict[str, Tensor],
    index: Index,
    dtype: Any,
    problems: list[str],
    progress: Callable[[int], None] = lambda size: None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Read part of our array of one row of the table.

    Their rows are read as far as they are needed; a part along their columns reads whole rows.

    index: slices with start and stop for every axis of our array. dtype: of the result. Weights
    that are not finite are added to `problems`. progress: called with the bytes read. out: where
    the result goes; new memory if None.
    """
    out = _allocate([part.stop - part.start for part in index], dtype) if out is None else out
    names = row.names()[index[0]] if row.layers else row.names()
    inner = index[1:] if row.layers else index

    def read_layer(name: str, out: np.ndarray) -> None:
        # Our rows are theirs, or (LINEAR) our columns are; other layouts are read whole.
        tensor, by_column = tensors[name], row.layout is LINEAR
        if row.layout not in (LINEAR, SAME):
            values = tensor.read()
            check_finite(name, tensor, values, problems)
            out[...] = row.layout.to_ours(values)[inner]
            progress(tensor.bytes)
            return
        wanted = inner[1] if by_column else inner[0]
        for start, piece in tensor.rows(wanted.start, wanted.stop).pieces():
            values = piece.read()
            check_finite(name, tensor, values, problems)
            here = slice(start, start + len(values))
            if by_column:
                transpose_into(out[:, here], values[:, inner[0]])
            else:
                out[here] = values[:, *inner[1:]]
            progress(piece.bytes)

    layers = out if row.layers else out[None]
    if len(names) == 1:
        read_layer(names[0], layers[0])
        return out
    in_threads(read_layer, zip(names, layers, strict=True))
    return out


def _allocate(shape: list[int], dtype: Any) -> np.ndarray:
    """An array in plain pages: NumPy asks for huge ones, and where memory is full of cached files
    the kernel takes longer to find those than all the rest of the work takes.
    """
    size = math.prod(shape)
    pages = mmap.mmap(-1, max(1, size * np.dtype(dtype).itemsize))
    return np.frombuffer(pages, np.dtype(dtype), size).reshape(shape)


THREADS = 4
"""That read and write: more than there may be cores, since most of their time they wait."""


def in_threads(work: Callable[..., object], jobs: Iterable[tuple[Any, ...]]) -> None:
    """Call `work` with every job's arguments, some at a time; the first error ends it."""
    with ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(work, *job) for job in jobs]
        try:
            for done in as_completed(running):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_CHECKED_AT_ONCE = 2**18  # numbers; what the comparison makes stays in the cache


def check_finite(name: str, tensor: Tensor, values: np.ndarray, problems: list[str]) -> None:
    """Add to `problems` if any of a tensor's weights is NaN or infinite."""
    problem = f"tensor {name} in {tensor.file.name} has NaN or infinite weights"
    if tensor.dtype in EXPONENT and not all_finite(values) and problem not in problems:
        problems.append(problem)


def all_finite(values: np.ndarray) -> bool:
    """Whether no weight is NaN or infinite."""
    mask = EXPONENT[STORED_NAME[values.dtype.name]]
    bits: Any = values.reshape(-1).view(np.uint32 if values.dtype.itemsize == 4 else np.uint16)
    return not any(
        ((bits[start : start + _CHECKED_AT_ONCE] & mask) == mask).any()
        for start in range(0, len(bits), _CHECKED_AT_ONCE)
    )


def transpose_into(out: np.ndarray, x: np.ndarray) -> None:
    """out[...] = x.T, by blocks that stay in the cache."""
    x = x.astype(out.dtype, copy=False)
    if x.dtype.itemsize == 2:  # NumPy copies its own integers faster than bfloat16
        out, x = out.view(np.uint16), x.view(np.uint16)
    for i in range(0, len(x), 32):
        for j in range(0, x.shape[1], 512):
            out[j : j + 512, i : i + 32] = x[i : i + 32, j : j + 512].T
