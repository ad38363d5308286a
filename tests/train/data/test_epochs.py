"""The plan of a run: padded shapes, which samples go together, how often each is used."""

import itertools
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.data import section
from train.data.epochs import (
    BatchPlan,
    Bucket,
    Epochs,
    Share,
    _cut,
    make_buckets,
    padded_share,
    shares,
)
from train.data.lengths import Lengths, count_beacons
from train.data.records.sample import Sample, VisualBlock
from train.data.sources import Source
from train.data.workers import lowest
from train.errors import DataError
from vxl_jax.config import VideoXLConfig
from vxl_jax.presets import tiny
from vxl_jax.stream.batch import StreamShape, batch_streams, round_up
from vxl_jax.stream.plan import draw_ratio
from vxl_jax.text.template import IGNORE

# Padded sizes.


def padded(kinds: Sequence[np.ndarray], ends: Sequence[Sequence[int]]) -> int:
    """Sum of lengths, each padded to the next end of its kind."""
    return sum(
        min(end for end in some if end >= length)
        for lengths, some in zip(kinds, ends, strict=True)
        for length in lengths
    )


def every_cut(lengths: np.ndarray) -> list[list[int]]:
    """All ways to cut lengths at places of the ladder."""
    ladder = sorted({round_up(int(length), 16) for length in lengths})
    return [
        [*some, ladder[-1]]
        for count in range(len(ladder))
        for some in itertools.combinations(ladder[:-1], count)
    ]


def test_ranges_of_lengths_pad_as_little_as_any():
    rng = np.random.default_rng(0)
    for case in range(200):
        kinds = []
        for _ in range(1 + case % 2):
            values = rng.choice([1, 3, 17, 31, 33, 100, 101, 260, 1000, 5000], rng.integers(1, 6))
            kinds.append(rng.choice(values, rng.integers(1, 30)))
        cuts = [every_cut(lengths) for lengths in kinds]
        for most in (1, 2, 3, 8):
            ends = [some.tolist() for some in _cut(kinds, most)]
            assert sum(map(len, ends)) <= max(most, len(kinds))
            assert all(some in every for some, every in zip(ends, cuts, strict=True))
            least = min(
                padded(kinds, some)
                for some in itertools.product(*cuts)
                if sum(map(len, some)) <= max(most, len(kinds))
            )
            assert padded(kinds, ends) == least, (kinds, most, ends)


def make_sample(frames: Sequence[int], text: int = 4) -> Sample:
    """A sample of blocks, some text after each of them, without files."""
    ids = np.array([1, *(i for _ in frames for i in [-200, *range(1, text + 1)]), 2], np.int32)
    blocks = tuple(VisualBlock(Path(f"{i}.png"), n) for i, n in enumerate(frames))
    return Sample("s", ids, np.where(ids > 1, ids, IGNORE), blocks, "", "2", "text")


def measure(samples: Sequence[Sample], config: VideoXLConfig, ratios: Sequence[int]) -> Lengths:
    """Lengths as a data set has them."""
    rows = []
    for sample in samples:
        tokens = np.array([config.layout.count(b.frames) for b in sample.blocks], np.int64)
        labels = (sample.labels != IGNORE).sum()
        beacons = count_beacons(tokens, config.window, ratios).sum()
        text = len(sample.ids) - len(sample.blocks)
        rows.append((text, labels, sample.frames, tokens.sum(), beacons))
    return Lengths(*np.array(rows, np.int32).T)


