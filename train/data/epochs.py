"""Which samples go together, in which padded shape, in which order: the same on every host.

All of it follows from the seed and the samples' lengths. A position in the sequence of batches is
one number, for any number of workers and hosts.
"""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.config import DataSection
from train.data.dataset import Dataset
from train.data.lengths import Lengths
from train.errors import DataError
from vxl_jax.stream.batch import StreamShape, round_up


@dataclass(frozen=True)
class Bucket:
    """Padded shape of a batch: its streams, frames and visual tokens of each sample, and places for
    samples.

    All batches of one bucket run the same compiled program.
    """

    shape: StreamShape
    frames: int
    places: int
    visual: int = 0


@dataclass(frozen=True)
class BatchPlan:
    """Samples of one batch, at most as many as its bucket has places, and a seed for each."""

    samples: np.ndarray
    bucket: Bucket
    seed: tuple[int, ...]

    def seed_of(self, place: int) -> tuple[int, ...]:
        """Seed of what is random in the sample at a place."""
        return (*self.seed, place)


@dataclass(frozen=True)
class Share:
    """What one source gives to an epoch.

    samples: its samples. amount: how many of them an epoch takes, which may be more than there are,
    or a fraction. epochs: epochs it takes part in. lesson: number of the data file it belongs to,
    for training on one after the other.
    """

    samples: range
    amount: float
    epochs: int = 1
    lesson: int = 0


def shares(dataset: Dataset, epochs: Sequence[int]) -> list[Share]:
    """What each source gives to an epoch: all it has `repeat` times, or, by weight, a share of as
    many samples as all have together.

    epochs: of each data file that was given, or one number for all.
    """
    total = sum(len(samples) for samples in dataset.ranges)
    weights = [source.weight for source in dataset.reader.sources]
    total_weight = sum(weight for weight in weights if weight is not None)
    found = []
    for source, samples in zip(dataset.reader.sources, dataset.ranges, strict=True):
        amount = len(samples) * source.repeat
        if source.weight is not None:
            amount = total * source.weight / total_weight
        times = epochs[source.entry] if len(epochs) > 1 else epochs[0]
        found.append(Share(samples, amount, times, source.entry))
    return found


def make_buckets(
    lengths: Lengths, data: DataSection, most_places: int
) -> tuple[list[Bucket], np.ndarray]:
    """Few buckets that pad little, and the bucket of every sample.

    Samples with media and samples of text alone have separate buckets. Lengths are cut where
    the sum of padded lengths is least (dynamic programming over a ladder of 16 lengths a doubling).
    """
    tokens = lengths.tokens
    of_sample = np.zeros(len(tokens), np.int32)
    buckets: list[Bucket] = []
    has_media = lengths.frames > 0
    kinds = [some for some in (np.flatnonzero(~has_media), np.flatnonzero(has_media)) if len(some)]
    for members, ends in zip(kinds, _cut([tokens[m] for m in kinds], data.shapes), strict=True):
        number = np.searchsorted(ends, tokens[members])
        for i, end in enumerate(ends):
            some = members[number == i]
            of_sample[some] = len(buckets)
            places = places_of(int(end), data, most_places)
            shape = StreamShape(
                groups=1,
                tokens=int(end),
                memory=round_up(int(lengths.memory[some].max()), 16),
                labels=round_up(max(1, int(lengths.labels[some].max())), 16),
                beacons=int(lengths.beacons[some].max() > 0),
            )
            frames, visual = (int(x[some].max()) for x in (lengths.frames, lengths.visual))
            buckets.append(Bucket(shape, frames, places, visual))
    return buckets, of_sample


