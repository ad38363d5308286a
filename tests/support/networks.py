"""Small networks for tests, and what is computed with them."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from vxl_jax.config import VideoXLConfig
from vxl_jax.models.loss import loss_and_metrics
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import tiny
from vxl_jax.stream.batch import StreamBatch
from vxl_jax.stream.plan import Stream, plan_stream
from vxl_jax.text.chat import IGNORE, IMAGE_TOKEN


def noisy_model(config: VideoXLConfig | None = None) -> VideoXL:
    """A random model, by default tiny, with random biases, norms and beacon parameters too, so that
    a swap of any two shows.
    """
    config = config or tiny()
    graph, state = nnx.split(nnx.jit(lambda: VideoXL(config, rngs=nnx.Rngs(0)))())
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
    rng = np.random.default_rng(1)
    noisy = [x + (0.2 * rng.normal(size=x.shape)).astype(x.dtype) for x in leaves]
    return nnx.merge(graph, jax.tree.unflatten(tree, noisy))


def graph_of(**changes: Any) -> Any:
    """Graph of a tiny model, to be merged with parameters; nothing is computed."""
    return nnx.graphdef(nnx.eval_shape(lambda: VideoXL(tiny(**changes), rngs=nnx.Rngs(0))))


def training_sample(model: VideoXL, frames: int = 10, seed: int = 0) -> tuple[Stream, np.ndarray]:
    """A stream with two labels around one video, and the video's pixels."""
    rng = np.random.default_rng(seed)
    labels = [IGNORE, IGNORE, IGNORE, 4, 5]
    stream = plan_stream(
        [1, 2, IMAGE_TOKEN, 4, 5],
        [model.config.layout.count(frames)],
        window=model.config.window,
        ratio=[2, 8, 4],
        labels=labels,
    )
    size = model.config.vision.image_size
    return stream, rng.integers(0, 256, (1, frames, size, size, 3), np.uint8)


def gradients(model: VideoXL, streams: StreamBatch, pixels: np.ndarray) -> tuple[float, Any]:
    """Mean loss of the labels and its gradient in all parameters."""
    graph, params = nnx.split(model)

    def loss(params: Any) -> Any:
        total, metrics = loss_and_metrics(nnx.merge(graph, params), streams, pixels)
        return total / metrics["tokens"]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), nnx.to_pure_dict(grads)


def relative_error(ours: Any, expected: Any) -> float:
    """Norm of the difference over that of what was expected, in float64."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))