@pytest.mark.parametrize("ratios", [(2, 4, 8), (4, 8), (3, 5), (8,), (16,), (1, 7), ()])
def test_a_bucket_holds_every_draw_of_ratios(ratios: tuple[int, ...]):
    rng = np.random.default_rng(0)
    lists_of_frames = ([1], [3], [9, 1], [5, 2, 7], [], [1] * 6, [40])
    samples = [make_sample(frames, text) for frames in lists_of_frames for text in (1, 4)]
    # 16, 4 or 1 tokens a frame.
    for pool_stride, most in itertools.product((1, 2, 4), (1, 3, 8)):
        config = tiny(window=16, ratios=ratios, pool_stride=pool_stride)
        lengths = measure(samples, config, ratios)
        buckets, bucket_of = make_buckets(lengths, section(".", shapes=most), 4)
        for i, sample in enumerate(samples):
            bucket = buckets[bucket_of[i]]
            assert bucket.frames >= sample.frames
            stream = sample.plan(config, lowest(ratios))
            assert (lengths.tokens[i], lengths.memory[i]) == (stream.length, stream.persistent)
            for _ in range(10):
                stream = sample.plan(config, draw_ratio(ratios, rng))
                assert stream.length <= lengths.tokens[i]
                assert stream.persistent <= lengths.memory[i]
                batch_streams([stream], bucket.shape)  # raises if it is too small


def some_lengths(count: int, seed: int = 0) -> Lengths:
    """Every third sample is of text alone."""
    rng = np.random.default_rng(seed)
    text = np.exp(rng.uniform(1, 6, count)).astype(np.int32)
    frames = (rng.integers(1, 130, count) * (rng.integers(0, 3, count) > 0)).astype(np.int32)
    return Lengths(text, text // 3, frames, 4 * frames, 2 * frames)


def test_buckets_are_few_and_text_has_its_own():
    lengths = some_lengths(500)
    for most in (1, 2, 5, 16):
        buckets, bucket_of = make_buckets(lengths, section(".", shapes=most), 6)
        assert len(buckets) == max(2, most)  # one for each kind in any case
        assert {*bucket_of.tolist()} == {*range(len(buckets))}
        for i, bucket in enumerate(buckets):
            some = np.flatnonzero(bucket_of == i)
            with_media = (lengths.frames[some] > 0).tolist()
            assert with_media == [with_media[0]] * len(some)
            assert (bucket.frames > 0, bucket.shape.beacons) == (with_media[0], with_media[0])
            assert bucket.frames == lengths.frames[some].max()
            assert bucket.shape.groups == 1
            assert lengths.tokens[some].max() <= bucket.shape.tokens
            assert lengths.memory[some].max() <= bucket.shape.memory
            assert lengths.labels[some].max() <= bucket.shape.labels
            assert bucket.places == 6
    # More shapes never pad more.
    sums = []
    for most in range(1, 16):
        buckets, bucket_of = make_buckets(lengths, section(".", shapes=most), 6)
        sums.append(sum(buckets[i].shape.tokens for i in bucket_of))
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] < sums[0]


def test_short_samples_share_a_batch_and_long_ones_have_it_alone():
    lengths = some_lengths(500)
    for limit in (1, 300, 1000, 10**6):
        data = section(".", batch_size=2, max_tokens_per_batch=limit)
        buckets, _ = make_buckets(lengths, data, 20)
        for bucket in buckets:
            assert 1 <= bucket.places <= 20
            assert bucket.places == 1 or bucket.places * bucket.shape.tokens <= limit
            # As many as there is room for.
            assert bucket.places == 20 or (bucket.places + 1) * bucket.shape.tokens > limit
    assert [*{bucket.places for bucket in buckets}] == [20]


@pytest.mark.parametrize("kind", ["text", "media", "one"])
def test_samples_of_one_kind(kind: str):
    lengths = some_lengths(50)
    chosen = np.flatnonzero((lengths.frames > 0) == (kind != "text"))[: 1 if kind == "one" else 50]
    columns = (lengths.text, lengths.labels, lengths.frames, lengths.visual, lengths.beacons)
    some = Lengths(*(column[chosen] for column in columns))
    buckets, bucket_of = make_buckets(some, section(".", shapes=5), 2)
    assert len(bucket_of) == len(chosen)
    assert {bucket.frames > 0 for bucket in buckets} == {kind != "text"}
    assert len(buckets) == {"one": 1, "text": 5, "media": 5}[kind]


