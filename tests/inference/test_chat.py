"""Conversations about a memory."""

import numpy as np
import pytest

from tests.support.networks import entries, frames, fresh
from vxl_jax import Model, Picture
from vxl_jax.inference.decode import generate
from vxl_jax.inference.sampling import Sampling
from vxl_jax.media.open import open_film
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import plan_stream
from vxl_jax.text.chat import encode_follow_up, encode_prompt

pytestmark = pytest.mark.usefixtures("exact_products")


def test_a_conversation_is_that_of_a_fresh_run_and_leaves_the_memory(model: Model):
    """Answers of one token, of several, and such that end by themselves or at their limit."""
    pixels = frames(7)
    memory = model.watch(pixels, ratio=4)
    before = entries(memory)
    chat, other = model.chat(memory), model.chat(memory)
    ids = encode_prompt("<image>Question 0?", model.tokenizer).tolist()
    for i, new in enumerate((5, 1, 40, 6)):
        stream = plan_stream(ids, [28], window=16, ratio=4)
        (expected,) = generate(
            model.network,
            batch_streams([stream]),
            pixels[None],
            max_new_tokens=new,
            stop_ids=tuple(model.stop_ids),
        )
        assert chat.ask(f"Question {i}?", max_new_tokens=new) == model.text_of(expected)
        other.ask(f"Something else {i}?", max_new_tokens=4)
        ids += [*expected, *encode_follow_up(f"Question {i + 1}?", model.tokenizer)]
    assert len(chat.turns) == 8
    for now, then in zip(entries(memory), before, strict=True):
        assert np.array_equal(now, then)


def test_a_follow_up_has_the_ids_of_all_turns_together(model: Model):
    tokenizer = model.tokenizer
    turns = [
        {"from": "human", "value": "<image>What is red?"},
        {"from": "gpt", "value": "the square"},
        {"from": "human", "value": "And where is <image>?"},
    ]
    answer = tokenizer.encode(turns[1]["value"], add_special_tokens=False)
    first = encode_prompt(turns[:1], tokenizer)
    follow_up = encode_follow_up(turns[2]["value"], tokenizer)
    assert [*first, *answer, *follow_up] == encode_prompt(turns, tokenizer).tolist()


def test_media_may_come_with_any_question(model: Model):
    first, second, picture = frames(6), frames(9, 1), frames(1, 2)[0]
    tiles = next(iter(open_film(Picture(picture), 56).chunks(99)))[0]
    for memory in (model.watch(first, ratio=4), None):
        chat = model.chat(memory)
        blocks = [first] if memory else []
        answer = chat.ask("What is new?", [Picture(picture)], ratio=4, max_new_tokens=6)
        blocks.append(tiles)
        assert answer == model.text_of(fresh(model, blocks, "What is new?", 4, new=6))
        ids = encode_prompt("<image>" * len(blocks) + "What is new?", model.tokenizer).tolist()
        ids += fresh(model, blocks, "What is new?", 4, new=6)
        ids += encode_follow_up("Is <image> it?", model.tokenizer).tolist()
        blocks.append(second)
        tokens = [len(block) * 4 for block in blocks]
        streams = batch_streams([plan_stream(ids, tokens, window=16, ratio=4)])
        pixels = np.concatenate(blocks)[None]
        stop = tuple(model.stop_ids)
        (last,) = generate(model.network, streams, pixels, max_new_tokens=6, stop_ids=stop)
        assert chat.ask("Is <image> it?", [second], ratio=4, max_new_tokens=6) == model.text_of(
            last
        )


def test_what_is_watched_later_is_not_seen_by_a_conversation(model: Model):
    pixels = frames(30)
    memory, early = model.watch(pixels[:6], ratio=4), model.watch(pixels[:6], ratio=4)
    chat = model.chat(memory)
    memory.extend(pixels[6:], ratio=4)
    assert chat.ask("What?", max_new_tokens=8) == model.ask(early, "What?", max_new_tokens=8)
    whole = model.watch(pixels, ratio=4)
    assert model.ask(memory, "What?", max_new_tokens=8) == model.ask(
        whole, "What?", max_new_tokens=8
    )


def test_an_answer_comes_in_pieces(model: Model):
    memory = model.watch(frames(5), ratio=4)
    expected = model.ask(memory, "What?", max_new_tokens=12)
    pieces = list(model.stream(memory, "What?", max_new_tokens=12))
    assert "".join(pieces).strip() == expected
    assert len(pieces) > 1


def test_an_answer_that_is_not_read_to_its_end_stands_as_far_as_it_was(model: Model):
    memory = model.watch(frames(5), ratio=4)
    chat, other = model.chat(memory), model.chat(memory)
    pieces = chat.stream("What?", max_new_tokens=12)
    begun = next(pieces)
    pieces.close()
    assert chat.turns[-1]["value"] == begun.strip()
    other.ask("What?", max_new_tokens=len(other.model.tokenizer.encode(begun)))
    assert chat.turns == other.turns
    assert chat.ask("And?", max_new_tokens=8) == other.ask("And?", max_new_tokens=8)


def test_draws_differ_by_seed_alone(model: Model):
    memory = model.watch(frames(5), ratio=4)

    def ask(seed: int) -> str:
        drawn = Sampling(temperature=1.5, seed=seed)
        return model.ask(memory, "What?", max_new_tokens=8, sampling=drawn)

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1
