"""Compare arrays with golden ones, and read the files of a golden set."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vxl_jax.checkpoints.json_files import read_json
from vxl_jax.errors import CheckpointError

TOLERANCE = 1e-4

ZERO_GRADIENT = 1e-8
"""Part of the norm of all gradients under which one is rounding: the bias of a tower's keys shifts
all scores of a softmax alike, so its gradient is zero, and what is published is 1e-11 of the
rest."""


@dataclass(frozen=True)
class Comparison:
    """One compared tensor: its relative error, and a note such as the agreement of argmax."""

    name: str
    error: float
    note: str = ""
    agrees: bool = True

    @property
    def passed(self) -> bool:
        """Within tolerance (a NaN is not) and agreeing where agreement is asked for."""
        return self.error <= TOLERANCE and self.agrees


def compare_tensor(name: str, ours: ArrayLike, golden: ArrayLike, note: str = "") -> Comparison:
    """Relative error in the 2-norm, infinite where the shapes differ."""
    ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
    if ours.shape != golden.shape:
        return Comparison(name, np.inf, f"shape {ours.shape}, golden {golden.shape}")
    scale = float(np.linalg.norm(golden)) or 1.0
    return Comparison(name, float(np.linalg.norm(ours - golden)) / scale, note)


def compare_thinned(name: str, ours: ArrayLike, golden: np.ndarray, axis: int) -> Comparison:
    """Compare where the set may have kept only every n-th row along an axis.

    Of the steps that keep that many rows, the one with the least error counts; a wrong step pairs
    rows of different tokens, which are far apart.
    """
    ours = np.moveaxis(np.asarray(ours), axis, 0)
    golden = np.moveaxis(golden, axis, 0)
    steps = [n for n in range(1, len(ours) + 1) if -(-len(ours) // n) == len(golden)]
    rows = [compare_tensor(name, ours[::n], golden) for n in steps] or [
        compare_tensor(name, ours, golden)
    ]
    return min(rows, key=lambda row: row.error)


class GoldenSet:
    """A golden directory: what `golden.json` says, and its tensors.

    Raises: CheckpointError if a file is missing or damaged.
    """

    def __init__(self, directory: Path):
        self.directory, self.path = directory, directory / "golden.json"
        self.meta = read_json(self.path)
        self.compared: set[str] = set()
        path = directory / "golden.safetensors"
        try:
            self.tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error

    def named(self, field: str) -> list[dict[str, Any]]:
        """Cases of a kind, each with a name.

        Raises: CheckpointError if they are something else.
        """
        cases = self.field(self.meta, field, list)
        for case in cases:
            if not isinstance(case, dict) or not isinstance(case.get("name"), str):
                raise CheckpointError(f"{self.path}: a case is {case!r}; it must have a name")
        return cases

    def field(self, values: dict[str, Any], name: str, kind: type) -> Any:
        """A field of golden.json, or of an object in it.

        Raises: CheckpointError if it is missing or of another type.
        """
        where = f"{self.path}: case {values['name']!r}" if "name" in values else f"{self.path}:"
        if name not in values:
            raise CheckpointError(f"{where} has no field {name!r}")
        if not isinstance(values[name], kind):
            raise CheckpointError(f"{where} {name} is {values[name]!r}, not {kind.__name__}")
        return values[name]

    def take(self, name: str) -> np.ndarray | None:
        """A tensor that is compared, or None where the set does not hold it."""
        self.compared.add(name)
        return self.tensors.get(name)

    def not_compared(self) -> list[str]:
        """Tensors that no case has asked for: misspelled, or of a kind that is not known."""
        held = {name for name in self.tensors if not name.startswith("input/")}
        return sorted(held - self.compared)

    def unknown(self) -> Iterator[Comparison]:
        """A failed row for each tensor that nothing has asked for."""
        for name in self.not_compared():
            yield Comparison(name, np.inf, "belongs to no case, or is of an unknown kind")


def gradient_rows(
    golden: GoldenSet, case: dict[str, Any], ours: dict[str, np.ndarray]
) -> Iterator[Comparison]:
    """Compare the gradients of a training case, and the norms of all.

    ours: gradients by published name.
    """
    norms = {key: float(np.linalg.norm(gradient)) for key, gradient in ours.items()}
    zero = ZERO_GRADIENT * float(np.linalg.norm(list(norms.values())))
    start = f"{case['name']}/grad/"
    for key in sorted(golden.tensors):
        if key.startswith(start):
            gradient = ours.get(key.removeprefix(start), np.empty(0))
            golden.compared.add(key)
            yield compare_tensor(key, gradient, golden.tensors[key])
    expected = golden.field(case, "grad_norms", dict) if "grad_norms" in case else {}
    for key, norm in expected.items():
        name, ours_norm = f"{case['name']}/grad_norm/{key}", norms.get(key, np.nan)
        if norm < zero:
            yield Comparison(name, 0.0, "zero but for rounding", ours_norm < 100 * zero)
        else:
            yield compare_tensor(name, ours_norm, norm)
