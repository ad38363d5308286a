"""Threads that ask, extend, save and load the same memory: each gets what it would get alone."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from vxl_jax import Model, VisualMemory, load_memory
from vxl_jax.inference import chat as chat_module, sampling
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import demo

pytestmark = pytest.mark.usefixtures("exact_products")

PIECES, PIECE = 7, 5
"""Extensions, and frames of each: windows of 4 frames end in the middle of most."""

QUESTION = "What is number 3?"


@pytest.fixture(scope="module")
def model(demo_tokenizer: Any) -> Model:
    model = Model(VideoXL(demo(), rngs=nnx.Rngs(3)), demo_tokenizer)
    model.windows_at_once = 2
    return model


def frames(piece: int) -> np.ndarray:
    return np.random.default_rng(piece).integers(0, 256, (PIECE, 56, 56, 3), np.uint8)


@pytest.fixture(scope="module")
def alone(model: Model) -> dict[int, list[int]]:
    """Ids of the answer, by entries, after each step of one thread that extends a memory."""
    memory = model.watch(frames(0), ratio=4)
    lengths, append = {memory.length}, memory.entries.append

    def noted(at: int, own: Any, first: int, count: int) -> None:
        append(at, own, first, count)
        lengths.add(at + count)

    memory.entries.append = noted  # type: ignore[method-assign]
    for piece in range(1, PIECES):
        memory.extend(frames(piece), ratio=4)
    return {length: answer(model, memory, length) for length in lengths}


def answer(model: Model, memory: VisualMemory, length: int) -> list[int]:
    """Ids of the answer about the first entries of a memory, with one thread."""
    ids = model.first_turn(1, QUESTION)
    turn = chat_module.Continuation(model, [(memory.entries, length)], slots=len(ids) + 6)
    tokens = turn.decode(turn.read_text(ids), 6, sampling.GREEDY)
    return [int(token) for (token,) in tokens]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Results of functions that start at the same moment, each in a thread."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


def test_asking_extending_and_saving_at_once(
    model: Model, alone: dict[int, list[int]], tmp_path: Path
):
    assert len({tuple(ids) for ids in alone.values()}) > 2
    memory = model.watch(frames(0), ratio=4)
    first = memory.arrays()
    done = threading.Event()

    def extend() -> None:
        try:
            for piece in range(1, PIECES):
                memory.extend(frames(piece), ratio=4)
        finally:
            done.set()

    def ask() -> list[tuple[int, list[int]]]:
        answers = []
        while not done.is_set() or not answers:
            chat = model.chat(memory)
            length = chat._base[1]
            said = chat.ask(QUESTION, max_new_tokens=6)
            answers.append((length, said))
        return answers

    def ask_many() -> list[list[list[int]]]:
        prompts, answers = [model.first_turn(1, QUESTION)] * 2, []
        while not done.is_set() or not answers:
            answers.append(model.ask_ids(memory, prompts, max_new_tokens=6))
        return answers

    def save() -> list[Path]:
        paths = []
        while not done.is_set() or not paths:
            paths.append(tmp_path / f"{len(paths)}.memory")
            memory.save(paths[-1])
        return paths

    _, asked, more, many, paths = together(extend, ask, ask, ask_many, save)

    stop = model.stop_ids
    expected = {
        length: next((ids[:i] for i, token in enumerate(ids) if token in stop), ids)
        for length, ids in alone.items()
    }
    for length, said in [*asked, *more]:
        assert said == model.text_of(expected[length]).strip()
    assert all(pair[0] == pair[1] and pair[0] in expected.values() for pair in many)
    for path in paths:
        loaded = load_memory(path, model)
        said = model.ask(loaded, QUESTION, max_new_tokens=6)
        assert said == model.text_of(expected[loaded.length]).strip()
        assert loaded.watched[0].frames <= memory.watched[0].frames
    assert memory.watched[0].frames == PIECES * PIECE
    assert memory.length == max(alone)
    for then, now in zip(first, memory.arrays(), strict=True):  # bit for bit
        assert np.array_equal(then, now[:, :, : then.shape[2]])


def test_extensions_at_once_come_one_after_another(model: Model):
    memory = model.watch(frames(0), ratio=4)
    together(*[lambda: memory.extend(frames(1), ratio=4)] * 4)
    whole = model.watch(np.concatenate([frames(0), *[frames(1)] * 4]), ratio=4)
    assert memory.watched[0].frames == 5 * PIECE
    for ours, theirs in zip(memory.arrays(), whole.arrays(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)


def test_a_loaded_memory_is_read_once(model: Model, tmp_path: Path):
    memory = model.watch(frames(0), ratio=4)
    memory.save(tmp_path / "memory")
    loaded = load_memory(tmp_path / "memory")
    answers = together(*[lambda: model.ask(loaded, QUESTION, max_new_tokens=6)] * 4)
    assert set(answers) == {model.ask(memory, QUESTION, max_new_tokens=6)}


def test_questions_of_a_conversation_at_once_come_one_after_another(model: Model):
    memory = model.watch(frames(0), ratio=4)
    chat, other = model.chat(memory), model.chat(memory)
    answers = together(*[lambda: chat.ask(QUESTION, max_new_tokens=6)] * 3)
    expected = [other.ask(QUESTION, max_new_tokens=6) for _ in range(3)]
    assert sorted(answers) == sorted(expected)
    assert chat.turns == other.turns
