"""Activations on request, layer hooks, other vision towers, and modes of differentiation."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.networks import noisy_model, relative_error, training_sample
from vxl_jax.errors import ArgumentError, ConfigError
from vxl_jax.models.loss import loss_and_metrics
from vxl_jax.models.video_xl import VideoXL, scan_groups
from vxl_jax.nn.collect import Collect
from vxl_jax.nn.memory import empty_memory
from vxl_jax.presets import tiny
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import plan_stream
from vxl_jax.text.template import IMAGE_TOKEN

pytestmark = pytest.mark.usefixtures("exact_products")

STREAM = plan_stream([1, 2, IMAGE_TOKEN, 4, 5], [40], window=16, ratio=[2, 8, 4])


@pytest.fixture(scope="module")
def model():
    return noisy_model()


@pytest.fixture(scope="module")
def visual(model):
    shape = (1, 40, model.config.language.width)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@partial(nnx.jit, static_argnames=("collect", "layer_fn"))
def run(model, streams, visual, collect=None, layer_fn=None):
    return model(streams, visual, collect=collect, layer_fn=layer_fn)


def layers_of(model):
    return range(model.config.language.layers)


@pytest.mark.parametrize("remat", ["full", "none"])
def test_collected_hidden_states_are_those_of_a_loop_over_layers(remat, visual):
    model = noisy_model(tiny(remat=remat))
    streams = batch_streams([STREAM])
    layers = tuple(reversed(layers_of(model)))
    hidden, collected = run(model, streams, visual, Collect(hidden=layers))
    assert collected.attention is None
    assert collected.hidden.shape == (1, len(layers), *hidden.shape)
    np.testing.assert_array_equal(collected.hidden[0, 0], hidden)  # the last layer's
    np.testing.assert_array_equal(hidden, run(model, streams, visual))
    for place, layer in enumerate(layers):
        shallow = truncated(model, layer + 1)
        expected = run(shallow, streams, visual)
        assert relative_error(collected.hidden[0, place], expected) < 1e-6
    some = run(model, streams, visual, Collect(hidden=(1,)))[1]
    np.testing.assert_array_equal(some.hidden[:, 0], collected.hidden[:, layers.index(1)])


def truncated(model, layers):
    """The same model with its first layers alone."""
    language = replace(model.config.language, layers=layers)
    config = replace(model.config, language=language)
    state = nnx.to_pure_dict(nnx.state(model))
    stack = state["language"]["layers"]
    state["language"]["layers"] = jax.tree.map(lambda x: x[:layers], stack)
    graph = nnx.graphdef(nnx.eval_shape(lambda: VideoXL(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, state)


def test_activations_do_not_depend_on_groups(model, visual):
    collect = Collect(hidden=(0, 2), attention=(1,))
    _, whole = run(model, batch_streams([STREAM]), visual, collect)
    streams = batch_streams([STREAM], windows_per_group=1)
    _, parts = run(model, streams, visual, collect)
    slots = streams.memory
    ends = np.append(STREAM.window_start, STREAM.length)
    for i, (start, stop) in enumerate(pairwise(ends)):
        ours = parts.hidden[i, :, :, : stop - start]
        assert relative_error(ours, whole.hidden[0, :, :, start:stop]) < 1e-5
        weights = parts.attention[i, 0, 0, :, : stop - start]
        expected = whole.attention[0, 0, 0, :, start:stop]
        np.testing.assert_allclose(weights[..., :slots], expected[..., :slots], atol=1e-5)
        own, all_tokens = weights[..., slots:], expected[..., slots:]
        np.testing.assert_allclose(own[..., : stop - start], all_tokens[..., start:stop], atol=1e-5)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_attention_weights_of_a_base_and_a_memory_are_those_of_one_memory(model, visual):
    """Text behind a memory: first the slots of the memory, then those of the base."""
    question = plan_stream([7, 8, 9], [], window=16, ratio=None, before=STREAM.persistent)
    question = batch_streams([question])
    collect = Collect(attention=(0, 2))

    @nnx.jit
    def both(model, visual):
        first = batch_streams([STREAM])
        _, memory, _ = scan_groups(model, first, visual, empty_memory(model.config, 1, 24))
        one = scan_groups(model, question, None, memory, collect=collect)
        own = empty_memory(model.config, 1, 5)
        return one[2], scan_groups(model, question, None, own, (memory,), collect=collect)[2]

    one, parted = both(model, visual)
    kept = STREAM.persistent
    np.testing.assert_allclose(
        parted.attention[..., 5 : 5 + kept], one.attention[..., :kept], atol=1e-6
    )
    np.testing.assert_allclose(parted.attention[..., -3:], one.attention[..., -3:], atol=1e-6)
    assert float(one.attention[..., :kept].sum()) > 1


def test_gradients_flow_through_what_is_collected(model, visual):
    """Of hidden states in the middle: those of the layers before alone."""
    streams = batch_streams([STREAM])
    graph, params = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(params):
        merged = nnx.merge(graph, params)
        _, collected = merged(streams, visual, collect=Collect(hidden=(1,), attention=(2,)))
        return (collected.hidden**2).sum()

    ours = nnx.to_pure_dict(gradient(params))["language"]["layers"]["mlp"]["up"]["kernel"]
    assert [bool(jnp.any(layer != 0)) for layer in ours] == [True, True, False]


@pytest.mark.parametrize("layers", [(3,), (-1,), (0, 0)])
def test_layers_that_do_not_exist_or_repeat_are_refused(layers, model):
    streams = batch_streams([plan_stream([1], [], window=16, ratio=None)])
    for name in ("hidden", "attention"):
        with pytest.raises(ArgumentError, match=f"Collect.{name}: .*layers from 0 to 2"):
            model(streams, collect=Collect(**{name: layers}))


@pytest.mark.parametrize("windows_per_group", [None, 1])
def test_patching_a_layer_changes_it_and_later_ones_alone(windows_per_group, model, visual):
    streams = batch_streams([STREAM], windows_per_group=windows_per_group)
    layers = tuple(layers_of(model))
    direction = np.random.default_rng(1).normal(size=visual.shape[2]).astype(np.float32)

    def steer(x, layer):
        return jnp.where(layer == 1, x + direction, x)

    _, plain = run(model, streams, visual, Collect(hidden=layers, attention=layers))
    hidden, steered = run(model, streams, visual, Collect(hidden=layers, attention=layers), steer)
    np.testing.assert_array_equal(steered.hidden[:, 0], plain.hidden[:, 0])
    np.testing.assert_array_equal(steered.attention[:, :2], plain.attention[:, :2])
    np.testing.assert_allclose(steered.hidden[:, 1], plain.hidden[:, 1] + direction, atol=1e-5)
    assert relative_error(steered.hidden[:, 2], plain.hidden[:, 2]) > 1e-2
    assert relative_error(steered.attention[:, 2], plain.attention[:, 2]) > 1e-3
    np.testing.assert_array_equal(hidden, run(model, streams, visual, layer_fn=steer))


def test_nothing_asked_for_costs_nothing(model, visual):
    """The program is the same as with neither argument, and no larger than a layer's scan."""
    graph, params = nnx.split(model)
    streams = batch_streams([STREAM])

    def bytes_of(collect):
        def forward(params):
            return nnx.merge(graph, params)(streams, visual, collect=collect)

        return jax.jit(forward).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(Collect()) == bytes_of(None) < bytes_of(Collect(attention=(0, 1, 2)))


