"""The optimizers: AdamW, and Adafactor for training all of a model that fills the device.

Both work in place, and Adafactor on one layer of a stacked matrix at a time: float32 numbers of one
layer alone are held with parameters, gradients and moments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, lax

from train.config import OptimSection, part_of
from vxl_jax.typing import ParamPath, ParamTree

MATRICES = ("kernel", "embedding", "lora_a", "lora_b")
"""Last names of the parameters that get weight decay."""

MOMENTS = {"adamw": optax.ScaleByAdamState, "adafactor": optax.FactoredState}
"""Optax's moments by optimizer: the count of steps, then trees of arrays like the parameters."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) or Adafactor (arXiv 1804.04235), clipping and learning rates.

    A run of `steps` steps; `seed` is that of stochastic rounding. Optimizers of equal arguments are
    equal: as a static argument of `jax.jit`, they share one compilation.

    Adafactor's second moments are a row and a column of numbers for each layer's matrix, there is
    no first moment, and learning rates are absolute. Moments are float32 for all parameters.
    """

    config: OptimSection
    steps: int
    seed: int

    def schedule(self, step: Array | int) -> Array:
        """Learning rate after `step` steps: linear warm-up from 0, then cosine to 0 at `steps`.

        With warm-up, the first step has rate 0, as in Hugging Face's cosine schedule: it fills the
        moments and leaves the parameters as they are.
        """
        peak = self.config.learning_rate
        warmup = min(int(np.ceil(self.steps * self.config.warmup_share)), self.steps - 1)
        start = 0.0 if warmup else peak
        return optax.warmup_cosine_decay_schedule(start, peak, warmup, self.steps)(step)

    def rate(self, state: Any) -> Array:
        """Compute the learning rate of the next step."""
        return self.schedule(_unpack(state)[0])

    def init(self, params: ParamTree) -> Any:
        """Make the state before the first step; moments of a stacked parameter are stacked.

        Returns: a tree in the layout of `_pack`.
        """
        rule, moments = self._rule(), {}
        for path, value in flatten_dict(params).items():
            layers = value.shape[:1] if is_stacked(path) else ()
            one = jax.ShapeDtypeStruct(value.shape[len(layers) :], jnp.float32)
            _, *shapes = jax.eval_shape(rule.init, one)
            moments[path] = [
                jnp.zeros_like(value, jnp.float32, shape=(*layers, *x.shape)) for x in shapes
            ]
        count, again = (jnp.zeros((), jnp.int32) for _ in range(2))  # both are donated
        return self._pack(count, again, _trees(moments))

    def clipping(self, norm: Array) -> Array:
        """Factor that brings gradients of this global norm to `optim.clip_norm` at most."""
        return jnp.minimum(1.0, self.config.clip_norm / norm)

    @jax.named_scope("optimizer")
    def apply(
        self,
        params: ParamTree,
        state: Any,
        gradients: ParamTree,
        scale: Array | float = 1.0,
        taken: Array | None = None,
    ) -> tuple[ParamTree, Any]:
        """One step with `scale` times the gradients (float32 or bfloat16), in place where donated.

        bfloat16 parameters are computed in float32 and rounded stochastically, with bits that
        depend on seed, step, name and layer alone.

        taken: bool scalar, whether the step is taken; without it, nothing changes.
        """
        count, again, trees = _unpack(state)
        key = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), count)
        gradients, *trees = map(flatten_dict, (gradients, *trees))
        new = {}
        for path, value in flatten_dict(params).items():
            step = partial(_chosen, taken, partial(self._step, path, count, scale))
            keys = jax.random.fold_in(key, crc32("/".join(path).encode()))
            if is_stacked(path):
                keys = jax.vmap(partial(jax.random.fold_in, keys))(jnp.arange(value.shape[0]))
                # XLA fuses AdamW, which goes number by number, and makes no temporaries.
                whole = self.config.optimizer == "adamw" or value.ndim == 2
                step = jax.vmap(step) if whole else partial(_each_layer, step)
            new[path] = step(keys, gradients[path], value, *(tree[path] for tree in trees))
        params, *trees = _trees(new)
        count, again = (_either(taken, optax.safe_increment(x), x) for x in (count, again))
        return params, self._pack(count, again, trees)

    # Orbax saves this tree by the names and numbers of its nodes, and older runs have it: it stays
    # the state of `optax.chain(optax.clip_by_global_norm(...), optax.adamw(..., mask=...))`, with
    # empty states and a second count. `_pack` and `_unpack` alone know the layout.
    def _pack(self, count: Array, again: Array, trees: Sequence[ParamTree]) -> Any:
        """Build the saved state from two equal counts of steps and the trees of moments."""
        return optax.EmptyState(), (
            MOMENTS[self.config.optimizer](count, *trees),
            optax.MaskedState(optax.EmptyState()),
            optax.ScaleByScheduleState(again),
        )

    def _step(
        self,
        path: ParamPath,
        count: Array,
        scale: Array | float,
        key: Array,
        gradient: Array,
        value: Array,
        *moments: Array,
    ) -> tuple[Array, ...]:
        """One parameter, or one layer of a stacked one -> its new value and moments."""
        config, rule = self.config, self._rule()
        x, gradient = value.astype(jnp.float32), gradient.astype(jnp.float32) * scale
        update, (_, *new) = rule.update(gradient, MOMENTS[config.optimizer](count, *moments), x)
        if config.optimizer == "adafactor":
            update, _ = optax.clip_by_block_rms(1.0).update(update, optax.EmptyState())
        if path[-1] in MATRICES:
            update += config.weight_decay * x
        ratio = config.peak(part_of(path)) / config.learning_rate
        x -= self.schedule(count) * ratio * update
        x = round_stochastic(x, key) if value.dtype == jnp.bfloat16 else x.astype(value.dtype)
        return x, *new

    def _rule(self) -> optax.GradientTransformation:
        """From a gradient to an update; the state is a count and arrays for each parameter."""
        if self.config.optimizer == "adamw":
            return optax.scale_by_adam(self.config.b1, self.config.b2)
        return optax.scale_by_factored_rms()


def _unpack(state: Any) -> tuple[Array, Array, list[ParamTree]]:
    """Split a state that `Optimizer._pack` has built into the counts and the trees of moments."""
    _, ((count, *trees), _, schedule) = state
    return count, schedule.count, trees


def is_stacked(path: ParamPath) -> bool:
    """Whether the first axis of a parameter is the layer."""
    return path[1:2] == ("layers",)


def round_stochastic(x: Array, key: Array) -> Array:
    """float32 -> one of the two nearest bfloat16 numbers, the mean of many draws being x.

    What bfloat16 can hold does not move, and NaN and infinities stay what they are.
    """
    # bfloat16 is the upper half of a float32: what is below decides how often noise carries over.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (lax.bitcast_convert_type(x, jnp.uint32) + noise) >> 16
    rounded = lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _either(taken: Array | None, new: Array, old: Array) -> Array:
    return new if taken is None else jnp.where(taken, new, old)


def _chosen(
    taken: Array | None,
    step: Callable[..., tuple[Array, ...]],
    key: Array,
    gradient: Array,
    *old: Array,
) -> tuple[Array, ...]:
    """The value and moments after `step`, or the old ones."""
    new = step(key, gradient, *old)
    return tuple(_either(taken, *pair) for pair in zip(new, old, strict=True))


def _each_layer(
    step: Callable[..., tuple[Array, ...]], keys: Array, gradient: Array, *stacked: Array
) -> tuple[Array, ...]:
    """`step` for each index of the first axis; `stacked` (value and moments) change in place."""

    def body(layer: Array, stacked: tuple[Array, ...]) -> tuple[Array, ...]:
        one = [lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (gradient, *stacked)]
        new = step(keys[layer], *one)
        return tuple(
            lax.dynamic_update_index_in_dim(whole, x, layer, 0)
            for whole, x in zip(stacked, new, strict=True)
        )

    return lax.fori_loop(0, len(gradient), body, stacked)


def _trees(arrays: dict[ParamPath, Any]) -> list[ParamTree]:
    """Several arrays for each path -> as many trees."""
    return [
        unflatten_dict(dict(zip(arrays, column, strict=True)))
        for column in zip(*arrays.values(), strict=True)
    ]
