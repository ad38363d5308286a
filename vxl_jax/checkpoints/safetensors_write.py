"""Write safetensors files piece by piece, without holding whole tensors in memory."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vxl_jax.checkpoints.json_files import write_json
from vxl_jax.checkpoints.safetensors_read import INDEX_FILE
from vxl_jax.checkpoints.tensors import in_threads, stored_bytes
from vxl_jax.errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: its size in bytes, and a thread-safe function that returns it."""

    bytes: int
    make: Callable[[], np.ndarray]


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write: its dtype as safetensors names it, and its pieces in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: list[Piece]

    @property
    def bytes(self) -> int:
        """Size of the weights in bytes."""
        return stored_bytes(self.dtype, self.shape)


def write_tensors(
    path: Path,
    tensors: list[NewTensor],
    metadata: dict[str, str],
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a safetensors file.

    Several threads make pieces and write each at its offset, so no whole tensor is held in memory
    (the safetensors library needs whole arrays).
    """
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    jobs, start = [], 8 + len(text)
    for piece in (piece for tensor in tensors for piece in tensor.pieces):
        jobs.append((start, piece))
        start += piece.bytes
    if start != 8 + len(text) + offset:
        raise CheckpointError(f"{path}: its pieces have {start} bytes, not those of its tensors")
    with path.open("wb", buffering=0) as file:

        def write(start: int, piece: Piece) -> None:
            made = piece.make()
            _write_at(file.fileno(), start, made.reshape(-1).view(np.uint8).data)
            progress(piece.bytes)

        _write_at(file.fileno(), 0, memoryview(struct.pack("<Q", len(text)) + text))
        in_threads(write, jobs)
        os.fsync(file.fileno())


def _write_at(file: int, start: int, data: memoryview) -> None:
    done = 0
    while done < len(data):  # twice as fast as one call: copied data stays in the cache
        done += os.pwrite(file, data[done : done + 2**17], start + done)


def write_shards(
    directory: Path, tensors: list[NewTensor], shard_bytes: int, progress: Callable[[int], None]
) -> None:
    """Write tensors in order into `model*.safetensors`, with an index if there are several.

    A tensor larger than `shard_bytes` gets a separate shard.
    """
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        write_tensors(directory / name, shard, {"format": "pt"}, progress)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX_FILE, index)
