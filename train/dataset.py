"""All samples of a run: where each stands and how long it is, without holding any record.

Records are indexed once (`train.index`) and measured once (text tokenised, headers of media read);
both are kept in a cache that notices when data files or settings change.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from train.cache import cached, forget
from train.config import DataSection
from train.errors import DataError
from train.index import RecordIndex, open_index
from train.records import (
    RECORDS_VERSION,
    BadSample,
    FastTokenizer,
    Preparer,
    Reader,
    Sample,
)
from train.sources import Source, find_sources, select
from train.workers import Measured, Work, WorkerPool
from vxl_jax.config import VideoXLConfig
from vxl_jax.media import MEDIA_VERSION
from vxl_jax.progress import progress_bar

PART = 2**14
"""Records whose lengths are cached together: a start that is killed keeps the parts it finished."""
TOGETHER = 16
"""Records that a worker measures at once."""
KINDS = ("text", "image", "images", "video", "videos")
"""Kinds of samples: no media, one image, several, one video, several."""
COLUMNS = ("record", "text", "labels", "blocks", "is_video")
"""What is cached of each record that can be used, beside the frames of its blocks."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of samples; one row a sample.

    text, labels: token ids without marks, and labelled ones, int32 [N]. frames: frames or tiles,
    int32 [N]. visual, beacons: tokens that these become under the lowest ratio, int32 [N].
    """

    text: np.ndarray
    labels: np.ndarray
    frames: np.ndarray
    visual: np.ndarray
    beacons: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each stream, int32 [N]."""
        return self.text + self.visual + self.beacons

    @property
    def memory(self) -> np.ndarray:
        """Memory entries of each stream, int32 [N]; see `compressed`."""
        return self.text + np.where(self.beacons > 0, self.beacons, self.visual)


@dataclass(frozen=True)
class Counts:
    """What became of one source's records."""

    source: Source
    records: int
    selected: int
    good: int


class Dataset:
    """The samples of some sources that can be used, in the order of sources and records.

    source, record: where each sample stands, uint16 and uint32 [N]. kind: its place in `KINDS`,
    uint8 [N]. ranges: the samples of each source. bad: what was left out. pool: reads them; ended
    with the dataset's `with` block.
    """

    def __init__(
        self,
        reader: Reader,
        pool: WorkerPool,
        seed: int,
        data: DataSection,
        kept: Path | None = None,
        resume: bool = False,
    ):
        """Measure what no cache has. `reader` is that of the pool's work.

        kept: folder of a run, where its samples are noted. resume: the samples are those noted
        there, though media that were bad then could be read now, or the other way round.

        Raises: DataError if a file cannot be read, or a source has no record that can be used.
        """
        self.reader, self.pool = reader, pool
        self.model = reader.preparer.model
        self.bad: list[BadSample] = []
        self.counts: list[Counts] = []
        self.ranges: list[range] = []
        self._folders: list[list[tuple[int, Path]]] = []
        columns: list[tuple[np.ndarray, ...]] = []
        start = 0
        for number, (source, index) in enumerate(zip(reader.sources, reader.indices, strict=True)):
            chosen = select(source.strategy, len(index), seed)
            measures = _Measures(reader, pool, number, chosen, data)
            noted = None if kept is None else kept / f"{number}.npz"
            if noted is not None and resume and noted.exists():
                found, bad = _noted(noted)
            else:
                found, bad = measures.read()
            if not len(found[0]):
                raise DataError(
                    f"{source.path}: none of its {len(chosen)} records can be used; the first: "
                    f"{bad[0].reason}"
                )
            if noted is not None and not resume:
                _note(noted, found, bad)
            self.bad += bad
            self._folders.append(measures.folders)
            self.counts.append(Counts(source, len(index), len(chosen), len(found[0])))
            self.ranges.append(range(start, start + len(found[0])))
            start += len(found[0])
            columns.append((np.full(len(found[0]), number, np.uint16), *found))
        self.source, self.record, self.kind, *rest = (
            np.concatenate(column) for column in zip(*columns, strict=True)
        )
        self.lengths = Lengths(*rest)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all data files and of where each sample stands and how long it is; reads the
        files, so that only a run that keeps its position pays for it.
        """
        digest = hashlib.sha256()
        columns = (self.record, self.kind, *vars(self.lengths).values())
        for source, samples in zip(self.reader.sources, self.ranges, strict=True):
            with source.path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            for column in columns:
                digest.update(column[samples.start : samples.stop].tobytes())
            digest.update(repr((source.strategy, source.weight, source.repeat)).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.record)

    def __enter__(self) -> "Dataset":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def is_as_measured(self, index: int, sample: Sample) -> bool:
        """Whether a sample's text still has the lengths that its batch was planned with."""
        planned = self.lengths.text[index], self.lengths.labels[index]
        return (sample.text, sample.labelled) == planned

    def forget(self, index: int) -> None:
        """Let the next start measure a sample again, with those that are cached with it."""
        for last, folder in self._folders[int(self.source[index])]:
            if self.record[index] <= last:
                forget(folder)
                return

    def name(self, index: int) -> str:
        """A sample's name: its file, its number there, and its id."""
        return self.reader.name(int(self.source[index]), int(self.record[index]))


