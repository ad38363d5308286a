"""How the next token is chosen."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from vxl_jax.errors import ArgumentError
from vxl_jax.nn.sharding import everywhere


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy and ignores the rest.

    top_k: only the k most likely tokens (0: all). top_p: only the most likely tokens that together
    reach this probability (1: all), of all tokens before top_k. seed: of the draws, which also
    depend on a sample's place in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:  # NaN too
            raise ArgumentError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 <= self.top_k < 2**31:
            raise ArgumentError(
                f"top_k is {self.top_k}; it must be 0 (all tokens) or a number below 2**31"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ArgumentError(f"seed is {self.seed}; it must fit in 64 bits")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p is {self.top_p}; it must be in (0, 1]")


GREEDY = Sampling()


@partial(jax.jit, static_argnums=1)
def choose_token(
    logits: Array, greedy: bool, key: Array, temperature: Any, top_k: Any, top_p: Any
) -> Array:
    """Next token [B] int32 from logits [B, V]; see `Sampling`."""
    if greedy:
        return everywhere(logits.argmax(-1).astype(jnp.int32))
    order = jnp.argsort(-logits, axis=-1)
    scaled = jnp.take_along_axis(logits, order, axis=-1) / temperature
    likelihood = jax.nn.softmax(scaled, axis=-1)
    above = jnp.cumsum(likelihood, axis=-1) - likelihood  # probability of all better tokens
    rank = jnp.arange(logits.shape[-1])
    allowed = (above < top_p) & ((top_k == 0) | (rank < top_k))
    drawn = jax.random.categorical(key, jnp.where(allowed, scaled, -jnp.inf), axis=-1)
    return everywhere(jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32))


def check_new_tokens(max_new_tokens: int) -> None:
    """Refuse answers without a token.

    Raises: ArgumentError.
    """
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
