"""The network against an independent NumPy implementation, and invariants no reference can give."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.networks import gradients, graph_of, noisy_model, relative_error, training_sample
from tests.support.oracle import Oracle
from vxl_jax.checkpoints.names import to_published
from vxl_jax.models import loss as loss_module, video_xl as model_module
from vxl_jax.models.functions import decode_step, prefill
from vxl_jax.models.loss import loss_and_metrics
from vxl_jax.models.video_xl import scan_groups
from vxl_jax.nn import qwen2 as language
from vxl_jax.nn.attention.key_values import KeyValues
from vxl_jax.nn.groups import make_group, take_group
from vxl_jax.nn.memory import empty_memory
from vxl_jax.stream.batch import StreamShape, batch_streams
from vxl_jax.stream.plan import PAD, plan_stream
from vxl_jax.text.template import IGNORE, IMAGE_TOKEN

pytestmark = pytest.mark.usefixtures("exact_products")

I = IMAGE_TOKEN


@pytest.fixture(scope="module")
def model():
    return noisy_model()


@nnx.jit
def encode(model, pixels):
    return model.encode(pixels)


@nnx.jit
def watch(model, streams, visual):
    memory = empty_memory(model.config, streams.kind.shape[1], 64)
    return scan_groups(model, streams, visual, memory)[:2]


STREAMS = {
    "text": ([3, 1, 4, 1, 5, 9], [], []),
    "long text": (list(range(40)), [], []),
    "one image": ([1, I, 2, 3], [8], [4]),
    "video": ([1, 2, 3, I, 4, 5], [40], [2, 8, 4]),
    "no text before": ([I, 5], [20], [4, 4]),
    "images with text between": ([7, I, 8, I, 9, 10], [8, 24], [2, 4, 8]),
    "adjacent images": ([7, I, I, 9], [4, 8], [4, 2]),
    "several turns": ([1, I, 2, 3, 4, I, 5, 6], [16, 16], [8, 2]),
    "left-over tokens": ([1, I, 2], [29], [5, 3]),
    "uncompressed": ([1, I, 2, 3], [20], [None, None]),
    "ends in an image": ([1, I], [20], [4, 2]),
}


def make_stream(name, model, labels=None):
    ids, blocks, ratios = STREAMS[name]
    return plan_stream(ids, blocks, window=model.config.window, ratio=list(ratios), labels=labels)


def features(name, model, seed=0):
    count = sum(STREAMS[name][1])
    shape = (count, model.config.language.width)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def oracle_logits(name, model):
    ids, blocks, ratios = STREAMS[name]
    weights = to_published(nnx.to_pure_dict(nnx.state(model)), model.config)
    oracle, visual, ratios = Oracle(model.config, weights), features(name, model), list(ratios)
    blocks, text = list(blocks), []
    for token in [*ids, None]:
        if token not in (I, None):
            text.append(token)
            continue
        if text:
            oracle.text(text)
        text = []
        if token == I:
            count = blocks.pop(0)
            windows = -(-count // model.config.window)
            oracle.visual(visual[:count], model.config.window, ratios[:windows])
            visual, ratios = visual[count:], ratios[windows:]
    return oracle.logits(), oracle


@nnx.jit
def run(model, streams, visual):
    return model.logits(model(streams, visual))


def our_logits(model, names, windows_per_group=None, shape=None):
    """Logits of all tokens that are not beacons, a list with an array for each stream."""
    streams = [make_stream(name, model) for name in names]
    batch = batch_streams(streams, shape, windows_per_group)
    most = max(8, *(sum(STREAMS[name][1]) for name in names))
    visual = np.zeros((len(names), most, model.config.language.width), np.float32)
    for i, name in enumerate(names):
        rows = features(name, model)
        visual[i, : len(rows)] = rows
    logits = np.asarray(run(model, batch, visual))
    kinds = np.moveaxis(batch.kind, 1, 0).reshape(len(names), -1)
    return [rows[(kind == 0) | (kind == 1)] for rows, kind in zip(logits, kinds, strict=True)]


@pytest.mark.parametrize("name", STREAMS)
def test_logits_equal_the_oracle(name, model):
    expected, _ = oracle_logits(name, model)
    (ours,) = our_logits(model, [name])
    assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize("name", ["video", "images with text between", "long text"])
@pytest.mark.parametrize("windows_per_group", [1, 2, 3])
def test_windows_per_group_do_not_matter(name, windows_per_group, model):
    (expected,) = our_logits(model, [name])
    (ours,) = our_logits(model, [name], windows_per_group)
    assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize("windows_per_group", [None, 1])
def test_batch_neighbours_and_padding_do_not_matter(windows_per_group, model):
    names = ["text", "video", "adjacent images", "uncompressed"]
    alone = [our_logits(model, [name])[0] for name in names]
    shapes = [StreamShape.of(make_stream(name, model), windows_per_group) for name in names]
    wide = shapes[0]
    for shape in shapes:
        wide = wide.union(shape)
    wide = StreamShape(*(size + 3 for size in vars(wide).values()))
    for shape in (None, replace(wide, beacons=1)):
        together = our_logits(model, names, windows_per_group, shape)
        for ours, expected in zip(together, alone, strict=True):
            assert relative_error(ours, expected) < 1e-5


def test_padding_features_do_not_matter(model):
    """The values in the padding of ids, features or pixels change no result."""
    stream = make_stream("video", model)
    shape = StreamShape.of(stream).padded(1)
    batch = batch_streams([stream], shape)
    visual = np.zeros((1, 64, model.config.language.width), np.float32)
    visual[0, :40] = features("video", model)
    expected = np.asarray(run(model, batch, visual))[0, : stream.length]
    visual[0, 40:] = 1e3
    source = np.where(batch.kind == PAD, 55, batch.source)
    ours = np.asarray(run(model, replace(batch, source=source), visual))[0, : stream.length]
    np.testing.assert_array_equal(ours, expected)


def test_memory_equals_the_oracle(model):
    _, oracle = oracle_logits("images with text between", model)
    stream = make_stream("images with text between", model)
    visual = features("images with text between", model)[None]
    batch = batch_streams([stream], windows_per_group=2)
    _, memory = watch(model, batch, visual)
    assert int(memory.length[0]) == stream.persistent
    for layer in range(model.config.language.layers):
        ours = np.asarray(memory.values[layer, 0, :, : stream.persistent])
        assert relative_error(ours.swapaxes(0, 1), oracle.values[layer]) < 1e-5
    assert not np.asarray(memory.keys[:, :, :, stream.persistent :]).any()


@pytest.mark.parametrize("name", ["text", "video", "adjacent images"])
def test_cached_decoding_equals_one_forward_pass(name, model):
    graph, params = nnx.split(model)
    new = [11, 12, 13, 14]
    ids, blocks, ratios = STREAMS[name]
    whole = plan_stream([*ids, *new], blocks, window=model.config.window, ratio=list(ratios))
    visual = features(name, model)[None] if blocks else None
    expected = np.asarray(run(model, batch_streams([whole]), visual))[0, -len(new) - 1 :]

    streams = batch_streams([make_stream(name, model)], windows_per_group=1)
    hidden, memory = watch(model, streams, visual)
    ours = [np.asarray(model.logits(hidden[0, streams.last[0]]))]
    for token in new:
        logits, memory = decode_step(graph, params, memory, jnp.array([token], jnp.int32))
        ours.append(np.asarray(logits[0]))
    assert relative_error(np.array(ours), expected) < 1e-5


def test_scan_over_layers_equals_a_python_loop(model):
    stream = make_stream("video", model)
    batch = batch_streams([stream])
    visual = features("video", model)[None]

    @nnx.jit
    def loop(model, batch, visual):
        group = take_group(batch, 0)
        x = model.language.embed_group(group, visual)
        arrays = make_group(model.config.language, group)
        graph, params = nnx.split(model.language.layers)
        memory = empty_memory(model.config, 1, batch.memory)
        keys, values = memory.keys, memory.values
        for layer in range(model.config.language.layers):
            one = nnx.merge(graph, jax.tree.map(lambda p: p[layer], params))  # noqa: B023
            own = KeyValues(keys, values, layer, arrays.window_memory)
            x, own = one(x, arrays, (own,))
            keys, values = own.keys, own.values
        return model.logits(x)

    expected = run(model, batch, visual)
    assert relative_error(loop(model, batch, visual), expected) < 1e-5


def test_gradients_do_not_depend_on_groups_remat_or_padding(model):
    stream, pixels = training_sample(model)
    loss, expected = gradients(model, batch_streams([stream]), pixels)

    def kept(remat: str) -> Any:
        return nnx.merge(graph_of(remat=remat), nnx.to_pure_dict(nnx.state(model)))

    for other, streams in {
        "groups": (model, batch_streams([stream], windows_per_group=1)),
        "nothing again": (kept("none"), batch_streams([stream])),
        "products kept": (kept("products"), batch_streams([stream])),
        "padding": (model, batch_streams([stream], StreamShape.of(stream).padded(1))),
    }.values():
        ours_loss, ours = gradients(other, streams, pixels)
        assert ours_loss == pytest.approx(loss, rel=1e-5)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-6


def test_an_mlp_may_take_its_tokens_in_turns(model, monkeypatch):
    stream, pixels = training_sample(model)
    loss, expected = gradients(model, batch_streams([stream]), pixels)
    width = model.config.language.mlp_width * 4
    monkeypatch.setattr(language, "MLP_BYTES", 7 * width)  # the last turn is not full
    ours_loss, ours = gradients(model, batch_streams([stream]), pixels)
    assert ours_loss == pytest.approx(loss, rel=1e-5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-6


def test_gradients_equal_finite_differences_through_the_memory(model):
    """Along a random direction of all parameters: nothing is detached."""
    stream, pixels = training_sample(model)
    batch = batch_streams([stream])
    graph, params = nnx.split(model)
    _, grads = gradients(model, batch, pixels)
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(params))
    rng = np.random.default_rng(3)
    direction = [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]

    @jax.jit
    def loss(step):
        moved = [leaf + step * d for leaf, d in zip(leaves, direction, strict=True)]
        total, metrics = loss_and_metrics(
            nnx.merge(graph, jax.tree.unflatten(tree, moved)), batch, pixels
        )
        return total / metrics["tokens"]

    pairs = zip(jax.tree.leaves(grads), direction, strict=True)
    slope = sum(float((gradient * d).sum()) for gradient, d in pairs)
    h = 3e-4
    assert float(loss(h) - loss(-h)) / (2 * h) == pytest.approx(slope, rel=2e-2)


def test_loss_is_the_mean_over_labelled_tokens(model):
    stream, pixels = training_sample(model)
    streams = batch_streams([stream, None])
    total, metrics = nnx.jit(loss_and_metrics)(model, streams, np.repeat(pixels, 2, 0))
    assert int(metrics["tokens"]) == 2
    visual = encode(model, pixels)
    logits = np.asarray(run(model, batch_streams([stream]), visual))[0]
    targets = stream.target != IGNORE
    picked = logits[targets] - np.log(np.exp(logits[targets]).sum(-1, keepdims=True))
    expected = -picked[np.arange(2), stream.target[targets]].sum()
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_one_compilation_for_a_bucket(model):
    """Streams of other lengths, kinds and ratios in one padded shape run the same program."""
    graph, params = nnx.split(model)
    names = ["video", "several turns", "one image"]
    streams = [make_stream(name, model) for name in names]
    shape = StreamShape.of(streams[0])
    for stream in streams:
        shape = shape.union(StreamShape.of(stream))
    traces = []

    @jax.jit
    def forward(params, batch, visual):
        traces.append(1)
        return nnx.merge(graph, params)(batch, visual)

    visual = np.zeros((1, 40, model.config.language.width), np.float32)
    for stream in streams:
        forward(params, batch_streams([stream], shape), visual)
    assert len(traces) == 1

    before = prefill._cache_size(), decode_step._cache_size()
    for stream in streams:
        _, memory = prefill(graph, params, batch_streams([stream], shape), None, 61)
        for token in range(3):
            _, memory = decode_step(graph, params, memory, jnp.array([token], jnp.int32))
    assert prefill._cache_size() - before[0] == 1
    assert decode_step._cache_size() - before[1] == 1


def test_frames_encoded_in_blocks_give_the_same_features_and_gradients(model, monkeypatch):
    _, pixels = training_sample(model)
    graph, params = nnx.split(model)

    def run_both():
        def total(params):
            features = nnx.merge(graph, params).encode(pixels)
            return (features**2).sum(), features

        (_, features), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        return features, gradient

    expected, expected_gradient = run_both()
    frame_bytes = 4 * model.config.vision.heads * (model.config.vision.grid**2 + 1) ** 2
    monkeypatch.setattr(model_module, "FRAME_BLOCK_BYTES", 3 * frame_bytes)
    features, gradient = run_both()
    assert relative_error(np.asarray(features), np.asarray(expected)) < 1e-5
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("labels", [1, 3, 7])
def test_logits_made_a_few_labels_at_a_time_give_the_same_loss_and_gradients(
    labels, model, monkeypatch
):
    ids = np.arange(1, 24)
    lengths = (23, 9, 1)
    streams = batch_streams(
        [plan_stream(ids[:n], [], window=16, ratio=2, labels=ids[:n]) for n in lengths]
    )
    assert streams.label.shape == (3, 22)
    pixels = None
    graph, params = nnx.split(model)

    def run():
        def total(params):
            return loss_and_metrics(nnx.merge(graph, params), streams, pixels)

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    (expected, expected_metrics), expected_gradient = run()
    monkeypatch.setattr(
        loss_module, "LOGITS_BYTES", 4 * 3 * model.config.language.vocab_size * labels
    )
    (loss, metrics), gradient = run()
    assert metrics == expected_metrics
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
