"""Own samplings, log-probabilities and own attention behind a memory."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vxl_jax
from tests.support.networks import frames
from vxl_jax.inference.decode import generate
from vxl_jax.inference.model import Model
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import demo
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import plan_stream

QUESTION = "what is the colour"


@pytest.fixture(scope="module")
def model(demo_tokenizer: Any) -> Model:
    return Model(VideoXL(demo(), rngs=nnx.Rngs(3)), demo_tokenizer)


def test_logprobs_behind_a_memory_are_those_of_the_whole_stream(model: Model):
    pixels = frames(5)
    memory = model.watch(pixels, ratio=4)
    turns = [model.first_turn(1, QUESTION), model.first_turn(1, "how many")]
    scored = model.ask_ids(memory, turns, max_new_tokens=4, logprobs=True)
    assert [answer.ids for answer in scored] == model.ask_ids(memory, turns, max_new_tokens=4)
    stream = plan_stream([*memory.ids, *turns[0]], [20], window=16, ratio=4)
    (whole,) = generate(
        *(model.network, batch_streams([stream]), pixels[None]),
        max_new_tokens=4,
        stop_ids=model.stop_ids,
        logprobs=True,
    )
    assert scored[0].ids == whole.ids
    np.testing.assert_allclose(scored[0].logprobs, whole.logprobs, rtol=1e-4)
    assert model.ask_ids(memory, [], logprobs=True) == []


@dataclass(frozen=True)
class SecondBest(vxl_jax.Sampling):
    """The second most likely token."""

    def choose(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.argsort(logits, axis=-1)[:, -2].astype(jnp.int32)


def test_own_sampling_is_asked_for_each_token(model: Model):
    memory = model.watch(frames(5), ratio=4)
    turn = [model.first_turn(1, QUESTION)]
    (best,) = model.ask_ids(memory, turn, max_new_tokens=1, logprobs=True)
    (second,) = model.ask_ids(memory, turn, max_new_tokens=1, sampling=SecondBest(), logprobs=True)
    assert best.ids != second.ids
    assert best.logprobs > second.logprobs
    chat = model.chat(memory)
    assert (
        chat.ask(QUESTION, max_new_tokens=1, sampling=SecondBest())
        == model.text_of(second.ids).strip()
    )


def test_dense_attention_gives_the_same_memory(model: Model):
    tiled = model.watch(frames(9), ratio=4)
    network = nnx.clone(model.network)
    network.language.layers.attention.implementation = "dense"
    dense = Model(network, model.tokenizer).watch(frames(9), ratio=4)
    for ours, theirs in zip(dense.arrays(), tiled.arrays(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)
