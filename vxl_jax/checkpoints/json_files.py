"""Read and write the JSON files of a checkpoint, with errors that name file and field."""

import json
from pathlib import Path
from typing import Any

from vxl_jax.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      CheckpointError: the file is missing, not JSON, or not an object.
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


Required = dict[str, tuple[Any, ...]]


class Fields:
    """A JSON object that names its file when a field is missing."""

    def __init__(self, values: dict[str, Any], path: Path):
        self.values, self.path = values, path

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise CheckpointError(f"{self.path}: has no field {name!r}")
        return self.values[name]

    def get(self, name: str, default: Any) -> Any:
        """Return a field, or `default` if it is missing."""
        return self.values.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a field that must be an integer.

        Raises:
          CheckpointError: the field is missing and has no default, or is not an integer.
        """
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} is {value!r}; it must be a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a field that must be a number.

        Raises:
          CheckpointError: the field is missing and has no default, or is not a number.
        """
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} is {value!r}; it must be a number")
        return float(value)

    def items(self, name: str, kind: type, default: Any = None) -> tuple[Any, ...]:
        """Return a field that must be a list of values of one type.

        Raises:
          CheckpointError: the field is missing and has no default, or is not such a list.
        """
        value = self[name] if default is None else self.get(name, default)
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, list) or not all(isinstance(item, kinds) for item in value):
            raise CheckpointError(
                f"{self.path}: {name} is {value!r}; it must be a list of {kind.__name__}"
            )
        return tuple(value)

    def require(self, required: dict[str, tuple[Any, ...]]) -> None:
        """Check that fields have allowed values.

        Raises:
          CheckpointError: a field has another value.
        """
        for name, allowed in required.items():
            if self.get(name, allowed[0]) not in allowed:
                known = [repr(value) for value in allowed if value is not None] or ["null"]
                raise CheckpointError(
                    f"{self.path}: {name} is {self[name]!r}; only {' or '.join(known)} is "
                    "implemented"
                )


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(values, indent=2) + "\n")
