"""The training step: gradients of a batch, summed over batches, then one optimizer update.

Pure jitted functions over plain dicts of arrays; buffers that are given up are donated.
"""

import hashlib
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, path_aware_map
from jax import Array

from train.config import OptimSection
from vxl_jax.lora import LORA_NAMES
from vxl_jax.model import VideoXL, loss_and_metrics
from vxl_jax.stream import StreamBatch

Params = dict[str, Any]

MATRICES = ("kernel", "embedding", *LORA_NAMES)
"""Names of the parameters that decay."""


def part_of(path: tuple[str, ...]) -> str:
    """Which of `optim.train`'s parts a parameter belongs to, from its path in the model."""
    if path[-1] in LORA_NAMES:
        return "lora"
    if path[0] != "language":
        return path[0]
    return "beacon" if any(name.startswith("beacon_") for name in path) else "language"


def split_parts(model: VideoXL, parts: tuple[str, ...]) -> tuple[Any, Params, Params]:
    """The model as (graph, trained parameters, frozen parameters); `nnx.merge` is the inverse.

    Trained parameters become float32 whatever the model stores: in bfloat16 a step of 1e-5 on a
    weight of 0.02 rounds to nothing.
    """
    graph, *states = nnx.split(model, lambda path, _: part_of(path) in parts, ...)
    trained, frozen = map(nnx.to_pure_dict, states)
    return graph, jax.tree.map(lambda x: x.astype(jnp.float32), trained), frozen


@cache
def make_optimizer(
    config: OptimSection, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with clipping, and its learning rate: linear warm-up, then cosine to 0 at `steps`.

    Equal arguments give the same object, for which `update` is compiled once.
    """
    warmup = min(int(np.ceil(steps * config.warmup_share)), steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
    )

    def is_matrix(params: Params) -> Any:
        return path_aware_map(lambda path, _: path[-1] in MATRICES, params)

    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=is_matrix
        ),
    )
    return optimizer, schedule


# Zeros that do not hang on a parameter restored from a checkpoint would not be bound to its device
# as all sums after them are, and `add_batch` would be compiled for both.
@partial(jax.jit, keep_unused=True)
def empty_sums(trained: Params) -> Params:
    """Sums of no batch: gradients, loss, labelled tokens and those predicted right."""
    zero = jnp.zeros((), jnp.float32)
    gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    return {"gradients": gradients, "loss": zero, "tokens": zero, "correct": zero}


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def add_batch(
    graph: Any,
    trained: Params,
    frozen: Params,
    sums: Params,
    streams: StreamBatch,
    pixels: Array | None,
) -> Params:
    """Add one batch to the sums of a step."""

    def loss(trained: Params) -> tuple[Array, dict[str, Array]]:
        return loss_and_metrics(nnx.merge(graph, trained, frozen), streams, pixels)

    (total, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
    batch = {"gradients": gradients, "loss": total, **metrics}
    return jax.tree.map(jnp.add, sums, batch)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def update(
    optimizer: optax.GradientTransformation, trained: Params, opt_state: Any, sums: Params
) -> tuple[Params, Any, dict[str, Array]]:
    """One optimizer step with the mean gradient over all labelled tokens of the summed batches.

    Returns parameters, optimizer state, and metrics: loss, accuracy, gradient_norm.
    """
    tokens = jnp.maximum(sums["tokens"], 1)
    gradients = jax.tree.map(
        lambda gradient, p: (gradient / tokens).astype(p.dtype), sums["gradients"], trained
    )
    updates, opt_state = optimizer.update(gradients, opt_state, trained)
    metrics = {
        "loss": sums["loss"] / tokens,
        "accuracy": sums["correct"] / tokens,
        "gradient_norm": optax.tree.norm(gradients),
    }
    return optax.apply_updates(trained, updates), opt_state, metrics


def fingerprint(*params: Params) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters, ordered by name."""
    flat = {path: leaf for tree in params for path, leaf in flatten_dict(tree).items()}
    digest = hashlib.sha256()
    for path in sorted(flat):
        array = np.asarray(flat[path])
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