# Which samples go together.

SMALL, LARGE = (Bucket(StreamShape(1, size, size, 1, 0), 0, 3) for size in (8, 16))
# 7 samples of the first file, 6 of the second.
BUCKET_OF = np.array([int(i in {1, 4, 7, 8, 9, 12}) for i in range(13)], np.int32)
FILES = [range(7), range(7, 13)]


def epochs(
    epochs: Sequence[int] = (1,),
    amounts: Sequence[float] = (7, 6),
    seed: int = 0,
    sequential: bool = False,
) -> Epochs:
    some = [
        Share(samples, amount, epochs[i % len(epochs)], i)
        for i, (samples, amount) in enumerate(zip(FILES, amounts, strict=True))
    ]
    return Epochs([SMALL, LARGE], BUCKET_OF, some, seed, sequential)


def content(plan: BatchPlan) -> tuple[list[int], Bucket, tuple[int, ...]]:
    return plan.samples.tolist(), plan.bucket, plan.seed


def contents(plans: Any) -> list[tuple[list[int], Bucket, tuple[int, ...]]]:
    return [content(plan) for plan in plans]


def samples_of(plans: Sequence[BatchPlan]) -> Counter[int]:
    return Counter(i for plan in plans for i in plan.samples.tolist())


def test_every_sample_is_in_one_batch_of_its_bucket_in_each_epoch():
    plans = [*epochs((3,))]
    # 7 small and 6 large ones: 3 + 2 batches, of which one is not full.
    assert len(plans) == len(epochs((3,))) == 3 * 5
    for epoch in range(3):
        some = plans[5 * epoch : 5 * (epoch + 1)]
        assert samples_of(some) == Counter(range(13))
        # What does not fill a batch comes last.
        assert [len(plan.samples) for plan in some] == [3, 3, 3, 3, 1]
    for plan in plans:
        assert {(SMALL, LARGE)[BUCKET_OF[i]] for i in plan.samples} == {plan.bucket}


def test_order_and_seeds_follow_from_the_seed_and_differ_between_epochs():
    plans = contents(epochs((2,)))
    assert plans == contents(epochs((2,)))
    other = contents(epochs((2,), seed=1))
    assert [samples for samples, _, _ in plans] != [samples for samples, _, _ in other]
    assert [samples for samples, _, _ in plans[:5]] != [samples for samples, _, _ in plans[5:]]
    seeds = [plan.seed_of(i) for plan in epochs((2,)) for i in range(3)]
    assert len({*seeds}) == len(seeds)
    assert not {*seeds} & {plan.seed_of(i) for plan in epochs((2,), seed=1) for i in range(3)}


def test_random_access_gives_what_iteration_gives():
    every = contents(epochs((3,), (17.5, 2.2)))
    again = epochs((3,), (17.5, 2.2))
    for i in np.random.default_rng(0).permutation(len(every)):
        assert content(again[int(i)]) == every[i]
    for i in (len(every), -1):
        with pytest.raises(IndexError):
            again[i]


def test_any_plan_holds_the_samples_of_its_epochs():
    rng = np.random.default_rng(0)
    for case in range(100):
        sizes = rng.integers(1, 30, rng.integers(1, 4))
        starts = np.concatenate([[0], sizes.cumsum()])
        some = [
            Share(
                range(starts[i], starts[i + 1]),
                float(rng.choice([size, rng.uniform(0, 3 * size)])),
                int(rng.integers(1, 4)),
                int(rng.integers(0, 2)),
            )
            for i, size in enumerate(sizes)
        ]
        buckets = [
            Bucket(StreamShape(1, i, 1, 1, 0), 0, int(rng.integers(1, 9)))
            for i in range(rng.integers(1, 5))
        ]
        bucket_of = rng.integers(0, len(buckets), starts[-1]).astype(np.int32)
        plans = Epochs(buckets, bucket_of, some, case, bool(case % 2))
        every = [*plans]
        assert len(every) == len(plans)
        start = 0
        for number, end in enumerate(plans.ends):
            here = every[start:end]
            assert samples_of(here) == Counter(plans.samples(number).tolist())
            start = int(end)
            partial = Counter(
                buckets.index(p.bucket) for p in here if len(p.samples) < p.bucket.places
            )
            assert all(count == 1 for count in partial.values())
            assert all(len(plan.samples) for plan in here)
            for plan in here:
                assert {buckets[i] for i in bucket_of[plan.samples]} == {plan.bucket}


