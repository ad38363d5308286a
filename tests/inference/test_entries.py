"""Entries of a memory on the device: how they are appended to and how they grow."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vxl_jax import VisualMemoryError
from vxl_jax.inference import entries as entries_module
from vxl_jax.inference.entries import Continuation, Entries, append_text
from vxl_jax.inference.runtime import Runtime
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn import memory
from vxl_jax.nn.memory import Memory
from vxl_jax.presets import demo


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime(VideoXL(demo(), rngs=nnx.Rngs(3)), None)


def random_memory(capacity: int, seed: int = 0) -> Memory:
    draw = np.random.default_rng(seed)
    keys, values = draw.normal(size=(2, 4, 1, 2, capacity, 16)).astype(np.float32)
    return Memory(jnp.array(keys), jnp.array(values), jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("counts", [[1], [128], [129, 0, 1, 300], [5, 127, 128, 256]])
def test_appended_slots_are_those_of_the_source(runtime: Runtime, counts: list[int]):
    """Also where the last block of slots would go past the end of either buffer."""
    entries, expected, length = Entries(runtime), [], 0
    entries.reserve(sum(counts))
    for seed, count in enumerate(counts):
        source = random_memory(count + 3, seed)
        entries.append(length, source, 3, count)
        length += count
        expected.append(source.keys[:, 0, :, 3:])
    keys, _ = entries.arrays(length)
    assert np.array_equal(keys, np.concatenate(expected, axis=2))
    with pytest.raises(ValueError, match="capacity"):
        entries.append(1, source, 0, entries.capacity)
    with pytest.raises(ValueError, match="-1 entries"):
        entries.append(1, source, 0, -1)


def test_append_allocates_next_to_nothing():
    """So it cannot fail for want of memory once its source is there."""

    def shape(capacity: int) -> Memory:
        part: Any = jax.ShapeDtypeStruct((4, 1, 2, capacity, 64), np.float32)
        length: Any = jax.ShapeDtypeStruct((1,), np.int32)
        return Memory(part, part, length)

    number = jax.ShapeDtypeStruct((), np.int32)
    program = entries_module._appended.lower(shape(2**16), shape(1024), number, number, number)
    bytes_of = program.compile().memory_analysis()
    assert bytes_of.temp_size_in_bytes < 4096
    assert bytes_of.alias_size_in_bytes >= 2 * 4 * 2 * 2**16 * 64 * 4


def test_growth_by_way_of_the_host_keeps_the_entries(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
):
    entries = Entries(runtime)
    append_text([(entries, 0)], np.arange(40, dtype=np.int32))
    before = entries.arrays(40)
    grown = entries._grown_on_host(96)
    assert grown.capacity == 96
    entries._memory = grown
    for then, now in zip(before, entries.arrays(40), strict=True):
        assert np.array_equal(then, now)

    make, most = memory.empty_memory, [50]

    def full(config: Any, samples: int, slots: int) -> Memory:
        if slots > most[0]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")
        return make(config, samples, slots)

    monkeypatch.setattr(entries_module, "empty_memory", full)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(Entries, "_grown", lambda self, slots: full(None, 1, 10**9))
    with pytest.raises(VisualMemoryError, match="the device has no room for 1,024 entries"):
        entries.reserve(1000)
    assert entries.capacity == 96
    with pytest.raises(VisualMemoryError, match="bringing a memory back to the device"):
        entries.arrays(40)
    most[0] = 96
    for then, now in zip(before, entries.arrays(40), strict=True):
        assert np.array_equal(then, now)
    assert isinstance(entries._memory.keys, jax.Array)


def test_entries_that_a_failed_device_has_taken_are_named(runtime: Runtime):
    entries = Entries(runtime)
    append_text([(entries, 0)], np.arange(4, dtype=np.int32))
    assert entries._memory is not None
    entries._memory.keys.delete()
    with pytest.raises(VisualMemoryError, match="whose entries are lost; watch again"):
        Continuation(runtime, [(entries, 4)]).read_text(np.arange(3))
