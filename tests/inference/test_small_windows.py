"""Windows with fewer tokens than their ratio keep one entry, written again if they grow."""

from pathlib import Path

import numpy as np
import pytest

import vxl_jax
from tests.support.networks import frames
from vxl_jax.inference.model import Model
from vxl_jax.planning.inference_bytes import video_entries

RATIO = 8  # a frame has 4 tokens
QUESTION = "what is the colour"


def head(model: Model) -> int:
    return len(model.head_ids())


def test_one_tile_is_seen_at_any_ratio(model: Model):
    one, other = frames(2)[:1], frames(2)[1:]
    memory = model.watch(one, ratio=16)
    assert memory.length == head(model) + 1
    _, values = memory.arrays()
    _, others = model.watch(other, ratio=16).arrays()
    assert not np.allclose(values[:, :, -1], others[:, :, -1])


@pytest.mark.parametrize("count", range(1, 10))
def test_entries_are_as_planned(model: Model, count: int):
    planned = video_entries(model.config, count, RATIO)
    assert model.watch(frames(count), ratio=RATIO).length == head(model) + planned
    assert planned >= 1


@pytest.mark.parametrize("cuts", [[1], [4, 5], [1, 2, 3, 5, 9]])
def test_grown_it_is_the_whole_and_who_reads_it_sees_no_change(
    model: Model, cuts: list[int], tmp_path: Path
):
    pixels = frames(11)
    first, *rest = np.split(pixels, cuts)
    memory = model.watch(first, ratio=RATIO)
    for piece in rest:
        before = memory.snapshot()
        entries = before.entries.arrays(before.length)
        memory.save(tmp_path / "memory", overwrite=True)
        saved = vxl_jax.load_memory(tmp_path / "memory", model)
        memory.extend(piece, ratio=RATIO)
        saved.extend(piece, ratio=RATIO)
        for ours, theirs in zip(before.entries.arrays(before.length), entries, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for ours, theirs in zip(saved.arrays(), memory.arrays(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)
    whole = model.watch(pixels, ratio=RATIO)
    assert memory.length == whole.length
    for ours, theirs in zip(memory.arrays(), whole.arrays(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)


def test_a_chat_goes_on_with_what_it_began_with(model: Model):
    alone = model.chat(model.watch(frames(1), ratio=RATIO))
    expected = [alone.ask(QUESTION, max_new_tokens=4) for _ in range(2)]
    memory = model.watch(frames(1), ratio=RATIO)
    chat = model.chat(memory)
    answers = [chat.ask(QUESTION, max_new_tokens=4)]
    memory.extend(frames(5)[1:], ratio=RATIO)
    answers.append(chat.ask(QUESTION, max_new_tokens=4))
    assert answers == expected
