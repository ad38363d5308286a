"""The training step: gradients of a batch, summed over batches, then one optimizer update.

Pure jitted functions over plain dicts of arrays; buffers that are given up are donated.
"""

import hashlib
from collections.abc import Callable, Sequence
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
from train.errors import TrainingError
from train.run.distributed import to_host
from train.run.optimizer import Optimizer
from vxl_jax.config import DTYPES
from vxl_jax.models.loss import loss_and_metrics
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn.backend import on_cpu
from vxl_jax.stream.batch import StreamBatch
from vxl_jax.typing import ParamTree

LossFn = Callable[[VideoXL, StreamBatch, Array | None], tuple[Array, dict[str, Array]]]
"""A training loss: `(model, streams, pixels) -> (loss, sums)`, as `loss_and_metrics`.

`loss` is a float32 scalar, summed over the batch. `sums` are scalars that are summed over batches
too. They must have `tokens`, by which loss and gradients are divided, and `correct`, from which the
accuracy follows. Other names are divided by `tokens` and logged. The function is traced inside
`jax.jit`; arrays that it closes over become constants of the program.
"""

NAMED_BY_STEPS = ("gradients", "loss", "accuracy", "gradient_norm", "learning_rate", "finite")
"""Metrics that `update` computes: a loss function cannot use these names."""


def split_parts(
    model: VideoXL, parts: tuple[str, ...], dtype: str = "float32"
) -> tuple[Any, ParamTree, ParamTree]:
    """Split a model into (graph, trained parameters, frozen parameters), for `nnx.merge`.

    Trained parameters are cast to `dtype`, also where the model stores another.
    """
    graph, *states = nnx.split(model, lambda path, _: part_of(path) in parts, ...)
    trained, frozen = map(nnx.to_pure_dict, states)
    return graph, jax.tree.map(lambda x: x.astype(DTYPES[dtype]), trained), frozen


TreeShardings = tuple[Sharding, ...]


def shardings_of(tree: Any) -> TreeShardings:
    """List the shardings of a tree of arrays, or of shapes with shardings."""
    return tuple(x.sharding for x in jax.tree.leaves(tree))


