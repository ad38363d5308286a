"""Models with low-rank updates."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from vxl_jax.config import LoRAConfig, LoRATarget, VideoXLConfig
from vxl_jax.models.functions import decode_step, prefill
from vxl_jax.models.lora import LORA_NAMES, add_lora
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import tiny
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import Stream, plan_stream
from vxl_jax.text.template import IGNORE, IMAGE_TOKEN

TARGETS: tuple[LoRATarget, ...] = get_args(LoRATarget)


ALL = LoRAConfig(rank=4, alpha=6.0, targets=TARGETS)


Arrays = dict[tuple[str, ...], Any]


def arrays_of(model: VideoXL) -> Arrays:
    """All parameters by path, on the host."""
    flat = flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    return {path: np.array(value) for path, value in flat.items()}


def with_arrays(model: VideoXL, arrays: Arrays) -> VideoXL:
    """The model with other parameters."""
    arrays = jax.tree.map(jnp.asarray, unflatten_dict(arrays))
    return nnx.merge(nnx.graphdef(model), arrays)


def noisy(arrays: Arrays, names: Sequence[str] | None = None) -> Arrays:
    """Noise added to all parameters, or to those of some names."""
    rng = np.random.default_rng(1)
    noise = {path: rng.normal(scale=0.2, size=x.shape) for path, x in arrays.items()}
    return {
        path: (x + noise[path]).astype(x.dtype) if names is None or path[-1] in names else x
        for path, x in arrays.items()
    }


@cache
def new_model(config: VideoXLConfig) -> tuple[Any, Any]:
    """Graph and parameters of a random model."""
    return nnx.split(nnx.jit(lambda: VideoXL(config, rngs=nnx.Rngs(0)))())


def plain_model(**changes: Any) -> VideoXL:
    """A small model in which no two linears and no two layers are alike."""
    model = nnx.merge(*new_model(tiny(remat="none", **changes)))
    return with_arrays(model, noisy(arrays_of(model)))


def lora_model(config: LoRAConfig = ALL, seed: int = 0, **changes: Any) -> VideoXL:
    """The same model with updates that have not been trained."""
    model = plain_model(**changes)
    add_lora(model, config, seed)
    return model


def trained_model(config: LoRAConfig = ALL, **changes: Any) -> VideoXL:
    """The same model with updates that change it."""
    model = lora_model(config, **changes)
    return with_arrays(model, noisy(arrays_of(model), LORA_NAMES))


@partial(jax.jit, static_argnums=0)
def training_form(graph: Any, params: Any, streams: Any, pixels: Any) -> Any:
    """Logits of all tokens."""
    model = nnx.merge(graph, params)
    return model.logits(model(streams, model.encode(pixels)))


def watched(config: VideoXLConfig) -> tuple[Stream, np.ndarray]:
    """A video with beacons of all ratios, and text after it that has labels."""
    ids, tokens = [1, 2, 3, IMAGE_TOKEN, 4, 5], config.layout.count(10)
    labels = [IGNORE] * 4 + [4, 5]
    stream = plan_stream(ids, [tokens], window=config.window, ratio=[2, 8, 4], labels=labels)
    shape = (1, 10, config.vision.image_size, config.vision.image_size, 3)
    return stream, np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def outputs(model: VideoXL) -> list[np.ndarray]:
    """Logits: in the form for training; then after the prompt watched a window at a time, and after
    two more tokens.
    """
    stream, pixels = watched(model.config)
    graph, params = nnx.split(model)
    found = [training_form(graph, params, batch_streams([stream]), pixels)]
    streams = batch_streams([stream], windows_per_group=1)
    logits, memory = prefill(graph, params, streams, pixels, 64)
    found.append(logits)
    for token in (7, 8):
        logits, memory = decode_step(graph, params, memory, jnp.array([token], jnp.int32))
        found.append(logits)
    return [np.asarray(logits) for logits in found]
