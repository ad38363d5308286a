"""JSON files of a checkpoint, read with errors that name file and field."""

import json
from pathlib import Path
from typing import Any

from vxl_jax.errors import CheckpointError


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
        """The field, or `default` where it is missing."""
        return self.values.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        """A field that is a whole number.

        Raises: CheckpointError if it is missing without a default, or none.
        """
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} is {value!r}; it must be a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A field that is a number.

        Raises: CheckpointError if it is missing without a default, or none.
        """
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} is {value!r}; it must be a number")
        return float(value)

    def items(self, name: str, kind: type, default: Any = None) -> tuple[Any, ...]:
        """A field that is a list of values of one type.

        Raises: CheckpointError if it is missing without a default, or none.
        """
        value = self[name] if default is None else self.get(name, default)
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, list) or not all(isinstance(item, kinds) for item in value):
            raise CheckpointError(
                f"{self.path}: {name} is {value!r}; it must be a list of {kind.__name__}"
            )
        return tuple(value)

    def require(self, required: dict[str, tuple[Any, ...]]) -> None:
        """Refuse a field with another value than those allowed.

        Raises: CheckpointError naming file and field.
        """
        for name, allowed in required.items():
            if self.get(name, allowed[0]) not in allowed:
                raise CheckpointError(
                    f"{self.path}: {name} is {self[name]!r}; only {allowed[0]!r} is implemented"
                )


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object so that a person can read it."""
    path.write_text(json.dumps(values, indent=2) + "\n")