def open_dataset(
    paths: Sequence[str],
    data: DataSection,
    model: VideoXLConfig,
    tokenizer: Any,
    seed: int = 0,
    prompts: bool = False,
    ratios: Sequence[int] | None = None,
    kept: Path | None = None,
    resume: bool = False,
) -> Dataset:
    """The samples of data files; use it in a `with` block, which ends its workers.

    Args:
        paths: as `data.train_json`.
        data: how samples are made.
        model: sizes of the network.
        tokenizer: of transformers.
        seed: of what `random` sampling strategies choose.
        prompts: samples end where the last answer is to begin, for evaluation.
        ratios: compression ratios drawn for windows; those of the model if None.
        kept: folder of a run, where its samples are noted.
        resume: the samples are those noted there.

    Raises: DataError naming file and record or field; WorkerError if workers cannot be started.
    """
    sources = find_sources(paths, data.media_root, data.allow_outside_root)
    for root in dict.fromkeys(source.media_root for source in sources):
        if not root.is_dir():
            raise DataError(f"data.media_root {root}: there is no such directory")
    cache = None if data.cache_dir is None else Path(data.cache_dir)
    opened: dict[Path, RecordIndex] = {}
    for source in sources:
        if source.path not in opened:
            opened[source.path] = open_index(source.path, cache)
    indices = [opened[source.path] for source in sources]
    preparer = Preparer(data, model)
    text = FastTokenizer(tokenizer)
    reader = Reader(sources, indices, preparer, text, prompts, data.control_tokens)
    work = Work(reader, tuple(model.ratios if ratios is None else ratios))
    pool = WorkerPool(work, data.workers, data.sample_seconds)
    try:
        return Dataset(reader, pool, seed, data, kept, resume)
    except BaseException:
        pool.close()
        raise


