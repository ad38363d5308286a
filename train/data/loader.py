"""Batches as the network takes them: decoded by data workers, padded, in the order of the plan.

grain asks for batches ahead of the training loop, in threads; each hands its samples to workers
(`train.data.workers`). What a batch holds is a function of the plan alone.
"""

import threading
from collections import OrderedDict
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import grain
import numpy as np

from train.data.dataset import Dataset
from train.data.epochs import BatchPlan, Epochs
from train.data.records.sample import BadSample, Sample
from train.data.workers import LoadedSample
from train.errors import WorkerError
from vxl_jax.stream.batch import StreamBatch, StreamShape, batch_streams
from vxl_jax.stream.plan import Stream
from vxl_jax.stream.visual import Pixels, VisualInput, batch_visual

AHEAD = 16
"""Batches that may be prepared at once, where `data.buffer_mb` has room for them."""


@dataclass(frozen=True)
class Batch:
    """What a step needs (host arrays).

    streams: see `StreamBatch`; pixels: uint8 [B, F, S, S, 3], with the visual tokens where the
    layout of the model asks for them; None in a batch of text alone. samples: what is in each
    place, None where it is empty. frames, tokens: what is in the batch, without padding;
    token_places: room for tokens, with padding.
    """

    streams: StreamBatch
    pixels: Pixels | None
    samples: list[Sample | None]
    frames: int
    tokens: int
    token_places: int
    bad: list[BadSample] = field(default_factory=list)


