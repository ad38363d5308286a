"""What the data plane costs: its speed compared with plain decoding, its memory, its padding.

    python -m benchmarks.data                          # made files, about ten minutes
    python -m benchmarks.data --videos DIR # real videos instead
    python -m benchmarks.data --quick                  # everything small, to see that it runs

- Throughput: `Loader.batches()` compared with the same files, frames and resizing in a plain
  pool of as many processes, which throws its pixels away; videos (`get_batch` of decord, and
  `load_video_frames`) and images (Pillow and `tile_image`). Rounds alternate, the best of each
  counts; everything is measured and started before the clock.
- Films: see `benchmarks.films`.
- First batch: from `open_dataset` on, without and with a cache.
- Memory: of a process and of one of its workers, at many records compared with ten, each in
  separate processes: one that measures, and one that finds the cache.
- Padding: the share of an epoch's token and frame places that stay empty in a mixture.

Writes benchmarks/results/data.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core import machine, write_results
from benchmarks.data_files import (
    FULL,
    MODEL,
    QUICK,
    WORDS,
    Sizes,
    make_epochs,
    make_images,
    make_videos,
    words_tokenizer,
    write_text_records,
)
from benchmarks.data_throughput import (
    decode_ours,
    decode_plainly,
    first_batch,
    throughput,
    tile_plainly,
)
from benchmarks.films import films, show_films
from train.config import DataSection
from train.data.dataset import open_dataset
from train.data.epochs import Epochs, Share, make_buckets, padded_share
from train.data.lengths import Lengths, count_beacons
from vxl_jax.config import VideoXLConfig
from vxl_jax.media import (
    FrameChoice,
    open_video,
    select_frames,
)

RATIO_GOAL, PADDED_GOAL, MEMORY_GOAL = 0.9, 0.15, 150e6

PARTS = ("throughput", "films", "memory", "padding")


# Memory.


def memory_of(process: int) -> dict[str, int]:
    """Bytes resident now, and at most so far."""
    status = Path(f"/proc/{process}/status").read_text()
    kilobytes = {name: int(status.split(f"{name}:")[1].split()[0]) for name in ("VmRSS", "VmHWM")}
    return {"now": kilobytes["VmRSS"] * 1024, "peak": kilobytes["VmHWM"] * 1024}


def use_records(path: Path, tokenizer: Path) -> dict[str, Any]:
    """In this process: open, plan an epoch, read 200 records; seconds and memory."""
    from train.data import index

    data = replace(text_section(path), workers=1)
    began = time.perf_counter()
    index.open_index(path, Path(str(data.cache_dir)))
    indexed = time.perf_counter()
    with open_dataset((str(path),), data, MODEL, words_tokenizer(tokenizer)) as dataset:
        opened = time.perf_counter()
        epochs = make_epochs(dataset, data)
        epochs[len(epochs) // 2]
        planned = time.perf_counter()
        rng = np.random.default_rng(0)
        size = MODEL.tower.image_size
        out = np.empty((0, size, size, 3), np.uint8)
        for sample in rng.integers(0, len(dataset), 200):
            dataset.pool.load(0, int(dataset.record[sample]), (0, 1), out)
        read = time.perf_counter()
        return {
            "index_seconds": indexed - began,
            "open_seconds": opened - indexed,
            "plan_seconds": planned - opened,
            "read_200_seconds": read - planned,
            "main": memory_of(os.getpid()),
            "worker": memory_of(child_of(os.getpid())),
        }


def child_of(parent: int) -> int:
    """The process of a worker."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if (
                int(fields[1]) == parent
                and b"vxl_jax.media.children.process" in (path.parent / "cmdline").read_bytes()
            ):
                return int(path.parent.name)
        except OSError:  # it has ended
            continue
    raise SystemExit("no worker runs")


def text_section(path: Path) -> DataSection:
    """Settings of a data set of text."""
    return DataSection(
        train_json=(str(path),),
        media_root=str(path.parent),
        cache_dir=str(path.parent / "cache"),
        batch_size=64,
        max_tokens_per_batch=32768,
    )


def memory(folder: Path, counts: Sequence[int], tokenizer: Path) -> list[dict[str, Any]]:
    """Seconds, and memory beyond that with ten records, for each number of records."""
    rows: list[dict[str, Any]] = []
    none: dict[str, Any] = {}
    for count in (10, *counts):
        path = folder / f"{count}.json"
        write_text_records(path, count)
        runs = {}
        for name in ("cold", "warm"):  # the second finds what the first has cached
            command = [sys.executable, "-m", "benchmarks.data", "--worker", str(path)]
            done = subprocess.run(
                [*command, str(tokenizer)], stdout=subprocess.PIPE, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"memory at {count} records failed")
            runs[name] = json.loads(done.stdout.splitlines()[-1])
        size = path.stat().st_size
        path.unlink()
        if not none:
            none = runs
            continue
        row: dict[str, Any] = {"records": count, "file_bytes": size, **runs}
        for run in runs:
            for process in ("main", "worker"):
                for what in ("now", "peak"):
                    grown = runs[run][process][what] - none[run][process][what]
                    row[run][process][f"{what}_growth"] = grown
        rows.append(row)
    return rows


