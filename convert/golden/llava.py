"""LLaVA-Video against golden numbers: from the stages of the tower to losses and gradients."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from convert.golden.compare import (
    Comparison,
    GoldenSet,
    compare_tensor,
    compare_thinned,
    gradient_rows,
)
from vxl_jax.checkpoints.hf_config import NEWLINES, read_config
from vxl_jax.checkpoints.names import to_published
from vxl_jax.config import VideoXLConfig, with_changes
from vxl_jax.errors import CheckpointError
from vxl_jax.inference.decode import generate
from vxl_jax.media.layout import VisualTokens
from vxl_jax.models.loss import loss_and_metrics
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn.vision import VisionTower
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import Stream, plan_stream
from vxl_jax.stream.visual import VisualInput, batch_visual
from vxl_jax.text.template import IMAGE_TOKEN


@dataclass(frozen=True)
class Blocks:
    """Visual blocks of one sample.

    pixels: normalised, [F, S, S, 3]. tokens: of all blocks. counts: visual tokens of each.
    """

    pixels: np.ndarray
    tokens: VisualTokens
    counts: list[int]


def check_llava(model: VideoXL, golden: GoldenSet, checkpoint: Path) -> Iterator[Comparison]:
    """Compare all cases, a row at a time. checkpoint: of the model."""
    for case in golden.named("cases"):
        config = read_config(
            checkpoint, overrides=golden.field(case, "config", dict), **_dtypes(model)
        )
        yield from _check_inference(with_config(model, config), golden, case)
    yield from _check_stages(model, golden)
    for case in golden.named("training"):
        yield from _check_training(model, golden, case)
    yield from golden.unknown()


def check_slowfast(model: VideoXL, golden: GoldenSet) -> Iterator[Comparison]:
    """Compare SlowFast layouts on the projected patches of the same frames."""
    seeds, ids = golden.field(golden.meta, "seeds", dict), []
    for name in ("prefix", "suffix"):
        ids.append(golden.field(golden.meta, name, list))
    for case in golden.named("slowfast"):
        position = golden.field(case, "position", str)
        config = with_changes(
            model.config,
            pool_stride=golden.field(case, "p", int),
            slow_every=golden.field(case, "s", int),
            pool_mode=golden.field(case, "mode", str),
            newline=NEWLINES.get(position, position),
            faster_token=golden.field(case, "faster_token", bool),
        )
        state = nnx.to_pure_dict(nnx.state(model))
        if config.faster_token:
            golden.compared.add("faster_token")
            state["projector"]["faster"] = jnp.asarray(golden.tensors["faster_token"])
        frames = golden.field(case, "frames", int)
        some = {
            "name": case["name"],
            "visuals": [{"kind": "video", "frames": frames}],
            "seed": seeds[str(frames)],
            "input_ids": [*ids[0], IMAGE_TOKEN, *ids[1]],
        }
        yield from _check_inference(with_config(model, config, state), golden, some)
    yield from golden.unknown()


def with_config(model: VideoXL, config: VideoXLConfig, state: Any = None) -> VideoXL:
    """The same parameters under another configuration."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: VideoXL(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, nnx.to_pure_dict(nnx.state(model)) if state is None else state)


def _dtypes(model: VideoXL) -> dict[str, Any]:
    return {"param_dtype": model.config.param_dtype, "dtype": model.config.dtype}


def draw_blocks(config: VideoXLConfig, visuals: Sequence[dict[str, Any]], seed: int) -> Blocks:
    """Draw the pixels of visual blocks, and lay out their tokens.

    Raises: CheckpointError if a block is of no known kind.
    """
    draw, layout, size = np.random.RandomState(seed), config.layout, config.tower.image_size
    pixels, tokens = [], []
    for block in visuals:
        kind = block.get("kind")
        if kind == "video":
            frames = int(block["frames"])
            some = layout.video_tokens(frames)
        elif kind in ("image", "pad"):
            grid = tuple(block["grid"]) if kind == "image" else None
            frames = 1 if grid is None else 1 + grid[0] * grid[1]
            some = layout.image(frames, grid, tuple(block.get("image_size", ()))).tokens()
        else:
            raise CheckpointError(f"a visual block is {block!r}; its kind must be video or image")
        tokens.append((some, frames))
        drawn = draw.randint(-128, 128, (frames, 3, size, size)) / 128
        pixels.append(rearrange(drawn.astype(np.float32), "F C h w -> F h w C"))
    empty = np.zeros((0, size, size, 3), np.float32)
    return Blocks(
        np.concatenate([empty, *pixels]),
        layout.join_blocks(tokens),
        [len(some) for some, _ in tokens],
    )


def _batch(config: VideoXLConfig, samples: Sequence[Blocks]) -> VisualInput | None:
    """Pixels and tokens of some samples; None if none of them has any."""
    most = max(len(blocks.pixels) for blocks in samples)
    if not most:
        return None
    padded = [
        np.pad(blocks.pixels, ((0, most - len(blocks.pixels)), (0, 0), (0, 0), (0, 0)))
        for blocks in samples
    ]
    return batch_visual(config.layout, np.stack(padded), [blocks.tokens for blocks in samples])