class _Measures:
    """The measures of the records of one source, part by part, from its cache if they are there."""

    def __init__(
        self, reader: Reader, pool: WorkerPool, number: int, chosen: np.ndarray, data: DataSection
    ):
        self.reader, self.pool, self.number, self.chosen = reader, pool, number, chosen
        self.source = reader.sources[number]
        self.cache_dir = None if data.cache_dir is None else Path(data.cache_dir)
        self.key = self._key(data)
        self.folders: list[tuple[int, Path]] = []  # last record of each part, and where it is

    def _key(self, data: DataSection) -> dict[str, Any]:
        """Everything that lengths depend on, but for the data file and the media."""
        model = self.reader.preparer.model
        names = (
            "template image_mode min_tiles max_tiles max_frames frame_sampling video_fps "
            "time_prompt max_length decoder control_tokens"
        )
        tokenizer = self.reader.tokenizer
        assert isinstance(tokenizer, FastTokenizer)
        return {
            "columns": COLUMNS,
            "media": MEDIA_VERSION,
            "records": RECORDS_VERSION,
            **{name: getattr(data, name) for name in names.split()},
            "media_root": str(self.source.media_root.resolve()),
            "allow_outside": self.source.allow_outside,
            "image_size": model.vision.image_size,
            "tokens_per_frame": model.tokens_per_frame,
            "prompts": self.reader.prompts,
            "tokenizer": hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest(),
            "chosen": hashlib.sha256(self.chosen.tobytes()).hexdigest(),
        }

    def read(self) -> tuple[list[np.ndarray], list[BadSample]]:
        """Columns of the records that can be used (record, kind, and those of `Lengths`), and the
        others.
        """
        name = "lengths-" + hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:16]
        parts = range(0, len(self.chosen), PART)
        self.bar = progress_bar(
            total=len(self.chosen), desc=f"measuring {self.source.path.name}", unit="record"
        )
        columns: list[tuple[np.ndarray, ...]] = []
        bad: list[BadSample] = []
        with self.bar:
            for start in parts:
                chosen = self.chosen[start : start + PART]
                held, bad_rows = self._part(f"{name}/{start // PART}", chosen)
                blocks = held["blocks"]
                lengths = self._lengths(held["text"], held["labels"], blocks, held["frames"])
                columns.append((held["record"], kinds_of(blocks, held["is_video"]), *lengths))
                bad += [BadSample(*row[1:]) for row in bad_rows]
                self.bar.update(len(chosen) - (self.bar.n - start))
        return [np.concatenate(column) for column in zip(*columns, strict=True)], bad

    def _part(self, name: str, chosen: np.ndarray) -> tuple[dict[str, np.ndarray], list[Any]]:
        """What is cached of one part; measured anew if a record that was bad can be used now."""
        built = False

        def build(folder: Path) -> None:
            nonlocal built
            built = True
            self._measure(folder, chosen)

        while True:
            folder = cached(self.source.path, self.cache_dir, name, self.key, build)
            try:
                with np.load(folder / "lengths.npz") as file:
                    held = dict(file)
                bad = json.loads((folder / "bad.json").read_text())
            except FileNotFoundError:  # another process puts a new one in its place
                continue
            # A list: leaving `_ask` before its end would end the workers.
            again = [] if built else [*self._ask(np.array([row[0] for row in bad], np.int64))]
            if not any(isinstance(now, Measured) for _, now in again):
                self.folders.append((int(chosen[-1]), folder))
                return held, bad
            forget(folder)

    def _measure(self, folder: Path, chosen: np.ndarray) -> None:
        good: list[tuple[int, ...]] = []
        frames: list[int] = []
        bad: list[tuple[int, str, str]] = []
        for record, found in self._ask(chosen, self.bar.update):
            if isinstance(found, BadSample):
                bad.append((record, found.name, found.reason))
                continue
            blocks = len(found.frames)
            good.append((record, found.text, found.labels, blocks, found.is_video))
            frames += found.frames
        columns = np.array(good, np.uint32).reshape(-1, len(COLUMNS)).T
        np.savez(
            folder / "lengths.npz",
            frames=np.array(frames, np.uint32),
            **dict(zip(COLUMNS, columns, strict=True)),  # type: ignore[arg-type]
        )
        (folder / "bad.json").write_text(json.dumps(bad))

    def _ask(
        self, records: np.ndarray, progress: Any = lambda count: None
    ) -> Iterator[tuple[int, Measured | BadSample]]:
        """Measures of records in their order, made by all workers."""
        if not len(records):
            return
        groups = [records[i : i + TOGETHER].tolist() for i in range(0, len(records), TOGETHER)]
        with ThreadPoolExecutor(max(1, self.pool.count)) as threads:
            try:
                answers = threads.map(lambda group: self.pool.measure(self.number, group), groups)
                for group, found in zip(groups, answers, strict=True):
                    yield from zip(group, found, strict=True)
                    progress(len(group))
            except BaseException:
                self.pool.close()  # or the threads would wait for all that was asked
                threads.shutdown(cancel_futures=True)
                raise

    def _lengths(
        self, text: np.ndarray, labels: np.ndarray, blocks: np.ndarray, frames: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Columns of `Lengths`, from frames of all blocks of all samples one after another."""
        model = self.reader.preparer.model
        tokens = frames.astype(np.int64) * model.tokens_per_frame
        beacons = count_beacons(tokens, model.window, self.pool.work.ratios)
        of_sample = np.repeat(np.arange(len(blocks)), blocks)

        def total(of_block: np.ndarray) -> np.ndarray:
            return np.bincount(of_sample, of_block, len(blocks)).astype(np.int32)

        return (
            text.astype(np.int32),
            labels.astype(np.int32),
            total(frames),
            total(tokens),
            total(beacons),
        )


def _note(path: Path, columns: list[np.ndarray], bad: list[BadSample]) -> None:
    """Write a source's samples, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    named = {f"column_{i}": column for i, column in enumerate(columns)}
    with part.open("wb") as file:
        np.savez(file, bad=np.array(json.dumps([(b.name, b.reason) for b in bad])), **named)  # type: ignore[arg-type]
    part.replace(path)


def _noted(path: Path) -> tuple[list[np.ndarray], list[BadSample]]:
    """What `_note` wrote."""
    with np.load(path) as held:
        bad = [BadSample(*row) for row in json.loads(str(held["bad"]))]
        return [held[f"column_{i}"] for i in range(len(held.files) - 1)], bad


def kinds_of(blocks: np.ndarray, is_video: np.ndarray) -> np.ndarray:
    """Places in `KINDS` of samples with so many blocks, some of them videos or none, uint8 [N]."""
    return np.where(blocks == 0, 0, np.minimum(blocks, 2) + 2 * is_video).astype(np.uint8)


def count_beacons(tokens: np.ndarray, window: int, ratios: Sequence[int]) -> np.ndarray:
    """Beacons of visual blocks of some tokens under the lowest ratio, which no draw exceeds."""
    if not ratios:
        return np.zeros_like(tokens)

    def of_window(count: Any) -> Any:
        # As in `draw_ratio`, a window with fewer tokens than the ratio keeps one beacon.
        return count // np.minimum(min(ratios), np.maximum(count, 1))

    return tokens // window * of_window(window) + of_window(tokens % window)