def places_of(tokens: int, data: DataSection, most: int) -> int:
    """Count the samples of a padded length that share a batch, at most `most`."""
    if data.max_tokens_per_batch is None:
        return most
    return max(1, min(most, data.max_tokens_per_batch // tokens))


def _cut(kinds: Sequence[np.ndarray], most: int) -> list[np.ndarray]:
    """For each kind of lengths, ends of ranges that hold them all; at most `most` ranges together,
    or one a kind, so that the sum of padded lengths is least.
    """
    curves = [_cuts(lengths, most) for lengths in kinds]
    choices = itertools.product(*(range(len(curve)) for curve in curves))
    fitting = [c for c in choices if sum(c) + len(c) <= max(most, len(kinds))]
    best = min(fitting, key=lambda c: sum(curve[i][0] for curve, i in zip(curves, c, strict=True)))
    return [curve[i][1] for curve, i in zip(curves, best, strict=True)]


def _cuts(lengths: np.ndarray, most: int) -> list[tuple[float, np.ndarray]]:
    """For 1, 2, … `most` ranges: the least sum of padded lengths, and the ranges' ends."""
    values, counts = np.unique(lengths, return_counts=True)
    ends, first = np.unique([round_up(int(value), 16) for value in values], return_index=True)
    size = len(ends)
    upto = np.concatenate([[0], np.add.reduceat(counts, first).cumsum()])  # samples below an end
    # cost[i, j]: padded lengths of a range from end i to end j - 1; best[j]: of all below end j.
    cost = np.concatenate([[0], ends]) * (upto - upto[:, None]).astype(float)
    cost[np.tril_indices(size + 1)] = np.inf
    best = np.full(size + 1, np.inf)
    best[0] = 0
    before: list[np.ndarray] = []
    found = []
    for _ in range(min(most, size)):
        through = best[:, None] + cost
        before.append(through.argmin(0))
        best = through.min(0)
        chosen, j = [], size
        for back in reversed(before):
            chosen.append(int(ends[j - 1]))
            j = int(back[j])
        found.append((float(best[size]), np.array(chosen[::-1])))
    return found


class Epochs:
    """All batches of a run in order, planned an epoch at a time when they are asked for.

    buckets, bucket_of: from `make_buckets`. shares: of all sources. sequential: one data file after
    the other, each for its epochs, instead of all mixed.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        bucket_of: np.ndarray,
        shares: Sequence[Share],
        seed: int,
        sequential: bool = False,
    ):
        self.buckets, self.bucket_of, self.shares, self.seed = buckets, bucket_of, shares, seed
        self.places = np.array([bucket.places for bucket in buckets])
        # Each epoch as (share, how many epochs of it went before).
        self.epochs: list[list[tuple[int, int]]] = []
        lessons = sorted({share.lesson for share in shares}) if sequential else [None]
        for lesson in lessons:
            some = [i for i, share in enumerate(shares) if lesson in (None, share.lesson)]
            for epoch in range(max(shares[i].epochs for i in some)):
                self.epochs.append([(i, epoch) for i in some if shares[i].epochs > epoch])
        self.ends = np.cumsum(
            [self.batches_of(self.samples(number)).sum() for number in range(len(self.epochs))]
        )
        if not len(self):
            raise DataError(
                "an epoch has no sample: data.train_json repeats its few for less than one"
            )
        self._planned: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> BatchPlan:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.ends, index, side="right"))
        with self._lock:
            if number not in self._planned:
                # Threads that prepare batches ask for the end of one and the beginning of the next.
                self._planned = {n: p for n, p in self._planned.items() if n == number - 1}
                self._planned[number] = self._plan(number)
            epoch = self._planned[number]
        k = index - int(self.ends[number - 1] if number else 0)
        bucket, start = int(epoch.batches["bucket"][k]), int(epoch.batches["start"][k])
        samples = epoch.samples[bucket][start : start + int(self.places[bucket])]
        return BatchPlan(samples, self.buckets[bucket], (self.seed, 3, number, k))

    def samples(self, number: int) -> np.ndarray:
        """The samples of an epoch, in no random order; one may be there several times."""
        return np.concatenate([self._walk(i, epoch) for i, epoch in self.epochs[number]])

    def _walk(self, share: int, epoch: int) -> np.ndarray:
        """What an epoch takes of one source.

        An endless walk through random orders of the source, of which every epoch takes the next
        `amount`: no sample is taken twice before every other was taken.
        """
        samples, amount = self.shares[share].samples, self.shares[share].amount
        start, stop = round(epoch * amount), round((epoch + 1) * amount)
        count = len(samples)
        pieces = []
        for lap in range(start // count, -(-stop // count)):
            order = np.arange(samples.start, samples.stop, dtype=np.int32)
            if lap * count < start or (lap + 1) * count > stop:  # else all of them are taken
                order = np.random.default_rng([self.seed, 1, share, lap]).permutation(order)
            pieces.append(order[max(0, start - lap * count) : stop - lap * count])
        return np.concatenate([np.empty(0, np.int32), *pieces])

    def batches_of(self, samples: np.ndarray) -> np.ndarray:
        """Batches of each bucket that an epoch of these samples makes."""
        counts = np.bincount(self.bucket_of[samples], minlength=len(self.buckets))
        return -(-counts // self.places)

    def _plan(self, number: int) -> "_Epoch":
        """Fill a batch of each bucket in random order; the last batch of each may be partial."""
        rng = np.random.default_rng([self.seed, 2, number])
        order = rng.permutation(self.samples(number))
        of_place = self.bucket_of[order]
        samples, pieces = [], []
        for i, places in enumerate(self.places):
            at = np.flatnonzero(of_place == i)
            samples.append(order[at])
            starts = np.arange(0, len(at), places)
            last = starts + places - 1
            full = last < len(at)
            some = np.empty(len(starts), _BATCH)
            some["bucket"], some["start"] = i, starts
            # Batches that never become full come last.
            some["complete"] = np.where(full, at[np.where(full, last, 0)], len(order) + i)
            pieces.append(some)
        batches = np.concatenate(pieces)
        return _Epoch(samples, batches[np.argsort(batches["complete"], kind="stable")])


_BATCH = np.dtype([("bucket", np.int16), ("start", np.int64), ("complete", np.int64)])
"""A batch: its bucket, its first sample among those of the bucket, and the place in the epoch's
order of the sample that makes it full.
"""


@dataclass(frozen=True)
class _Epoch:
    """One epoch: the samples of each bucket in order, and its batches (`_BATCH`) in order."""

    samples: list[np.ndarray]
    batches: np.ndarray


def plan_run(dataset: Dataset, data: DataSection, seed: int) -> Epochs:
    """All batches of a training run.

    Raises: DataError if the run has no batch.
    """
    buckets, bucket_of = make_buckets(dataset.lengths, data, data.batch_size)
    return Epochs(buckets, bucket_of, shares(dataset, data.epochs), seed, data.sequential)


def padded_share(lengths: Lengths, epochs: Epochs, number: int = 0, shards: int = 1) -> float:
    """Share of an epoch's token places that hold no token; empty places of a batch count too.

    shards: over how many devices samples are divided, each with equally many places.
    """
    samples = epochs.samples(number)
    sizes = np.array(
        [bucket.shape.tokens * -(-bucket.places // shards) * shards for bucket in epochs.buckets]
    )
    total = (epochs.batches_of(samples) * sizes).sum()
    return float(1 - lengths.tokens[samples].sum(dtype=np.int64) / total)
