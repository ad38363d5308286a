"""Attention as one masked softmax over whole rows of scores: the definition.

It stores the matrix of scores, [B, N, T, S + T]. In return every transformation of JAX applies:
`grad`, `jvp`, `hessian`, `vmap`. The other implementations are tested against it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from vxl_jax.nn.attention.key_values import KeyValues


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    window_start: Int[Array, "B T"],
    past: Sequence[KeyValues] = (),
) -> Float[Array, "B T N H"]:
    """Attend with a softmax over whole rows; see `window_attention`."""
    weights = attention_weights(q, k, window_start, past).astype(v.dtype)
    values = [_layer_of(each.values, each.layer, q.shape[0]) for each in past]
    values.append(rearrange(v, "B T K H -> B K T H"))
    groups = rearrange(weights, "B (K G) T S -> B K G T S", K=k.shape[2])
    out = jnp.einsum(
        "BKGTS,BKSH->BTKGH", groups, jnp.concatenate(values, 2), preferred_element_type=jnp.float32
    )
    return out.astype(q.dtype).reshape(q.shape)


def attention_weights(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    window_start: Int[Array, "B T"],
    past: Sequence[KeyValues] = (),
) -> Float[Array, "B N T S"]:
    """Compute the attention weights of all heads, float32; each row sums to 1.

    The S keys are the slots of each of `past`, in the order given, and then the T tokens. Keys that
    a query does not see have weight 0. Arguments as for `window_attention`.
    """
    keys = [_layer_of(each.keys, each.layer, q.shape[0]) for each in past]
    keys.append(rearrange(k, "B T K H -> B K T H"))
    grouped = rearrange(q, "B T (K G) H -> B K G T H", K=k.shape[2])
    scores = jnp.einsum(
        "BKGTH,BKSH->BKGTS",
        *(grouped, jnp.concatenate(keys, 2)),
        preferred_element_type=jnp.float32,
    )
    visible = [jnp.arange(each.keys.shape[3]) < each.seen[..., None] for each in past]
    visible.append(_in_window(window_start))
    mask = jnp.concatenate(visible, -1)[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return rearrange(weights, "B K G T S -> B (K G) T S")


def _in_window(window_start: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Whether each query sees each token: those from the start of its window to itself."""
    token = jnp.arange(window_start.shape[1])
    return (window_start[..., None] <= token) & (token <= token[:, None])


def _layer_of(
    stacked: Float[Array, " L #B K S H"], layer: Int[Array, ""] | int, batch: int
) -> Float[Array, "B K S H"]:
    """One layer, repeated for every sample if it is shared."""
    one = lax.dynamic_index_in_dim(stacked, layer, keepdims=False)
    return jnp.broadcast_to(one, (batch, *one.shape[1:]))
