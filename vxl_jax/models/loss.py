"""The training loss."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn.sharding import by_sample, sample_shards
from vxl_jax.stream.batch import StreamBatch
from vxl_jax.stream.visual import Pixels
from vxl_jax.text.template import IGNORE
from vxl_jax.typing import AnyArray


def loss_and_metrics(
    model: VideoXL, streams: StreamBatch, pixels: Pixels | None
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Compute the summed next-token cross-entropy in float32, and its metrics.

    Divide by `tokens` for the loss of the published code; with a sum, gradient accumulation gives
    every labelled token the same weight.

    Args:
        model: the network.
        streams: from `batch_streams`.
        pixels: see `Pixels`; None.

    Returns:
        The loss, and int32 counts of `tokens` (labelled) and `correct` (of the highest logit).
    """
    visual = None if pixels is None else model.encode(pixels)
    hidden = model(streams, visual)
    picked = by_sample(jax.vmap(lambda rows, index: rows[index])(hidden, streams.label_index))
    return cross_entropy(model, picked, streams.label)


_Sums = tuple[Array, Array, Array]

LOGITS_BYTES = 2**28
"""Most bytes of logits on a device at once in `cross_entropy`."""


@jax.named_scope("loss")
def cross_entropy(
    model: VideoXL, hidden: Float[Array, "B labels D"], label: Int[AnyArray, "B labels"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Compute the summed cross-entropy of hidden states with labels, as `loss_and_metrics`.

    Logits are computed for a block of labels at a time, and recomputed for gradients.
    """
    label = jnp.asarray(label)
    batch, count = label.shape
    vocabulary = model.config.language.vocab_size
    step = max(1, LOGITS_BYTES // (4 * -(-batch // sample_shards()) * vocabulary))
    graph, params = nnx.split(model)

    def of_some(hidden: Array, label: Array) -> tuple[Array, Array, Array]:
        logits = nnx.merge(graph, params).logits(hidden)
        counted = label != IGNORE
        label = jnp.where(counted, label, 0)
        scores = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
        losses = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - scores, 0.0)
        return losses.sum(), counted.sum(), (counted & (logits.argmax(-1) == label)).sum()

    if step >= count:
        loss, tokens, correct = of_some(hidden, label)
        return loss, {"tokens": tokens, "correct": correct}
    blocks = -(-count // step)
    pad = blocks * step - count
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    label = jnp.pad(label, ((0, 0), (0, pad)), constant_values=IGNORE)

    def add(sums: _Sums, some: tuple[Array, Array]) -> tuple[_Sums, None]:
        return jax.tree.map(jnp.add, sums, jax.checkpoint(of_some)(*some)), None

    first = (rearrange(hidden, "B (K N) D -> K B N D", K=blocks),)
    some = (*first, rearrange(label, "B (K N) -> K B N", K=blocks))
    zero = jnp.zeros((), jnp.int32)
    (loss, tokens, correct), _ = lax.scan(add, (jnp.zeros((), jnp.float32), zero, zero), some)
    return loss, {"tokens": tokens, "correct": correct}
