"""What processes share: places of a batch, counts, and what one of them cannot read."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from train.data.loader import Batch, Shards, leave_out
from train.run.distributed import check_batch_size, count_distinct, counted_share
from vxl_jax.errors import ConfigError
from vxl_jax.nn.sharding import make_mesh
from vxl_jax.stream.batch import StreamShape, batch_streams
from vxl_jax.stream.plan import plan_stream
from vxl_jax.text.template import IMAGE_TOKEN


def test_shards_have_equally_many_places():
    assert Shards().places(5) == [0, 1, 2, 3, 4]
    assert Shards((1, 2), 4).places(10) == [3, 4, 5, 6, 7, 8]
    assert Shards((3,), 4).places(10) == [9, 10, 11]  # two of them past the end


def test_a_batch_smaller_than_the_devices_is_refused():
    check_batch_size(8, 8)
    check_batch_size(12, 8)
    with pytest.raises(ConfigError, match=r"data\.batch_size is 7, .* over 8 devices"):
        check_batch_size(7, 8)


def test_one_process_counts_all_that_it_loads():
    mesh = make_mesh(1, devices=jax.devices()[:1])
    assert counted_share(mesh, Shards()) == jax.local_device_count()
    assert count_distinct({"a": "dark", "b": "long"}) == 2


def test_a_sample_that_is_left_out_leaves_an_empty_place():
    streams = [
        plan_stream([1, IMAGE_TOKEN, *range(2, 5 + i)], [8], window=16, ratio=2, labels=None)
        for i in range(3)
    ]
    shape = StreamShape.of(streams[0])
    for stream in streams:
        shape = shape.union(StreamShape.of(stream))
    samples = [object()] * 3
    batch = Batch(batch_streams(streams, shape), None, samples, 0, 0, 0)  # type: ignore[arg-type]
    found = leave_out(batch, [1])
    expected = batch_streams([streams[0], None, streams[2]], shape)
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(found.streams, name), value, err_msg=name)
    assert found.samples == [samples[0], None, samples[2]]
    whole = vars(replace(batch).streams)
    for name, value in vars(batch_streams(streams, shape)).items():  # the first is as it was
        np.testing.assert_array_equal(whole[name], value)
    assert leave_out(batch, []) is batch