def constrain(tree: Any, layout: TreeShardings) -> Any:
    """Constrain the arrays of a tree to the shardings of `layout`, inside a jitted function."""
    leaves, structure = jax.tree.flatten(tree)
    placed = [
        lax.with_sharding_constraint(x, sharding) if isinstance(sharding, NamedSharding) else x
        for x, sharding in zip(leaves, layout, strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


def metric_names(
    loss_fn: LossFn,
    graph: Any,
    trained: ParamTree,
    frozen: ParamTree,
    streams: StreamBatch,
    pixels: Array | None,
) -> tuple[str, ...]:
    """Find the names of the sums that a loss function returns. Traces it and computes nothing.

    Raises: TrainingError if `tokens` or `correct` is missing, or a name is taken.
    """
    if loss_fn is loss_and_metrics:
        return COUNTS

    def sums(trained: ParamTree, frozen: ParamTree, *batch: Any) -> dict[str, Array]:
        return _checked(*loss_fn(nnx.merge(graph, trained, frozen), *batch))[1]

    return tuple(jax.eval_shape(sums, trained, frozen, streams, pixels))


COUNTS = ("tokens", "correct")
"""Sums that every loss function returns."""


def _checked(loss: Array, sums: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    missing = [name for name in COUNTS if name not in sums]
    taken = [name for name in sums if name.startswith(NAMED_BY_STEPS)]
    if missing or taken or jnp.shape(loss) != ():
        raise TrainingError(
            f"loss_fn: returns a loss of shape {list(jnp.shape(loss))} and the sums "
            f"{', '.join(sums) or 'none'}; return a scalar, 'tokens' and 'correct', and no name "
            f"that begins with {', '.join(NAMED_BY_STEPS)}"
        )
    return loss, sums


def empty_sums(trained: ParamTree, metrics: Sequence[str] = COUNTS) -> ParamTree:
    """Make the sums of no batch: float32 zeros for gradients, loss and the loss function's sums."""
    return _empty_sums(shardings_of(trained), tuple(metrics), trained)


# Zeros that do not hang on a parameter restored from a checkpoint would not be bound to its device
# as all sums after them are, and `add_batch` would be compiled for both.
@partial(jax.jit, static_argnums=(0, 1), keep_unused=True)
def _empty_sums(layout: TreeShardings, metrics: tuple[str, ...], trained: ParamTree) -> ParamTree:
    zero = jnp.zeros((), jnp.float32)
    gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    gradients = constrain(gradients, layout)
    return {"gradients": gradients, "loss": zero, **dict.fromkeys(metrics, zero)}


def add_batch(
    graph: Any,
    trained: ParamTree,
    frozen: ParamTree,
    sums: ParamTree | None,
    streams: StreamBatch,
    pixels: Array | None,
    loss_fn: LossFn = loss_and_metrics,
) -> ParamTree:
    """Add the loss and gradients of one batch to the sums of a step.

    Gradients lie where the parameters do.

    Args:
        graph: of the model, from `split_parts`.
        trained: parameters that get gradients.
        frozen: the other parameters.
        sums: of the batches before, which are given up (donated). None for a step of one batch: its
            gradients then have the parameters' dtype. Sums of several batches are float32, and
            begin with `empty_sums`.
        streams: from `batch_streams`.
        pixels: as for `VideoXL.encode`, or None.
        loss_fn: see `LossFn`. It is a static argument: another function compiles another program.

    Returns: `gradients`, a tree like `trained`; `loss` and the sums that `loss_fn` returns.

    Raises: TrainingError if `loss_fn` returns something else.
    """
    layout = shardings_of(trained)
    return _add_batch(graph, layout, loss_fn, trained, frozen, sums, streams, pixels)


def lower_add_batch(graph: Any, trained: ParamTree, *rest: Any) -> Any:
    """Lower `add_batch`, with the default loss, for shapes with shardings."""
    return _add_batch.lower(graph, shardings_of(trained), loss_and_metrics, trained, *rest)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _add_batch(
    graph: Any,
    layout: TreeShardings,
    loss_fn: LossFn,
    trained: ParamTree,
    frozen: ParamTree,
    sums: ParamTree | None,
    streams: StreamBatch,
    pixels: Array | None,
) -> ParamTree:
    def loss(trained: ParamTree) -> tuple[Array, dict[str, Array]]:
        return _checked(*loss_fn(nnx.merge(graph, trained, frozen), streams, pixels))

    (total, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
    batch = {"gradients": constrain(gradients, layout), "loss": total, **metrics}
    if sums is None:
        return batch
    return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, batch)


def update(
    optimizer: Optimizer, trained: ParamTree, opt_state: Any, sums: ParamTree
) -> tuple[ParamTree, Any, dict[str, Array]]:
    """Take one optimizer step with the mean gradient over all labelled tokens of a step's batches.

    Nothing changes, and no step is counted, if no token has a label, or if the loss or a gradient
    is not finite. Parameters and state are given up (donated).

    Returns: parameters, optimizer state, and float32 scalars: loss and accuracy (NaN without
        labelled tokens), tokens (labelled), gradient_norm, gradient_norm_PART for each trained
        part, learning_rate, finite (bool), and the mean over tokens of each other sum of the loss
        function.
    """
    layout = shardings_of((trained, opt_state))
    return _update(optimizer, layout, trained, opt_state, sums)


def lower_update(optimizer: Optimizer, trained: ParamTree, opt_state: Any, sums: ParamTree) -> Any:
    """Lower `update` for shapes with shardings."""
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
    scale, taken = optimizer.clipping(norm) / tokens, finite & labelled
    if on_cpu():
        trained, opt_state = lax.cond(
            taken,
            optimizer.apply,
            lambda trained, opt_state, *_: (trained, opt_state),
            *(trained, opt_state, gradients, scale),
        )
    else:  # a GPU copies what a branch returns, donated or not
        trained, opt_state = optimizer.apply(trained, opt_state, gradients, scale, taken)
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
        **{name: x / tokens for name, x in sums.items() if name not in _WITHOUT_MEAN},
    }
    return trained, opt_state, metrics


_WITHOUT_MEAN = ("gradients", "loss", *COUNTS)


def fingerprint(*params: ParamTree) -> str:
    """Compute a sha256 of names, dtypes, shapes and bytes of all parameters, ordered by name."""
    flat = {path: leaf for tree in params for path, leaf in flatten_dict(tree).items()}
    digest = hashlib.sha256()
    for path in sorted(flat):
        array = flat[path]
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}\n".encode())
        # Layer by layer: one that is cut over processes is whole on each for a moment.
        for index in range(array.shape[0]) if array.ndim > 2 else [...]:
            digest.update(np.ascontiguousarray(to_host(array[index])).tobytes())
    return digest.hexdigest()
