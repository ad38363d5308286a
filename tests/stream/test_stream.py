"""The stream plan against literal arrays."""

from dataclasses import fields

import jax
import numpy as np
import pytest

from vxl_jax.nn import groups
from vxl_jax.stream.batch import StreamBatch, StreamShape, batch_streams, round_up
from vxl_jax.stream.plan import BEACON, NO_SLOT, PAD, TEXT, VISUAL, draw_ratio, plan_stream
from vxl_jax.text.template import IGNORE, IMAGE_TOKEN

X = int(NO_SLOT)


def test_text_and_one_compressed_block():
    stream = plan_stream(
        [7, 8, IMAGE_TOKEN, 9], [5], window=4, ratio=2, labels=[IGNORE, 8, IGNORE, 9]
    )
    assert stream.kind.tolist() == [0, 0, 1, 1, 2, 1, 1, 2, 1, 0]
    assert stream.source.tolist() == [7, 8, 0, 1, 0, 2, 3, 0, 4, 9]
    assert stream.rank.tolist() == [0, 1, X, X, 2, X, X, 3, X, 4]
    # The last visual token, not the beacon, predicts the text that follows.
    assert stream.target.tolist() == [8, -100, -100, -100, -100, -100, -100, -100, 9, -100]
    assert stream.window_start.tolist() == [0, 2, 8, 9]
    # Two persistent tokens before the first visual window, four before the second and the text.
    assert stream.window_memory.tolist() == [0, 2, 4, 4]
    assert stream.persistent == 5


def test_left_over_tokens_follow_the_last_beacon_without_one():
    stream = plan_stream([IMAGE_TOKEN], [9], window=9, ratio=4)
    assert stream.kind.tolist() == [1, 1, 1, 1, 2, 1, 1, 1, 1, 2, 1]


def test_ratio_over_the_window_keeps_nothing():
    stream = plan_stream([IMAGE_TOKEN, 1], [3], window=9, ratio=4)
    assert stream.kind.tolist() == [1, 1, 1, 0]
    assert stream.rank.tolist() == [X, X, X, 0]


def test_uncompressed_block_is_plain_qwen2():
    stream = plan_stream([5, IMAGE_TOKEN, 6], [3], window=2, ratio=None)
    assert stream.rank.tolist() == [0, 1, 2, 3, 4]
    assert stream.kind.tolist() == [TEXT, VISUAL, VISUAL, VISUAL, TEXT]


def test_blocks_have_their_own_windows_and_features_are_counted_through():
    stream = plan_stream([IMAGE_TOKEN, IMAGE_TOKEN, 3], [2, 2], window=9, ratio=2)
    assert stream.window_start.tolist() == [0, 3, 6]
    assert stream.source[stream.kind == VISUAL].tolist() == [0, 1, 2, 3]
    assert stream.window_memory.tolist() == [0, 1, 2]


def test_one_ratio_for_each_window():
    stream = plan_stream([IMAGE_TOKEN], [8], window=4, ratio=[2, 4])
    assert (stream.kind == BEACON).tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1]
    for ratios in ([2], [2, 4, 8]):
        with pytest.raises(ValueError, match=f"{len(ratios)} ratios given for 2 visual windows"):
            plan_stream([IMAGE_TOKEN], [8], window=4, ratio=ratios)


def test_long_text_is_cut_into_windows():
    cut = plan_stream(np.arange(7), [], window=3, ratio=2)
    assert cut.window_start.tolist() == cut.window_memory.tolist() == [0, 3, 6]
    assert cut.rank.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("ids", "visual", "message"),
    [
        ([1, IMAGE_TOKEN], [], "1 image marks in the token ids, 0 visual blocks given"),
        ([IMAGE_TOKEN], [0], "a visual block needs at least one token"),
        ([], [], "at least one token"),
    ],
)
def test_impossible_samples_are_refused(ids, visual, message):
    with pytest.raises(ValueError, match=message):
        plan_stream(ids, visual, window=4, ratio=2)
    with pytest.raises(ValueError, match="must be at least 1"):
        plan_stream([IMAGE_TOKEN], [4], window=4, ratio=0)
    with pytest.raises(ValueError, match="1 token ids but 2 labels"):
        plan_stream([1], [], window=4, ratio=2, labels=[1, 2])


def test_drawn_ratios_divide_the_window_where_one_does():
    draw = draw_ratio((2, 8, 12), np.random.default_rng(0))
    assert {draw(16) for _ in range(100)} == {2, 8}
    assert {draw(24) for _ in range(100)} == {2, 8, 12}
    assert {draw(9) for _ in range(100)} == {2, 8}  # none divides 9: those that do not exceed it
    assert draw(1) == 1
    assert draw_ratio((), np.random.default_rng(0))(16) is None


