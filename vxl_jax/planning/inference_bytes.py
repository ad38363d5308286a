"""Will it fit? Bytes of watching and answering, compiled for the model's shapes; nothing allocated.

Weights and memory entries are arithmetic, and exact. Activations are what the compiler of the plan
allocates for the same programs (`vxl_jax.planning.compiler`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.errors import ConfigError
from vxl_jax.models.functions import decode_step, encode, read
from vxl_jax.models.int8 import new_network
from vxl_jax.nn.memory import Memory
from vxl_jax.planning.cards import Card
from vxl_jax.planning.compiler import PlanCompiler
from vxl_jax.stream.batch import StreamShape, batch_streams, round_up
from vxl_jax.stream.plan import plan_stream
from vxl_jax.stream.visual import video_shapes
from vxl_jax.text.template import IMAGE_TOKEN

USABLE = 0.92
"""Share of a card's memory that a program gets: programs here ask for 0.95 of what the driver
leaves."""

TEXT_ROOM = 512
"""Tokens of the text before a film, and room for a question and its answer."""

STEP_TOKENS = 8192
"""Visual tokens that are put into a memory at once on an accelerator."""

OWN_SLOTS = 1024
"""Least capacity of what a question adds behind a memory."""


SEARCHED_FRAMES = 2**24
"""Frames up to which it is looked for what fits."""


def memory_of(card: Card, memory_gb: float | None) -> int:
    """Bytes that a program gets on a card, or `memory_gb` (10^9 bytes) where that is given.

    Raises: ConfigError if that is not a positive number.
    """
    if memory_gb is None:
        return int(card.memory * USABLE)
    if not 0 < memory_gb < math.inf:
        raise ConfigError(f"--memory-gb {memory_gb}: give a positive number")
    return int(memory_gb * 1e9)


@dataclass(frozen=True)
class Estimate:
    """Bytes of a model that watches a film and is asked.

    entries, memory: of the film, with the room that its capacity has. activations: the most that
    is held with weights and memory: temporaries, pixels and features of one step.
    """

    frames: int
    ratio: int | None
    weights: int
    entry: int
    entries: int
    memory: int
    activations: int

    @property
    def peak(self) -> int:
        """Most bytes that stand at once."""
        return self.weights + self.memory + self.activations


@dataclass(frozen=True)
class Programs:
    """Lowered programs by name; `read` and `encode` are of one step of a film.

    waiting: bytes of what stands besides arguments and temporaries. frames, tokens: of a step.
    """

    lowered: dict[str, Any]
    waiting: int
    frames: int
    tokens: int


class Estimator:
    """Compiles the programs of inference for a configuration, as a GPU would run them."""

    def __init__(
        self,
        config: VideoXLConfig,
        weights: str | None = None,
        compiler: PlanCompiler | None = None,
    ):
        """weights: as for `load_network`. compiler: that of a CPU by default."""
        self.config, self.compiler = config, compiler or PlanCompiler()
        self.weights = tree_bytes(nnx.state(nnx.eval_shape(lambda: new_network(config, weights))))
        wide = replace(config, dtype="float32", param_dtype="float32")
        self.compiled_as = config if self.compiler.is_exact else wide
        self.graph, self.params = nnx.split(
            nnx.eval_shape(lambda: new_network(self.compiled_as, weights))
        )
        self.entry = entry_bytes(config)
        self.windows = max(1, STEP_TOKENS // config.window)

    def estimate(self, frames: int, ratio: int | None) -> Estimate:
        """Estimate watching a number of frames at one ratio, and answering."""
        entries = TEXT_ROOM + video_entries(self.config, frames, ratio)
        capacity = round_up(entries, 16)
        return Estimate(
            frames,
            ratio,
            self.weights,
            self.entry,
            entries,
            capacity * self.entry,
            self.activations(capacity, ratio),
        )

    def most_frames(self, like: Estimate, memory: int) -> int:
        """Find how many frames at the ratio of an estimate fit into some bytes. Activations are its
        own, which do not depend on the frames.
        """
        room = (memory - like.weights - like.activations) // self.entry
        low, high = 0, SEARCHED_FRAMES
        while low < high:
            middle = (low + high + 1) // 2
            needed = TEXT_ROOM + video_entries(self.config, middle, like.ratio)
            low, high = (middle, high) if round_up(needed, 16) <= room else (low, middle - 1)
        return low

    def activations(self, capacity: int, ratio: int | None) -> int:
        """Find the most bytes that any program needs with weights and a memory of some capacity."""
        programs = self.programs(capacity, ratio)
        return programs.waiting + max(
            _extra_bytes(self.compiler.compile(lowered)) for lowered in programs.lowered.values()
        )

    def programs(self, capacity: int, ratio: int | None) -> Programs:
        """Lower the programs of watching and answering for a memory of some capacity."""
        c = self.compiled_as
        tokens = self.windows * c.window
        frames = c.layout.frames_of(tokens)
        size = c.tower.image_size
        pixels: Any = jax.ShapeDtypeStruct((1, frames, size, size, 3), np.uint8)
        pixels = video_shapes(c.layout, pixels)
        visual = jax.ShapeDtypeStruct((1, tokens, c.language.width), DTYPES[c.dtype])
        stream = plan_stream([IMAGE_TOKEN], [tokens], window=c.window, ratio=ratio)
        batch = batch_streams([stream], StreamShape.of(stream).padded(8))
        film, step, own = map(self._memory, (capacity, max(1, stream.persistent), OWN_SLOTS))
        token = jax.ShapeDtypeStruct((1,), np.int32)
        sharding = SingleDeviceSharding(self.compiler.devices()[0])

        def placed(*arguments: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
            )

        with self.compiler.tracing():
            lowered = {
                "encode": encode.lower(self.graph, *placed(self.params, pixels)),
                "read": read.lower(self.graph, *placed(self.params, step, batch, visual, (film,))),
                "decode_step": decode_step.lower(
                    self.graph, *placed(self.params, own, token, (film,))
                ),
            }
        # Pixels and features of the next step stand while this one runs, and what the step makes.
        waiting = 2 * tree_bytes((pixels, visual)) + tree_bytes(step)
        return Programs(lowered, waiting, frames, tokens)

    def _memory(self, capacity: int) -> Memory:
        language = self.config.language
        shape = (language.layers, 1, language.kv_heads, capacity, language.head_size)
        part: Any = jax.ShapeDtypeStruct(shape, DTYPES[self.compiled_as.dtype])
        length: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
        return Memory(part, part, length)


def _extra_bytes(compiled: Any) -> int:
    """Count a program's temporaries, and outputs that do not alias its arguments."""
    memory = compiled.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.temp_size_in_bytes + made)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays or shapes of a tree."""
    return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def entry_bytes(config: VideoXLConfig) -> int:
    """Bytes of one entry of a memory: keys and values of all layers."""
    language = config.language
    width = language.kv_heads * language.head_size
    return 2 * language.layers * width * np.dtype(DTYPES[config.dtype]).itemsize


def video_entries(config: VideoXLConfig, frames: int, ratio: int | None) -> int:
    """Entries of a video at one ratio."""
    full, rest = divmod(config.layout.video_count(frames), config.window)
    if ratio is None:
        return full * config.window + rest
    return full * (config.window // ratio) + (rest // min(ratio, rest) if rest else 0)


def estimate_table(estimates: Sequence[Estimate]) -> str:
    """A line for each estimate."""
    head = f"{'frames':>8}{'ratio':>7}{'entries':>11}{'memory':>10}{'activations':>13}{'peak':>10}"
    lines = [
        f"{e.frames:>8,}{e.ratio or '-':>7}{e.entries:>11,}{e.memory / 1e9:>7.2f} GB"
        f"{e.activations / 1e9:>10.2f} GB{e.peak / 1e9:>7.2f} GB"
        for e in estimates
    ]
    return "\n".join([head, *lines])
