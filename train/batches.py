"""Batches: which samples go together, decoded and padded by worker processes.

Which samples form a batch, in which order, with which random ratios, is a function of the seed and
the batch's number alone. A run that starts again at step n asks for the batches from n on.
"""

import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grain
import numpy as np
from absl import flags

from train.records import BadSample, Block, Preparer, Sample
from vxl_jax.media import MediaError
from vxl_jax.stream import Ratio, StreamBatch, StreamShape, batch_streams, draw_ratio, round_up


@dataclass(frozen=True)
class Bucket:
    """Padded sizes of a batch; all batches of one bucket run the same compiled program."""

    shape: StreamShape
    frames: int


@dataclass(frozen=True)
class BatchPlan:
    """Samples of one batch (at most `data.batch_size`) and the seed of their ratios."""

    samples: tuple[int, ...]
    bucket: Bucket
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """What a step needs (host arrays).

    streams: see `StreamBatch`; pixels: uint8 [B, F, S, S, 3], None in a batch of text alone.
    samples: index of the sample in each place, -1 where the place is empty. frames, tokens: what
    is in the batch, without padding.
    """

    streams: StreamBatch
    pixels: np.ndarray | None
    samples: np.ndarray
    frames: int
    tokens: int
    bad: list[BadSample] = field(default_factory=list)


def bucket_of(sample: Sample, preparer: Preparer, ratios: Sequence[int]) -> Bucket:
    """The bucket of a sample: sizes under the lowest of the ratios, which no draw exceeds."""
    steps = preparer.data.bucket_steps
    # As in `draw_ratio`, a window with fewer tokens than the ratio keeps one beacon.
    lowest: Ratio = (lambda count: min(*ratios, count)) if ratios else None
    shape = StreamShape.of(sample.plan(preparer.model, lowest)).padded(steps)
    return Bucket(shape, round_up(sample.frames, steps) if sample.frames else 0)


class Epochs:
    """All batches of a run in order, planned an epoch at a time when they are asked for.

    buckets: of every sample. files: samples (as indices) of each data file. epochs: passes over
    each file, or one number for all. sequential: one file after another instead of all mixed.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        files: Sequence[Sequence[int]],
        batch_size: int,
        seed: int,
        epochs: Sequence[int] = (1,),
        sequential: bool = False,
    ):
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        passes_over = list(epochs) if len(epochs) > 1 else list(epochs) * len(files)
        if sequential:
            passes = [[file] for file, n in zip(files, passes_over, strict=True) for _ in range(n)]
        else:
            passes = [
                [file for file, n in zip(files, passes_over, strict=True) if n > epoch]
                for epoch in range(max(passes_over))
            ]
        self.passes = [np.array([i for file in some for i in file], int) for some in passes]
        self.ends = np.cumsum([self._batches_in(samples) for samples in self.passes])
        self._planned: tuple[int, list[BatchPlan]] | None = None

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> BatchPlan:
        number = int(np.searchsorted(self.ends, index, side="right"))
        if self._planned is None or self._planned[0] != number:
            self._planned = number, self._plan(number)
        return self._planned[1][index - int(self.ends[number])]

    def _batches_in(self, samples: np.ndarray) -> int:
        counts: dict[Bucket, int] = defaultdict(int)
        for i in samples:
            counts[self.buckets[i]] += 1
        return sum(-(-count // self.batch_size) for count in counts.values())

    def _plan(self, number: int) -> list[BatchPlan]:
        """Fill a batch of each bucket in random order; what is left at the end is not full."""
        rng = np.random.default_rng([self.seed, number])
        waiting: dict[Bucket, list[int]] = defaultdict(list)
        batches: list[tuple[Bucket, list[int]]] = []
        for i in rng.permutation(self.passes[number]):
            bucket = self.buckets[i]
            waiting[bucket].append(int(i))
            if len(waiting[bucket]) == self.batch_size:
                batches.append((bucket, waiting.pop(bucket)))
        batches += waiting.items()
        return [
            BatchPlan(tuple(samples), bucket, (self.seed, number, k))
            for k, (bucket, samples) in enumerate(batches)
        ]


class Loader:
    """Decodes and pads the batch of a plan; runs in the worker processes."""

    def __init__(
        self, samples: Sequence[Sample], preparer: Preparer, ratios: Sequence[int], size: int
    ):
        self.samples, self.preparer, self.ratios, self.size = samples, preparer, ratios, size
        self._cache = _PixelCache(preparer.data.cache_mb * 2**20)

    def __call__(self, plan: BatchPlan) -> Batch:
        """Samples whose media cannot be decoded leave their place empty and are listed in `bad`."""
        preparer, rng = self.preparer, np.random.default_rng(plan.seed)
        size, frames = preparer.model.vision.image_size, plan.bucket.frames
        pixels = np.zeros((self.size, frames, size, size, 3), np.uint8) if frames else None
        streams: list[Any] = [None] * self.size
        present = np.full(self.size, -1, np.int32)
        bad = []
        for place, index in enumerate(plan.samples):
            sample = self.samples[index]
            ratio: Ratio = draw_ratio(self.ratios, rng)
            stream = sample.plan(preparer.model, ratio)
            try:
                blocks = [self._pixels(block) for block in sample.blocks]
            except MediaError as error:
                bad.append(BadSample(sample.name, str(error)))
                continue
            if pixels is not None and blocks:
                pixels[place, : sample.frames] = np.concatenate(blocks)
            streams[place], present[place] = stream, index
        return Batch(
            streams=batch_streams(streams, plan.bucket.shape),
            pixels=pixels,
            samples=present,
            frames=sum(self.samples[i].frames for i in present.tolist() if i >= 0),
            tokens=sum(stream.length for stream in streams if stream is not None),
            bad=bad,
        )

    def _pixels(self, block: Block) -> np.ndarray:
        pixels = self._cache.get(block)
        if pixels is None:
            pixels = self.preparer.pixels(block)
            self._cache.put(block, pixels)
        return pixels


class _PixelCache:
    """Least recently used pixels of visual blocks, bounded in bytes."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.pixels: OrderedDict[Block, np.ndarray] = OrderedDict()

    def get(self, block: Block) -> np.ndarray | None:
        if block in self.pixels:
            self.pixels.move_to_end(block)
        return self.pixels.get(block)

    def put(self, block: Block, pixels: np.ndarray) -> None:
        if pixels.nbytes > self.limit:
            return
        self.pixels[block] = pixels
        self.used += pixels.nbytes
        while self.used > self.limit:
            self.used -= self.pixels.popitem(last=False)[1].nbytes


