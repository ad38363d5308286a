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
from jax.sharding import NamedSharding, Sharding

from train.config import part_of
from train.run.distributed import to_host
from train.run.optimizer import Optimizer
from vxl_jax.config import DTYPES
from vxl_jax.models.loss import loss_and_metrics
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.stream.batch import StreamBatch
from vxl_jax.typing import ParamTree


def split_parts(
    model: VideoXL, parts: tuple[str, ...], dtype: str = "float32"
) -> tuple[Any, ParamTree, ParamTree]:
    """The model as (graph, trained parameters, frozen parameters); `nnx.merge` is the inverse.

    Trained parameters become `dtype` whatever the model stores.
    """
    graph, *states = nnx.split(model, lambda path, _: part_of(path) in parts, ...)
    trained, frozen = map(nnx.to_pure_dict, states)
    return graph, jax.tree.map(lambda x: x.astype(DTYPES[dtype]), trained), frozen


TreeShardings = tuple[Sharding, ...]


def shardings_of(tree: Any) -> TreeShardings:
    """Where the arrays (or shapes with shardings) of a tree lie."""
    return tuple(x.sharding for x in jax.tree.leaves(tree))


def constrain(tree: Any, layout: TreeShardings) -> Any:
    """Inside a jitted function: the tree with its arrays where `layout` says."""
    leaves, structure = jax.tree.flatten(tree)
    placed = [
        lax.with_sharding_constraint(x, sharding) if isinstance(sharding, NamedSharding) else x
        for x, sharding in zip(leaves, layout, strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


def empty_sums(trained: ParamTree) -> ParamTree:
    """Sums of no batch: gradients, loss, labelled tokens and those predicted right."""
    return _empty_sums(shardings_of(trained), trained)


# Zeros that do not hang on a parameter restored from a checkpoint would not be bound to its device
# as all sums after them are, and `add_batch` would be compiled for both.
@partial(jax.jit, static_argnums=0, keep_unused=True)
def _empty_sums(layout: TreeShardings, trained: ParamTree) -> ParamTree:
    zero = jnp.zeros((), jnp.float32)
    gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    gradients = constrain(gradients, layout)
    return {"gradients": gradients, "loss": zero, "tokens": zero, "correct": zero}


def add_batch(
    graph: Any,
    trained: ParamTree,
    frozen: ParamTree,
    sums: ParamTree | None,
    streams: StreamBatch,
    pixels: Array | None,
) -> ParamTree:
    """Add one batch to the sums of a step, whose gradients lie where the parameters do.

    sums: None for a step of one batch; its gradients then have the parameters' dtype. Sums of
    several are float32, and begin with `empty_sums`.
    """
    return _add_batch(graph, shardings_of(trained), trained, frozen, sums, streams, pixels)


def lower_add_batch(graph: Any, trained: ParamTree, *rest: Any) -> Any:
    """`add_batch` of shapes with shardings, ready to be compiled."""
    return _add_batch.lower(graph, shardings_of(trained), trained, *rest)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _add_batch(
    graph: Any,
    layout: TreeShardings,
    trained: ParamTree,
    frozen: ParamTree,
    sums: ParamTree | None,
    streams: StreamBatch,
    pixels: Array | None,
) -> ParamTree:
    def loss(trained: ParamTree) -> tuple[Array, dict[str, Array]]:
        return loss_and_metrics(nnx.merge(graph, trained, frozen), streams, pixels)

    (total, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
    batch = {"gradients": constrain(gradients, layout), "loss": total, **metrics}
    if sums is None:
        return batch
    return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, batch)


def update(
    optimizer: Optimizer, trained: ParamTree, opt_state: Any, sums: ParamTree
) -> tuple[ParamTree, Any, dict[str, Array]]:
    """One optimizer step with the mean gradient over all labelled tokens of the summed batches.

    Nothing changes, and no step is counted, if no token has a label, or if the loss or a gradient
    is not finite. Parameters and state are given up (donated).

    Returns parameters, optimizer state, and metrics: loss and accuracy (NaN without labelled
    tokens), tokens (labelled), gradient_norm, gradient_norm_PART for each trained part,
    learning_rate, finite (bool).
    """
    layout = shardings_of((trained, opt_state))
    return _update(optimizer, layout, trained, opt_state, sums)


def lower_update(optimizer: Optimizer, trained: ParamTree, opt_state: Any, sums: ParamTree) -> Any:
    """`update` of shapes with shardings, ready to be compiled."""
    return _update.lower(optimizer, shardings_of((trained, opt_state)), trained, opt_state, sums)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _update(
    optimizer: Optimizer, layout: TreeShardings, trained: ParamTree, opt_state: Any, sums: ParamTree
) -> tuple[ParamTree, Any, dict[str, Array]]:
    labelled = sums["tokens"] > 0
    tokens = jnp.maximum(sums["tokens"], 1)
    gradients = sums["gradients"]
    squares = {
        path: jnp.sum(jnp.square(x.astype(jnp.float32)))
        for path, x in sorted(flatten_dict(gradients).items())
    }
    loss, norm = sums["loss"] / tokens, jnp.sqrt(sum(squares.values())) / tokens
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    rate = optimizer.rate(opt_state)
    trained, opt_state = lax.cond(
        finite & labelled,
        optimizer.apply,
        lambda trained, opt_state, *_: (trained, opt_state),
        *(trained, opt_state, gradients, optimizer.clipping(norm) / tokens),
    )
    trained, opt_state = constrain((trained, opt_state), layout)
    parts: dict[str, list[Array]] = {}
    for path, square in squares.items():
        parts.setdefault(part_of(path), []).append(square)
    metrics = {
        "loss": jnp.where(labelled | ~finite, loss, jnp.nan),
        "accuracy": jnp.where(labelled, sums["correct"] / tokens, jnp.nan),
        "tokens": sums["tokens"],
        "gradient_norm": norm,
        **{f"gradient_norm_{name}": jnp.sqrt(sum(own)) / tokens for name, own in parts.items()},
        "learning_rate": rate,
        "finite": finite,
    }
    return trained, opt_state, metrics


def fingerprint(*params: ParamTree) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters, ordered by name."""
    flat = {path: leaf for tree in params for path, leaf in flatten_dict(tree).items()}
    digest = hashlib.sha256()
    for path in sorted(flat):
        array = flat[path]
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}\n".encode())
        # Layer by layer: one that is cut over processes is whole on each for a moment.
        for index in range(array.shape[0]) if array.ndim > 2 else [...]:
            digest.update(np.ascontiguousarray(to_host(array[index])).tobytes())
    return digest.hexdigest()
