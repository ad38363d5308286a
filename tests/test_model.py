"""The network against an independent NumPy implementation, and invariants no reference can give."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.oracle import Oracle
from vxl_jax import attention, language
from vxl_jax import model as model_module
from vxl_jax.config import tiny
from vxl_jax.language import make_group
from vxl_jax.memory import empty_memory
from vxl_jax.model import (
    VideoXL,
    decode_step,
    loss_and_metrics,
    prefill,
    scan_groups,
    take_group,
)
from vxl_jax.names import to_published
from vxl_jax.stream import IGNORE, IMAGE_TOKEN, PAD, StreamShape, batch_streams, plan_stream

pytestmark = pytest.mark.usefixtures("exact_products")

I = IMAGE_TOKEN


@pytest.fixture(scope="module")
def model():
    """Random biases, norms and beacon parameters too, so that no swap goes unseen."""
    graph, state = nnx.split(nnx.jit(lambda: VideoXL(tiny(), rngs=nnx.Rngs(0)))())
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
    rng = np.random.default_rng(1)
    noisy = [x + 0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return nnx.merge(graph, jax.tree.unflatten(tree, noisy))


def graph_of(**changes):
    """Graph of a tiny model, to be merged with parameters; nothing is computed."""
    return nnx.graphdef(nnx.eval_shape(lambda: VideoXL(tiny(**changes), rngs=nnx.Rngs(0))))


@nnx.jit
def encode(model, pixels):
    return model.encode(pixels)


@nnx.jit
def watch(model, streams, visual):
    memory = empty_memory(model.config, streams.kind.shape[1], 64)
    return scan_groups(model, streams, visual, memory, keep_hidden=False)


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


def error(ours, expected):
    assert ours.shape == expected.shape
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", STREAMS)
def test_logits_equal_the_oracle(name, model):
    expected, _ = oracle_logits(name, model)
    (ours,) = our_logits(model, [name])
    assert error(ours, expected) < 1e-5


@pytest.mark.parametrize("name", ["video", "images with text between", "long text"])
@pytest.mark.parametrize("windows_per_group", [1, 2, 3])
def test_windows_per_group_do_not_matter(name, windows_per_group, model):
    (expected,) = our_logits(model, [name])
    (ours,) = our_logits(model, [name], windows_per_group)
    assert error(ours, expected) < 1e-5


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
            assert error(ours, expected) < 1e-5


def test_padding_features_do_not_matter(model):
    """Whatever stands in the padding of ids, features or pixels, no result changes."""
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
        assert error(ours.swapaxes(0, 1), oracle.values[layer]) < 1e-5
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
    assert error(np.array(ours), expected) < 1e-5


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
            x, keys, values = one(x, arrays, keys, values, layer)
        return model.logits(x)

    assert (
        error(np.asarray(loop(model, batch, visual)), np.asarray(run(model, batch, visual))) < 1e-5
    )


def gradients(model, streams, pixels):
    graph, params = nnx.split(model)

    def loss(params):
        total, metrics = loss_and_metrics(nnx.merge(graph, params), streams, pixels)
        return total / metrics["tokens"]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), nnx.to_pure_dict(grads)


def training_sample(model, frames=10, seed=0):
    rng = np.random.default_rng(seed)
    labels = [IGNORE, IGNORE, IGNORE, 4, 5]
    stream = plan_stream(
        [1, 2, I, 4, 5],
        [frames * model.config.tokens_per_frame],
        window=model.config.window,
        ratio=[2, 8, 4],
        labels=labels,
    )
    size = model.config.vision.image_size
    return stream, rng.integers(0, 256, (1, frames, size, size, 3), np.uint8)


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


def test_bfloat16_runs_close_to_float32(model):
    stream, pixels = training_sample(model)
    graph = graph_of(dtype="bfloat16", param_dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.to_pure_dict(nnx.state(model)))
    half = nnx.merge(graph, params)
    rounded = nnx.merge(graph_of(), jax.tree.map(lambda x: x.astype(jnp.float32), params))
    loss, expected = gradients(rounded, batch_streams([stream]), pixels)
    ours, grads = gradients(half, batch_streams([stream]), pixels)
    assert ours == pytest.approx(loss, rel=0.02)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))
    for part in ("vision", "projector", "language"):
        pairs = zip(jax.tree.leaves(grads[part]), jax.tree.leaves(expected[part]), strict=True)
        a, b = zip(*((np.float32(a).ravel(), b.ravel()) for a, b in pairs), strict=True)
        a, b = np.concatenate(a), np.concatenate(b)
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b), part
    visual = encode(half, pixels)
    assert visual.dtype == jnp.bfloat16
    assert run(half, batch_streams([stream]), visual).dtype == jnp.float32


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
    assert error(np.asarray(features), np.asarray(expected)) < 1e-5
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
        model_module, "LOGITS_BYTES", 4 * 3 * model.config.language.vocab_size * labels
    )
    (loss, metrics), gradient = run()
    assert metrics == expected_metrics
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


TILES = [(1, 1), (3, 5), (8, 4), (7, 32), (64, 64)]


def dense_attention(q, k, v, keys, values, window_start, window_memory):
    """Softmax over the whole row of scores, in NumPy's float64."""
    group = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        own, past = slice(window_start[b, t], t + 1), slice(window_memory[b, t])
        seen = np.concatenate([k[b, own, n // group], keys[b, n // group, past]])
        p = np.exp(seen.astype(np.float64) @ q[b, t, n] / np.sqrt(q.shape[3]))
        read = np.concatenate([v[b, own, n // group], values[b, n // group, past]])
        out[b, t, n] = p @ read / p.sum()
    return out


def attention_case(tokens=30, slots=13):
    """Two samples whose windows differ, the second with padding (windows of one token) behind."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, tokens, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, tokens, 2, 8)).astype(np.float32)
    keys, values = rng.normal(size=(2, 3, 2, 2, slots, 8)).astype(np.float32)
    start = np.array([[0] * 10 + [10] * 13 + [23] * 7, [0] * 4 + [4] * 20 + [*range(24, 30)]])
    seen = np.array([[0] * 10 + [5] * 13 + [12] * 7, [0] * 4 + [3] * 20 + [0] * 6])
    return (q, k, v, keys, values), (1, start.astype(np.int32), seen.astype(np.int32))


@pytest.mark.parametrize("tile", TILES)
def test_attention_by_tiles_equals_a_softmax_over_whole_rows(tile):
    (q, k, v, keys, values), (layer, start, seen) = attention_case()
    ours = attention.window_attention(q, k, v, keys, values, layer, start, seen, tile)
    expected = dense_attention(q, k, v, keys[layer], values[layer], start, seen)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("tile", TILES)
def test_gradients_of_attention_are_those_of_a_softmax_over_whole_rows(tile):
    arrays, (layer, start, seen) = attention_case()
    direction = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)

    def ours(*arrays):
        return (attention.window_attention(*arrays, layer, start, seen, tile) * direction).sum()

    def whole_rows(q, k, v, keys, values):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        keys, values = (jnp.repeat(x[layer], 2, axis=1) for x in (keys, values))
        own = jnp.einsum("BTNH,BSNH->BNTS", q, k)
        past = jnp.einsum("BTNH,BNMH->BNTM", q, keys)
        index = jnp.arange(own.shape[-1])
        own_seen = (start[..., None] <= index) & (index <= index[:, None])
        past_seen = jnp.arange(past.shape[-1]) < seen[..., None]
        scores = jnp.concatenate([own, past], -1) / np.sqrt(q.shape[-1])
        visible = jnp.concatenate([own_seen, past_seen], -1)[:, None]
        p = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        values = jnp.concatenate([jnp.moveaxis(v, 1, 2), values], axis=2)
        return (jnp.einsum("BNTS,BNSH->BTNH", p, values) * direction).sum()

    wanted = range(len(arrays))
    expected = jax.jit(jax.grad(whole_rows, wanted))(*arrays)
    for a, b in zip(jax.jit(jax.grad(ours, wanted))(*arrays), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("source", ["memory", "own window"])
def test_tiles_that_nobody_sees_are_not_computed(source):
    """A value that is NaN would spoil every query that computes with it, at whatever weight."""
    (q, k, v, keys, values), (layer, start, seen) = attention_case(slots=16)
    q, k, v, keys, values = q[:1], k[:1], v[:1], keys[:, :1], values[:, :1]
    start, seen = start[:1], seen[:1]

    # The queries from 24 on are in a window that starts at 23; nobody sees a slot from 12 on.
    queries = slice(24, 30) if source == "own window" else slice(0, 30)

    def total(q, k, v, keys, values):
        out = attention.window_attention(q, k, v, keys, values, layer, start, seen, (8, 4))
        return (out[:, queries] ** 2).sum()

    gradient = jax.jit(jax.value_and_grad(total))
    expected = gradient(q, k, v, keys, values)
    if source == "own window":
        k[:, :20], v[:, :20] = np.nan, np.nan
    else:
        keys[:, :, :, 12:], values[:, :, :, 12:] = np.nan, np.nan
    ours = gradient(q, k, v, keys, values)
    np.testing.assert_array_equal(ours[0], expected[0])
    np.testing.assert_array_equal(ours[1][:, queries], expected[1][:, queries])


def test_a_memory_without_slots():
    (q, k, v, keys, values), (layer, start, seen) = attention_case()
    none = keys[:, :, :, :0], values[:, :, :, :0]
    ours = attention.window_attention(q, k, v, *none, layer, start, 0 * seen)
    expected = dense_attention(q, k, v, keys[layer], values[layer], start, 0 * seen)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