def test_files_may_have_different_numbers_of_epochs():
    plans = [*epochs((1, 3))]
    assert samples_of(plans) == Counter(
        {**dict.fromkeys(FILES[0], 1), **dict.fromkeys(FILES[1], 3)}
    )
    # All are mixed in the first epoch, then the second file is alone.
    first = [plan.samples.tolist() for plan in plans[:5]]
    assert {i for samples in first for i in samples} == {*range(13)}
    assert any(min(samples) < 7 <= max(samples) for samples in first)


def test_a_curriculum_takes_one_file_after_the_other():
    plans = [*epochs((2, 1), sequential=True)]
    assert samples_of(plans) == Counter(
        {**dict.fromkeys(FILES[0], 2), **dict.fromkeys(FILES[1], 1)}
    )
    of_first_file = [max(plan.samples) < 7 for plan in plans]
    assert of_first_file == sorted(of_first_file, reverse=True)
    assert not any(min(plan.samples) < 7 <= max(plan.samples) for plan in plans)


def test_the_datasets_of_one_mixture_are_one_lesson():
    some = [Share(range(5), 5, 2, 0), Share(range(5, 9), 4, 2, 0), Share(range(9, 13), 4, 1, 1)]
    plans = [*Epochs([SMALL, LARGE], BUCKET_OF, some, 0, sequential=True)]
    lessons = [{int(i) >= 9 for i in plan.samples} for plan in plans]
    assert lessons == sorted(lessons, key=max)
    assert {len(lesson) for lesson in lessons} == {1}
    mixed = [min(plan.samples) < 5 <= max(plan.samples) < 9 for plan in plans]
    assert any(mixed)


# How often.


