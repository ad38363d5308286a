"""Video-XL against golden numbers: visual features, logits, memories, ids, losses and gradients.

`docs/parity.md` describes the sets.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from convert.golden.compare import (
    Comparison,
    GoldenSet,
    compare_tensor,
    compare_thinned,
    gradient_rows,
)
from vxl_jax.checkpoints.names import to_published
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import CheckpointError
from vxl_jax.inference.decode import generate
from vxl_jax.models.functions import prefill
from vxl_jax.models.loss import loss_and_metrics
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn.rope import rope_angles, rotate
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import BEACON, Stream, plan_stream
from vxl_jax.text.template import IMAGE_TOKEN

GOLDEN_AXES = {
    "visual_features": 2,
    "logits": 2,
    "memory_len": 1,
    "beacon_keys_layer0": 3,
    "beacon_values_last": 3,
    "generated": 1,
}
"""Axes of the tensors of a case."""


class Golden(GoldenSet):
    """A golden set of Video-XL: cases, inputs and expected tensors."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.cases = self.named("cases")

    @cached_property
    def drawn_frames(self) -> np.ndarray:
        """Frames made from the stated seed, [F, 3, S, S] float32; earlier draws are checked."""
        frames = self.field(self.meta, "frames", dict)
        seed, count, size = (self.field(frames, name, int) for name in ("seed", "n", "size"))
        draw = np.random.RandomState(seed)
        highest = self.vocabulary - 12
        for name in ("prefix", "suffix"):
            ids = self.field(self.meta, name, list)
            if draw.randint(0, highest, len(ids)).tolist() != ids:
                raise CheckpointError(f"{self.directory}: the seed does not give the stated {name}")
        return (draw.randint(-128, 128, (count, 3, size, size)) / 64).astype(np.float32)

    vocabulary = 0  # set from the model's configuration before drawn_frames is read

    def pixels(self, case: dict[str, Any], size: int) -> np.ndarray:
        """Normalised pixel values of a case, [1, F, S, S, 3], without an image's squashed copy.

        size: of the model's frames. Raises: CheckpointError if those of the set differ.
        """
        name = f"input/{case['frames']}" if "frames" in case else "frames"
        frames = self.tensors.get(name) if "frames" in case else self.drawn_frames
        shape = None if frames is None else frames.shape
        if frames is None or frames.ndim != 4 or frames.shape[1:] != (3, size, size):
            raise CheckpointError(
                f"{self.directory}: tensor {name} of case {case['name']!r} has shape {shape}; the "
                f"model needs (frames, 3, {size}, {size})"
            )
        if case.get("modality") == "image":
            frames = frames[1:]
        return np.ascontiguousarray(frames.transpose(0, 2, 3, 1))[None]

    def plan(
        self, case: dict[str, Any], suffix: str, frames: int, config: VideoXLConfig, **options: Any
    ) -> Stream:
        """The stream of a case.

        Raises: CheckpointError if its fields give none.
        """
        ids = [self.field(self.meta, name, list) for name in ("prefix", suffix)]
        try:
            return plan_stream(
                [*ids[0], IMAGE_TOKEN, *ids[1]],
                [config.layout.count(frames)],
                window=config.window,
                **options,
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: case {case['name']!r} cannot be planned ({error})"
            ) from error

    def expected(self, case: dict[str, Any], name: str) -> np.ndarray | None:
        """A tensor of the case, or None where the set does not hold it.

        Raises: CheckpointError if it has another number of axes.
        """
        full = f"{case['name']}/{name}"
        self.compared.add(full)
        tensor = self.tensors.get(full)
        if tensor is not None and tensor.ndim != GOLDEN_AXES.get(name, tensor.ndim):
            raise CheckpointError(
                f"{self.directory}: tensor {full} has shape {tensor.shape}; it must have "
                f"{GOLDEN_AXES[name]} axes"
            )
        return tensor


def check(model: VideoXL, golden: Golden) -> Iterator[Comparison]:
    """Compare all cases, a row at a time."""
    golden.vocabulary = model.config.language.vocab_size
    for case in golden.cases:
        checker = _check_training if "window_ratios" in case else _check_inference
        found = False
        for row in checker(model, golden, case):
            found = True
            yield row
        if not found:
            yield Comparison(case["name"], np.inf, "the set holds no tensor of this case")
    yield from golden.unknown()