class MeanColour(nnx.Module):
    """A tower with another idea of features: the mean colour of each patch, as width features."""

    def __init__(self, config, rngs):
        self.grid = config.tower.grid
        self.out = nnx.Linear(3, config.tower.width, rngs=rngs)

    def __call__(self, pixels):
        x = pixels.astype(jnp.float32) / 255
        size = pixels.shape[1] // self.grid
        x = x.reshape(len(x), self.grid, size, self.grid, size, 3).mean((2, 4))
        return self.out(x.reshape(len(x), self.grid**2, 3))


def test_another_tower_encodes_and_is_trained():
    config = tiny()
    tower = MeanColour(config, nnx.Rngs(1))
    model = VideoXL(config, rngs=nnx.Rngs(0), vision=tower)
    stream, pixels = training_sample(model)
    expected = model.projector(tower(pixels[0]))
    assert expected.shape[1] == config.layout.count(1)
    np.testing.assert_allclose(
        model.encode(pixels)[0], expected.reshape(-1, expected.shape[-1]), atol=1e-6
    )
    graph, params = nnx.split(model)
    gradient = jax.jit(
        jax.grad(
            lambda p: loss_and_metrics(nnx.merge(graph, p), batch_streams([stream]), pixels)[0]
        )
    )(params)
    assert float(jnp.abs(gradient["vision"]["out"]["kernel"][...]).max()) > 0

    assigned = noisy_model()
    before = assigned.encode(pixels)
    assigned.vision = tower
    assert relative_error(assigned.encode(pixels), before) > 0.1


