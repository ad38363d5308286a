"""Types that several packages share. No JAX at run time."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    AnyArray = np.ndarray | jax.Array
else:
    AnyArray = Any
"""An array of the host (NumPy) or of the device (JAX)."""

Family = Literal["video_xl", "llava_video"]
"""Whose checkpoints and conversations a model has; see `vxl_jax.checkpoints.hf_config` and
`vxl_jax.text.template`."""

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
