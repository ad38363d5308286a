"""Qwen2 over a stream of text, visual and beacon tokens (one group of windows at a time).

Shapes follow the axis legend of `vxl_jax`. Source: Qwen2 (arXiv 2407.10671) for the plain network,
Video-XL (arXiv 2409.14485, section 3.2) for beacon tokens and what they keep.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.nn.attention.tiled import window_attention
from vxl_jax.nn.groups import Group
from vxl_jax.nn.layers import RMSNorm, make_linear
from vxl_jax.nn.memory import Memory, write
from vxl_jax.nn.rope import rotate
from vxl_jax.nn.scan import map_in_blocks, recomputed, stacked
from vxl_jax.nn.sharding import by_sample, from_table, residual, sample_shards
from vxl_jax.stream.batch import StreamBatch
from vxl_jax.stream.plan import BEACON, TEXT, VISUAL


class Attention(nnx.Module):
    """Grouped-query attention over memory and own window; beacons have separate q, k and v."""

    def __init__(self, config: VideoXLConfig, *, rngs: nnx.Rngs):
        c = config.language
        linear = partial(make_linear, config, rngs)
        kv_width = c.kv_heads * c.head_size
        self.q = linear(c.width, c.width, use_bias=True)
        self.k = linear(c.width, kv_width, use_bias=True)
        self.v = linear(c.width, kv_width, use_bias=True)
        self.o = linear(c.width, c.width)
        if config.compression is not None:
            self.beacon_q = linear(c.width, c.width, use_bias=True)
            self.beacon_k = linear(c.width, kv_width, use_bias=True)
            self.beacon_v = linear(c.width, kv_width, use_bias=True)
        self.head_size = c.head_size

    def project(self, x: Array, is_beacon: Array | None) -> tuple[Array, Array, Array]:
        """x [B, T, D] -> q [B, T, N, H], k and v [B, T, K, H], before RoPE."""

        def heads(name: str) -> Array:
            y = getattr(self, name)(x)
            if is_beacon is not None:
                y = jnp.where(is_beacon[..., None], getattr(self, f"beacon_{name}")(x), y)
            return y.reshape(*y.shape[:-1], -1, self.head_size)

        return heads("q"), heads("k"), heads("v")

    def __call__(
        self,
        x: Array,
        group: Group,
        keys: Array,
        values: Array,
        layer: Array | int,
        bases: Sequence[Memory] = (),
    ) -> tuple[Array, Array, Array]:
        """Write the group's persistent tokens into `layer` of the memory, then attend.

        x [B, T, D]; keys and values [L, B, K, M, H]; bases: see `LanguageModel.run_group`. Returns
        the output [B, T, D] and the updated memory. The group's own entries are in the memory
        before anyone reads it: a window sees only the slots before its start.
        """
        q, k, v = self.project(x, group.is_beacon)
        keys = write(keys, layer, group.slot, rotate(k, group.memory_angles))
        values = write(values, layer, group.slot, v)
        q = rotate(q, group.own_angles, scale=self.head_size**-0.5)
        k = rotate(k, group.own_angles)
        start, seen = group.window_start, group.window_memory
        before = [
            (base.keys, base.values, base_seen)
            for base, base_seen in zip(bases, group.window_base, strict=True)
        ]
        out = window_attention(q, k, v, keys, values, layer, start, seen, bases=before)
        return self.o(out.reshape(x.shape)), keys, values


def _take(x: Array, index: Array) -> Array:
    """Rows `index` [B, I] of x [B, T, ...] -> [B, I, ...]; indices must be in bounds."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, index)


MLP_BYTES = 2**28
"""Most bytes of an MLP's hidden values on a device at once; larger inputs are split by tokens."""


class MLP(nnx.Module):
    """SiLU-gated feed-forward network."""

    def __init__(self, config: VideoXLConfig, *, rngs: nnx.Rngs):
        c = config.language
        self.gate = make_linear(config, rngs, c.width, c.mlp_width)
        self.up = make_linear(config, rngs, c.width, c.mlp_width)
        self.down = make_linear(config, rngs, c.mlp_width, c.width)

    def __call__(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        graph, params = nnx.split((self.gate, self.up, self.down))

        def run(x: Array) -> Array:
            gate, up, down = nnx.merge(graph, params)
            return down(jax.nn.silu(gate(x)) * up(x))

        width = self.up.out_features * jnp.dtype(self.up.dtype).itemsize
        most = MLP_BYTES // (width * -(-x.shape[0] // sample_shards()))
        return map_in_blocks(run, x.swapaxes(0, 1), max(1, most)).swapaxes(0, 1)


class DecoderLayer(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, config: VideoXLConfig, *, rngs: nnx.Rngs):
        norm = partial(
            RMSNorm,
            config.language.width,
            config.language.norm_eps,
            param_dtype=DTYPES[config.param_dtype],
        )
        self.attention_norm = norm()
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Array,
        group: Group,
        keys: Array,
        values: Array,
        layer: Array | int,
        bases: Sequence[Memory] = (),
    ) -> tuple[Array, Array, Array]:
        """See `Attention.__call__`."""
        y, keys, values = self.attention(self.attention_norm(x), group, keys, values, layer, bases)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), keys, values