def _check_inference(model: VideoXL, golden: Golden, case: dict[str, Any]) -> Iterator[Comparison]:
    name, pixels = case["name"], golden.pixels(case, model.config.tower.image_size)
    suffix = "long_suffix" if case.get("suffix") == "long" else "suffix"
    ratio = golden.field(case, "ratio", int)
    stream = golden.plan(case, suffix, pixels.shape[1], model.config, ratio=ratio)

    visual = nnx.jit(VideoXL.encode)(model, pixels)
    if (features := golden.expected(case, "visual_features")) is not None:
        yield compare_thinned(f"{name}/visual_features", visual[0], features, axis=0)

    if (logits := golden.expected(case, "logits")) is not None:
        ours = np.asarray(nnx.jit(_all_logits)(model, batch_streams([stream]), visual))[0]
        ours = ours[stream.length - len(logits) : stream.length]
        same = (ours.argmax(-1) == logits.argmax(-1)).mean()
        yield compare_tensor(f"{name}/logits", ours, logits, f"argmax agrees {same:.0%}")

    # A window at a time, as a film is watched; the logits above came from all windows at once.
    streams = batch_streams([stream], windows_per_group=1)
    _, memory = prefill(*nnx.split(model), streams, pixels, streams.memory)
    if (length := golden.expected(case, "memory_len")) is not None:
        ours_length = int(memory.length[0]) - len(golden.meta[suffix])
        note = f"{ours_length}, golden {int(length[0])}"
        yield Comparison(f"{name}/memory_len", 0.0, note, agrees=ours_length == int(length[0]))
    yield from _check_beacons(model, golden, case, stream, memory)

    if (generated := golden.expected(case, "generated")) is not None:
        ours_ids = generate(model, streams, pixels, max_new_tokens=len(generated))[0]
        same = np.mean(np.equal(ours_ids, generated))
        yield Comparison(f"{name}/generated", 0.0, f"ids agree {same:.0%}", agrees=same == 1)


def _all_logits(model: VideoXL, streams: Any, visual: jax.Array) -> jax.Array:
    return model.logits(model(streams, visual))


def _check_beacons(
    model: VideoXL, golden: Golden, case: dict[str, Any], stream: Stream, memory: Any
) -> Iterator[Comparison]:
    """Beacon keys of layer 0 (before RoPE) and values of the last layer, read from the memory."""
    language = model.config.language
    slots = stream.rank[stream.kind == BEACON]
    if (keys := golden.expected(case, "beacon_keys_layer0")) is not None:
        angles = rope_angles(slots, language.head_size, language.rope_theta)
        cos, sin = (x[:, 0] for x in angles)
        ours = np.asarray(rotate(memory.keys[0, 0][:, slots], (cos, -sin)))
        yield compare_thinned(f"{case['name']}/beacon_keys_layer0", ours, keys, axis=1)
    if (values := golden.expected(case, "beacon_values_last")) is not None:
        ours = np.asarray(memory.values[-1, 0][:, slots])
        yield compare_thinned(f"{case['name']}/beacon_values_last", ours, values, axis=1)


def _check_training(model: VideoXL, golden: Golden, case: dict[str, Any]) -> Iterator[Comparison]:
    name, pixels = case["name"], golden.pixels(case, model.config.tower.image_size)
    ratios, labels = (golden.field(case, name, list) for name in ("window_ratios", "labels"))
    stream = golden.plan(case, "suffix", pixels.shape[1], model.config, ratio=ratios, labels=labels)
    graph, params = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradients(params: Any) -> jax.Array:
        total, metrics = loss_and_metrics(nnx.merge(graph, params), batch_streams([stream]), pixels)
        return total / metrics["tokens"]

    loss, gradients = loss_and_gradients(params)
    if (expected := golden.expected(case, "loss")) is not None:
        yield compare_tensor(f"{name}/loss", np.reshape(loss, -1), np.reshape(expected, -1))
    ours = to_published(nnx.to_pure_dict(gradients), model.config)
    yield from gradient_rows(golden, case, ours)
