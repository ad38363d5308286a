"""Lengths of the records of a source, measured by workers and cached."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from train.config import DataSection
from train.data.cache import cached, forget
from train.data.lengths import count_beacons, kinds_of
from train.data.records.reader import Reader
from train.data.records.sample import RECORDS_VERSION, BadSample
from train.data.tokenizer import FastTokenizer
from train.data.workers import Measured, WorkerPool
from vxl_jax.media import MEDIA_VERSION
from vxl_jax.progress import progress_bar

PART = 2**14
"""Records whose lengths are cached together: a start that is killed keeps the parts it finished."""


TOGETHER = 16
"""Records that a worker measures at once."""


COLUMNS = ("record", "text", "labels", "blocks", "is_video")
"""What is cached of each record that can be used, in addition to that of its blocks."""


BY_BLOCK = ("frames", "visual")
"""What is cached of each visual block: its frames or tiles, and its tokens."""


class Measures:
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
        names = ("template", "max_length", "control_tokens")
        tokenizer = self.reader.tokenizer
        assert isinstance(tokenizer, FastTokenizer)
        return {
            "columns": COLUMNS,
            "media": MEDIA_VERSION,
            "records": RECORDS_VERSION,
            **{name: getattr(data, name) for name in names},
            "preprocessing": asdict(self.reader.preparer.preprocessing),
            "media_root": str(self.source.media_root.resolve()),
            "allow_outside": self.source.allow_outside,
            "image_size": model.tower.image_size,
            "layout": asdict(model.layout),
            "family": model.family,
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
                lengths = self._lengths(held)
                columns.append((held["record"], kinds_of(blocks, held["is_video"]), *lengths))
                bad += [BadSample(*row[1:]) for row in bad_rows]
                self.bar.update(len(chosen) - (self.bar.n - start))
        return [np.concatenate(column) for column in zip(*columns, strict=True)], bad

    def _part(self, name: str, chosen: np.ndarray) -> tuple[dict[str, np.ndarray], list[Any]]:
        """Read one part from the cache; measure it again if a record that was bad is usable now."""
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
        of_blocks: dict[str, list[int]] = {name: [] for name in BY_BLOCK}
        bad: list[tuple[int, str, str]] = []
        for record, found in self._ask(chosen, self.bar.update):
            if isinstance(found, BadSample):
                bad.append((record, found.name, found.reason))
                continue
            blocks = len(found.frames)
            good.append((record, found.text, found.labels, blocks, found.is_video))
            for name, values in of_blocks.items():
                values += getattr(found, name)
        columns = np.array(good, np.uint32).reshape(-1, len(COLUMNS)).T
        np.savez(
            folder / "lengths.npz",
            **{name: np.array(values, np.uint32) for name, values in of_blocks.items()},  # type: ignore[arg-type]
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

    def _lengths(self, held: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """Columns of `Lengths`, from those of all blocks of all samples one after another."""
        blocks, frames = held["blocks"], held["frames"]
        model, tokens = self.reader.preparer.model, held["visual"].astype(np.int64)
        beacons = count_beacons(tokens, model.window, self.pool.work.ratios)
        of_sample = np.repeat(np.arange(len(blocks)), blocks)

        def total(of_block: np.ndarray) -> np.ndarray:
            return np.bincount(of_sample, of_block, len(blocks)).astype(np.int32)

        return (
            held["text"].astype(np.int32),
            held["labels"].astype(np.int32),
            total(frames),
            total(tokens),
            total(beacons),
        )
