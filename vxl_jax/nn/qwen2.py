"""Qwen2 over a stream of text, visual and beacon tokens (one group of windows at a time).

Shapes follow the axis legend of CONTRIBUTING.md. Source: Qwen2 (arXiv 2407.10671) for the plain
network, Video-XL (arXiv 2409.14485, section 3.2) for beacon tokens and what they keep.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.nn.attention import AttentionName, window_attention
from vxl_jax.nn.attention.dense import attention_weights
from vxl_jax.nn.attention.key_values import KeyValues
from vxl_jax.nn.backend import row_unit
from vxl_jax.nn.collect import Collect, Collected, LayerFn, collect_layer, nothing_collected
from vxl_jax.nn.few_rows import layer_in_place, reads_in_place
from vxl_jax.nn.groups import Group
from vxl_jax.nn.layers import ModuleState, RMSNorm, dot_in_float32, make_linear, product_in_float32
from vxl_jax.nn.memory import Memory, write
from vxl_jax.nn.rope import rotate
from vxl_jax.nn.scan import map_in_blocks, recomputed, stacked
from vxl_jax.nn.sharding import by_sample, from_table, residual, sample_shards
from vxl_jax.stream.batch import StreamBatch
from vxl_jax.stream.plan import BEACON, TEXT, VISUAL

Past = tuple[KeyValues, ...]
"""What a layer reads: its memory, then the bases of the memory."""

_Carry = tuple[Array, tuple[Array, Array], Collected | None]
"""Of the scan over layers: hidden states, keys and values of the memory, activations."""


class Attention(nnx.Module):
    """Grouped-query attention over memory and own window; beacons have separate q, k and v.

    implementation: see `window_attention`. A static attribute: it may be changed on a built model.
    """

    def __init__(
        self,
        config: VideoXLConfig,
        implementation: AttentionName | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        c = config.language
        linear = partial(make_linear, config, rngs)
        kv_width = c.kv_heads * c.head_size
        self.q = linear(c.width, c.width)
        self.k = linear(c.width, kv_width)
        self.v = linear(c.width, kv_width)
        self.o = linear(c.width, c.width, use_bias=False)
        if config.compression is not None:
            self.beacon_q = linear(c.width, c.width)
            self.beacon_k = linear(c.width, kv_width)
            self.beacon_v = linear(c.width, kv_width)
        self.head_size = c.head_size
        self.implementation = implementation

    def project(
        self, x: Float[Array, "B T D"], is_beacon: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Compute q, k and v before RoPE."""

        def heads(name: str) -> Array:
            y = getattr(self, name)(x)
            if is_beacon is not None:
                y = jnp.where(is_beacon[..., None], getattr(self, f"beacon_{name}")(x), y)
            return y.reshape(*y.shape[:-1], -1, self.head_size)

        return heads("q"), heads("k"), heads("v")

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "B T D"], group: Group, past: Past
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """Write the group's persistent tokens into the memory, then attend.

        past: the memory, then its bases. Returns the output and the updated memory. The group's own
        entries are in the memory before any query reads it: a window sees only the slots before its
        start.
        """
        q, k, v = self.project(x, group.is_beacon)
        memory, *bases = past
        memory = replace(
            memory,
            keys=write(memory.keys, memory.layer, group.slot, rotate(k, group.memory_angles)),
            values=write(memory.values, memory.layer, group.slot, v),
        )
        q, k = self._rotated(q, k, group)
        out = window_attention(
            q, k, v, group.window_start, [memory, *bases], implementation=self.implementation
        )
        return self.o(out.reshape(x.shape)), memory

    def weights(
        self, x: Float[Array, "B T D"], group: Group, past: Past
    ) -> Float[Array, "B N T S"]:
        """Compute the attention weights; past: as it was after `__call__` with the same x."""
        q, k, _ = self.project(x, group.is_beacon)
        return attention_weights(*self._rotated(q, k, group), group.window_start, past)

    def _rotated(self, q: Array, k: Array, group: Group) -> tuple[Array, Array]:
        q = rotate(q, group.own_angles, scale=self.head_size**-0.5)
        return q, rotate(k, group.own_angles)


