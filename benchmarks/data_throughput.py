"""Samples a second, compared with plain loops over the same files."""

import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

from benchmarks.data_files import MODEL, make_epochs, write_media_records
from train.config import DataSection
from train.data.dataset import open_dataset
from train.data.loader import Loader
from vxl_jax.media import grid_pinpoints, load_image, load_video_frames, resize_and_crop, tile_image


def decode_plainly(task: tuple[str, list[int]]) -> int:
    """Frames of a video through decord alone."""
    from decord import VideoReader

    frames = VideoReader(task[0], num_threads=1).get_batch(task[1]).asnumpy()
    size = MODEL.tower.image_size
    return len([resize_and_crop(frame, size) for frame in frames])


def decode_ours(task: tuple[str, list[int]]) -> int:
    """The same through this project's function."""
    return len(load_video_frames(*task, MODEL.tower.image_size))


def tile_plainly(path: str) -> int:
    """Tiles of an image through Pillow."""
    size = MODEL.tower.image_size
    return len(tile_image(load_image(path), grid_pinpoints(size), size))


def spread(pool: Pool, function: Callable[[Any], int], tasks: Sequence[Any]) -> int:
    """Work of a pool; the frames of all tasks."""
    return sum(pool.imap_unordered(function, tasks))


def warm_up(_: int) -> int:
    """Import what the work needs, and give every process of the pool a turn."""
    import decord  # noqa: F401

    time.sleep(0.2)
    return 0


def load_all(loader: Loader) -> int:
    """Frames of all batches."""
    frames = 0
    for batch in loader.batches():
        frames += batch.frames
        if batch.bad:
            raise SystemExit(f"{batch.bad[0].name}: {batch.bad[0].reason}")
    return frames


def throughput(
    folder: Path,
    files: Sequence[Path],
    data: DataSection,
    tokenizer: Any,
    references: dict[str, tuple[Callable[[Any], int], Sequence[Any]]],
    rounds: int,
) -> dict[str, Any]:
    """Seconds of the loader and of each reference (a function and its tasks), in turns."""
    path = folder / f"{files[0].suffix[1:]}.json"
    write_media_records(path, files)
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with (
        open_dataset((str(path),), data, MODEL, tokenizer) as dataset,
        context.Pool(data.workers) as pool,
    ):
        measuring = time.perf_counter() - began
        if dataset.bad:
            raise SystemExit(f"{dataset.bad[0].name}: {dataset.bad[0].reason}")
        loader = Loader(make_epochs(dataset, data), dataset)
        runs: dict[str, Callable[[], int]] = {"loader": lambda: load_all(loader)}
        for name, (function, tasks) in references.items():
            runs[name] = lambda function=function, tasks=tasks: spread(pool, function, tasks)
        pool.map(warm_up, range(4 * data.workers), chunksize=1)
        batches = loader.batches()
        next(batches)  # its workers run too
        batches.close()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        frames = set()
        for number in range(rounds):
            for name in list(runs) if number % 2 else reversed(list(runs)):
                gc.collect()
                began = time.perf_counter()
                frames.add(runs[name]())
                seconds[name].append(time.perf_counter() - began)
    if len(frames) != 1:
        raise SystemExit(f"not the same frames: {frames}")
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "samples": len(files),
        "frames": frames.pop(),
        "workers": data.workers,
        "measuring_and_start_seconds": measuring,
        "all_seconds": seconds,
        "seconds": best,
        "ratio": {name: value / best["loader"] for name, value in best.items() if name != "loader"},
    }


def first_batch(path: Path, data: DataSection, tokenizer: Any, cache: Path) -> dict[str, float]:
    """Seconds from opening a data set to its first batch, without and with a cache."""
    found = {}
    for name in ("cold", "warm"):
        began = time.perf_counter()
        with open_dataset((str(path),), replace(data, cache_dir=str(cache)), MODEL, tokenizer) as d:
            opened = time.perf_counter() - began
            batches = Loader(make_epochs(d, data), d).batches()
            next(batches)
            found[name] = time.perf_counter() - began
            found[f"{name}_open"] = opened
            batches.close()
    return found
