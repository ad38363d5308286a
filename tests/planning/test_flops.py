"""Counted operations against XLA's own count, the parameters of the 7B model, and brute force."""

import subprocess
import sys
from dataclasses import astuple, replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.config import Part, part_of
from vxl_jax.config import Compression, LanguageConfig, VideoXLConfig, VisionConfig
from vxl_jax.models.functions import decode_step, prefill
from vxl_jax.models.loss import loss_and_metrics
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn import vision
from vxl_jax.nn.backend import row_unit
from vxl_jax.nn.memory import empty_memory
from vxl_jax.planning.flops import (
    PARTS,
    Flops,
    PassSize,
    forward_flops,
    frame_flops,
    step_flops,
    stream_flops,
)
from vxl_jax.presets import video_xl_7b
from vxl_jax.stream.batch import StreamShape, batch_streams
from vxl_jax.stream.plan import NO_SLOT, plan_stream
from vxl_jax.text.template import IMAGE_TOKEN

I = IMAGE_TOKEN
WINDOW = 4

STREAMS = {
    "text": ([3, 1, 4, 1, 5, 9, 2, 6, 5], [], []),
    "video": ([1, 2, 3, I, 4, 5], [14], [2, 4, 1, None]),
    "images": ([7, I, 8, I, I, 9, 10, 3, 3, 3], [3, 8, 1], [2, 4, 3, 5]),
    "no text before": ([I, 5], [5], [3, None]),
    "nothing kept": ([I], [3], [9]),
}


def make_stream(name):
    ids, blocks, ratios = STREAMS[name]
    return plan_stream(ids, blocks, window=WINDOW, ratio=ratios, labels=ids)


# Work.


def visible_pairs(stream):
    """The rule itself, one pair after another."""
    window = np.repeat(np.arange(len(stream.window_start)), stream.window_lengths)
    persistent = stream.rank != NO_SLOT
    pairs = 0
    for query in range(stream.length):
        for key in range(query + 1):
            pairs += bool(persistent[key] or window[key] == window[query])
    return pairs


@pytest.mark.parametrize("name", STREAMS)
def test_pairs_are_those_that_the_rule_makes_visible(name):
    stream = make_stream(name)
    assert PassSize.of(stream).pairs == visible_pairs(stream)


def test_work_of_a_stream():
    stream = plan_stream([1, I, 2], [5], window=4, ratio=2, labels=[-100, -100, 2])
    # Windows of 1, 4 + 2, 1 and 1 tokens after 0, 1, 3 and 3 persistent ones.
    assert PassSize.of(stream, frames=5) == PassSize(5, 9, 2, 1 + (6 + 21) + (3 + 1) + (3 + 1), 1)
    assert PassSize.of(stream, prefill=True).logits == 1


@pytest.mark.parametrize("windows_per_group", [None, 1, 2])
@pytest.mark.parametrize("prefill", [False, True])
def test_a_batch_is_the_sum_of_its_streams(windows_per_group, prefill):
    streams = [make_stream(name) for name in STREAMS]
    places = [streams[0], None, *streams[1:], None]
    shape = batch_shape(streams, windows_per_group)
    batch = batch_streams(places, shape, windows_per_group)
    expected = sum((PassSize.of(s, prefill=prefill) for s in streams), PassSize(frames=7))
    assert PassSize.of(batch, 7, prefill=prefill) == expected


def batch_shape(streams, windows_per_group):
    shape = StreamShape.of(streams[0], windows_per_group)
    for stream in streams:
        shape = shape.union(StreamShape.of(stream, windows_per_group))
    return StreamShape(*(size + 3 for size in vars(shape).values()))


@pytest.mark.parametrize("at_once", [True, False])
def test_tokens_after_a_memory_are_the_rest_of_the_stream(at_once):
    before, after = plan_stream([1, 2, I], [8], window=4, ratio=2), [3, 4, 5]
    whole = plan_stream([1, 2, I, *after], [8], window=4, ratio=2)
    if at_once:
        rest = PassSize.of_text(3, before.persistent, logits=0)
    else:
        rest = sum(
            (PassSize.of_text(1, before.persistent + i, logits=0) for i in range(3)), PassSize()
        )
    assert PassSize.of(before) + rest == PassSize.of(whole)
    assert PassSize.of_text(3).logits == 3


