"""Decode the media of many samples, by all workers."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

import numpy as np

from train.data.dataset import Dataset
from train.data.records.sample import BadSample
from train.data.workers import LoadedSample
from train.inspect.figures import BadNames
from vxl_jax.progress import progress_bar

T = TypeVar("T")


def load_each(
    data: Dataset,
    indices: Sequence[int],
    keep: Callable[[int, LoadedSample | BadSample, np.ndarray], T],
) -> Iterator[T]:
    """What `keep` makes of each sample and its pixels uint8 [F, S, S, 3], in order.

    All workers decode; no more samples than there are workers are held with their pixels.
    """
    size, count = data.reader.preparer.size, max(1, data.pool.count)

    def load(index: int) -> T:
        pixels = np.zeros((data.lengths.frames[index], size, size, 3), np.uint8)
        source, record = int(data.source[index]), int(data.record[index])
        return keep(index, data.pool.load(source, record, None, pixels), pixels)

    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(count, "inspect") as threads:
        try:
            for index in indices:
                waiting.append(threads.submit(load, int(index)))
                if len(waiting) > 8 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            data.pool.close()  # or the threads would go on to the end of what they do
            threads.shutdown(cancel_futures=True)
            raise


def check_media(datasets: Sequence[Dataset], bad: BadNames) -> dict[str, Any]:
    """Decode all media of all samples; what fails is added to `bad`."""
    began = time.perf_counter()
    chosen = [distinct_with_media(dataset) for dataset in datasets]
    frames = sum(int(d.lengths.frames[i].sum()) for d, i in zip(datasets, chosen, strict=True))
    count = 0
    with progress_bar(total=frames, desc="decoding media", unit="frame") as bar:
        for data, indices in zip(datasets, chosen, strict=True):

            def keep(
                index: int, loaded: LoadedSample | BadSample, _: np.ndarray, data: Dataset = data
            ) -> tuple[int, BadSample | None]:
                fault = loaded if isinstance(loaded, BadSample) else None
                return int(data.lengths.frames[index]), fault

            with closing(load_each(data, indices.tolist(), keep)) as results:  # type: ignore[type-var]
                for done, fault in results:
                    if fault:
                        count += 1
                        bad.add([fault])
                        bar.set_postfix(bad=count, refresh=False)
                    bar.update(done)
    return {
        "samples": sum(map(len, chosen)),
        "frames": frames,
        "bad": count,
        "seconds": round(time.perf_counter() - began, 2),
    }


def distinct_with_media(data: Dataset) -> np.ndarray:
    """Samples with media; a record that several sources have only once."""
    numbers: dict[tuple[Any, ...], int] = {}
    places = [(s.path, s.media_root, s.allow_outside) for s in data.reader.sources]
    of_source = np.array([numbers.setdefault(place, len(numbers)) for place in places])
    indices = np.flatnonzero(data.lengths.frames > 0)
    keys = of_source[data.source[indices]] * 2**32 + data.record[indices]
    return indices[np.sort(np.unique(keys, return_index=True)[1])]