class LanguageModel(nnx.Module):
    """Token and beacon embeddings, stacked layers, final norm and head.

    Without `config.compression` there are neither beacon embedding nor beacon projections.
    """

    def __init__(self, config: VideoXLConfig, *, rngs: nnx.Rngs):
        c = config.language
        self.config = config
        param_dtype, dtype = DTYPES[config.param_dtype], DTYPES[config.dtype]
        self.embed = nnx.Embed(
            c.vocab_size, c.width, param_dtype=param_dtype, dtype=dtype, rngs=rngs
        )
        if config.compression is not None:
            self.beacon_embed = nnx.Param(jnp.zeros((1, c.width), param_dtype))
        self.layers = stacked(partial(DecoderLayer, config), c.layers, rngs)
        self.norm = RMSNorm(c.width, c.norm_eps, param_dtype)
        if not c.tie_embeddings:
            self.head = make_linear(
                *(config, rngs, c.width, c.vocab_size),
                preferred_element_type=jnp.float32,
                dot_general=_dot_in_float32,
            )

    def embed_group(self, streams: StreamBatch, visual: Array | None) -> Array:
        """Input of the first layer, [B, T, D].

        streams: without its group axis. visual [B, V, D], or None where no sample has any.
        """
        kind = streams.kind[..., None]
        x = from_table(self.embed(jnp.where(streams.kind == TEXT, streams.source, 0)))
        if visual is not None:
            index = jnp.where(streams.kind == VISUAL, streams.source, 0)
            x = jnp.where(kind == VISUAL, _take(visual.astype(x.dtype), index), x)
        if streams.has_beacons:
            x = jnp.where(kind == BEACON, self.beacon_embed[0].astype(x.dtype), x)
        return by_sample(x)

    def run_group(
        self, x: Array, group: Group, memory: Memory, bases: Sequence[Memory] = ()
    ) -> tuple[Array, Memory]:
        """Run all layers over one group, writing its persistent tokens into the memory in place.

        bases: memories of one sample each, shared by all samples, which come before the memory in
        stream order, one after another; they are only read. x [B, T, D] -> hidden states after the
        last layer [B, T, D]. `memory.length` is left to the caller.
        """
        graph, params = nnx.split(self.layers)

        def body(carry: tuple[Array, Array, Array], scanned: tuple[Any, Array]) -> tuple[Any, None]:
            layer_params, layer = scanned
            x, *memory = nnx.merge(graph, layer_params)(carry[0], group, *carry[1:], layer, bases)
            return (by_sample(x), *(by_sample(part, axis=1) for part in memory)), None

        layers = jnp.arange(self.config.language.layers)
        (x, keys, values), _ = lax.scan(body, (x, memory.keys, memory.values), (params, layers))
        return x, replace(memory, keys=keys, values=values)

    def run_group_alone(self, x: Array, group: Group, capacity: int) -> Array:
        """Run all layers over a group that has all windows of its samples; return no memory.

        For training: each layer's memory exists only inside the layer, and with `remat` the
        backward pass takes memory linear in the length of the stream. x [B, T, D] -> [B, T, D].
        """
        c = self.config.language
        graph, params = nnx.split(self.layers)
        shape = (1, x.shape[0], c.kv_heads, capacity, c.head_size)

        def body(x: Array, layer_params: Any) -> tuple[Array, None]:
            empty = by_sample(jnp.zeros(shape, x.dtype), axis=1)
            x = nnx.merge(graph, layer_params)(x, group, empty, empty, 0)[0]
            return residual(x), None

        return by_sample(lax.scan(recomputed(body, self.config.remat), residual(x), params)[0])

    def logits(self, hidden: Array) -> Array:
        """Hidden states [..., D] after the last layer -> logits [..., V] float32.

        The head multiplies in the compute dtype and returns the float32 sums without rounding.
        """
        hidden = self.norm(hidden)
        if self.config.language.tie_embeddings:
            table = self.embed.embedding[...].astype(self.embed.dtype)
            return product_in_float32(hidden, table.T)
        return self.head(hidden)


@jax.custom_vjp
def product_in_float32(x: Array, kernel: Array) -> Array:
    """x [..., D] times kernel [D, V] -> [..., V] float32, without rounding to the dtype of x.

    Gradients are products in the dtype of x, rounded to it: JAX's own rule would make a float32
    copy of the kernel.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product_in_float32(x, kernel), (x, kernel)


def _product_backward(factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = factors
    gradient = gradient.astype(x.dtype)
    return jnp.matmul(gradient, kernel.T), jnp.einsum("...D,...V->DV", x, gradient)


product_in_float32.defvjp(_product_forward, _product_backward)


def _dot_in_float32(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """`product_in_float32` with the arguments of `nnx.Linear.dot_general`."""
    return product_in_float32(x, kernel)