def _check_inference(
    model: VideoXL, golden: GoldenSet, case: dict[str, Any]
) -> Iterator[Comparison]:
    name, config = case["name"], model.config
    blocks = draw_blocks(config, case["visuals"], case["seed"])
    visual = _batch(config, [blocks])
    stream = plan_stream(case["input_ids"], blocks.counts, window=config.window, ratio=None)
    features = None
    if visual is not None:
        features = nnx.jit(VideoXL.encode)(model, visual)
        if (expected := golden.take(f"{name}/visual_features")) is not None:
            yield compare_thinned(f"{name}/visual_features", features[0], expected, axis=0)
    if (logits := golden.take(f"{name}/logits")) is not None:
        ours = np.asarray(nnx.jit(_all_logits)(model, batch_streams([stream]), features))[0]
        ours = ours[stream.length - len(logits) : stream.length]
        same = (ours.argmax(-1) == logits.argmax(-1)).mean()
        yield compare_tensor(f"{name}/logits", ours, logits, f"argmax agrees {same:.0%}")
    if (generated := golden.take(f"{name}/generated")) is not None:
        # A window at a time, as a film is watched; the logits above came from all at once.
        streams = batch_streams([stream], windows_per_group=1)
        ids = generate(model, streams, visual, max_new_tokens=len(generated))[0]
        same = np.mean(np.equal(ids, generated))
        yield Comparison(f"{name}/generated", 0.0, f"ids agree {same:.0%}", agrees=same == 1)


def _all_logits(model: VideoXL, streams: Any, visual: jax.Array | None) -> jax.Array:
    return model.logits(model(streams, visual))


def _check_stages(model: VideoXL, golden: GoldenSet) -> Iterator[Comparison]:
    """Compare the first frame of the first case, step by step."""
    first = golden.named("cases")[0]
    if not any(name.startswith("stages/") for name in golden.tensors):
        return
    config, tower = model.config, model.vision
    assert isinstance(tower, VisionTower)
    frame = draw_blocks(config, first["visuals"], first["seed"]).pixels[:1]
    x = tower.embed(jnp.asarray(frame))
    stages = {"embeddings": x}
    graph, params = nnx.split(tower.layers)
    for i in range(config.tower.layers_used):
        layer = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], params))
        x = layer(x, x.shape[1])
        stages[f"tower_layer{i}"] = x
    stages["projector"] = model.projector(x)
    for mode in ("bilinear", "average", "max"):
        changed = with_changes(config, pool_mode=mode, newline="none")
        tokens = batch_visual(changed.layout, frame[None], [changed.layout.video_tokens(1)])
        pooled = with_config(model, changed).projector.merge(stages["projector"], tokens)
        stages[f"pool_{mode}"] = pooled
    for name, ours in stages.items():
        if (expected := golden.take(f"stages/{name}")) is not None:
            yield compare_tensor(f"stages/{name}", ours[0], expected)


def _check_training(
    model: VideoXL, golden: GoldenSet, case: dict[str, Any]
) -> Iterator[Comparison]:
    name, config = case["name"], model.config
    samples = golden.field(case, "samples", list)
    seeds = range(case["seed"], case["seed"] + len(samples))
    blocks = [draw_blocks(config, s["visuals"], n) for s, n in zip(samples, seeds, strict=True)]
    longest = golden.field(case, "config", dict).get("tokenizer_model_max_length")
    streams = batch_streams(
        [_plan(config, s, b, longest) for s, b in zip(samples, blocks, strict=True)]
    )
    visual = _batch(config, blocks)
    graph, params = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradients(params: Any) -> jax.Array:
        total, metrics = loss_and_metrics(nnx.merge(graph, params), streams, visual)
        return total / metrics["tokens"]

    loss, gradients = loss_and_gradients(params)
    labelled = int((np.asarray(streams.label) >= 0).sum())
    note = f"{labelled} labels, golden {case['labelled']}"
    yield Comparison(f"{name}/labelled", 0.0, note, agrees=labelled == case["labelled"])
    if (expected := golden.take(f"{name}/loss")) is not None:
        yield compare_tensor(f"{name}/loss", np.reshape(loss, -1), np.reshape(expected, -1))
    yield from gradient_rows(golden, case, to_published(nnx.to_pure_dict(gradients), config))


def _plan(
    config: VideoXLConfig, sample: dict[str, Any], blocks: Blocks, longest: int | None
) -> Stream:
    """The stream of a training sample; text after `longest` tokens is cut off, as published."""
    ids, labels = sample["input_ids"], sample["labels"]
    if longest is not None:
        kept = longest - sum(blocks.counts) + len(blocks.counts)
        ids, labels = ids[:kept], labels[:kept]
    return plan_stream(ids, blocks.counts, window=config.window, ratio=None, labels=labels)