def test_ladder():
    assert [round_up(n, 1) for n in (1, 2, 3, 5, 8, 9)] == [1, 2, 4, 8, 8, 16]
    assert [round_up(n, 2) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert [round_up(n, 4) for n in (9, 10, 11, 1441)] == [10, 10, 12, 1536]
    for steps in (1, 2, 4, 8):
        assert all(n <= round_up(n, steps) <= n + -(-n // steps) for n in range(1, 500))
    for steps in (0, 3, 12):
        with pytest.raises(ValueError, match=f"steps: {steps}; it must be a power of two"):
            round_up(5, steps)


def test_batch_of_two_streams_in_groups_of_one_window():
    long = plan_stream([7, IMAGE_TOKEN, 9], [4], window=4, ratio=4, labels=[IGNORE, IGNORE, 9])
    short = plan_stream([5, 6], [], window=4, ratio=4, labels=[IGNORE, 6])
    batch = batch_streams([long, short], windows_per_group=1)
    assert batch.kind.shape == (3, 2, 5)
    assert batch.kind[:, 0].tolist() == [[0, 3, 3, 3, 3], [1, 1, 1, 1, 2], [0, 3, 3, 3, 3]]
    # Aligned at the last group: the short sample is padding before it.
    assert (batch.kind[:2, 1] == PAD).all()
    assert batch.kind[2, 1].tolist() == [0, 0, 3, 3, 3]
    assert batch.window_memory[:, 0].tolist() == [[0] * 5, [1] * 5, [2, 0, 0, 0, 0]]
    assert batch.last.tolist() == [0, 1]
    assert batch.length.tolist() == [3, 2]
    # The visual token before the beacon is token 8 of 15, its target is 9.
    assert batch.label_index.tolist() == [[8], [10]]
    assert batch.label.tolist() == [[9], [6]]


def test_every_token_knows_its_window_in_its_group():
    stream = plan_stream([7, IMAGE_TOKEN, 9], [4], window=2, ratio=2)
    batch = batch_streams([stream])
    assert batch.window_start[0, 0].tolist() == [0, 1, 1, 1, 4, 4, 4, 7]
    assert batch.window_memory[0, 0].tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
    batch = batch_streams([stream], windows_per_group=2)
    assert batch.window_start[:, 0].tolist() == [[0, 1, 1, 1], [0, 0, 0, 3]]
    assert batch.window_memory[:, 0].tolist() == [[0, 1, 1, 1], [2, 2, 2, 3]]
    # Padding is a separate window in each place.
    batch = batch_streams([stream, plan_stream([1], [], window=2, ratio=2)])
    assert batch.window_start[0, 1].tolist() == list(range(8))
    assert batch.window_memory[0, 1].tolist() == [0] * 8


def test_left_out_sample_is_all_padding():
    stream = plan_stream([1, 2], [], window=4, ratio=2)
    batch = batch_streams([None, stream])
    assert (batch.kind[:, 0] == PAD).all()
    assert (batch.label[0] == IGNORE).all()
    shape = StreamShape.of(stream)
    assert (batch_streams([None, None], shape).kind == PAD).all()
    with pytest.raises(ValueError, match="at least one sample"):
        batch_streams([None])


def test_a_stream_that_ends_in_an_image_is_read_at_its_last_raw_token():
    batch = batch_streams([plan_stream([1, IMAGE_TOKEN], [4], window=4, ratio=4)])
    assert batch.kind[0, 0].tolist() == [0, 1, 1, 1, 1, 2]
    assert batch.last.tolist() == [4]


def test_windows_per_group_is_checked():
    stream = plan_stream([1], [], window=4, ratio=2)
    for number in (0, -1):
        with pytest.raises(ValueError, match="windows_per_group is"):
            batch_streams([stream], windows_per_group=number)


def test_too_small_a_shape_is_refused():
    stream = plan_stream([1, 2, 3], [], window=4, ratio=2)
    small = StreamShape.of(plan_stream([1], [], window=4, ratio=2))
    with pytest.raises(ValueError, match="a stream needs"):
        batch_streams([stream], small)


def test_arrays_of_a_batch_are_leaves_and_its_sizes_are_static():
    """By name, not by annotation; `vxl_jax.nn.groups` registers them."""
    assert groups
    batch = batch_streams([plan_stream([1, IMAGE_TOKEN], [4], window=4, ratio=4)])
    leaves, structure = jax.tree_util.tree_flatten_with_path(batch)
    names = {path[0].name for path, _ in leaves}
    assert names == {field.name for field in fields(StreamBatch)} - {"memory", "has_beacons"}
    assert names == {name for name, x in vars(batch).items() if isinstance(x, np.ndarray)}
    for path, leaf in leaves:
        assert leaf is getattr(batch, path[0].name)
    other = batch_streams([plan_stream([1, 2, IMAGE_TOKEN], [4], window=4, ratio=4)])
    assert jax.tree.structure(other) != structure  # another size of memory
    assert jax.tree.unflatten(structure, [x for _, x in leaves]) == batch