@pytest.mark.parametrize("amount", [17.5, 7, 3, 0.4, 6.99, 14, 7 / 3])
def test_every_sample_is_used_as_often_as_any_other(amount: float):
    """Seven samples, of which an epoch takes some."""
    count = 40
    plans = Epochs([SMALL], np.zeros(7, np.int32), [Share(range(7), amount, count)], 0)
    used: Counter[int] = Counter()
    for epoch in range(count):
        here = Counter(plans.samples(epoch).tolist())
        assert here.total() in {int(amount), int(-(-amount // 1))}
        used += here
        total = round((epoch + 1) * amount)
        assert used.total() == total
        assert {used[i] for i in range(7)} <= {total // 7, -(-total // 7)}
    assert samples_of([*plans]) == used
    if amount >= 7:
        per_epoch = [Counter(plans.samples(epoch).tolist()) for epoch in range(count)]
        assert all(set(here) == set(range(7)) for here in per_epoch)


def test_which_samples_a_part_takes_follows_from_the_seed():
    def taken(seed: int) -> list[list[int]]:
        plans = Epochs([SMALL], np.zeros(50, np.int32), [Share(range(50), 10, 5)], seed)
        return [sorted(plans.samples(epoch).tolist()) for epoch in range(5)]

    assert taken(0) == taken(0) != taken(1)
    assert sorted(itertools.chain(*taken(0))) == [*range(50)]
    assert taken(0)[0] != [*range(10)]


def fake_dataset(sizes: Sequence[int], **columns: Sequence[Any]) -> Any:
    """What `shares` asks of a data set."""
    sources = [
        Source(Path("x"), Path(), **{name: values[i] for name, values in columns.items()})
        for i in range(len(sizes))
    ]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    ranges = [range(starts[i], starts[i + 1]) for i in range(len(sizes))]
    return SimpleNamespace(ranges=ranges, reader=SimpleNamespace(sources=sources))


def test_shares_of_sources():
    some = shares(fake_dataset([10, 30], repeat=[2.5, 1.0], entry=[0, 1]), (1, 4))
    assert some == [Share(range(10), 25.0, 1, 0), Share(range(10, 40), 30.0, 4, 1)]
    some = shares(fake_dataset([10, 30], weight=[3.0, 1.0], entry=[0, 0]), (2,))
    assert some == [Share(range(10), 30.0, 2, 0), Share(range(10, 40), 10.0, 2, 0)]
    small = shares(fake_dataset([100, 1], weight=[1.0, 999.0]), (1,))
    assert [share.amount for share in small] == pytest.approx([0.101, 100.899])


def test_mixed_batches_of_a_weighted_mixture():
    dataset = fake_dataset([10, 30], weight=[3.0, 1.0], entry=[0, 0])
    plans = Epochs([SMALL], np.zeros(40, np.int32), shares(dataset, (6,)), 0)
    for epoch in range(6):
        counts = Counter(plans.samples(epoch).tolist())
        assert {counts[i] for i in range(10)} == {3}
        assert sum(counts[i] for i in range(10, 40)) == 10
    used = samples_of([*plans])
    assert {used[i] for i in range(10, 40)} == {2}


# What the plan itself costs.


def test_an_epoch_is_planned_when_it_is_asked_for():
    count = 200_000
    bucket_of = np.zeros(count, np.int32)
    tracemalloc.start()
    try:
        plans = Epochs([SMALL], bucket_of, [Share(range(count), count, 50)], 0)
        assert tracemalloc.get_traced_memory()[0] < count
        for index in (0, len(plans) - 1, len(plans) // 2):
            assert len(plans[index].samples)
        assert tracemalloc.get_traced_memory()[0] < 20 * count  # one epoch of fifty
    finally:
        tracemalloc.stop()


def test_an_epoch_is_planned_once_for_all_threads(monkeypatch: pytest.MonkeyPatch):
    planned: list[int] = []
    plan = Epochs._plan

    def slow(self: Epochs, number: int) -> Any:
        planned.append(number)
        time.sleep(0.05)
        return plan(self, number)

    monkeypatch.setattr(Epochs, "_plan", slow)
    plans = epochs((2,))
    with ThreadPoolExecutor(8) as threads:
        found = [*threads.map(plans.__getitem__, range(len(plans)))]
    assert sorted(planned) == [0, 1]
    assert contents(found) == contents(epochs((2,)))


def test_padding_is_what_the_batches_hold():
    lengths = some_lengths(300)
    buckets, bucket_of = make_buckets(
        lengths, section(".", batch_size=2, max_tokens_per_batch=2000), 7
    )
    some = [Share(range(200), 500.0, 2), Share(range(200, 300), 30.0, 1)]
    plans = Epochs(buckets, bucket_of, some, 0)
    for number, start in enumerate([0, *plans.ends[:-1]]):
        here = [plans[i] for i in range(int(start), int(plans.ends[number]))]
        places = sum(plan.bucket.places * plan.bucket.shape.tokens for plan in here)
        held = sum(int(lengths.tokens[plan.samples].sum()) for plan in here)
        assert padded_share(lengths, plans, number) == pytest.approx(1 - held / places)
    assert 0 < padded_share(lengths, plans) < 0.5


def test_no_batch_at_all_is_an_error():
    lengths = some_lengths(3)
    buckets, bucket_of = make_buckets(lengths, section("."), 1)
    with pytest.raises(DataError, match="an epoch has no sample"):
        Epochs(buckets, bucket_of, [Share(range(3), 0.3)], 0)
