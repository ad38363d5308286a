"""Batches: which samples go together, and what is in them, whoever makes them."""

import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from train.batches import (
    Batch,
    Bucket,
    Epochs,
    Loader,
    WorkerError,
    blank,
    bucket_of,
    load_batches,
)
from train.config import DataSection
from train.records import Block, Preparer, Sample, check_records, read_records
from vxl_jax.config import tiny
from vxl_jax.stream import BEACON, IGNORE, PAD, TEXT, VISUAL, StreamShape, batch_streams, draw_ratio

RATIOS = (2, 4, 8)


def preparer(media_root: Path | str = ".", **data: Any) -> Preparer:
    data = {"train_json": ("x",), "media_root": str(media_root), "min_tiles": 1, **data}
    return Preparer(DataSection(**data), tiny())


def make_sample(frames: Sequence[int], text: int = 4) -> Sample:
    """A sample of blocks, some text after each of them, without files."""
    ids = np.array([1, *(i for _ in frames for i in [-200, *range(1, text + 1)]), 2], np.int32)
    blocks = tuple(Block(Path(f"{i}.png"), n) for i, n in enumerate(frames))
    return Sample("s", ids, np.where(ids > 1, ids, IGNORE), blocks, "", "2", "text")


# Which samples go together.

SMALL, LARGE = (Bucket(StreamShape(1, size, size, 1, 0), 0) for size in (8, 16))
# 7 samples of the first file, 6 of the second.
BUCKETS = [LARGE if i in {1, 4, 7, 8, 9, 12} else SMALL for i in range(13)]
FILES = [range(7), range(7, 13)]


def epochs(**options: Any) -> Epochs:
    return Epochs(BUCKETS, FILES, **{"batch_size": 3, "seed": 0, **options})


def samples_of(plans: Sequence[Any]) -> Counter[int]:
    return Counter(i for plan in plans for i in plan.samples)


def test_every_sample_is_in_one_batch_of_its_bucket_in_each_epoch():
    plans = list(epochs(epochs=(3,)))
    # 7 small and 6 large ones: 3 + 2 batches, of which one is not full.
    assert len(plans) == len(epochs(epochs=(3,))) == 3 * 5
    for epoch in range(3):
        some = plans[5 * epoch : 5 * (epoch + 1)]
        assert samples_of(some) == Counter(range(13))
        assert sorted(len(plan.samples) for plan in some) == [1, 3, 3, 3, 3]
    assert all(BUCKETS[i] == plan.bucket for plan in plans for i in plan.samples)
    assert all(type(i) is int for plan in plans for i in plan.samples)


def test_order_and_ratios_follow_from_the_seed_and_differ_between_epochs():
    plans = list(epochs(epochs=(2,)))
    assert plans == list(epochs(epochs=(2,)))
    assert plans != list(epochs(epochs=(2,), seed=1))
    assert [p.samples for p in plans[:5]] != [p.samples for p in plans[5:]]
    seeds = [plan.seed for plan in plans]
    assert len(set(seeds)) == len(seeds)


def test_random_access_gives_what_iteration_gives():
    every = list(epochs(epochs=(3,)))
    again = epochs(epochs=(3,))
    for i in np.random.default_rng(0).permutation(len(every)):
        assert again[int(i)] == every[i]
    with pytest.raises(IndexError):
        again[len(every)]


def test_files_may_have_different_numbers_of_epochs():
    plans = list(epochs(epochs=(1, 3)))
    counts = Counter({**dict.fromkeys(FILES[0], 1), **dict.fromkeys(FILES[1], 3)})
    assert samples_of(plans) == counts
    # All are mixed in the first epoch, then the second file is alone.
    first = [plan.samples for plan in plans[:5]]
    assert {i for samples in first for i in samples} == set(range(13))
    assert any(min(samples) < 7 <= max(samples) for samples in first)


def test_a_curriculum_takes_one_file_after_the_other():
    plans = list(epochs(epochs=(2, 1), sequential=True))
    counts = Counter({**dict.fromkeys(FILES[0], 2), **dict.fromkeys(FILES[1], 1)})
    assert samples_of(plans) == counts
    of_first_file = [max(plan.samples) < 7 for plan in plans]
    assert of_first_file == sorted(of_first_file, reverse=True)
    assert not any(min(plan.samples) < 7 <= max(plan.samples) for plan in plans)


# Padded sizes.


@pytest.mark.parametrize("ratios", [(2, 4, 8), (4, 8), (3, 5), (8,), (16,), ()])
def test_a_bucket_holds_every_draw_of_ratios(ratios: tuple[int, ...]):
    rng = np.random.default_rng(0)
    lists_of_frames = ([1], [3], [9, 1], [5, 2, 7], [])
    # 16, 4 or 1 tokens a frame; sizes as they are, or rounded up to powers of two.
    for pool_stride, steps, frames in product((1, 2, 4), (16, 1), lists_of_frames):
        config = tiny(window=16, ratios=ratios, pool_stride=pool_stride)
        maker = Preparer(preparer(bucket_steps=steps).data, config)
        sample = make_sample(frames)
        bucket = bucket_of(sample, maker, ratios)
        assert bucket.frames >= sample.frames
        for _ in range(20):
            stream = sample.plan(config, draw_ratio(ratios, rng))
            batch_streams([stream], bucket.shape)  # raises if it is too small