def _take(x: Float[Array, "B V D"], index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Take rows of each sample; indices must be in bounds."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, index)


MLP_BYTES = 2**28
"""Most bytes of an MLP's hidden values on a device at once; larger inputs are split by tokens."""


class MLP(nnx.Module):
    """SiLU-gated feed-forward network."""

    def __init__(self, config: VideoXLConfig, *, rngs: nnx.Rngs):
        c = config.language
        linear = partial(make_linear, config, rngs, use_bias=False)
        self.gate = linear(c.width, c.mlp_width)
        self.up = linear(c.width, c.mlp_width)
        self.down = linear(c.mlp_width, c.width)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Transform each token; tokens are split into blocks of at most `MLP_BYTES`."""
        graph, params = nnx.split((self.gate, self.up, self.down))

        def run(x: Array) -> Array:
            gate, up, down = nnx.merge(graph, params)
            return down(jax.nn.silu(gate(x)) * up(x))

        width = self.up.out_features * jnp.dtype(self.up.dtype).itemsize
        most = MLP_BYTES // (width * -(-x.shape[0] // sample_shards()))
        y = map_in_blocks(run, x.swapaxes(0, 1), max(1, most), unit=row_unit())
        return y.swapaxes(0, 1)


class DecoderLayer(nnx.Module):
    """One pre-norm layer."""

    def __init__(
        self,
        config: VideoXLConfig,
        implementation: AttentionName | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        c = config.language
        norm = partial(RMSNorm, c.width, c.norm_eps, param_dtype=DTYPES[config.param_dtype])
        self.attention_norm = norm()
        self.attention = Attention(config, implementation, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], group: Group, past: Past
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """Run the layer; see `Attention.__call__`."""
        y, memory = self.attention(self.attention_norm(x), group, past)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), memory

    def attention_weights(
        self, x: Float[Array, "B T D"], group: Group, past: Past
    ) -> Float[Array, "B N T S"]:
        """Compute the attention weights of the layer for its input x; see `Attention.weights`."""
        return self.attention.weights(self.attention_norm(x), group, past)


class LanguageModel(nnx.Module):
    """Token and beacon embeddings, stacked layers, final norm and head.

    Without `config.compression` there are neither beacon embedding nor beacon projections.
    attention: see `window_attention`; `layers.attention.implementation` changes it later.
    """

    def __init__(
        self, config: VideoXLConfig, attention: AttentionName | None = None, *, rngs: nnx.Rngs
    ):
        c = config.language
        self.config = config
        param_dtype, dtype = DTYPES[config.param_dtype], DTYPES[config.dtype]
        self.embed = nnx.Embed(
            c.vocab_size, c.width, param_dtype=param_dtype, dtype=dtype, rngs=rngs
        )
        if config.compression is not None:
            self.beacon_embed = nnx.Param(jnp.zeros((1, c.width), param_dtype))
        self.layers = stacked(partial(DecoderLayer, config, attention), c.layers, rngs)
        self.norm = RMSNorm(c.width, c.norm_eps, param_dtype)
        if not c.tie_embeddings:
            self.head = make_linear(
                *(config, rngs, c.width, c.vocab_size),
                use_bias=False,
                preferred_element_type=jnp.float32,
                dot_general=dot_in_float32,
            )

    @jax.named_scope("embed")
    def embed_group(
        self, streams: StreamBatch, visual: Float[Array, "B V D"] | None
    ) -> Float[Array, "B T D"]:
        """Embed the tokens of one group: the input of the first layer.

        streams: without its group axis. visual: None where no sample has any.
        """
        kind = jnp.asarray(streams.kind)[..., None]
        x = from_table(self.embed(jnp.where(streams.kind == TEXT, streams.source, 0)))
        if visual is not None:
            index = jnp.where(streams.kind == VISUAL, streams.source, 0)
            x = jnp.where(kind == VISUAL, _take(visual.astype(x.dtype), index), x)
        if streams.has_beacons:
            x = jnp.where(kind == BEACON, self.beacon_embed[0].astype(x.dtype), x)
        return by_sample(x)

    def run_group(
        self,
        x: Float[Array, "B T D"],
        group: Group,
        memory: Memory,
        bases: Sequence[Memory] = (),
        *,
        collect: Collect | None = None,
        layer_fn: LayerFn | None = None,
    ) -> tuple[Float[Array, "B T D"], Memory, Collected | None]:
        """Run all layers over one group, writing its persistent tokens into the memory in place.

        Args:
            x: from `embed_group`.
            group: from `make_group`.
            memory: `memory.length` is left to the caller.
            bases: memories of one sample each, shared by all samples, which come before the memory
                in stream order, one after another; they are only read.
            collect: layers whose activations are returned as well.
            layer_fn: hook for the output of every layer.

        Returns:
            Hidden states after the last layer, the memory, and what was asked for.
        """
        graph, stacked_params = nnx.split(self.layers)
        in_place = reads_in_place(x)
        slots = sum((base.capacity for base in bases), memory.capacity)
        collected = self._nothing_collected(collect, x, slots)

        def body(carry: _Carry, scanned: tuple[ModuleState | None, Array]) -> tuple[_Carry, None]:
            x, (keys, values), collected = carry
            params, index = scanned
            if params is None:
                params = layer_in_place(stacked_params, x.dtype, index)
            layer = nnx.merge(graph, params)
            before = tuple(
                KeyValues(base.keys, base.values, index, seen)
                for base, seen in zip(bases, group.window_base, strict=True)
            )
            own = KeyValues(keys, values, index, group.window_memory)
            y, own = layer(x, group, (own, *before))
            y = y if layer_fn is None else layer_fn(y, index)
            if collect is not None and collected is not None:
                weights = partial(layer.attention_weights, x, group, (own, *before))
                collected = collect_layer(collect, collected, index, y, weights)
            kept = by_sample(own.keys, axis=1), by_sample(own.values, axis=1)
            return (by_sample(y), kept, collected), None

        layers = jnp.arange(self.config.language.layers)
        carry: _Carry = x, (memory.keys, memory.values), collected
        scanned = (None if in_place else stacked_params, layers)
        (x, (keys, values), collected), _ = lax.scan(body, carry, scanned)
        return x, replace(memory, keys=keys, values=values), collected

    def run_group_alone(
        self,
        x: Float[Array, "B T D"],
        group: Group,
        capacity: int,
        *,
        collect: Collect | None = None,
        layer_fn: LayerFn | None = None,
    ) -> tuple[Float[Array, "B T D"], Collected | None]:
        """Run all layers over a group that has all windows of its samples; return no memory.

        For training: each layer's memory exists only inside the layer, and with `remat` the
        backward pass takes memory linear in the length of the stream. capacity: slots of a layer's
        memory. Other arguments as for `run_group`.
        """
        graph, params = nnx.split(self.layers)
        c, wants_weights = self.config.language, collect is not None and bool(collect.attention)
        shape = (1, x.shape[0], c.kv_heads, capacity, c.head_size)

        def run(x: Array, params: ModuleState, index: Array) -> tuple[Array, KeyValues | None]:
            empty = by_sample(jnp.zeros(shape, x.dtype), axis=1)
            own = KeyValues(empty, empty, 0, group.window_memory)
            y, own = nnx.merge(graph, params)(x, group, (own,))
            y = y if layer_fn is None else layer_fn(y, index)
            return residual(y), own if wants_weights else None

        run = recomputed(run, self.config.remat)

        def body(
            carry: tuple[Array, Collected | None], scanned: tuple[ModuleState, Array]
        ) -> tuple[tuple[Array, Collected | None], None]:
            x, collected = carry
            y, own = run(x, *scanned)
            if collect is not None and collected is not None:

                def weights() -> Array:
                    assert own is not None
                    return nnx.merge(graph, scanned[0]).attention_weights(x, group, (own,))

                collected = collect_layer(collect, collected, scanned[1], y, weights)
            return (y, collected), None

        carry = residual(x), self._nothing_collected(collect, x, capacity)
        (x, collected), _ = lax.scan(body, carry, (params, jnp.arange(c.layers)))
        return by_sample(x), collected

    def _nothing_collected(self, collect: Collect | None, x: Array, slots: int) -> Collected | None:
        if collect is None:
            return None
        collect.check(self.config.language.layers)
        return nothing_collected(collect, x, self.config.language.heads, slots)

    @jax.named_scope("logits")
    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Read float32 logits from hidden states after the last layer.

        The head multiplies in the compute dtype and returns the float32 sums without rounding.
        """
        hidden = self.norm(hidden)
        if self.config.language.tie_embeddings:
            table = self.embed.embedding[...].astype(self.embed.dtype)
            return product_in_float32(hidden, table.T)
        return self.head(hidden)
