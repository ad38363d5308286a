"""Read the tensors of safetensors files piece by piece, and check their weights.

The safetensors library is not used to read weights: it maps whole files, and mapped pages count as
memory. `safetensors_read` finds the tensors.
"""

import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vxl_jax.config import DTYPES
from vxl_jax.errors import CheckpointError

STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Dtypes of weights, as safetensors and as NumPy name them."""

NUMPY = {
    **{name: np.dtype(DTYPES.get(dtype, dtype)) for name, dtype in STORED.items()},
    **{"F64": np.dtype("f8"), "BOOL": np.dtype("?"), "U8": np.dtype("u1")},
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
}
"""NumPy dtypes by safetensors name."""

STORED_NAME = {numpy: stored for stored, numpy in STORED.items()}

EXPONENT = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
"""Bits that are all set in a NaN or an infinity and in no other number."""

PIECE_BYTES = 2**22
"""Most bytes read at once: a piece stays in the CPU cache until it is checked and copied."""


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size in bytes of an array with a safetensors dtype ("BF16", "BOOL", …)."""
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
        """Size of the weights in bytes."""
        return stored_bytes(self.dtype, self.shape)

    def rows(self, start: int, stop: int) -> "Tensor":
        """Return a range of the first axis as a tensor, without reading it."""
        offset = self.offset + start * stored_bytes(self.dtype, self.shape[1:])
        array = None if self.array is None else self.array[start:stop]
        return Tensor(self.file, self.dtype, (stop - start, *self.shape[1:]), offset, array)

    def read(self) -> np.ndarray:
        """Read the values, in the stored dtype.

        The result is in a buffer that the next `read` of the same thread overwrites: copy it to
        keep it.

        Raises:
          CheckpointError: the file cannot be read or has become shorter.
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
        """Yield (first row, tensor) for pieces of at most `PIECE_BYTES`, or of one row."""
        if not self.shape:
            yield 0, self
            return
        step = max(1, PIECE_BYTES * self.shape[0] // max(1, self.bytes))
        for start in range(0, self.shape[0], step):
            yield start, self.rows(start, min(start + step, self.shape[0]))


_buffers = threading.local()


def scratch(size: int, use: str = "read") -> np.ndarray:
    """Return a buffer that the same thread's next call with this `use` reuses.

    Allocating memory for each call costs more than using it.
    """
    held = getattr(_buffers, use, None)
    if held is None or len(held) < size:
        held = np.empty(size, np.uint8)
        setattr(_buffers, use, held)
    return held[:size]


def scratch_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised array that the same thread's next call reuses."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return scratch(size, "array").view(dtype).reshape(shape)


def as_dtype(values: np.ndarray, tensor: Tensor, dtype: str | None) -> np.ndarray:
    """Cast weights to a dtype; non-weights (position ids) and a dtype of None change nothing."""
    return values if dtype is None or tensor.dtype not in STORED else values.astype(DTYPES[dtype])


def raise_problems(where: Any, problems: list[str]) -> None:
    """Raise one error that lists all problems.

    Raises:
      CheckpointError: `problems` is not empty.
    """
    if len(problems) == 1:
        raise CheckpointError(f"{where}: {problems[0]}")
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} problems\n  " + "\n  ".join(problems))


def tensors_not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """List tensors with NaN or infinite weights; reads all weights."""
    problems: list[str] = []
    for name, tensor in tensors.items():
        for _, piece in tensor.pieces() if tensor.dtype in EXPONENT else ():
            check_finite(name, tensor, piece.read(), problems)
    return problems


FILE_THREADS = 4
"""Threads that read and write files; may exceed the cores, since they mostly wait."""


def in_threads(work: Callable[..., object], jobs: Iterable[tuple[Any, ...]]) -> None:
    """Call `work` with each job's arguments in a thread pool; the first error cancels the rest."""
    with ThreadPoolExecutor(FILE_THREADS) as pool:
        running = [pool.submit(work, *job) for job in jobs]
        try:
            for done in as_completed(running):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_CHECKED_AT_ONCE = 2**18  # elements; temporaries stay in the CPU cache


def check_finite(name: str, tensor: Tensor, values: np.ndarray, problems: list[str]) -> None:
    """Add a message to `problems` if a weight of a tensor is NaN or infinite."""
    problem = f"tensor {name} in {tensor.file.name} has NaN or infinite weights"
    if tensor.dtype in EXPONENT and not all_finite(values) and problem not in problems:
        problems.append(problem)


def all_finite(values: np.ndarray) -> bool:
    """Return whether all weights are finite."""
    mask = EXPONENT[STORED_NAME[values.dtype.name]]
    bits: Any = values.reshape(-1).view(np.uint32 if values.dtype.itemsize == 4 else np.uint16)
    return not any(
        ((bits[start : start + _CHECKED_AT_ONCE] & mask) == mask).any()
        for start in range(0, len(bits), _CHECKED_AT_ONCE)
    )