# Padding.


def mixture(count: int, model: VideoXLConfig) -> Lengths:
    """Lengths of a mixture: 60 % images, 10 % sets of images, 25 % videos, 5 % text."""
    rng = np.random.default_rng(0)
    kind = rng.choice(4, count, p=(0.6, 0.1, 0.25, 0.05))
    text = np.exp(rng.normal(5.2, 0.6, count)).clip(50, 600).astype(np.int32)
    text = np.where(kind == 3, np.exp(rng.uniform(np.log(50), np.log(4000), count)), text)
    blocks = []
    for k in kind:
        if k == 0:
            blocks.append(rng.integers(2, 11, 1))
        elif k == 1:
            blocks.append(rng.integers(2, 11, rng.integers(2, 7)))
        elif k == 2:
            blocks.append(np.exp(rng.uniform(np.log(8), np.log(129), 1)).astype(np.int64))
        else:
            blocks.append(np.zeros(0, np.int64))
    of_sample = np.repeat(np.arange(count), [len(b) for b in blocks])
    frames = np.concatenate(blocks)
    tokens = frames * model.layout.count(1)

    def total(of_block: np.ndarray) -> np.ndarray:
        return np.bincount(of_sample, of_block, count).astype(np.int32)

    return Lengths(
        text=text.astype(np.int32),
        labels=(0.7 * text).astype(np.int32),
        frames=total(frames),
        visual=total(tokens),
        beacons=total(count_beacons(tokens, model.window, model.ratios)),
    )


def padding(count: int) -> list[dict[str, Any]]:
    """Shares of empty places for several numbers of shapes."""
    lengths = mixture(count, MODEL)
    rows = []
    for shapes in (4, 8, 16):
        data = DataSection(
            train_json=("x",),
            media_root=".",
            batch_size=64,
            max_tokens_per_batch=32768,
            shapes=shapes,
        )
        began = time.perf_counter()
        buckets, bucket_of = make_buckets(lengths, data, data.batch_size)
        epochs = Epochs(buckets, bucket_of, [Share(range(count), count)], 0)
        plans = [epochs[i] for i in range(len(epochs))]
        seconds = time.perf_counter() - began
        frame_places = sum(plan.bucket.frames * plan.bucket.places for plan in plans)
        token_places = sum(plan.bucket.shape.tokens * plan.bucket.places for plan in plans)
        empty = sum(
            (plan.bucket.places - len(plan.samples)) * plan.bucket.shape.tokens for plan in plans
        )
        rows.append(
            {
                "shapes": shapes,
                "buckets": len(buckets),
                "batches": len(plans),
                "padded_share": padded_share(lengths, epochs),
                "empty_places_share": empty / token_places,
                "blank_frames_share": 1 - int(lengths.frames.sum()) / frame_places,
                "plan_seconds": seconds,
            }
        )
    return rows


# The run.


@contextmanager
def work_folder(directory: Path | None) -> Iterator[Path]:
    """A temporary folder with a tokenizer."""
    from train.demo.tokenizer import save_tokenizer

    with tempfile.TemporaryDirectory(dir=directory) as name:
        save_tokenizer(Path(name) / "tokenizer", WORDS)
        yield Path(name)


def video_tasks(files: Sequence[Path], data: DataSection) -> list[tuple[str, list[int]]]:
    """The frames that the loader takes of each file."""
    tasks = []
    for path in files:
        choice = FrameChoice(data.frame_sampling, data.max_frames, data.video_fps)
        tasks.append((str(path), select_frames(open_video(path), choice).indices))
    return tasks


def verdict(ok: bool) -> str:
    """How a figure compares with its goal."""
    return "reached" if ok else "missed"


def show_throughput(results: dict[str, Any]) -> None:
    """Speed compared with plain decoding, and the time to the first batch."""
    print(f"\n{'throughput':12}{'samples/s':>11}{'frames/s':>10}  times of plain decoding")
    for name, row in results["throughput"].items():
        seconds = row["seconds"]["loader"]
        ratios = ", ".join(f"{value:.2f} {other}" for other, value in row["ratio"].items())
        ok = verdict(min(row["ratio"].values()) >= RATIO_GOAL)
        print(
            f"{name:12}{row['samples'] / seconds:11.1f}{row['frames'] / seconds:10.1f}  "
            f"{ratios}   (goal {RATIO_GOAL}: {ok})"
        )
    print(f"\n{'first batch':12}{'no cache s':>11}{'cache s':>10}")
    for name, row in results["first_batch"].items():
        print(f"{name:12}{row['cold']:11.2f}{row['warm']:10.2f}")


