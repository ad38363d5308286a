"""Memories in files: one safetensors file with keys, values, and the tokens that wait."""

import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vxl_jax.checkpoints.safetensors_read import PICKLES, metadata_of, tensors_of
from vxl_jax.checkpoints.safetensors_write import NewTensor, Piece, write_tensors
from vxl_jax.checkpoints.tensors import STORED_NAME
from vxl_jax.errors import CheckpointError, VisualMemoryError, VxlError
from vxl_jax.inference.entries import Entries
from vxl_jax.inference.runtime import Runtime
from vxl_jax.inference.watching import Block, no_features
from vxl_jax.media.layout import VisualLayout

FORMAT = "vxl-jax memory 1"
"""What a saved memory says it is."""

SPARE_BYTES = 2**20
"""Room on the disk for the header of a saved memory."""


def check_fingerprint(name: str, made_by: str, model: str) -> None:
    """Check that a memory is this model's.

    Raises: VisualMemoryError.
    """
    if made_by != model:
        raise VisualMemoryError(
            f"{name}: was made by another model, or with other weights or dtypes (its fingerprint "
            f"begins with {made_by[:12]}, this one's with {model[:12]}); watch again"
        )


def check_free(path: Path, overwrite: bool) -> None:
    """Check that a memory can be saved under a name.

    Raises: VisualMemoryError if there is a file already, or no directory.
    """
    if path.suffix in PICKLES:
        raise VisualMemoryError(f"{path}: {path.suffix} is a name for pickles; use another")
    if path.exists() and not overwrite:
        raise VisualMemoryError(f"{path}: exists already; choose another name, or overwrite it")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise VisualMemoryError(
            f"{path}: the parent directory does not exist, or the path is a directory"
        )


def write_memory(
    path: Path, entries: Entries, length: int, block: Block | None, about: dict[str, Any]
) -> None:
    """Write the first `length` entries, while others may be appended.

    block: the last visual block. about: what else is noted.

    Raises: VisualMemoryError if the disk has no room.
    """
    config = entries.runtime.config
    language = config.language
    about = about | {
        "model": entries.runtime.fingerprint,
        "length": length,
        "block": block and _about_block(block),
    }
    features = np.asarray(no_features(config) if block is None else block.features)
    stored = STORED_NAME[features.dtype.name]
    shape = (language.layers, language.kv_heads, length, language.head_size)
    each = length * language.head_size * features.dtype.itemsize
    planned = []
    for name in ("keys", "values"):
        places = itertools.product(range(language.layers), range(language.kv_heads))
        pieces = [Piece(each, partial(_rows, entries, length, name, *place)) for place in places]
        planned.append(NewTensor(name, stored, shape, pieces))
    waiting = Piece(features.nbytes, lambda: features)
    planned.append(NewTensor("features", stored, features.shape, [waiting]))
    needed = sum(tensor.bytes for tensor in planned)
    free = shutil.disk_usage(path.absolute().parent).free
    if needed + SPARE_BYTES > free:
        raise VisualMemoryError(
            f"{path}: {needed / 1e9:.2f} GB will be written, and the disk has "
            f"{free / 1e9:.2f} GB left; make room, or choose another disk"
        )
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        write_tensors(part, planned, {"format": FORMAT, "about": json.dumps(about)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _about_block(block: Block) -> dict[str, Any]:
    about = {"start": block.start, "ratios": block.ratios, "tokens": block.tokens}
    if isinstance(block.layout, VisualLayout):  # images do not go on
        about["slow_every"] = block.layout.slow_every
    return about | {"is_ended": block.is_ended}


def _rows(entries: Entries, length: int, name: str, layer: int, head: int) -> np.ndarray:
    """Keys or values of one head of a layer, [length, H]."""
    with entries.reading(length) as memory:
        part = _of_head(getattr(memory, name), layer, head)
    return np.asarray(part)[:length]


@jax.jit
def _of_head(x: Array, layer: Any, head: Any) -> Array:
    start = (layer, 0, head, 0, 0)
    return lax.dynamic_slice(x, start, (1, 1, 1, *x.shape[3:]))[0, 0, 0]


class SavedMemory:
    """A memory in a file: its tensors, and what the header says.

    Raises: CheckpointError if the file is damaged or not a memory.
    """

    def __init__(self, path: Path):
        self.path, self.tensors = path, tensors_of(path)
        metadata = metadata_of(path)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path}: is not a saved memory ({FORMAT!r})")
        with self.damaged():
            self.about = json.loads(metadata["about"])
            self.length = int(self.about["length"])

    @contextmanager
    def damaged(self) -> Iterator[None]:
        """Turn what a header lacks into CheckpointError."""
        try:
            yield
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, VxlError):
                raise
            raise CheckpointError(f"{self.path}: is damaged ({error!r}); watch again") from error

    def read(self, runtime: Runtime) -> tuple[Entries, Block | None]:
        """Its entries on the device, and its last block.

        Raises: VisualMemoryError if another model has made it, or the device has no room.
        """
        with self.damaged():
            check_fingerprint(str(self.path), self.about["model"], runtime.fingerprint)
            language = runtime.config.language
            shape = (language.layers, language.kv_heads, self.length, language.head_size)
            waiting = (self.tensors["features"].shape[0], language.width)
            for name, expected in (("keys", shape), ("values", shape), ("features", waiting)):
                if self.tensors[name].shape != expected:
                    raise ValueError(f"{name} has shape {self.tensors[name].shape}, not {expected}")
            block, about = None, self.about["block"]
            if about is not None:
                features = jnp.array(np.array(self.tensors["features"].read()))
                layout = runtime.config.layout
                every = int(about.get("slow_every", layout.slow_every))
                block = Block(
                    start=int(about["start"]),
                    features=features,
                    layout=replace(layout, slow_every=every),
                    ratios=tuple(about["ratios"]),
                    tokens=int(about["tokens"]),
                    is_ended=bool(about.get("is_ended", False)),
                )
        entries = Entries(runtime)
        entries.fill(self.length, map(self._layer, range(language.layers)))
        return entries, block

    def _layer(self, index: int) -> tuple[Array, Array]:
        """Keys and values [K, length, H] of a layer. Copied on the host: the next read overwrites
        the buffer, and a device may copy later.
        """
        keys, values = (
            jnp.array(np.array(self.tensors[name].rows(index, index + 1).read()[0]))
            for name in ("keys", "values")
        )
        return keys, values