@pytest.mark.parametrize(
    ("ratios", "ratio"), [((4, 8), 4), ((16, 8), 8), ((5,), 5), ((4, 8), None), ((), None)]
)
@pytest.mark.parametrize("frames", [0, 3, 12])
def test_a_shape_is_the_work_of_the_sample_it_was_made_for(ratios, ratio, frames):
    """Of a video and text behind it, nothing is lost by knowing the shape alone."""
    config = video_xl_7b(ratios=ratios)
    ids = [I] * bool(frames) + [1] * 30
    blocks = [config.layout.count(frames)] if frames else []
    stream = plan_stream(ids, blocks, window=config.window, ratio=ratio, labels=ids)
    one, shape = PassSize.of(stream, frames), StreamShape.of(stream)
    assert PassSize.of_shape(config, shape, frames) == one
    assert PassSize.of_shape(config, shape, frames, places=3) == one + one + one
    groups = replace(shape, groups=2, tokens=-(-shape.tokens // 2))
    assert PassSize.of_shape(config, groups, frames).tokens == 2 * groups.tokens


# Operations, against XLA. It counts the body of a loop once: one layer, one tile of attention.

CONFIG = VideoXLConfig(
    vision=VisionConfig(image_size=56, patch_size=14, width=256, layers=2, heads=2, mlp_width=384),
    language=LanguageConfig(
        vocab_size=640, width=256, layers=1, heads=2, kv_heads=1, mlp_width=320
    ),
    pool_stride=4,
    compression=Compression(WINDOW, (2, 4)),
    remat="none",
)


def xla_flops(function, *arguments):
    """Operations of the program before it is optimized: all of its products, on any device.

    The few per cent that it counts besides products are those of norms, softmax and the like.
    """
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def example(ratio, frames, text=6):
    """A batch of two samples, a video and text that is to be learned, and the pixels."""
    ids = [1] + [I] * bool(frames) + list(range(2, 2 + text))
    blocks = [CONFIG.layout.count(frames)] if frames else []
    stream = plan_stream(ids, blocks, window=WINDOW, ratio=ratio, labels=ids)
    pixels = jnp.zeros((2, frames, 56, 56, 3)) if frames else None
    return batch_streams([stream, stream]), pixels


def all_pairs(streams):
    """Pairs that the network computes for two samples in one tile: all, tokens in whole units."""
    unit = row_unit()
    tokens = -(-streams.kind.shape[-1] // unit) * unit
    return 2 * tokens * (tokens + streams.memory)


def split(trained):
    model = nnx.eval_shape(lambda: VideoXL(CONFIG, rngs=nnx.Rngs(0)))
    graph, *states = nnx.split(model, lambda path, _: part_of(path) in trained, ...)
    return graph, *map(nnx.to_pure_dict, states)


@pytest.fixture
def no_loop_over_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA counts the body of a loop once: the tower takes all frames at once, as on a mesh."""
    monkeypatch.setattr(vision, "is_one_cpu", lambda: False)


@pytest.mark.usefixtures("no_loop_over_frames")
def test_forward_pass_against_xla():
    for frames, text in ((8, 6), (0, 200)):
        streams, pixels = example(None, frames, text)
        graph, trained, frozen = split(())

        def loss(trained, frozen, streams, pixels, graph=graph):
            return loss_and_metrics(nnx.merge(graph, trained, frozen), streams, pixels)[0]

        measured = xla_flops(loss, trained, frozen, streams, pixels)
        work = replace(PassSize.of(streams, 2 * frames), pairs=all_pairs(streams))
        assert 1 < measured / forward_flops(CONFIG, work).total < 1.02


SETS = [
    ("vision", "projector", "language", "beacon"),
    ("vision",),
    ("projector",),
    ("language",),
    ("vision", "language"),
    ("beacon",),
    ("language", "beacon"),
]


@pytest.mark.usefixtures("no_loop_over_frames")
@pytest.mark.parametrize(
    ("trained", "frames"),
    # Beacons alone, in text alone: the network computes a gradient of zero that nobody needs.
    [
        (trained, frames)
        for trained in SETS
        for frames in (8, 0)
        if trained != ("beacon",) or frames
    ],
)
def test_training_against_xla(trained, frames):
    """Of every set of trained parts, with a video under compression and with text alone."""
    streams, pixels = example(2, 8) if frames else example(None, 0, text=150)
    graph, params, frozen = split(trained)

    def loss(params, frozen, streams, pixels):
        return loss_and_metrics(nnx.merge(graph, params, frozen), streams, pixels)[0]

    measured = xla_flops(jax.value_and_grad(loss), params, frozen, streams, pixels)
    work = PassSize.of(streams, 2 * frames)
    step = step_flops(CONFIG, replace(work, pairs=all_pairs(streams)), trained)
    c = CONFIG.language
    expected = step.total
    if step.backward.total:
        expected += all_pairs(streams) * 2 * c.width  # scores are made again
    if frames:  # and both kinds of projections of all tokens, where each needs one
        qkv = 2 * c.width * (c.width + 2 * c.kv_heads * c.head_size)
        text = work.tokens - work.beacons
        backward = work.tokens + ("language" in trained) * work.beacons
        expected += qkv * (work.tokens + backward + ("beacon" in trained) * text)
    assert 1 < measured / expected < 1.02


def test_prefill_and_decoding_against_xla():
    graph, params = nnx.split(nnx.eval_shape(lambda: VideoXL(CONFIG, rngs=nnx.Rngs(0))))
    streams = batch_streams([plan_stream(range(64), [], window=64, ratio=None)] * 2)
    measured = prefill.lower(graph, params, streams, None, 64).cost_analysis()["flops"]
    work = replace(PassSize.of(streams, prefill=True), pairs=all_pairs(streams))
    assert 1 < measured / forward_flops(CONFIG, work).total < 1.04

    memory = jax.eval_shape(lambda: empty_memory(CONFIG, 2, 64))
    token = jax.ShapeDtypeStruct((2,), jnp.int32)
    measured = decode_step.lower(graph, params, memory, token).cost_analysis()["flops"]
    one = PassSize.of_text(1, 64)
    assert 1 < measured / forward_flops(CONFIG, one + one).total < 1.04


# The 7B model.


def kernels(module):
    """Weights of a module that products use."""
    flat = nnx.to_flat_state(nnx.state(module))
    return sum(leaf.size for path, leaf in flat if path[-1] == "kernel")


@pytest.fixture(scope="module")
def big():
    return nnx.eval_shape(lambda: VideoXL(video_xl_7b(), rngs=nnx.Rngs(0)))


def test_two_operations_a_weight_and_token(big):
    config = video_xl_7b()
    attention = big.language.layers.attention
    beacon = sum(map(kernels, (attention.beacon_q, attention.beacon_k, attention.beacon_v)))
    streams = stream_flops(config, PassSize(tokens=1000, logits=10))
    assert streams.language == 2 * 1000 * (kernels(big.language.layers) - beacon)
    assert streams.head == 2 * 10 * kernels(big.language.head)
    frame = frame_flops(config)
    assert frame.projector == 2 * 576 * kernels(big.projector)
    embedding, layers = kernels(big.vision.patch_embed), kernels(big.vision.layers)
    attention = 23 * 4 * 577**2 * 1024
    assert frame.vision == 2 * (576 * embedding + 577 * layers) + attention


def test_sizes_of_the_published_model():
    """By hand: 6.5 billion weights in the layers, 0.3 in the tower."""
    config = video_xl_7b()
    ids = [1] * 14 + [I] + [1] * 50
    stream = plan_stream(ids, [128 * 144], window=config.window, ratio=16)
    flops = forward_flops(config, PassSize.of(stream, 128, prefill=True))
    assert flops.vision == pytest.approx(128 * 577 * 2 * 0.29e9, rel=0.1)
    assert flops.language == pytest.approx(19648 * 2 * 6.5e9, rel=0.02)
    # On average a token sees half its window and 546 entries of the memory.
    assert flops.attention == pytest.approx(28 * 4 * 3584 * 19648 * (756 + 546), rel=0.005)
    assert flops.head == 2 * 3584 * 152064


def ratio(trained, work, **options):
    step = step_flops(video_xl_7b(), work, trained, **options)
    return step.total / step.forward.total


def test_training_costs_what_is_trained():
    video = PassSize(frames=64, tokens=11000, beacons=1152, pairs=10**7, logits=100)
    text = PassSize(tokens=1000, pairs=500_500, logits=1000)
    full = ("vision", "projector", "language", "beacon")
    # All but the gradient of pixels.
    assert ratio(full, video) == pytest.approx(3, rel=2e-3)
    assert ratio(full, text) == 3
    # Frozen weights need no gradient: two thirds, and attention three.
    assert 2 < ratio(("lora",), text, lora_parameters=40_370_176) < 2.05
    # No gradient reaches the tower.
    assert 1.5 < ratio(("projector",), video) < 2
    assert ratio(("language",), video) < ratio(full, video)
    # What takes no part is not taught.
    for trained in ((), ("vision",), ("projector",), ("beacon",), ("vision", "beacon")):
        assert ratio(trained, text) == 1


def test_parts_add_up():
    """Projections of a stream are trained by those who have them: text, or beacons."""
    work = PassSize(frames=2, tokens=300, beacons=32, pairs=9000, logits=5)
    backward = {
        trained: step_flops(CONFIG, work, trained).backward
        for trained in (("beacon",), ("language",), ("language", "beacon"))
    }
    both = step_flops(CONFIG, replace(work, beacons=300), ("beacon",)).backward.language
    one, other, together = (flops.language for flops in backward.values())
    activations = stream_flops(CONFIG, work).language
    assert together == 2 * activations
    assert one - activations == (both - activations) * 32 // 300
    assert one + other == together + activations
    forward = forward_flops(CONFIG, work)
    assert forward.total == sum(astuple(forward))
    assert astuple(forward)[:2] == tuple(2 * x for x in astuple(frame_flops(CONFIG))[:2])


def test_adapters():
    """Two products a number and token; twice that backward, half of it where they are frozen."""
    work = PassSize(tokens=10, pairs=55)
    step = step_flops(CONFIG, work, ("lora",), lora_parameters=7)
    assert step.forward.lora == 140
    assert step.backward.lora == 280
    step = step_flops(CONFIG, work, ("language",), lora_parameters=7)
    assert step.backward.lora == 140


def test_nothing_trained_and_unknown_parts():
    work = PassSize(frames=1, tokens=10)
    assert step_flops(CONFIG, work, ()).backward == Flops()
    with pytest.raises(ValueError, match=r"tower.*vision"):
        step_flops(CONFIG, work, ("tower",))
    assert step_flops(CONFIG, PassSize(), PARTS).total == 0


def test_training_has_no_other_parts():
    assert set(get_args(Part)) <= set(PARTS)


def test_no_jax():
    """A planning tool on a laptop starts in no time."""
    code = "import sys; from vxl_jax.planning import cards, flops; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