def load_batches(
    plans: Epochs, loader: Loader, workers: int, start: int = 0
) -> Generator[Batch, None, None]:
    """The batches of `plans` from number `start` on, in order, made by `workers` processes.

    0 workers: made in this process, when asked for. Close the generator to end the processes.

    Raises: WorkerError if a process is killed or cannot go on.
    """
    numbers = grain.MapDataset.range(start, len(plans))
    # Threads would race for the decoder; processes are what scales.
    alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    if not workers:
        yield from numbers.map(plans.__getitem__).map(loader).to_iter_dataset(alone)
        return
    if not flags.FLAGS.is_parsed():  # grain reads absl flags, and nobody else here parses them
        flags.FLAGS.mark_as_parsed()
    with TemporaryDirectory(prefix="vxl-batches-") as folder:
        paths = numbers.map(_Writer(plans, loader, Path(folder))).to_iter_dataset(alone)
        paths = paths.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=4),
            partial(_follow_parent, folder),
        )
        with closing(iter(paths)) as iterator:
            for number in range(start, len(plans)):
                try:
                    path = next(iterator)
                except (OSError, RuntimeError, StopIteration) as error:
                    raise WorkerError(
                        f"batch {number}: a process that prepares data has failed ({error}); if "
                        "memory was short, lower data.workers, data.cache_mb or data.batch_size"
                    ) from error
                yield pickle.loads(path.read_bytes())
                path.unlink()


class WorkerError(RuntimeError):
    """A data process has failed; the message says what to do."""


@dataclass(frozen=True)
class _Writer:
    """Makes a batch and hands it over in a file of its own, of which grain sends the path.

    grain's pipe holds 64 KB. With whole batches in it, a worker that is killed leaves half of one
    there, for the rest of which the training process waits forever; and one that is told to end
    waits until somebody has read all batches that it has made.
    """

    plans: Epochs
    loader: Loader
    folder: Path

    def __call__(self, number: int) -> Path:
        path = self.folder / str(number)
        path.write_bytes(pickle.dumps(self.loader(self.plans[number]), protocol=5))
        return path


def _follow_parent(folder: str, worker: int, workers: int) -> None:
    """Let a worker process end with the training process, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process to handle

    def end() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def blank(batch: Batch) -> Batch:
    """The same batch with black pixels: what the model can answer without looking."""
    if batch.pixels is None:
        return batch
    return replace(batch, pixels=np.zeros_like(batch.pixels))
