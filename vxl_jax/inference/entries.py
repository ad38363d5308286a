"""Entries of a memory on the device: appended to, read by any number of threads, never lost.

A step never writes into the entries that it reads. It puts its own into a small memory behind them
(`Continuation`), and what succeeded is appended afterwards (`Entries.append`), a copy in place that
allocates next to nothing. A step that fails, for want of device memory for example, costs what it
was reading and nothing else. One contiguous buffer, and not a list of segments, is what a fused
attention kernel reads best.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial, reduce
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vxl_jax.errors import VisualMemoryError
from vxl_jax.inference.decode import ScoredTokens, decode, decode_scored
from vxl_jax.inference.runtime import Runtime
from vxl_jax.inference.sampling import Sampling
from vxl_jax.interrupts import held_interrupts
from vxl_jax.models.functions import decode_step, read
from vxl_jax.nn.memory import Memory, empty_memory
from vxl_jax.planning.cards import DEVICE_ERRORS, is_out_of_memory
from vxl_jax.planning.inference_bytes import OWN_SLOTS, entry_bytes
from vxl_jax.stream.batch import StreamShape, batch_streams, round_up
from vxl_jax.stream.plan import Stream, plan_stream

Tokens = TypeVar("Tokens", np.ndarray, ScoredTokens)

APPEND_SLOTS = 128
"""Entries that are copied at once by `Entries.append`, which bounds its temporaries."""

OWN_SLOTS_OF_MANY, TEXT_STEP = 128, 64
"""Least capacity of a continuation of several samples (`OWN_SLOTS` for one), and the step to which
text is padded: questions of other lengths use programs that are compiled already."""


@contextmanager
def device_memory(step: str) -> Iterator[None]:
    """Turn an allocation failure of the device into VisualMemoryError; `step` is what failed."""
    try:
        yield
    except DEVICE_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        raise VisualMemoryError(
            f"out of device memory {step}; use fewer frames, a higher ratio, or int8 weights"
        ) from error


class Entries:
    """A buffer of entries on the device, shared by threads: their owners know how many count.

    Entries that an owner has published never change: `append` is called with a place behind them,
    so a reader that has noted a length sees the same entries after every append. The buffer is
    replaced under `lock`, and each program that reads it is dispatched under `lock` (`reading`): a
    thread whose program is being compiled keeps the others waiting for that long.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.lock = threading.RLock()
        self._memory: Memory | None = None  # of NumPy arrays where the device had no room

    @property
    def capacity(self) -> int:
        """Entries that have room."""
        return 0 if self._memory is None else self._memory.capacity

    @contextmanager
    def reading(self, length: int) -> Iterator[Memory]:
        """The first `length` entries, for programs that are dispatched inside the block.

        Raises: VisualMemoryError if the device has no room for them, or has failed while it was
            appending.
        """
        with self.lock:
            if self._memory is None:
                self.reserve(1)
            assert self._memory is not None
            if isinstance(self._memory.keys, np.ndarray):
                with device_memory("bringing a memory back to the device"):
                    self._memory = self._from_host(self._memory, self.capacity)
            if self._memory.keys.is_deleted():
                raise VisualMemoryError(
                    "the device failed while it was extending this memory, whose entries are lost; "
                    "watch again, or load a saved memory"
                )
            yield replace(self._memory, length=jnp.full((1,), length, jnp.int32))

    def copied(self) -> "Entries":
        """Copy all entries into a new buffer.

        Raises: VisualMemoryError if the device has no room for both.
        """
        copy = Entries(self.runtime)
        with device_memory("copying a memory"), self.reading(self.capacity) as memory:
            copy._memory = jax.block_until_ready(jax.tree.map(jnp.copy, memory))
        return copy

    def arrays(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the first keys and values on the host, [L, K, length, H]."""
        layers = []
        for layer in range(self.runtime.config.language.layers):
            with self.reading(length) as memory:
                cut = [x[layer, 0, :, :length] for x in (memory.keys, memory.values)]
            layers.append([np.asarray(x) for x in cut])
        keys, values = zip(*layers, strict=True)
        return np.stack(keys), np.stack(values)

    def reserve(self, slots: int) -> None:
        """Grow the capacity to at least `slots`, one of a small set of sizes: few programs.

        Tried in turn: half as much again as there is; what is needed; what is needed, with the old
        buffer on the host meanwhile.

        Raises: VisualMemoryError if the device has no room; the entries stay as they were.
        """
        with self.lock:
            if slots <= self.capacity:
                return
            exact = round_up(slots, 16)
            roomy = round_up(max(slots, self.capacity * 3 // 2), 16)
            ways = [partial(self._grown, roomy), partial(self._grown, exact)]
            if exact == roomy:
                ways.pop()
            if self._memory is not None and jax.default_backend() != "cpu":
                ways.append(partial(self._grown_on_host, exact))
            for way in ways:
                try:
                    with held_interrupts():
                        self._memory = way()
                    return
                except DEVICE_ERRORS as error:
                    if not is_out_of_memory(error):
                        raise
                    failure = error.with_traceback(None)  # which holds the arrays of `way`
            size = exact * entry_bytes(self.runtime.config) / 1e9
            raise VisualMemoryError(
                f"the device has no room for {exact:,} entries ({size:.1f} GB): use fewer frames, "
                "a higher ratio, or int8 weights"
            ) from failure

    def _grown(self, capacity: int) -> Memory:
        """Allocate a larger buffer while the old one exists."""
        if self._memory is None:
            new = empty_memory(self.runtime.config, 1, capacity)
        else:
            new = _padded(self._memory, capacity)
        return jax.block_until_ready(new)

    def _grown_on_host(self, capacity: int) -> Memory:
        """A larger buffer, after the old one has left the device; if that fails, it stays on the
        host until it is read (`reading`).
        """
        old = self._memory
        assert old is not None
        keys: Any = np.array(old.keys)
        values: Any = np.array(old.values)
        host = replace(old, keys=keys, values=values)
        self._memory = host
        for x in (old.keys, old.values):
            if isinstance(x, Array):
                x.delete()
        return self._from_host(host, capacity)

    def _from_host(self, host: Memory, capacity: int) -> Memory:
        """A buffer of the device from arrays of the host."""
        new = empty_memory(self.runtime.config, 1, capacity)
        keys, values = new.keys, new.values
        for i in range(len(host.keys)):
            keys = _put_layer(keys, np.asarray(host.keys[i]), i)
            values = _put_layer(values, np.asarray(host.values[i]), i)
        return jax.block_until_ready(replace(new, keys=keys, values=values))

    def append(self, at: int, memory: Memory, first: int, count: int) -> None:
        """Put slots `first` to `first + count` of a memory of one sample in, from entry `at` on.

        `reserve` comes before. The memory is waited for, since the buffer must not depend on a step
        that failed.

        Raises: VisualMemoryError if that step ran out of memory; the entries stay as they were.
        """
        if count < 0 or at + count > self.capacity:
            raise ValueError(f"{count} entries from {at} on: capacity {self.capacity}")
        with device_memory("extending a memory"):
            jax.block_until_ready(memory)
            with self.lock, held_interrupts():
                self._memory = _appended(
                    self._memory, memory, np.int32(at), np.int32(first), np.int32(count)
                )

    def fill(self, length: int, layers: Iterator[tuple[Array, Array]]) -> None:
        """Put in the first entries: keys and values [K, length, H] of one layer after another.

        No other thread has these entries yet.

        Raises: VisualMemoryError if the device has no room.
        """
        self.reserve(length)
        assert self._memory is not None
        keys, values = self._memory.keys, self._memory.values
        with device_memory("loading a memory"):
            for i, (of_keys, of_values) in enumerate(layers):
                keys, values = _put_layer(keys, of_keys, i), _put_layer(values, of_values, i)
            self._memory = jax.block_until_ready(replace(self._memory, keys=keys, values=values))


Base = tuple[Entries, int]
"""Entries, and how many of them are read: later ones are not seen."""


class Continuation:
    """A memory behind entries: text of questions, or a step of a film. [B] samples.

    Each sample follows the same entries by itself. bases: the entries before, in their order.
    slots: most entries of a sample. capacity: instead, the exact size of the memory.

    Raises: VisualMemoryError if the device has no room.
    """

    def __init__(
        self,
        runtime: Runtime,
        bases: Sequence[Base],
        samples: int = 1,
        *,
        slots: int = 1,
        capacity: int | None = None,
    ):
        self.runtime, self.bases = runtime, tuple(bases)
        self.before = sum(length for _, length in self.bases)
        self.lengths = np.zeros(samples, np.int32)
        self.decoded = 0
        if capacity is None:
            least = OWN_SLOTS if samples == 1 else OWN_SLOTS_OF_MANY
            capacity = least * round_up(-(-slots // least), 1)
        with device_memory(f"making room for {samples} x {capacity:,} entries"):
            self.memory = empty_memory(runtime.config, samples, capacity)

    def plan_text(self, ids: Sequence[int] | np.ndarray, sample: int = 0) -> Stream:
        """Text that follows the entries of a sample."""
        before = self.before + int(self.lengths[sample])
        return plan_stream(ids, [], window=self.runtime.config.window, ratio=None, before=before)

    def read(
        self, streams: Sequence[Stream], visual: Array | None = None, tokens: int = 0
    ) -> Array:
        """Put streams into the memory; returns the logits [B, V] after each.

        streams: one a sample, planned after `before` and its length. visual: features [1, V, D] of
        a stream with a visual block. tokens: padded size; the next multiple of `TEXT_STEP` if 0.

        Raises: VisualMemoryError if the device runs out of memory: this continuation is lost then.
        """
        shape = reduce(StreamShape.union, map(StreamShape.of, streams))
        lengths = self.lengths + np.array([s.persistent for s in streams], np.int32)
        if lengths.max() > self.memory.capacity:
            raise ValueError(f"{lengths.max()} entries: capacity {self.memory.capacity}")
        tokens = tokens or -(-shape.tokens // TEXT_STEP) * TEXT_STEP
        # Slots are this memory's own: programs must not be compiled for those that a plan needs.
        batch = batch_streams(streams, replace(shape, tokens=tokens, memory=tokens))
        self.memory = replace(self.memory, length=jnp.array(self.lengths))
        with device_memory("reading what follows a memory"):
            logits = self._run(read, replace(batch, memory=0), visual)
        self.lengths = lengths
        return logits

    def read_text(self, ids: np.ndarray) -> Array:
        """Put text into the memory of the one sample; returns the logits [1, V] after it."""
        return self.read([self.plan_text(ids)])

    def decode(
        self, logits: Array, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[np.ndarray]:
        """Yield the next token of every sample [B] from the logits before it on.

        The memory has room for them. `lengths` is left to the caller: `decoded` of the tokens that
        were given have an entry.

        Raises: VisualMemoryError if the device runs out of memory: this continuation is lost then.
        """
        return self._counted(decode(self._begun(), logits, max_new_tokens, sampling))

    def decode_scored(
        self, logits: Array, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[ScoredTokens]:
        """Yield the next token of every sample with its log-probability, as `decode` does."""
        return self._counted(decode_scored(self._begun(), logits, max_new_tokens, sampling))

    def _begun(self) -> Callable[[Array], Array]:
        """The step of decoding, from the lengths as they are now."""
        self.memory = replace(self.memory, length=jnp.array(self.lengths))
        return self._step

    def _counted(self, tokens: Iterator[Tokens]) -> Iterator[Tokens]:
        with device_memory("writing an answer"):
            for self.decoded, token in enumerate(tokens):
                yield token

    def _step(self, token: Array) -> Array:
        """Put a token of every sample into the memory; returns the logits after it."""
        return self._run(decode_step, token)

    def _run(self, program: Callable[..., tuple[Array, Memory]], *arguments: Any) -> Array:
        """Dispatch a program that takes over the memory and reads the bases; returns logits."""
        with ExitStack() as reading, held_interrupts():
            bases = tuple(reading.enter_context(one.reading(length)) for one, length in self.bases)
            graph, params = self.runtime.graph, self.runtime.params
            logits, self.memory = program(graph, params, self.memory, *arguments, bases)
        return logits


def append_text(bases: Sequence[Base], ids: np.ndarray) -> int:
    """Append text to the last of the bases; returns how many entries it has then.

    Raises: VisualMemoryError if the device has no room; the entries stay as they were.
    """
    entries, length = bases[-1]
    entries.reserve(length + len(ids))
    turn = Continuation(entries.runtime, bases, slots=len(ids))
    turn.read_text(ids)
    entries.append(length, turn.memory, 0, len(ids))
    return length + len(ids)


@partial(jax.jit, static_argnums=1)
def _padded(memory: Memory, capacity: int) -> Memory:
    room = [(0, 0)] * 3 + [(0, capacity - memory.capacity), (0, 0)]
    return replace(memory, keys=jnp.pad(memory.keys, room), values=jnp.pad(memory.values, room))


@partial(jax.jit, donate_argnums=0)
def _appended(memory: Memory, own: Memory, at: Any, first: Any, count: Any) -> Memory:
    """Copy `count` slots of `own` from `first` on into the memory from `at` on, in place.

    The number of blocks is that of a full `own`: a GPU would ask the host about a bound that it has
    computed, in every turn of the loop.
    """
    size = min(APPEND_SLOTS, memory.capacity)
    blocks = -(-own.capacity // size)

    def copy(i: Any, parts: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.minimum(at + i * size, memory.capacity - size)
        slot = start + jnp.arange(size)
        new = ((slot >= at) & (slot < at + count))[:, None]

        def put(x: Array, source: Array) -> Array:
            taken = jnp.take(source, slot - at + first, axis=3, mode="clip")
            old = lax.dynamic_slice_in_dim(x, start, size, axis=3)
            return lax.dynamic_update_slice_in_dim(x, jnp.where(new, taken, old), start, axis=3)

        return put(parts[0], own.keys), put(parts[1], own.values)

    keys, values = lax.fori_loop(0, blocks, copy, (memory.keys, memory.values))
    return replace(memory, keys=keys, values=values)


@partial(jax.jit, donate_argnums=0)
def _put_layer(x: Array, layer: Array, index: Any) -> Array:
    """Put keys or values [K, S, H] or [1, K, S, H] into the first slots of one layer."""
    return lax.dynamic_update_slice(x, layer.reshape(1, 1, *layer.shape[-3:]), (index, 0, 0, 0, 0))
