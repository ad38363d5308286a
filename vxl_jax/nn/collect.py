"""Hidden states and attention weights of chosen layers, and a hook for the output of each layer."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from vxl_jax.errors import ArgumentError

LayerFn = Callable[[Array, Array], Array]
"""Hook for the output of every layer: called with hidden states [B, T, D] and the index of the
layer, an int32 scalar that is traced (choose with `jnp.where(index == 3, …)`). It returns the
hidden states that the next layer reads, of the same shape and dtype."""


@dataclass(frozen=True)
class Collect:
    """Layers whose activations a forward pass returns as well. Hashable: a static argument of jit.

    hidden: layers (0 to L - 1) of which to return the hidden states, after the hook.
    attention: layers of which to return the attention weights. They are computed separately, as
        whole rows, for these layers alone.
    """

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()

    def check(self, layers: int) -> None:
        """Check that each layer exists and is asked for once.

        Raises:
            ArgumentError: a field with another layer.
        """
        for name, chosen in (("hidden", self.hidden), ("attention", self.attention)):
            if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(layers)):
                raise ArgumentError(
                    f"Collect.{name}: {chosen}; give layers from 0 to {layers - 1}, each once"
                )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Collected:
    """Activations of the layers of a `Collect`, in its order; None if it names no layer.

    hidden: [layers, B, T, D] in the compute dtype: the stream after the layer, before any norm.
    attention: [layers, B, N, T, S] float32. The keys S are the M slots of the memory, those of each
        base, and the T tokens of the group itself; a key that a query does not see has weight 0.
    """

    hidden: Float[Array, "layers B T D"] | None
    attention: Float[Array, "layers B N T S"] | None


def nothing_collected(
    collect: Collect, hidden: Float[Array, "B T D"], heads: int, slots: int
) -> Collected:
    """Make buffers of zeros for one group. slots: of the memory and all bases."""
    batch, tokens, _ = hidden.shape
    weights = (len(collect.attention), batch, heads, tokens, slots + tokens)
    return Collected(
        jnp.zeros((len(collect.hidden), *hidden.shape), hidden.dtype) if collect.hidden else None,
        jnp.zeros(weights, jnp.float32) if collect.attention else None,
    )


def collect_layer(
    collect: Collect,
    collected: Collected,
    layer: Int[Array, ""],
    hidden: Float[Array, "B T D"],
    attention: Callable[[], Array],
) -> Collected:
    """Put the activations of one layer of a scan in, if it is among those asked for.

    attention: computes the weights [B, N, T, S]; it runs for chosen layers alone.
    """
    return Collected(
        _put(collected.hidden, collect.hidden, layer, lambda: hidden),
        _put(collected.attention, collect.attention, layer, attention),
    )


def _put(
    buffer: Array | None, chosen: tuple[int, ...], layer: Array, make: Callable[[], Array]
) -> Array | None:
    if buffer is None:
        return None
    found = jnp.array(chosen) == layer
    return lax.cond(
        found.any(),
        lambda old: lax.dynamic_update_index_in_dim(old, make(), found.argmax(), 0),
        lambda old: old,
        buffer,
    )
