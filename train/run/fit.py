"""Will it fit? A step's bytes and operations, compiled for its mesh; nothing is allocated.

    python -m train.finetune --config finetune_video --plan --card h100

Works without a GPU, also for several. Parameters, gradients and optimizer state are arithmetic, and
exact. Activations are what the compiler of the plan allocates for the same program
(`vxl_jax.planning.compiler`); XLA's CPU compiler, on a mesh of virtual devices, as a rule needs
more than a GPU, since it multiplies bfloat16 in float32.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config import TrainConfig
from train.data.epochs import places_of
from train.data.loader import Batch
from train.run.distributed import check_batch_size
from train.run.optimizer import Optimizer
from train.run.setup import abstract_state, count_flops, init_opt_state, read_model_config
from train.run.step import lower_add_batch, lower_update
from vxl_jax.config import VideoXLConfig
from vxl_jax.nn.groups import map_by_sample
from vxl_jax.nn.sharding import make_mesh, param_placement, sample_shards, sample_spec
from vxl_jax.planning.cards import Card, find_card
from vxl_jax.planning.compiler import PlanCompiler, compiler_for
from vxl_jax.planning.inference_bytes import memory_of
from vxl_jax.presets import PRESETS
from vxl_jax.progress import progress_bar
from vxl_jax.stream.batch import StreamBatch, StreamShape, batch_streams
from vxl_jax.stream.plan import Stream, plan_stream
from vxl_jax.stream.visual import video_shapes
from vxl_jax.text.template import IGNORE, IMAGE_TOKEN

SAMPLE_TEXT, SAMPLE_LABELS = 512, 256
"""Tokens of text in a planned sample, and how many of them carry loss."""

EFFICIENCY = 0.4
"""Share of a card's peak that a step is expected to reach."""


@dataclass(frozen=True)
class StepEstimate:
    """One training step. Bytes are those of one device, `flops` of all together.

    frames, tokens: of one sample. samples: in one batch, of all devices. update: temporaries of the
    optimizer, which stand when the activations are gone.
    """

    frames: int
    tokens: int
    samples: int
    trained: int
    frozen: int
    gradients: int
    optimizer: int
    batch: int
    activations: int
    update: int
    flops: int

    @property
    def peak(self) -> int:
        """Most bytes that stand at once."""
        rest = self.trained + self.frozen + self.gradients + self.optimizer
        return rest + max(self.batch + self.activations, self.update)


class PlannedBatch(NamedTuple):
    """Streams on the host, shapes of the arrays on the devices, samples, and tokens of each."""

    streams: StreamBatch
    placed: tuple[Any, Any]
    samples: int
    tokens: int


