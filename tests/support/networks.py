"""Small networks and models for tests, and what is computed with them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from vxl_jax.config import VideoXLConfig
from vxl_jax.inference.decode import generate
from vxl_jax.inference.memory import VisualMemory
from vxl_jax.inference.model import Model
from vxl_jax.models.loss import loss_and_metrics
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import tiny
from vxl_jax.stream.batch import StreamBatch, batch_streams
from vxl_jax.stream.plan import Stream, plan_stream
from vxl_jax.text.chat import encode_prompt
from vxl_jax.text.template import IGNORE, IMAGE_TOKEN


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


# Watching and asking.

WINDOW = 4  # frames
MICRO = Path(__file__).parents[1] / "golden" / "micro"


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 56, 56, 3), np.uint8)


def entries(memory: VisualMemory) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values in use."""
    return memory.arrays()


def assert_same(one: VisualMemory, other: VisualMemory) -> None:
    assert one.length == other.length
    assert one.ids.tolist() == other.ids.tolist()
    for ours, theirs in zip(entries(one), entries(other), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)


def fresh(
    model: Model, blocks: list[np.ndarray], question: str, ratio: Any, new: int = 8
) -> list[int]:
    """The answer's ids when all is read again, in one go, by the functions below this interface."""
    ids = encode_prompt("<image>" * len(blocks) + question, model.tokenizer)
    tokens = [model.config.layout.count(len(block)) for block in blocks]
    stream = plan_stream(ids, tokens, window=model.config.window, ratio=ratio)
    pixels = np.concatenate(blocks)[None]
    (answer,) = generate(
        model.network,
        batch_streams([stream]),
        pixels,
        max_new_tokens=new,
        stop_ids=tuple(model.stop_ids),
    )
    return answer