@dataclass(frozen=True)
class Shards:
    """Which shares of every batch this process loads: those numbered `own`, of `count`."""

    own: tuple[int, ...] = (0,)
    count: int = 1

    def places(self, total: int) -> list[int]:
        """Their places in a batch, equally many of each share; the last may lie past the end."""
        each = -(-total // self.count)
        return [shard * each + i for shard in self.own for i in range(each)]


class Loader:
    """Loads the batches of a plan.

    random: draw ratios and move frames in time by the plan's seeds; else the lowest ratio. shards:
    the places of each batch that are loaded.
    """

    def __init__(
        self, plans: Epochs, dataset: Dataset, random: bool = True, shards: Shards | None = None
    ):
        self.plans, self.dataset, self.pool = plans, dataset, dataset.pool
        self.random, self.shards = random, shards or Shards()
        data, model = dataset.reader.preparer.data, dataset.reader.preparer.model
        self.size = model.tower.image_size
        self.limit = data.buffer_mb * 2**20
        # Frames that are moved in time are others each time; held-out samples come once.
        self.cache = _Cache(data.cache_mb * 2**20 if random and not data.frame_jitter else 0)

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """Batches from number `start` on, in order. Close the generator to stop what runs ahead.

        Raises: WorkerError if data processes cannot be started.
        """
        numbers = grain.MapDataset.range(start, len(self.plans))
        workers = self.pool.count
        if not workers:  # made here, when asked for
            alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            load = numbers.map(lambda number: self._load(self.plans[number], None))
            yield from load.to_iter_dataset(alone)
            return
        budget = _Budget(self.limit, start)
        with ThreadPoolExecutor(workers, "sample") as threads:

            def ahead(number: int) -> tuple[Batch, int]:
                plan = self.plans[number]
                size = self._bytes(plan)
                budget.enter(number, size)
                return self._load(plan, threads), size

            options = grain.ReadOptions(num_threads=AHEAD, prefetch_buffer_size=AHEAD)
            iterator = iter(numbers.map(ahead).to_iter_dataset(options))
            try:
                for batch, size in iterator:
                    budget.leave(size)
                    yield batch
            finally:
                budget.close()
                threads.shutdown(wait=False, cancel_futures=True)
                self.pool.stop()
                if hasattr(iterator, "close"):  # not in all versions of grain
                    iterator.close()

    def _bytes(self, plan: BatchPlan) -> int:
        places = self.shards.places(plan.bucket.places)
        return len(places) * plan.bucket.frames * self.size**2 * 3

    def _load(self, plan: BatchPlan, threads: ThreadPoolExecutor | None) -> Batch:
        """Samples whose media cannot be decoded leave their place empty and are listed in `bad`."""
        places = self.shards.places(plan.bucket.places)
        frames = plan.bucket.frames
        pixels = None
        if frames:
            pixels = np.zeros((len(places), frames, self.size, self.size, 3), np.uint8)
        found: list[LoadedSample | BadSample | Future | None] = []
        for row, place in enumerate(places):
            if place >= len(plan.samples):
                found.append(None)
                continue
            index = int(plan.samples[place])
            out = np.empty((0, self.size, self.size, 3), np.uint8)
            if pixels is not None:
                out = pixels[row, : self.dataset.lengths.frames[index]]
            seed = plan.seed_of(place) if self.random else None
            if threads is None:
                found.append(self._sample(index, seed, out))
            else:
                found.append(threads.submit(self._sample, index, seed, out))
        loaded = [item.result() if isinstance(item, Future) else item for item in found]
        streams: list[Stream | None] = []
        samples: list[Sample | None] = []
        bad = []
        for row, item in enumerate(loaded):
            good = item if isinstance(item, LoadedSample) else None
            streams.append(good.stream if good else None)
            samples.append(good.sample if good else None)
            if isinstance(item, BadSample):
                bad.append(item)
                if pixels is not None:  # half of it may have been decoded
                    pixels[row] = 0
        return Batch(
            streams=batch_streams(streams, plan.bucket.shape),
            pixels=self._visual(pixels, samples, plan.bucket.visual),
            samples=samples,
            frames=sum(sample.frames for sample in samples if sample),
            tokens=sum(stream.length for stream in streams if stream),
            token_places=len(places) * plan.bucket.shape.tokens,
            bad=bad,
        )

    def _visual(
        self, pixels: np.ndarray | None, samples: list[Sample | None], length: int
    ) -> Pixels | None:
        """Pixels with the tokens that are made of them."""
        model = self.dataset.reader.preparer.model
        if pixels is None or model.layout.is_uniform:
            return pixels
        tokens = [None if sample is None else sample.tokens(model) for sample in samples]
        return batch_visual(model.layout, pixels, tokens, length)

    def _sample(
        self, index: int, seed: tuple[int, ...] | None, out: np.ndarray
    ) -> LoadedSample | BadSample:
        held = self.cache.get(index)
        if held is not None:
            sample, out[...] = held
            return LoadedSample(sample, self.pool.work.stream(sample, seed))
        dataset = self.dataset
        loaded = self.pool.load(int(dataset.source[index]), int(dataset.record[index]), seed, out)
        if isinstance(loaded, LoadedSample) and not dataset.is_as_measured(index, loaded.sample):
            reason = "its text or images have another size than when it was measured; start again"
            loaded = BadSample(loaded.sample.name, reason, changed=True)
        if isinstance(loaded, LoadedSample):
            self.cache.put(index, loaded.sample, out)
        elif loaded.changed:
            dataset.forget(index)
        return loaded


class _Cache:
    """Samples and their pixels, least recently used ones given up, bounded in bytes of pixels; for
    many threads.
    """

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.held: OrderedDict[int, tuple[Sample, np.ndarray]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, index: int) -> tuple[Sample, np.ndarray] | None:
        with self.lock:
            if index in self.held:
                self.held.move_to_end(index)
            return self.held.get(index)

    def put(self, index: int, sample: Sample, pixels: np.ndarray) -> None:
        size = self._size(sample, pixels)
        if size > self.limit:
            return
        with self.lock:
            if index in self.held:
                return
            self.held[index] = sample, pixels.copy()
            self.used += size
            while self.used > self.limit:
                self.used -= self._size(*self.held.popitem(last=False)[1])

    @staticmethod
    def _size(sample: Sample, pixels: np.ndarray) -> int:
        return pixels.nbytes + 2 * sample.ids.nbytes + _OVERHEAD


_OVERHEAD = 2**11
"""Bytes of a sample's objects, roughly."""


class _Budget:
    """Bounds the bytes of batches that are prepared or wait, in the order of their numbers."""

    def __init__(self, limit: int, start: int):
        self.limit, self.turn, self.used, self.closed = limit, start, 0, False
        self.changed = threading.Condition()

    def enter(self, number: int, size: int) -> None:
        """Wait for this number's turn and for room; a batch that is too large waits to be alone.

        Raises: WorkerError once closed.
        """
        with self.changed:
            while not (self.closed or self._may_enter(number, size)):
                self.changed.wait(0.5)
                # The interpreter waits for all threads before it ends, though nobody has closed
                # the batches. It has no public name for that moment.
                self.closed |= getattr(threading, "_SHUTTING_DOWN", False)
            if self.closed:
                raise WorkerError("the data is no longer asked for")
            self.used += size
            self.turn += 1
            self.changed.notify_all()

    def _may_enter(self, number: int, size: int) -> bool:
        return self.turn == number and (not self.used or self.used + size <= self.limit)

    def leave(self, size: int) -> None:
        """Give back the room of a batch that was handed over."""
        with self.changed:
            self.used -= size
            self.changed.notify_all()

    def close(self) -> None:
        """Let all that wait raise."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


def blank(batch: Batch) -> Batch:
    """The same batch with black pixels: what the model can answer without looking."""
    if batch.pixels is None:
        return batch
    if isinstance(batch.pixels, VisualInput):
        black = replace(batch.pixels, pixels=np.zeros_like(batch.pixels.pixels))
        return replace(batch, pixels=black)
    return replace(batch, pixels=np.zeros_like(batch.pixels))


def leave_out(batch: Batch, places: list[int]) -> Batch:
    """The same batch with nothing in these places."""
    if not places:
        return batch
    old = batch.streams
    groups, _, tokens = old.kind.shape
    shape = StreamShape(groups, tokens, old.memory, old.label.shape[1], int(old.has_beacons))
    empty = batch_streams([None] * len(places), shape)
    arrays: dict[str, Any] = {}
    for name, value in vars(old).items():
        if isinstance(value, np.ndarray):
            arrays[name] = value.copy()
            arrays[name][(slice(None),) * (value.ndim == 3) + (places,)] = getattr(empty, name)
    samples = [None if i in places else sample for i, sample in enumerate(batch.samples)]
    return replace(batch, streams=replace(old, **arrays), samples=samples)
