"""Samples that were left out, by name."""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.data.records.sample import BadSample
from train.errors import TooManyBadSamples
from train.rows import read_rows, write_rows

SHOWN = 20
"""Bad samples that are printed at once."""


class BadSamples:
    """Samples that were left out, by name, kept in bad_samples.jsonl."""

    def __init__(self, run_dir: Path, records: dict[str, int], max_share: float, start: int):
        """records: number of records that are used of each data file.

        start: steps that are done already. Samples found in them are kept; those found before
        training or later will be found again, unless they have been repaired.
        """
        self.path, self.records, self.max_share = run_dir / "bad_samples.jsonl", records, max_share
        rows = [row for row in read_rows(self.path) if 0 < row["step"] <= start]
        write_rows(self.path, rows)
        self.reasons = {row["name"]: row["reason"] for row in rows}
        self.asked = 0

    def summary(self) -> dict[str, Any]:
        """Their count, their count by data file, and the reason for each."""
        files = [self._file(name) for name in self.reasons]
        return {
            "count": len(self.reasons),
            "by_file": {file: files.count(file) for file in self.records},
            "reasons": self.reasons,
        }

    def _file(self, name: str) -> str | None:
        return next((file for file in self.records if name.startswith(f"{file}[")), None)

    def check(self, count: int) -> None:
        """Check the number of bad samples of all processes against data.max_bad_share.

        Raises: TooManyBadSamples if they are more than the allowed share.
        """
        total = sum(self.records.values())
        if count > self.max_share * total:
            raise TooManyBadSamples(
                f"{count} of {total} samples are bad, more than data.max_bad_share "
                f"{self.max_share:g} allows; {self.path} lists them with reasons"
            )

    def since_asked(self) -> bool:
        """Whether there are new ones since the last call."""
        asked, self.asked = self.asked, len(self.reasons)
        return len(self.reasons) > asked

    def collect(self, processes: Path, count: int) -> None:
        """Add what the run's other processes, `count` with this one, have found."""
        for number in range(1, count):
            rows = read_rows(processes / str(number) / self.path.name)
            self.reasons.update({row["name"]: row["reason"] for row in rows})

    def note(self, bad: list[BadSample], step: int) -> None:
        """Name and count new ones, found in a step; 0: before training."""
        new = {sample.name: sample for sample in bad if sample.name not in self.reasons}
        with self.path.open("a") as file:
            for number, sample in enumerate(new.values()):
                self.reasons[sample.name] = sample.reason
                row = {"step": step, "name": sample.name, "reason": sample.reason}
                file.write(json.dumps(row) + "\n")
                if number < SHOWN:
                    tqdm.write(f"bad sample left out: {sample.name}: {sample.reason}")
        if len(new) > SHOWN:
            tqdm.write(f"and {len(new) - SHOWN} more; {self.path} lists them all")