class StepEstimator:
    """Compiles the steps of a configuration for a mesh, as a GPU would run them."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: VideoXLConfig,
        mesh: Mesh,
        compiler: PlanCompiler | None = None,
    ):
        """compiler: that of a CPU by default; the mesh is of its devices."""
        self.config, self.model, self.mesh = config, model_config, mesh
        self.compiler = compiler or PlanCompiler()
        placement = param_placement(mesh, model_config)
        self.graph, self.trained, self.frozen = abstract_state(config, model_config, placement)
        self.optimizer = Optimizer(config.optim, steps=1000, seed=0)
        self.opt_state = init_opt_state(self.optimizer, self.trained, placement)
        dtype = jnp.float32 if config.optim.accumulate > 1 else None
        zero = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        gradients = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding),
            self.trained,
        )
        self.sums = {"gradients": gradients, "loss": zero, "tokens": zero, "correct": zero}

    @cached_property
    def update_bytes(self) -> int:
        """Bytes of the optimizer's temporaries."""
        return self._temporaries(self.lowered_update())

    def lowered_update(self) -> Any:
        """Lower the optimizer's update."""
        with self.compiler.tracing():
            return lower_update(self.optimizer, self.trained, self.opt_state, self.sums)

    def step(self, frames: int) -> StepEstimate:
        """A step whose samples have a number of frames each, and `SAMPLE_TEXT` tokens of text."""
        config = self.config
        planned = self.batch(frames)
        flops = count_flops(config, self.model, self.trained)(
            Batch(planned.streams, None, [], frames * planned.samples, 0, 0)
        )
        return StepEstimate(
            frames=frames,
            tokens=planned.tokens,
            samples=planned.samples,
            trained=device_bytes(self.trained),
            frozen=device_bytes(self.frozen),
            gradients=device_bytes(self.sums["gradients"]),
            optimizer=device_bytes(self.opt_state),
            batch=device_bytes(planned.placed),
            activations=self._temporaries(self.lowered_batch(planned)),
            update=self.update_bytes,
            flops=flops * config.optim.accumulate,
        )

    def batch(self, frames: int) -> PlannedBatch:
        """Make the shapes of a batch whose samples have one video of a number of frames."""
        stream = self.stream(frames)
        samples = self.samples(stream)
        shards = sample_shards(self.mesh)
        places = -(-samples // shards) * shards
        batch = batch_streams(
            [stream] * samples + [None] * (places - samples), StreamShape.of(stream)
        )
        size = self.model.tower.image_size

        def struct(x: Any, axis: int) -> Any:
            sharding = NamedSharding(self.mesh, sample_spec(axis))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        visual: Any = None
        if frames:
            visual = jax.ShapeDtypeStruct((places, frames, size, size, 3), np.uint8)
            visual = video_shapes(self.model.layout, visual)
        placed = map_by_sample(struct, batch), jax.tree.map(lambda x: struct(x, 0), visual)
        return PlannedBatch(batch, placed, samples, stream.length)

    def lowered_batch(self, planned: PlannedBatch) -> Any:
        """Lower the gradient of one batch."""
        sums = self.sums if self.config.optim.accumulate > 1 else None
        with jax.set_mesh(self.mesh), self.compiler.tracing():
            return lower_add_batch(self.graph, self.trained, self.frozen, sums, *planned.placed)

    def stream(self, frames: int) -> Stream:
        """A sample with one video, under the ratio that leaves most beacons."""
        ids = np.full(SAMPLE_TEXT + 1, 1, np.int32)
        ids[0] = IMAGE_TOKEN
        labels = np.where(np.arange(len(ids)) > SAMPLE_TEXT - SAMPLE_LABELS, ids, IGNORE)
        ids, labels = (ids, labels) if frames else (ids[1:], labels[1:])
        visual = [self.model.layout.video_count(frames)] if frames else []
        ratio = min(self.model.ratios, default=None)
        return plan_stream(ids, visual, window=self.model.window, ratio=ratio, labels=labels)

    def samples(self, stream: Stream) -> int:
        """How many such samples share a batch, on all devices."""
        return places_of(stream.length, self.config.data, self.config.data.batch_size)

    def _temporaries(self, lowered: Any) -> int:
        """Compile a program; return the bytes of its temporaries on one device."""
        return int(self.compiler.compile(lowered).memory_analysis().temp_size_in_bytes)


def device_bytes(tree: Any) -> int:
    """Bytes of shapes with shardings on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def longest(planner: StepEstimator, one: StepEstimate, memory: int) -> StepEstimate | None:
    """The longest sample whose step fits, to a few per cent, compiled; None if not even one frame
    does.

    Bytes grow with frames, in proportion where activations are what counts: each new step is drawn
    from the line through a step that fits and one that does not.
    """
    fits = one if one.peak <= memory else planner.step(1)
    if fits.peak > memory:
        return None
    if fits.frames >= LONGEST_FRAMES:
        return fits
    fails = one if fits is not one else planner.step(min(LONGEST_FRAMES, 2 * one.frames))
    for _ in range(4):
        slope = (fails.peak - fits.peak) / (fails.frames - fits.frames)
        frames = int(fits.frames + 0.99 * (memory - fits.peak) / max(slope, 1.0))
        frames = min(frames, LONGEST_FRAMES)
        if frames <= fits.frames * 1.02:
            break
        found = planner.step(frames)
        if found.peak <= memory:
            fits = found
        else:
            fails = found
    return fits


LONGEST_FRAMES = 16384
"""Frames up to which the longest sample is looked for."""


def print_training_plan(config: TrainConfig, card_name: str, memory_gb: float | None) -> None:
    """Compile the steps of a configuration and print what they need on a card.

    memory_gb: of a device, in GB (10^9 bytes); that of the card if None.

    Raises: ConfigError if there is no such card, or `memory_gb` is not a positive number.
    """
    card = find_card(card_name)
    data, fsdp, tensor = config.mesh.data or 1, config.mesh.fsdp, config.mesh.tensor
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", data * fsdp * tensor)
    compiler = compiler_for(card)
    mesh = make_mesh(data, fsdp, tensor, devices=compiler.devices(data * fsdp * tensor))
    check_batch_size(config.data.batch_size, sample_shards(mesh))
    model, sizes = planned_model(config)
    memory = memory_of(card, memory_gb)
    with progress_bar(total=5, desc="compiling", unit="program") as progress:
        planner = StepEstimator(config, model, mesh, compiler)
        progress.update()
        step = planner.step(config.data.max_frames)
        progress.update()
        most = longest(planner, step, memory)
        progress.update(3)
    print(f"sizes: {sizes}; trains {', '.join(config.optim.train)} with {config.optim.optimizer}")
    print(f"mesh: data {data} x fsdp {fsdp} x tensor {tensor}, one {card.name} each")
    print(f"compiled by {compiler.name}\n")
    print(_table(step, memory))
    print(_longest(most, config, memory))
    print(_speed(step, card, mesh.size))


def planned_model(config: TrainConfig) -> tuple[VideoXLConfig, str]:
    """Sizes of the checkpoint, or of the preset where it is not on this machine; and their name."""
    checkpoint = config.model.checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        sizes = f"preset {config.model.preset} ({checkpoint} is not here)"
        return PRESETS[config.model.preset](**config.model.changes()), sizes
    return read_model_config(config), checkpoint or f"preset {config.model.preset}"


def _table(step: StepEstimate, memory: int) -> str:
    rows = [
        ("parameters, trained", step.trained),
        ("parameters, frozen", step.frozen),
        ("gradients", step.gradients),
        ("optimizer state", step.optimizer),
        ("batch", step.batch),
        ("activations (compiled)", step.activations),
        ("or update, after them (compiled)", step.update),
        ("peak", step.peak),
        ("of", memory),
    ]
    head = (
        f"a batch of {step.samples} sample(s) of {step.frames:,} frames and {SAMPLE_TEXT} tokens "
        f"of text, {step.tokens:,} tokens each"
    )
    lines = [f"{name:36}{size / 1e9:>8.2f} GB a device" for name, size in rows]
    verdict = "it fits" if step.peak <= memory else "IT DOES NOT FIT"
    return "\n".join([head, *lines, verdict])


def _longest(most: StepEstimate | None, config: TrainConfig, memory: int) -> str:
    if most is None:
        return f"longest sample: none fits in {memory / 1e9:.1f} GB"
    limit = config.data.max_length
    note = f"; data.max_length {limit:,} would skip it" if most.tokens > limit else ""
    more = " or more" if most.frames >= LONGEST_FRAMES else ""
    return (
        f"longest sample: {most.frames:,} frames{more}, {most.tokens:,} tokens "
        f"({most.peak / 1e9:.2f} GB, compiled){note}"
    )


def _speed(step: StepEstimate, card: Card, devices: int) -> str:
    seconds = step.flops / (devices * card.flops * EFFICIENCY)
    return (
        f"a step: {step.flops / 1e15:.3f} PFLOP without recomputation; at {EFFICIENCY:.0%} of "
        f"{card.flops / 1e12:.0f} TFLOP/s on {devices} device(s): {seconds:.2f} s, "
        f"{1 / seconds:.3f} steps/s"
    )
