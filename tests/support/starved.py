"""A process that runs out of memory in the middle of steps, for `tests.inference.test_starved`.

`RLIMIT_AS` is lowered around single programs. Started with malloc's pools off (`ENVIRONMENT`), so
that what a program allocates is asked of the kernel, which then refuses it: XLA's own error.
"""

import itertools
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "GLIBC_TUNABLES": "",
}

ROOM = 2**20
"""Bytes that a starved program may still allocate."""


def address_space() -> int:
    """Bytes of address space that the process has."""
    size = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert size
    return int(size[1]) * 1024


@contextmanager
def starved(room: int = ROOM) -> Iterator[None]:
    """No more than `room` bytes of address space more than the process has."""
    sizes = [address_space()]
    while len(sizes) < 5 or len(set(sizes[-5:])) > 1:  # threads that end still give back theirs
        time.sleep(0.05)
        sizes.append(address_space())
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (sizes[-1] + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def starving(module: Any, name: str, after: int = 0, room: int = ROOM) -> Iterator[None]:
    """In the block, a function of a module has no memory from its call number `after` on."""
    import jax

    def starved_run(function: Callable[..., Any], *arguments: Any) -> Any:
        for array in jax.live_arrays():  # what runs still would give back its memory in the middle
            error_of(array.block_until_ready)
        with starved(room):
            return jax.block_until_ready(function(*arguments))

    with replaced(module, name, starved_run, after):
        yield


@contextmanager
def failing(module: Any, name: str, after: int = 0) -> Iterator[None]:
    """In the block, a program of a module takes its donated arrays and then finds no memory, from
    its call number `after` on: for programs that need too little to starve.
    """
    import jax.numpy as jnp

    def failed_run(function: Callable[..., Any], *arguments: Any) -> Any:
        function(*arguments)
        return jnp.zeros(2**45).block_until_ready()

    with replaced(module, name, failed_run, after):
        yield


@contextmanager
def replaced(module: Any, name: str, run: Callable[..., Any], after: int) -> Iterator[None]:
    """In the block, `run(function, *arguments)` in place of a function, from a call on."""
    function, calls = getattr(module, name), itertools.count()

    def call(*arguments: Any) -> Any:
        return function(*arguments) if next(calls) < after else run(function, *arguments)

    setattr(module, name, call)
    try:
        yield
    finally:
        setattr(module, name, function)


def error_of(call: Callable[[], Any]) -> list[str]:
    """The class and message of an error, and of its cause."""
    try:
        call()
    except Exception as error:
        cause = error.__cause__
        return [type(error).__name__, str(error), type(cause).__name__, str(cause)]
    return []


def main(tokenizer: str) -> None:
    """Print what each case leaves behind, as JSON."""
    import numpy as np
    from flax import nnx
    from transformers import AutoTokenizer

    from vxl_jax import Model
    from vxl_jax.inference import entries, watching
    from vxl_jax.models.video_xl import VideoXL
    from vxl_jax.planning.inference_bytes import entry_bytes
    from vxl_jax.presets import demo
    from vxl_jax.stream.batch import round_up

    model = Model(VideoXL(demo(), rngs=nnx.Rngs(3)), AutoTokenizer.from_pretrained(tokenizer))
    model.windows_at_once = 64  # a step of 256 frames
    pixels = np.random.default_rng(0).integers(0, 256, (600, 56, 56, 3), np.uint8)

    def watched(count: int) -> Any:
        memory = model.remember()
        memory.entries.reserve(1000)  # one capacity: few programs
        memory.extend(pixels[:count], ratio=4)
        return memory

    def state(memory: Any) -> list[Any]:
        norms = [float(np.linalg.norm(x)) for x in memory.arrays()]
        answer = model.ask(memory, "What happens?", max_new_tokens=6)
        return [memory.length, [block.frames for block in memory.watched], norms, answer]

    def extended(*where: Any, **when: Any) -> dict[str, Any]:
        """From 100 frames to 600, in steps of 256."""
        memory = watched(100)
        with starving(*where, **when):
            error = error_of(lambda: memory.extend(iter(pixels[100:]), ratio=4))
        left = state(memory)
        frames = memory.watched[0].frames
        memory.extend(pixels[frames:], ratio=4)
        return {"error": error, "left": left, "whole": state(memory)}

    memory = watched(100)
    memory.extend(iter(pixels[100:]), ratio=4)  # compiles
    alone = {count: state(watched(count)) for count in (100, 356, 600)}
    cases: dict[str, Any] = {"alone": alone}
    cases["first"] = extended(entries, "read")
    cases["second"] = extended(entries, "read", after=1)
    cases["encode"] = extended(watching, "encode", after=1)

    memory = watched(100)
    with failing(entries, "decode_step", after=2):
        asked = error_of(lambda: model.ask(memory, "What happens?", max_new_tokens=6))
    cases["ask"] = {"error": asked, "left": state(memory)}

    chat, other, first = (model.chat(memory) for _ in range(3))
    for one in (chat, other, first):
        one.ask("What happens?", max_new_tokens=6)
    first.ask("And here?", [pixels[:300]], ratio=4, max_new_tokens=2)  # compiles
    errors = []
    with failing(entries, "decode_step", after=2):
        errors.append(error_of(lambda: chat.ask("And then?", max_new_tokens=6)))
    with starving(entries, "read", after=1):
        errors.append(error_of(lambda: chat.ask("And here?", [pixels[:300]], ratio=4)))
    turns = len(chat.turns)
    answers = [one.ask("And then?", max_new_tokens=6) for one in (chat, other)]
    cases["chat"] = {"errors": errors, "turns": turns, "answers": answers}

    # 1 kB an entry: 5,120 are 5 MB, and half as much again needs 7.5.
    memory = model.remember()
    memory.entries.reserve(5000)
    memory.extend(pixels[:100], ratio=4)
    held = memory.entries.capacity
    for slots in (held + 1, held * 3 // 2):
        entries._padded(memory.entries._memory, round_up(slots, 16))  # compiles
    room = int(1.3 * held * entry_bytes(model.config))
    with starving(entries, "_padded", room=room):
        exact = error_of(lambda: memory.entries.reserve(held + 1))
    after = memory.entries.capacity
    with failing(entries, "_padded"):
        none = error_of(lambda: memory.entries.reserve(after + 1))
    grow = {"held": held, "exact": exact, "after": after, "none": none, "left": state(memory)}
    cases["grow"] = grow | {"capacity": memory.entries.capacity}
    print(json.dumps(cases))


if __name__ == "__main__":
    main(sys.argv[1])
