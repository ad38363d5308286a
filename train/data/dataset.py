"""All samples of a run: where each stands and how long it is, without holding any record.

Records are indexed once (`train.data.index`) and measured once (text tokenised, headers of media
read); both are kept in a cache that notices when data files or settings change.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from train.config import DataSection
from train.data.cache import forget
from train.data.index import RecordIndex, open_index
from train.data.lengths import Lengths
from train.data.measures import Measures
from train.data.records.media import Preparer
from train.data.records.reader import Reader
from train.data.records.sample import BadSample, Sample
from train.data.sources import Source, find_sources, select
from train.data.tokenizer import FastTokenizer
from train.data.workers import RecordWork, WorkerPool
from train.errors import DataError
from vxl_jax.config import VideoXLConfig


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
            measures = Measures(reader, pool, number, chosen, data)
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
        """Whether a sample still has the lengths that its batch was planned with."""
        columns = self.lengths.text, self.lengths.labels, self.lengths.visual
        visual = sum(sample.visual_tokens(self.model))
        return (sample.text, sample.labelled, visual) == tuple(c[index] for c in columns)

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
    work = RecordWork(reader, tuple(model.ratios if ratios is None else ratios))
    pool = WorkerPool(work, data.workers, data.sample_seconds)
    try:
        return Dataset(reader, pool, seed, data, kept, resume)
    except BaseException:
        pool.close()
        raise


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
