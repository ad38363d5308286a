"""Attention in fused kernels for NVIDIA GPUs: no scores in the card's memory.

The memory and its bases are read where they lie, with the layer as an index; those of fewer slots
than a tile are padded to one. Axis letters as in `tiled`. A source is the own windows, the memory
or a base; query t sees its keys first[t] <= i < end[t].
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from vxl_jax.nn.attention.fused_kernels import (
    BlockSizes,
    Kernels,
    KeySource,
    run_few,
    run_forward,
    run_of_keys,
    run_of_queries,
)
from vxl_jax.nn.attention.key_values import KeyValues
from vxl_jax.nn.backend import PROGRAMS, Capability, gpu_capability
from vxl_jax.nn.scan import gradient_of_stack
from vxl_jax.nn.sharding import SAMPLES, sample_shards

HEAD_SIZES = (16, 32, 64, 128)
"""Sizes of a head that the kernels are compiled for: Triton's tiles are powers of two."""

_FEW = BlockSizes(16, 64, 4, 3)
HOPPER = Kernels(
    BlockSizes(128, 64, 8, 3), _FEW, BlockSizes(64, 64, 4, 2), BlockSizes(64, 64, 4, 2)
)
AMPERE = Kernels(BlockSizes(64, 64, 4, 3), _FEW, BlockSizes(64, 32, 4, 2), BlockSizes(64, 64, 8, 2))
"""For compute capability 9 and 10, and for 8 and 12, which have less shared memory: the largest
that were found to compile without spilled registers. Not yet timed on a card."""


def kernels_for(capability: Capability) -> Kernels:
    """Choose the blocks for a GPU."""
    return HOPPER if (9, 0) <= capability < (12, 0) else AMPERE


def why_not_fused(
    q: Float[Array, "B T N H"], past: Sequence[KeyValues], capability: Capability
) -> str | None:
    """Say why the kernels cannot take some shapes on a GPU; None if they can."""
    if capability < (8, 0):
        return f"a GPU of compute capability {capability[0]}.{capability[1]} (8.0 or more)"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype} (use bfloat16)"
    if q.shape[3] not in HEAD_SIZES:
        return f"heads of {q.shape[3]} (of {', '.join(map(str, HEAD_SIZES))})"
    if any(each.keys.dtype != q.dtype for each in past):
        return "a memory of another dtype"
    return None


def fused_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    window_start: Int[Array, "B T"],
    past: Sequence[KeyValues] = (),
    kernels: Kernels | None = None,
) -> Float[Array, "B T N H"]:
    """Attend in fused kernels; see `window_attention`. Differentiable once, in reverse mode.

    On a mesh every device has its samples and heads, as far as they divide, and nothing is sent.
    kernels: chosen for the GPU by default.
    """
    if kernels is None:
        kernels = kernels_for(gpu_capability() or (9, 0))
    past = tuple(each for each in past if each.keys.shape[3])
    attend = partial(_attend_to_sources, kernels)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q, k, v, window_start, past)
    samples = SAMPLES if q.shape[0] % sample_shards() == 0 else None
    heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
    tokens = PartitionSpec(samples, None, heads)

    def spec(each: KeyValues) -> Any:
        shared = each.keys.shape[1] < q.shape[0]
        stored = PartitionSpec(None, None if shared else samples, heads)
        return KeyValues(stored, stored, PartitionSpec(), PartitionSpec(samples))  # type: ignore[arg-type]

    past = tuple(replace(each, layer=jnp.asarray(each.layer, jnp.int32)) for each in past)
    specs = tokens, tokens, tokens, PartitionSpec(samples), tuple(map(spec, past))
    return jax.shard_map(attend, in_specs=specs, out_specs=tokens, check_vma=False)(
        q, k, v, window_start, past
    )


def _attend_to_sources(
    kernels: Kernels,
    q: Array,
    k: Array,
    v: Array,
    window_start: Array,
    past: tuple[KeyValues, ...],
) -> Array:
    blocks = kernels.forward, kernels.few, kernels.of_queries, kernels.of_keys
    least = max(each.keys for each in blocks)

    def source(
        keys: Array, values: Array, layer: Array | int, first: Array, end: Array
    ) -> KeySource:
        if (missing := least - keys.shape[3]) > 0:
            room = ((0, 0),) * 3 + ((0, missing), (0, 0))
            keys, values = (
                jnp.pad(lax.dynamic_index_in_dim(x, layer), room) for x in (keys, values)
            )
            layer = 0
        layer = jnp.asarray(layer, jnp.int32).reshape(1)
        first, end = (x.astype(jnp.int32) for x in (first, end))
        return KeySource(keys, values, layer, first, end)

    own_end = jnp.broadcast_to(jnp.arange(1, q.shape[1] + 1), window_start.shape)
    own_keys, own_values = (rearrange(x, "B T K H -> 1 B K T H") for x in (k, v))
    sources = [source(own_keys, own_values, 0, window_start, own_end)]
    sources += [
        source(each.keys, each.values, each.layer, jnp.zeros_like(each.seen), each.seen)
        for each in past
    ]
    return _attend(kernels, q, tuple(sources))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernels: Kernels, q: Array, sources: tuple[KeySource, ...]) -> Array:
    return _forward(kernels, q, sources)[0]


_Residuals = tuple[Array, tuple[KeySource, ...], tuple[Array, ...], Array, Array]


def _forward(
    kernels: Kernels, q: Array, sources: tuple[KeySource, ...]
) -> tuple[Array, _Residuals]:
    rows = q.shape[1] * q.shape[2] // sources[0].keys.shape[2]
    blocks = q.shape[0] * sources[0].keys.shape[2] * -(-rows // kernels.few.queries)
    few = blocks < PROGRAMS if kernels.parts is None else kernels.parts > 0
    out, normaliser = (run_few if few else run_forward)(kernels, q, sources)
    # The backward pass needs one layer of each source only.
    read = tuple(
        source._replace(
            keys=lax.dynamic_index_in_dim(source.keys, source.layer[0]),
            values=lax.dynamic_index_in_dim(source.values, source.layer[0]),
        )
        for source in sources
    )
    # A residual is an array: the number of layers goes along as a shape.
    stacks = tuple(jnp.zeros((source.keys.shape[0], 0)) for source in sources)
    return out, (q, read, stacks, out, normaliser)


def _backward(
    kernels: Kernels, residuals: _Residuals, gradient: Array
) -> tuple[Array, tuple[KeySource, ...]]:
    q, sources, stacks, out, normaliser = residuals
    mean = jnp.einsum("BTNH,BTNH->BNT", gradient, out, preferred_element_type=jnp.float32)
    rows = q, gradient, normaliser, mean
    one_layer = tuple(source._replace(layer=jnp.zeros_like(source.layer)) for source in sources)
    of_q = run_of_queries(kernels, rows, one_layer)
    of_sources = []
    for source, one, stack in zip(sources, one_layer, stacks, strict=True):
        place = partial(gradient_of_stack, layers=stack.shape[0], layer=source.layer[0])
        of_keys, of_values = run_of_keys(kernels, rows, one)
        of_sources.append(KeySource(place(of_keys), place(of_values), None, None, None))  # type: ignore[arg-type]
    return of_q, tuple(of_sources)


_attend.defvjp(_forward, _backward)
