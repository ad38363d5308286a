"""The training step: gradients of a batch, summed over batches, then one optimizer update.

Pure jitted functions over plain dicts of arrays; buffers that are given up are donated.
"""

import hashlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import Array, lax

from train.config import part_of
from train.optimizer import Optimizer, Params
from vxl_jax.config import DTYPES
from vxl_jax.model import VideoXL, loss_and_metrics
from vxl_jax.stream import StreamBatch


def split_parts(
    model: VideoXL, parts: tuple[str, ...], dtype: str = "float32"
) -> tuple[Any, Params, Params]:
    """The model as (graph, trained parameters, frozen parameters); `nnx.merge` is the inverse.

    Trained parameters become `dtype` whatever the model stores.
    """
    graph, *states = nnx.split(model, lambda path, _: part_of(path) in parts, ...)
    trained, frozen = map(nnx.to_pure_dict, states)
    return graph, jax.tree.map(lambda x: x.astype(DTYPES[dtype]), trained), frozen


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
    sums: Params | None,
    streams: StreamBatch,
    pixels: Array | None,
) -> Params:
    """Add one batch to the sums of a step.

    sums: None for a step of one batch; its gradients then have the parameters' dtype. Sums of
    several are float32, and begin with `empty_sums`.
    """

    def loss(trained: Params) -> tuple[Array, dict[str, Array]]:
        return loss_and_metrics(nnx.merge(graph, trained, frozen), streams, pixels)

    (total, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
    batch = {"gradients": gradients, "loss": total, **metrics}
    if sums is None:
        return batch
    return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, batch)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def update(
    optimizer: Optimizer, trained: Params, opt_state: Any, sums: Params
) -> tuple[Params, Any, dict[str, Array]]:
    """One optimizer step with the mean gradient over all labelled tokens of the summed batches.

    Nothing changes, and no step is counted, if the loss or a gradient is not finite.

    Returns parameters, optimizer state, and metrics: loss, accuracy, gradient_norm, finite (bool).
    """
    tokens = jnp.maximum(sums["tokens"], 1)
    gradients = sums["gradients"]
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(gradients)]
    loss, norm = sums["loss"] / tokens, jnp.sqrt(sum(squares)) / tokens
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    trained, opt_state = lax.cond(
        finite,
        optimizer.apply,
        lambda trained, opt_state, *_: (trained, opt_state),
        *(trained, opt_state, gradients, optimizer.clipping(norm) / tokens),
    )
    accuracy = sums["correct"] / tokens
    metrics = {"loss": loss, "accuracy": accuracy, "gradient_norm": norm, "finite": finite}
    return trained, opt_state, metrics


def fingerprint(*params: Params) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters, ordered by name."""
    flat = {path: leaf for tree in params for path, leaf in flatten_dict(tree).items()}
    digest = hashlib.sha256()
    for path in sorted(flat):
        array = np.asarray(flat[path])
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
