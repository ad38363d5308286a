"""Watching and asking: one memory for many questions, extended at any point."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.networks import MICRO, assert_same, entries, frames, fresh
from vxl_jax import Model, Picture, Video, VisualMemory, load_network
from vxl_jax.media.open import open_film
from vxl_jax.text.template import IMAGE_TOKEN

pytestmark = pytest.mark.usefixtures("exact_products")


def test_ten_questions_of_one_memory_are_ten_fresh_runs(model: Model):
    pixels = frames(11)
    memory = model.watch(pixels, ratio=4)
    before = entries(memory)
    questions = [f"What is number {i}?" for i in range(10)]
    expected = [fresh(model, [pixels], question, 4) for question in questions]
    assert len({tuple(ids) for ids in expected}) > 1
    prompts = [model.first_turn(1, question) for question in questions]
    assert [model.ask_ids(memory, [ids], max_new_tokens=8)[0] for ids in prompts] == expected
    assert model.ask_ids(memory, prompts, max_new_tokens=8) == expected
    assert model.ask(memory, questions, max_new_tokens=8) == [
        model.text_of(ids) for ids in expected
    ]
    for now, then in zip(entries(memory), before, strict=True):
        assert np.array_equal(now, then)


@pytest.mark.parametrize("cuts", [[4], [3, 8, 9], list(range(1, 13))])
@pytest.mark.parametrize("ratio", [4, None, {0: 4, 5: 8, 9: None}])
def test_extended_at_any_point_it_is_the_whole(model: Model, cuts: list[int], ratio: Any):
    pixels = frames(13)
    whole = model.watch(pixels, ratio=ratio)
    first, *rest = np.split(pixels, cuts)
    memory = model.watch(first, ratio=ratio)
    for piece in rest:
        memory.extend(piece, ratio=ratio)
        assert memory.watched[-1].last == memory.watched[-1].frames - 1
    assert_same(memory, whole)
    assert memory.watched[0].frames == 13


def test_frames_one_by_one_are_the_whole(model: Model):
    pixels = frames(19)
    whole = model.watch(pixels, ratio=8)
    memory = model.remember()
    memory.extend((frame for frame in pixels), ratio=8)
    assert_same(memory, whole)


@pytest.mark.parametrize("windows", [1, 2, 3, 64])
def test_the_size_of_chunks_does_not_matter(model: Model, windows: int):
    pixels = frames(23)
    other = Model(model.network, model.tokenizer)
    other.windows_at_once = windows
    ratio = {0: 4, 7: 8}
    assert_same(other.watch(pixels, ratio=ratio), model.watch(pixels, ratio=ratio))


def test_each_window_has_the_ratio_of_its_first_frame(model: Model):
    """Windows begin at seconds 0, 2, 4 and 6 of frames at 2 a second; 16 tokens each."""
    pixels = Video(frames(16), fps=2.0)
    length = model.remember().length
    assert model.watch(pixels, ratio={0: 4, 2: 8, 4.1: 16}).length == length + 4 + 2 + 2 + 1
    ids = fresh(model, [pixels.source], "Which?", [4, 8, 8, 16])
    memory = model.watch(pixels, ratio={0: 4, 2: 8, 4.1: 16})
    assert model.ask(memory, "Which?", max_new_tokens=8) == model.text_of(ids)


def test_several_videos_and_images_are_blocks_of_one_memory(model: Model):
    """Windows do not go over the end of a block."""
    first, second, picture = frames(5), frames(6, 1), frames(1, 2)[0]
    memory = model.watch([first, Picture(picture), second], ratio=4)
    assert [block.frames for block in memory.watched] == [5, 2, 6]
    assert (memory.ids == IMAGE_TOKEN).sum() == 3
    tiles = next(iter(open_film(Picture(picture), 56).chunks(99)))[0]
    expected = fresh(model, [first, tiles, second], "What differs?", 4)
    assert model.ask(memory, "What differs?", max_new_tokens=8) == model.text_of(expected)


# The numbers of the published implementation.


def test_golden_ids_through_this_interface(demo_tokenizer: Any):
    meta = json.loads((MICRO / "golden.json").read_text())
    tensors = load_file(MICRO / "golden.safetensors")
    model = Model(load_network(MICRO / "hf"), demo_tokenizer)
    model.__dict__["stop_ids"] = []
    compared = 0
    for case in meta["cases"]:
        if f"{case['name']}/generated" not in tensors:
            continue
        expected = tensors[f"{case['name']}/generated"]
        memory = VisualMemory(np.array(meta["prefix"], np.int32))
        memory.attach(model)
        pixels = tensors[f"input/{case['frames']}"].transpose(0, 2, 3, 1)
        memory.extend(pixels, ratio=case["ratio"])
        (ids,) = model.ask_ids(memory, [meta["suffix"]], max_new_tokens=len(expected))
        assert ids == expected.tolist()
        compared += 1
    assert compared == 1
