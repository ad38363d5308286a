"""Shard parameters, samples and activations over one mesh, by one table of logical axes.

The mesh has three axes: `data` (copies of the model), `fsdp` (each parameter is sharded, and
gathered when it is used; samples are sharded over it as well) and `tensor` (attention heads and MLP
columns are sharded). XLA's partitioner adds the communication; the numbers stay those of one
device.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from vxl_jax.config import VideoXLConfig
from vxl_jax.typing import ParamPath, Placement

AXES = ("data", "fsdp", "tensor")
SAMPLES = ("data", "fsdp")
"""Mesh axes over which the samples of a batch are divided."""


# Logical axes: `in`, `out` the width of the residual stream, read and written; `heads` whole
# attention heads; `mlp`; `vocab`. None is never sharded.
_MESH_AXIS = {"in": "fsdp", "out": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}

Axes = tuple[str | None, ...]


def _linears(block: str, names: str, inputs: str, outputs: str, bias: bool) -> dict[str, Axes]:
    """Rows of stacked linears; a bias along the residual stream is small and replicated."""
    bias_axis = None if outputs == "out" else outputs
    rows: dict[str, Axes] = {}
    for name in names.split():
        rows[f"{block}/{name}/kernel"] = (None, inputs, outputs)
        if bias:
            rows[f"{block}/{name}/bias"] = (None, bias_axis)
    return rows


_TABLE: dict[str, Axes] = {
    "language/embed/embedding": ("vocab", "out"),
    "language/beacon_embed": (None, None),
    **_linears("language/layers/attention", "q k v", "in", "heads", bias=True),
    **_linears("language/layers/attention", "beacon_q beacon_k beacon_v", "in", "heads", bias=True),
    **_linears("language/layers/attention", "o", "heads", "out", bias=False),
    **_linears("language/layers/mlp", "gate up", "in", "mlp", bias=False),
    **_linears("language/layers/mlp", "down", "mlp", "out", bias=False),
    "language/layers/attention_norm/scale": (None, None),
    "language/layers/mlp_norm/scale": (None, None),
    "language/norm/scale": (None,),
    "language/head/kernel": ("in", "vocab"),
    "projector/up/kernel": ("in", "mlp"),
    "projector/up/bias": ("mlp",),
    "projector/down/kernel": ("mlp", "out"),
    "projector/down/bias": (None,),
    "projector/newline": (None,),
    "projector/faster": (None,),
    "vision/class_embed": (None,),
    "vision/position_embed": (None, None),
    "vision/patch_embed/kernel": (None, "out"),
    "vision/patch_embed/bias": (None,),
    "vision/pre_norm/scale": (None,),
    "vision/pre_norm/bias": (None,),
    **_linears("vision/layers", "q k v", "in", "heads", bias=True),
    **_linears("vision/layers", "o", "heads", "out", bias=True),
    **_linears("vision/layers", "up", "in", "mlp", bias=True),
    **_linears("vision/layers", "down", "mlp", "out", bias=True),
    "vision/layers/attention_norm/scale": (None, None),
    "vision/layers/attention_norm/bias": (None, None),
    "vision/layers/mlp_norm/scale": (None, None),
    "vision/layers/mlp_norm/bias": (None, None),
}
"""Logical axes of every parameter, by its full name. Stacked ones have the layer first."""

SMALL = 2**16
"""Most elements of a parameter without a row in the table: it is replicated."""


def make_mesh(
    data: int, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Make the mesh data × fsdp × tensor over all devices of all processes, or over `devices`."""
    return jax.make_mesh(
        (data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def logical_axes(path: ParamPath) -> Axes | None:
    """Look up the logical axes of a parameter; None if the table has no row for it.

    Low-rank updates have the axes of their kernel, with the rank in place of one of them; scales of
    an int8 kernel have the axis of its columns.
    """
    axes = _TABLE.get("/".join(path))
    if axes is None and path and path[-1] in ("lora_a", "lora_b", "scale"):
        kernel = _TABLE.get("/".join((*path[:-1], "kernel")))
        if kernel is not None:
            *layer, inputs, outputs = kernel
            derived = {"lora_a": (inputs, None), "lora_b": (None, outputs), "scale": (outputs,)}
            return (*layer, *derived[path[-1]])
    return axes


def param_placement(mesh: Mesh, config: VideoXLConfig) -> Placement:
    """Make the function from a parameter to its sharding: for `load_network` and for training.

    An axis that the mesh does not divide is replicated, and a head is never split.

    The function raises ValueError for a parameter of more than `SMALL` elements that has no row in
    the table, or another number of axes than its row: it would be replicated.
    """
    head_size = {"language": config.language.head_size}
    if config.vision is not None:
        head_size["vision"] = config.vision.width // config.vision.heads

    def place(path: ParamPath, shape: tuple[int, ...]) -> NamedSharding:
        axes = logical_axes(path)
        if axes is None or len(axes) != len(shape):
            if math.prod(shape) > SMALL:
                raise ValueError(
                    f"{'/'.join(path)} {shape}: the table of vxl_jax/nn/sharding.py has "
                    f"{'no row for it' if axes is None else f'{len(axes)} axes for it'}; add a "
                    "row with its logical axes"
                )
            axes = (None,) * len(shape)
        spec: list[str | None] = []
        for axis, size in zip(axes, shape, strict=True):
            unit = head_size[path[0]] if axis == "heads" else 1
            cut = None if axis is None else _MESH_AXIS[axis]
            parts = mesh.shape[cut] if cut else 1
            spec.append(cut if parts > 1 and size % (unit * parts) == 0 else None)
        while spec and spec[-1] is None:  # XLA's form; another one would be compiled again
            spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return place


def place_tree(placement: Placement, tree: Any) -> Any:
    """Compute the shardings of a tree of arrays that is nested as the parameters are.

    In an optimizer's state, whose dictionaries are inside tuples, an array of another rank than its
    parameter is replicated: a row or a column of Adafactor's moments, a count.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        if len(names) < len(path) and leaf.ndim != len(logical_axes(names) or ()):
            return placement((), ())
        return placement(names, leaf.shape)

    return jax.tree_util.tree_map_with_path(of, tree)


def sample_shards(mesh: Mesh | None = None) -> int:
    """Count the devices over which the samples of a batch are sharded; 1 without a mesh.

    mesh: that of `jax.set_mesh` by default.
    """
    shape = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
    return int(np.prod([shape.get(axis, 1) for axis in SAMPLES]))


def sample_spec(axis: int = 0) -> PartitionSpec:
    """Make the partition of an array whose samples are along an axis."""
    return PartitionSpec(*(None,) * axis, SAMPLES)


# Inside the model. These look at the mesh of `jax.set_mesh`; without one they do nothing.


def by_sample(x: Array, axis: int = 0) -> Array:
    """Shard an array along its axis of samples alone; unchanged if the devices do not divide it."""
    shards = sample_shards()
    if shards == 1 or x.shape[axis] % shards:
        return x
    return lax.with_sharding_constraint(x, sample_spec(axis))


def residual(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Shard the residual stream for the backward pass: by sample, and its width over `tensor`."""
    shape = jax.sharding.get_abstract_mesh().shape
    if shape.get("tensor", 1) == 1 or x.shape[2] % shape["tensor"] or x.shape[0] % sample_shards():
        return by_sample(x)
    return lax.with_sharding_constraint(x, PartitionSpec(SAMPLES, None, "tensor"))


def from_table(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Shard looked-up embeddings as each device finds them: all samples of its `fsdp` group, in
    its part of the width. By default XLA gathers all samples of the mesh and shards them again.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    if sample_shards() == 1 or x.shape[0] % shape["data"] or x.shape[2] % shape["fsdp"]:
        return x
    return lax.with_sharding_constraint(x, PartitionSpec("data", None, "fsdp"))


def everywhere(x: Array) -> Array:
    """Replicate an array, so that every process can read it."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return lax.with_sharding_constraint(x, PartitionSpec())