def test_a_bucket_of_text_has_no_beacons_and_no_pixels():
    bucket = bucket_of(make_sample([]), preparer(), RATIOS)
    assert (bucket.frames, bucket.shape.beacons) == (0, 0)
    assert bucket_of(make_sample([1]), preparer(), RATIOS).shape.beacons == 1


# What is in a batch.


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one, two and three tiles of noise, and half of one."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for tiles in (1, 2, 3):
        pixels = rng.integers(1, 256, (56, 56 * tiles, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{tiles}.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def prepare(images: Sequence[Sequence[str]], media: Path, tokenizer: Any) -> list[Sample]:
    """A sample of each list of pictures."""
    records = [
        (
            str(i),
            {
                "image": list(files),
                "conversations": [
                    {"from": "human", "value": "<image>" * len(files) + "\nhow many shapes"},
                    {"from": "gpt", "value": "one"},
                ],
            },
        )
        for i, files in enumerate(images)
    ]
    samples, bad = check_records(records, preparer(media), tokenizer, prompts=False)
    assert not bad
    return samples


def load(samples: Sequence[Sample], media: Path, size: int, **data: Any) -> Batch:
    """One batch of all samples, whatever their buckets."""
    maker = preparer(media, bucket_steps=1, **data)
    buckets = [bucket_of(sample, maker, RATIOS) for sample in samples]
    shape = buckets[0].shape
    for bucket in buckets:
        shape = shape.union(bucket.shape)
    bucket = Bucket(shape, max(bucket.frames for bucket in buckets))
    (plan,) = Epochs([bucket] * len(samples), [range(len(samples))], size, seed=0)
    return Loader(samples, maker, RATIOS, size)(plan)


def test_pixels_stand_in_their_places_and_the_rest_is_black(media: Path, demo_tokenizer: Any):
    files = [["1.png"], ["3.png", "2.png"], [], ["2.png"]]
    samples = prepare(files, media, demo_tokenizer)
    batch = load(samples, media, size=5)
    assert sorted(batch.samples.tolist()) == [-1, 0, 1, 2, 3]
    assert batch.pixels is not None
    assert batch.pixels.dtype == np.uint8
    assert batch.pixels.shape == (5, 8, 56, 56, 3)
    for place, index in enumerate(batch.samples):
        names = files[index] if index >= 0 else []
        tiles = []
        for name in names:
            picture = np.asarray(Image.open(media / name))
            tiles += np.hsplit(picture, picture.shape[1] // 56)
        if tiles:
            np.testing.assert_array_equal(batch.pixels[place, : len(tiles)], tiles)
        assert not batch.pixels[place, len(tiles) :].any()
    assert batch.frames == 1 + 5 + 2
    assert not batch.bad


def test_streams_are_those_of_the_samples(media: Path, demo_tokenizer: Any):
    samples = prepare([["1.png"], ["2.png"]], media, demo_tokenizer)
    batch = load(samples, media, size=3)
    kind, source = batch.streams.kind[0], batch.streams.source[0]
    for place, index in enumerate(batch.samples):
        counts = Counter(kind[place].tolist())
        if index < 0:
            assert set(counts) == {PAD}
            continue
        sample = samples[index]
        text = sample.ids[sample.ids >= 0]
        np.testing.assert_array_equal(source[place][kind[place] == TEXT], text)
        assert counts[VISUAL] == 4 * sample.frames
        assert counts[BEACON] in {4 * sample.frames // ratio for ratio in RATIOS}
        learned = sample.labels[1:][sample.labels[1:] != IGNORE]
        found = batch.streams.label[place]
        np.testing.assert_array_equal(found[found != IGNORE], learned)
    assert batch.tokens == (kind != PAD).sum()


def test_undecodable_media_leave_an_empty_place(media: Path, demo_tokenizer: Any):
    samples = prepare([["1.png"], ["2.png", "cut.png"], ["2.png"]], media, demo_tokenizer)
    batch = load(samples, media, size=3)
    ((name, reason),) = [(bad.name, bad.reason) for bad in batch.bad]
    assert name == "1"
    assert "cut.png: image cannot be decoded" in reason
    place = int(np.flatnonzero(batch.samples == -1)[0])
    assert sorted(batch.samples.tolist()) == [-1, 0, 2]
    assert batch.pixels is not None
    assert not batch.pixels[place].any()
    assert (batch.streams.kind[:, place] == PAD).all()
    assert (batch.streams.label[place] == IGNORE).all()
    assert batch.frames == 3
    assert batch.tokens == (batch.streams.kind != PAD).sum()


def test_a_batch_may_lose_all_its_samples(media: Path, demo_tokenizer: Any):
    batch = load(prepare([["cut.png"]] * 2, media, demo_tokenizer), media, size=2)
    assert sorted(bad.name for bad in batch.bad) == ["0", "1"]
    assert (batch.tokens, batch.frames, batch.samples.tolist()) == (0, 0, [-1, -1])
    assert (batch.streams.label == IGNORE).all()
    assert (batch.streams.kind == PAD).all()


def test_a_blank_batch_is_black_and_otherwise_the_same(media: Path, demo_tokenizer: Any):
    batch = load(prepare([["1.png"], ["2.png"]], media, demo_tokenizer), media, size=2)
    dark = blank(batch)
    assert dark.pixels is not None
    assert batch.pixels is not None
    assert batch.pixels.any()
    assert not dark.pixels.any()
    assert dark.pixels.shape == batch.pixels.shape
    assert dark.streams is batch.streams
    text = load(prepare([[]], media, demo_tokenizer), media, size=1)
    assert blank(text).pixels is None


def test_cached_media_are_not_decoded_again_and_bounded_in_bytes(
    media: Path, demo_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    samples = prepare([["1.png"], ["2.png"], ["3.png"]], media, demo_tokenizer)
    tile = 56 * 56 * 3
    decoded: list[str] = []
    original = Preparer.pixels

    def pixels(self: Preparer, block: Block) -> np.ndarray:
        decoded.append(block.path.name)
        return original(self, block)

    monkeypatch.setattr(Preparer, "pixels", pixels)
    maker = preparer(media)
    loader = Loader(samples, maker, RATIOS, 1)
    loader._cache.limit = 4 * tile
    buckets = [bucket_of(sample, maker, RATIOS) for sample in samples]
    plans = {plan.samples[0]: plan for plan in Epochs(buckets, [range(3)], 1, seed=0)}
    fresh: dict[int, Any] = {}
    for index in (0, 1, 0, 2, 0, 1):
        # 1 + 2 tiles fit; then 3 push out the 2, which were not used for longer; 1 is kept.
        found = loader(plans[index]).pixels
        np.testing.assert_array_equal(found, fresh.setdefault(index, found))
        held = sum(array.nbytes for array in loader._cache.pixels.values())
        assert held == loader._cache.used <= 4 * tile
    assert decoded == ["1.png", "2.png", "3.png", "2.png"]


def test_media_larger_than_the_cache_are_not_kept(media: Path, demo_tokenizer: Any):
    samples = prepare([["3.png"]], media, demo_tokenizer)
    maker = preparer(media, cache_mb=0)
    loader = Loader(samples, maker, RATIOS, 1)
    (plan,) = Epochs([bucket_of(samples[0], maker, RATIOS)], [range(1)], 1, seed=0)
    loader(plan)
    assert (len(loader._cache.pixels), loader._cache.used) == (0, 0)


def test_one_file_may_be_a_picture_and_a_video(media: Path):
    loader = Loader([], preparer(media, cache_mb=1), RATIOS, 1)
    picture, video = Block(media / "a.gif", 1), Block(media / "a.gif", 2, (0, 1))
    loader._cache.put(picture, np.zeros(3, np.uint8))
    assert loader._cache.get(picture) is not None
    assert loader._cache.get(video) is None


# Worker processes.


@pytest.fixture(scope="module")
def many(demo_data: Path, demo_tokenizer: Any) -> tuple[Epochs, Loader]:
    """Batches of every kind of demo record: pictures, sets, videos and text."""
    maker = preparer(demo_data / "media", bucket_steps=1)
    records = read_records(demo_data / "train.json")
    samples, bad = check_records(records, maker, demo_tokenizer, prompts=False)
    assert not bad
    buckets = [bucket_of(sample, maker, RATIOS) for sample in samples]
    return Epochs(buckets, [range(len(samples))], 8, 0, (2,)), Loader(samples, maker, RATIOS, 8)


def as_bytes(batch: Batch) -> bytes:
    arrays = [*jax.tree.leaves(batch.streams), batch.samples, batch.pixels, batch.frames]
    return pickle.dumps([*map(np.asarray, arrays), batch.tokens, batch.bad])


def test_batches_do_not_depend_on_workers_or_start(many: tuple[Epochs, Loader]):
    plans, loader = many
    expected = [as_bytes(batch) for batch in load_batches(plans, loader, workers=0)]
    assert len(expected) == len(plans) > 10
    assert len(set(expected)) == len(expected)
    for start in (1, 7, len(plans) - 1, len(plans)):
        found = [as_bytes(batch) for batch in load_batches(plans, loader, 0, start)]
        assert found == expected[start:]
    found = [as_bytes(batch) for batch in load_batches(plans, loader, workers=2, start=3)]
    assert found == expected[3:]
    assert not multiprocessing.active_children()


def test_workers_end_when_the_batches_are_closed(many: tuple[Epochs, Loader]):
    plans, loader = many
    batches = load_batches(plans, loader, workers=1)
    assert as_bytes(next(batches)) == as_bytes(loader(plans[0]))
    assert multiprocessing.active_children()
    began = time.perf_counter()
    batches.close()
    assert time.perf_counter() - began < 10
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_an_error(many: tuple[Epochs, Loader]):
    plans, loader = many
    batches = load_batches(plans, loader, workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"batch \d+: .* exit code -9.*lower data.workers"):
        for _ in batches:
            pass