def test_a_tower_needs_a_configuration_of_its_size():
    config = tiny()
    tower = MeanColour(config, nnx.Rngs(1))
    with pytest.raises(ConfigError, match=r"VideoXLConfig\.vision: None, but a tower is given"):
        VideoXL(replace(config, vision=None), rngs=nnx.Rngs(0), vision=tower)


@pytest.mark.parametrize("windows_per_group", [None, 1])
def test_forward_mode_and_hessian_products_of_the_whole_model(windows_per_group, model):
    """With dense attention: against reverse mode along a random direction."""
    model = nnx.clone(model)
    stream, pixels = training_sample(model)
    streams = batch_streams([stream], windows_per_group=windows_per_group)
    graph, params = nnx.split(model)
    rng = np.random.default_rng(3)
    step = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)

    def loss(graph, params):
        return loss_and_metrics(nnx.merge(graph, params), streams, pixels)[0]

    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(partial(loss, graph), (params,), (step,))

    def dot(a, b):
        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), a, b)))

    model.language.layers.attention.implementation = "dense"
    dense = partial(loss, nnx.split(model)[0])
    value, slope = jax.jit(lambda p: jax.jvp(dense, (p,), (step,)))(params)
    expected_value, gradient = jax.jit(jax.value_and_grad(partial(loss, graph)))(params)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-6)
    assert float(slope) == pytest.approx(float(dot(gradient, step)), rel=1e-4)

    _, forward = jax.jit(lambda p: jax.jvp(jax.grad(dense), (p,), (step,)))(params)
    h = 1e-4
    moved = (jax.tree.map(lambda x, s: x + sign * h * s, params, step) for sign in (1, -1))  # noqa: B023
    ahead, behind = map(jax.jit(jax.grad(dense)), moved)
    differences = jax.tree.map(lambda a, b: (a - b) / (2 * h), ahead, behind)
    assert float(dot(forward, step)) == pytest.approx(float(dot(differences, step)), rel=2e-2)


def test_implementation_of_attention_is_an_argument_of_the_model(model):
    def graph_of(attention):
        return nnx.split(
            nnx.eval_shape(lambda: VideoXL(tiny(), rngs=nnx.Rngs(0), attention=attention))
        )[0]

    # It is part of the graph: another program is compiled for another implementation.
    assert graph_of("dense") != graph_of(None) == graph_of(None)
    streams = batch_streams([STREAM])
    with pytest.raises(ValueError, match="implementation: 'flash'; use one of dense, tiled"):
        jax.eval_shape(lambda: VideoXL(tiny(), rngs=nnx.Rngs(0), attention="flash")(streams))
