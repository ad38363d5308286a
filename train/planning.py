"""Will it fit? A step's bytes and operations, compiled for its mesh; nothing is allocated.

    python -m train.finetune --config finetune_video --plan --card h100

Works without a GPU, also for several: the mesh is made of virtual CPU devices. Parameters,
gradients and optimizer state are arithmetic, and exact. Activations are what XLA's CPU compiler
allocates for the same program: about what a GPU needs, as a rule more, since a CPU multiplies
bfloat16 in float32.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config import TrainConfig
from train.optimizer import Optimizer
from train.progress import progress_bar
from train.setup import abstract_state, init_opt_state, read_model_config
from train.step import add_batch_program, sums_like, update_program
from vxl_jax import attention
from vxl_jax.cards import CARDS, Card, card_of
from vxl_jax.chat import IMAGE_TOKEN
from vxl_jax.config import PRESETS, ConfigError, VideoXLConfig
from vxl_jax.flops import Work, step_flops
from vxl_jax.model import GROUP_FIELDS
from vxl_jax.sharding import SAMPLES, make_mesh, param_placement
from vxl_jax.stream import IGNORE, StreamBatch, StreamShape, batch_streams, plan_stream

TEXT, LABELS = 512, 256
"""Tokens of text in a planned sample, and how many of them carry loss."""

USABLE = 0.92
"""Share of a card's memory that a program gets (with XLA_CLIENT_MEM_FRACTION=0.95)."""

EFFICIENCY = 0.4
"""Share of a card's peak that a step is expected to reach."""

# A CPU multiplies bfloat16 matrices in float32. Moved out of the loop over layers, that would be a
# float32 copy of all layers, which no accelerator makes.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


@dataclass(frozen=True)
class StepPlan:
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


class Planner:
    """Compiles the steps of a configuration for a mesh of virtual devices."""

    def __init__(self, config: TrainConfig, mesh: Mesh, model_config: VideoXLConfig):
        self.config, self.mesh, self.model = config, mesh, model_config
        placement = param_placement(mesh, model_config)
        self.graph, self.trained, self.frozen = abstract_state(config, model_config, placement)
        self.optimizer = Optimizer(config.optim, steps=1000, seed=0)
        self.opt_state = init_opt_state(self.optimizer, self.trained, placement)
        self._update: int | None = None

    def step(self, frames: int) -> StepPlan:
        """Plan a step whose samples all have so many frames, and `TEXT` tokens."""
        config = self.config
        streams, pixels = self._batch(frames)
        work = Work.of(streams, frames * len(streams.last))
        with jax.set_mesh(self.mesh):
            placed, placed_pixels = self._place(streams), pixels and self._on_devices(pixels, 0)
            sums = sums_like(self.trained) if config.optim.accumulate > 1 else None
            program = add_batch_program(
                self.graph, self.trained, self.frozen, sums, placed, placed_pixels
            )
            memory = program.compile(compiler_options=COMPILER_OPTIONS).memory_analysis()
            sums = sums_like(self.trained, None if sums is None else jnp.float32)
        flops = step_flops(
            self.model, work, config.optim.train, _count(self.trained, "lora_")
        ).total
        return StepPlan(
            frames=frames,
            tokens=int(streams.kind.shape[2]),
            samples=len(streams.last),
            trained=bytes_of(self.trained),
            frozen=bytes_of(self.frozen),
            gradients=bytes_of(sums["gradients"]),
            optimizer=bytes_of(self.opt_state),
            batch=bytes_of((placed, placed_pixels)),
            activations=memory.temp_size_in_bytes,
            update=self.update_bytes(sums),
            flops=flops * config.optim.accumulate,
        )
'''
'''
