"""Conversion from and to the published PyTorch checkpoint; see docs/conversion.md."""

from importlib import import_module
from typing import Any

_MODULES = {
    "convert_from_hf": "convert.from_hf",
    "convert_to_hf": "convert.to_hf",
    "init_checkpoint": "convert.init",
    "compress_checkpoint": "convert.init",
}

__all__ = ["compress_checkpoint", "convert_from_hf", "convert_to_hf", "init_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import a function when it is asked for: `python -m convert.…` runs each module by itself."""
    if name not in _MODULES:
        raise AttributeError(f"module 'convert' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