def show_memory(results: dict[str, Any]) -> None:
    """Seconds, and memory beyond that with ten records: its peak with a cache, and without."""
    print(
        f"\n{'records':>9}{'index s':>9}{'measure s':>11}{'warm open s':>13}{'plan s':>8}"
        f"{'main MB':>9}{'worker MB':>11}{'measuring: main':>17}{'worker':>8}"
    )
    for row in results["memory"]:
        cold, warm = row["cold"], row["warm"]
        grown = [
            run[process]["peak_growth"] for run in (warm, cold) for process in ("main", "worker")
        ]
        text = ""
        if row["records"] == 10**6:
            text = f"   (goal {MEMORY_GOAL / 1e6:.0f} MB: {verdict(max(grown) <= MEMORY_GOAL)})"
        print(
            f"{row['records']:9}{cold['index_seconds']:9.2f}{cold['open_seconds']:11.1f}"
            f"{warm['index_seconds'] + warm['open_seconds']:13.2f}{warm['plan_seconds']:8.2f}"
            f"{grown[0] / 1e6:9.1f}{grown[1] / 1e6:11.1f}{grown[2] / 1e6:17.1f}"
            f"{grown[3] / 1e6:8.1f}{text}"
        )


def show_padding(results: dict[str, Any]) -> None:
    """Empty places."""
    print(f"\n{'shapes':>7}{'buckets':>9}{'batches':>9}{'padded':>8}{'blank frames':>14}")
    for row in results["padding"]:
        ok = verdict(row["padded_share"] <= PADDED_GOAL)
        print(
            f"{row['shapes']:7}{row['buckets']:9}{row['batches']:9}{row['padded_share']:8.1%}"
            f"{row['blank_frames_share']:14.1%}"
            + (f"   (goal {PADDED_GOAL:.0%}: {ok})" if row["shapes"] == DataSection.shapes else "")
        )


def measure(
    options: argparse.Namespace, sizes: Sizes, wanted: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Measure the parts that are wanted, with files in a folder."""
    results: dict[str, Any] = {"throughput": {}, "first_batch": {}, "memory": [], "padding": []}
    results["films"] = {}
    tokenizer = words_tokenizer(folder / "tokenizer")
    media = folder / "media"
    media.mkdir()
    videos = []
    if options.videos is None and {"throughput", "films"} & {*wanted}:
        videos = make_videos(media, sizes)
    for path in sorted(options.videos.glob("*.mp4")) if options.videos else ():
        videos.append(media / path.name)
        videos[-1].symlink_to(path.resolve())
    if "films" in wanted:
        clips = videos[: len(sizes.seconds)]
        results["films"] = films(folder, clips, sizes.minutes, sizes.rounds)
    if "throughput" in wanted:
        data = DataSection(
            train_json=("x",),
            media_root=str(media),
            allow_outside_root=True,
            cache_dir=str(folder / "cache"),
            workers=options.workers,
            batch_size=4,
        )
        images = make_images(media, sizes.images)
        tasks = video_tasks(videos, data)
        plain = {"decord": (decode_plainly, tasks), "ours": (decode_ours, tasks)}
        tiles = {"pillow": (tile_plainly, [str(path) for path in images])}
        for name, files, references in (("videos", videos, plain), ("images", images, tiles)):
            some = replace(data, batch_size=4 if name == "videos" else 16)
            row = throughput(folder, files, some, tokenizer, references, sizes.rounds)
            results["throughput"][name] = row
            path = folder / f"{files[0].suffix[1:]}.json"
            cache = folder / f"first-{name}"
            results["first_batch"][name] = first_batch(path, some, tokenizer, cache)
    if "memory" in wanted:
        results["memory"] = memory(folder, sizes.records, folder / "tokenizer")
    if "padding" in wanted:
        results["padding"] = padding(sizes.samples)
    return results


def main() -> None:
    """Run all, print tables, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=Path, help="a folder of .mp4 files instead of made ones")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--records", type=int, nargs="*", help="sizes of the memory test")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=PARTS,
        help="these alone, and nothing is written",
    )
    parser.add_argument("--quick", action="store_true", help="small, and nothing is written")
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(use_records(*options.worker)))
        return
    sizes = QUICK if options.quick else FULL
    if options.rounds:
        sizes = replace(sizes, rounds=options.rounds)
    if options.records is not None:
        sizes = replace(sizes, records=tuple(options.records))
    wanted = options.only or PARTS
    with work_folder(options.directory) as folder:
        results = measure(options, sizes, wanted, folder)
    tables = {"throughput": show_throughput, "films": show_films}
    tables |= {"memory": show_memory, "padding": show_padding}
    for name in wanted:
        tables[name](results)
    if options.quick or options.only:
        return
    about = machine()
    about["versions"] |= {name: version(name) for name in ("grain", "decord", "pillow", "av")}
    figures = {
        "goals": {
            "throughput_ratio": RATIO_GOAL,
            "padded_share": PADDED_GOAL,
            "memory_growth_bytes": MEMORY_GOAL,
        },
        **results,
    }
    write_results("data", figures, about)


if __name__ == "__main__":
    main()
