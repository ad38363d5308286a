"""How the next token is chosen."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from vxl_jax.errors import ArgumentError
from vxl_jax.nn.sharding import everywhere


@dataclass(frozen=True)
class Sampling:
    """Choose tokens greedily, or draw them by temperature, top-k and top-p.

    For another rule, subclass it and define `choose`:

        @dataclass(frozen=True)
        class MinP(Sampling):
            min_p: float = 0.1

            def choose(self, logits, key):
                likelihood = jax.nn.softmax(logits)
                likely = likelihood >= self.min_p * likelihood.max(-1, keepdims=True)
                return jax.random.categorical(key, jnp.where(likely, logits, -jnp.inf))

    temperature: 0 is greedy and ignores the other fields.
    top_k: draw from the k most likely tokens alone (0: all).
    top_p: draw from the most likely tokens that together reach this probability (1: all). The
        probabilities are those of all tokens, before top_k.
    seed: of the draws, which also depend on a sample's place in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
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

    def choose(self, logits: Float[Array, "B V"], key: Array) -> Int32[Array, " B"]:
        """Choose the next token of every sample.

        Called once for each token of an answer, outside of jit.

        Args:
            logits: float32, of all tokens of the vocabulary.
            key: typed PRNG key, another one for each token; it depends on `seed` alone.

        Returns:
            Token ids, int32.
        """
        greedy = self.temperature == 0
        return _choose_token(logits, greedy, key, self.temperature, self.top_k, self.top_p)


GREEDY = Sampling()


@partial(jax.jit, static_argnums=1)
def _choose_token(
    logits: Float[Array, "B V"],
    greedy: bool,
    key: Array,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Int32[Array, " B"]:
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


@jax.jit
def token_logprobs(logits: Float[Array, "B V"], ids: Int32[Array, " B"]) -> Float[Array, " B"]:
    """Compute the model's log-probability of each chosen token: at temperature 1, of all tokens."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return everywhere(jnp.take_along_axis(logprobs, ids[:, None], axis=-1)[:, 0])


def check_new_tokens(max_new_tokens: int) -> None:
    """Refuse answers without a token.

    Raises:
        ArgumentError: fewer than 1.
    """
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
