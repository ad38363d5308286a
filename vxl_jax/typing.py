"""Types that several packages share. No JAX at run time."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    from jax.sharding import NamedSharding

ParamPath = tuple[str, ...]
"""Where a parameter stands in the model."""
Params = dict[ParamPath, Any]
"""Arrays by path."""
ParamTree = dict[str, Any]
"""The same arrays as nested dicts."""
Shapes = dict[ParamPath, "jax.ShapeDtypeStruct"]
"""Shape and dtype by path."""
Placement = Callable[[ParamPath, tuple[int, ...]], "NamedSharding"]
"""From a parameter's path and shape to where it lies."""
