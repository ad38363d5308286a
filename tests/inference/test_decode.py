"""Choosing tokens, stopping, and what generation refuses."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vxl_jax.errors import ArgumentError
from vxl_jax.inference.decode import generate, stream_tokens
from vxl_jax.inference.sampling import Sampling
from vxl_jax.models.functions import decode_step, prefill
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import tiny
from vxl_jax.stream.batch import StreamShape, batch_streams
from vxl_jax.stream.plan import plan_stream
from vxl_jax.text.template import IMAGE_TOKEN

LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]))


@pytest.fixture(scope="module")
def model():
    return nnx.jit(lambda: VideoXL(tiny(), rngs=nnx.Rngs(3)))()


def frequencies(temperature=1.0, top_k=0, top_p=1.0, draws=4000):
    keys = jax.random.split(jax.random.key(0), draws)
    sampling = Sampling(temperature, top_k, top_p)
    tokens = jax.vmap(lambda key: sampling.choose(LOGITS, key))(keys)
    return np.array([np.bincount(column, minlength=4) / draws for column in np.asarray(tokens).T])


def test_sampling_follows_the_probabilities():
    expected = np.exp(np.asarray(LOGITS))
    np.testing.assert_allclose(frequencies(), expected, atol=0.03)
    hot = expected ** (1 / 2)
    np.testing.assert_allclose(
        frequencies(temperature=2.0), hot / hot.sum(-1, keepdims=True), atol=0.03
    )


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 2}, 2),
        ({"top_p": 0.4}, 1),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.81}, 3),
        ({"top_p": 0.81, "top_k": 2}, 2),
        ({"top_k": 99}, 4),
    ],
)
def test_only_the_likely_tokens_are_drawn(options, allowed):
    drawn = frequencies(**options, draws=500) > 0
    assert drawn.sum(-1).tolist() == [allowed, allowed]
    assert drawn[0, :allowed].all()
    assert drawn[1, 4 - allowed :].all()


def test_greedy_takes_the_likeliest():
    assert Sampling().choose(LOGITS, jax.random.key(0)).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_impossible_sampling_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def prompts(model, *texts, shape=None):
    streams = [plan_stream(text, [], window=model.config.window, ratio=4) for text in texts]
    return batch_streams(streams, shape, windows_per_group=1)


def test_a_seed_gives_the_same_draws_and_another_seed_others(model):
    def run(seed):
        sampling = Sampling(temperature=3.0, seed=seed)
        return generate(model, prompts(model, [1, 2, 3]), max_new_tokens=8, sampling=sampling)

    assert run(0) == run(0)
    assert run(0) != run(1)


@dataclass(frozen=True)
class Constant(Sampling):
    """Chooses the n-th token from the end of the vocabulary for sample n."""

    offset: int = 1

    def choose(self, logits, key):
        return logits.shape[1] - self.offset - jnp.arange(len(logits), dtype=jnp.int32)


def test_a_subclass_chooses_the_tokens(model):
    streams = prompts(model, [1, 2, 3], [4, 5, 6, 7, 8])
    last = model.config.language.vocab_size - 2
    ours = generate(model, streams, max_new_tokens=3, sampling=Constant(offset=2))
    assert ours == [[last] * 3, [last - 1] * 3]


def test_a_subclass_that_does_not_choose_for_every_sample_is_refused(model):
    class First(Sampling):
        def choose(self, logits, key):
            return logits[0].argmax(keepdims=True).astype(jnp.int32)

    streams = prompts(model, [1, 2, 3], [4, 5])
    with pytest.raises(ArgumentError, match=r"First\.choose: returned shape \(1,\) for logits"):
        generate(model, streams, max_new_tokens=1, sampling=First())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0, top_k=9, seed=1)])
def test_logprobs_are_those_of_one_forward_pass_over_prompt_and_answer(model, sampling):
    """Of the model's distribution, before sampling changes it."""
    texts = [1, 2, 3], [4, 5, 6, 7, 8]
    options = {"max_new_tokens": 5, "sampling": sampling}
    answers = generate(model, prompts(model, *texts), **options, logprobs=True)
    assert [answer.ids for answer in answers] == generate(model, prompts(model, *texts), **options)
    for text, (ids, logprobs) in zip(texts, answers, strict=True):
        whole = batch_streams([plan_stream([*text, *ids], [], window=99, ratio=None)])
        logits = model.logits(model(whole))[0, len(text) - 1 : -1]
        expected = jax.nn.log_softmax(logits)[np.arange(5), np.array(ids)]
        np.testing.assert_allclose(logprobs, expected, rtol=1e-4)
    stop = answers[0].ids[2]
    stopped = generate(model, prompts(model, *texts), **options, stop_ids=(stop,), logprobs=True)
    kept = answers[0].ids.index(stop)
    assert stopped[0] == (answers[0].ids[:kept], answers[0].logprobs[:kept])


def test_each_sample_ends_at_its_stop_token(model):
    streams = prompts(model, [1, 2, 3], [4, 5, 6, 7, 8])
    free = generate(model, streams, max_new_tokens=6)
    assert [len(ids) for ids in free] == [6, 6]
    stop = free[0][2]
    stopped = generate(model, streams, max_new_tokens=6, stop_ids=(stop,))
    for ids, whole in zip(stopped, free, strict=True):
        assert ids == (whole[: whole.index(stop)] if stop in whole else whole)


def test_a_sample_answers_as_it_does_alone_and_empty_places_say_nothing(model):
    stream = plan_stream([1, 2, 3], [], window=model.config.window, ratio=4)
    long = plan_stream(np.arange(30), [], window=model.config.window, ratio=4)
    (alone,) = generate(model, batch_streams([stream]), max_new_tokens=5)
    together = generate(
        model, batch_streams([long, None, stream], windows_per_group=1), max_new_tokens=5
    )
    assert together[2] == alone
    assert together[1] == []


def test_nothing_is_compiled_from_token_to_token_or_for_another_length(model):
    shape = StreamShape(groups=1, tokens=24, memory=24, labels=1, beacons=0)
    list(stream_tokens(model, prompts(model, [1, 2], shape=shape), max_new_tokens=2))
    before = prefill._cache_size(), decode_step._cache_size()
    list(stream_tokens(model, prompts(model, [1] * 9, shape=shape), max_new_tokens=4))
    assert (prefill._cache_size(), decode_step._cache_size()) == before


def test_what_cannot_be_generated_is_refused(model):
    stream = plan_stream([1, IMAGE_TOKEN, 2], [8], window=model.config.window, ratio=4)
    streams, size = batch_streams([stream]), model.config.vision.image_size
    one_frame = np.zeros((1, 1, size, size, 3), np.uint8)
    for pixels, count in ((None, 0), (one_frame, 1)):
        with pytest.raises(ValueError, match=f"planned for 2 frames, pixels has {count}"):
            generate(model, streams, pixels, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, prompts(model, [1]), max_new_tokens=0)
    with pytest.raises(ValueError, match="capacity 2 is less than the 3 slots needed"):
        prefill(*nnx.split(model), prompts(model, [1, 2, 3]), None, 2)
