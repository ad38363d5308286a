"""Figures about a data set: computed for summary.json, and printed as tables."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.dataset import Dataset
from train.data.epochs import Epochs, padded_share
from train.data.lengths import KINDS
from train.data.records.sample import BadSample
from train.rows import write_rows

REASONS_SHOWN, NAMES_SHOWN = 8, 3
"""Reasons of bad samples that are printed, and samples of each."""


class BadNames:
    """Bad samples by name; a data file may be read twice."""

    def __init__(self, path: Path):
        self.path, self.reasons = path, dict[str, str]()

    def add(self, samples: Sequence[BadSample]) -> None:
        for sample in samples:
            self.reasons.setdefault(sample.name, sample.reason)

    def write(self) -> None:
        rows = [{"name": name, "reason": reason} for name, reason in self.reasons.items()]
        write_rows(self.path, rows)


# Figures, as they are in summary.json.


def statistics(values: np.ndarray) -> dict[str, float]:
    """What is told about lengths."""
    if not len(values):
        return dict.fromkeys(("min", "median", "mean", "p95", "max", "sum"), 0)
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
        "sum": int(values.sum(dtype=np.int64)),
    }


def count_kinds(kind: np.ndarray) -> dict[str, int]:
    """Samples of each kind."""
    return dict(zip(KINDS, np.bincount(kind, minlength=len(KINDS)).tolist(), strict=True))


def source_figures(data: Dataset, plans: Epochs | None = None) -> list[dict[str, Any]]:
    """What became of each source's records and, with plans, what an epoch takes of it."""
    rows = []
    tokens = data.lengths.tokens
    for number, (count, samples) in enumerate(zip(data.counts, data.ranges, strict=True)):
        source, some = count.source, slice(samples.start, samples.stop)
        row = {
            "file": str(source.path),
            "media_root": str(source.media_root),
            "sampling_strategy": source.strategy,
            "records": count.records,
            "used": count.selected,
            "good": count.good,
            "bad": count.selected - count.good,
            "kinds": count_kinds(data.kind[some]),
            "tokens": int(tokens[some].sum(dtype=np.int64)),
        }
        if plans:
            share = plans.shares[number]
            row["weight"], row["repeat"] = source.weight, source.repeat
            row["samples_an_epoch"] = share.amount
            row["tokens_an_epoch"] = share.amount * float(tokens[some].mean())
            row["epochs"] = share.epochs
        rows.append(row)
    return rows


def length_figures(data: Dataset) -> dict[str, Any]:
    """Lengths of all samples that can be used, each counted once."""
    lengths = data.lengths
    text, labels = (int(a.sum(dtype=np.int64)) for a in (lengths.text, lengths.labels))
    by_kind = {}
    for number, name in enumerate(KINDS):
        some = data.kind == number
        if some.any():
            by_kind[name] = {
                "samples": int(some.sum()),
                "tokens": statistics(lengths.tokens[some]),
                "frames": statistics(lengths.frames[some]),
            }
    return {
        "samples": len(data),
        "tokens": statistics(lengths.tokens),
        "text": statistics(lengths.text),
        "visual": statistics(lengths.visual),
        "beacons": statistics(lengths.beacons),
        "labelled": statistics(lengths.labels),
        "frames": statistics(lengths.frames[lengths.frames > 0]),
        "labelled_share_of_text": labels / text,
        "labelled_share": labels / int(lengths.tokens.sum(dtype=np.int64)),
        "by_kind": by_kind,
    }


def epoch_figures(data: Dataset, plans: Epochs) -> list[dict[str, Any]]:
    """The first of each stretch of epochs that take the same sources; one takes nearly the same
    amount as the next.
    """
    rows: list[dict[str, Any]] = []
    batches = np.diff(plans.ends, prepend=0)
    before: list[int] = []
    for number, parts in enumerate(plans.epochs):
        taken = [share for share, _ in parts]
        if not rows or taken != before:
            samples = plans.samples(number)
            rows.append(
                {
                    "first": number + 1,
                    "sources": taken,
                    "samples": len(samples),
                    "tokens": int(data.lengths.tokens[samples].sum(dtype=np.int64)),
                    "batches": int(batches[number]),
                    "padded_share": padded_share(data.lengths, plans, number),
                }
            )
        before, rows[-1]["last"] = taken, number + 1
    return rows


def bucket_figures(data: Dataset, plans: Epochs) -> list[dict[str, Any]]:
    """Every padded shape, and what the whole run puts into it."""
    size = len(plans.buckets)
    batches, samples, tokens = (np.zeros(size, np.int64) for _ in range(3))
    for number in range(len(plans.epochs)):
        some = plans.samples(number)
        batches += plans.batches_of(some)
        samples += np.bincount(plans.bucket_of[some], minlength=size)
        weights = data.lengths.tokens[some]
        tokens += np.bincount(plans.bucket_of[some], weights, size).astype(np.int64)
    rows = []
    for i, bucket in enumerate(plans.buckets):
        room = int(batches[i]) * bucket.places * bucket.shape.tokens
        rows.append(
            {
                "tokens": bucket.shape.tokens,
                "frames": bucket.frames,
                "memory": bucket.shape.memory,
                "labels": bucket.shape.labels,
                "places": bucket.places,
                "samples": int((plans.bucket_of == i).sum()),
                "samples_run": int(samples[i]),
                "tokens_run": int(tokens[i]),
                "batches_run": int(batches[i]),
                "padded_share": 1 - int(tokens[i]) / room if room else 0.0,
            }
        )
    return rows


def run_figures(
    rows: list[dict[str, Any]], plans: Epochs, steps: int, last_step: int
) -> dict[str, Any]:
    """Totals of the run, of which `rows` are the `bucket_figures`. last_step: where it ends."""
    room = sum(row["batches_run"] * row["places"] * row["tokens"] for row in rows)
    tokens = sum(row["tokens_run"] for row in rows)
    return {
        "epochs": len(plans.epochs),
        "samples": sum(row["samples_run"] for row in rows),
        "tokens": tokens,
        "batches": len(plans),
        "steps": steps,
        "last_step": last_step,
        "padded_share": 1 - tokens / room,
    }


def bad_figures(bad: BadNames, selected: int, most: float) -> dict[str, Any]:
    """Bad samples by reason; `too_many`: whether training would stop for them."""
    groups: dict[str, list[str]] = {}
    for name, reason in bad.reasons.items():
        groups.setdefault(general(reason), []).append(name)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return {
        "count": len(bad.reasons),
        "of": selected,
        "too_many": len(bad.reasons) > most * selected,
        "max_bad_share": most,
        "reasons": [
            {"reason": reason, "count": len(names), "names": names[:NAMES_SHOWN]}
            for reason, names in ordered
        ],
    }


def general(reason: str) -> str:
    """A reason without the names and numbers of one sample."""
    start, colon, rest = reason.partition(": ")
    if colon and re.search(r"[/.]", start):  # the file that it is about
        reason = "…: " + rest
    reason = re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*[^\s.,;:)]", "…", reason)
    return re.sub(r"\d+(?:[.,]\d+)*", "…", reason)


# What is printed.


@dataclass(frozen=True)
class Table:
    """Rows to print: `title` heads the first column, which is set left, `columns` the others.

    note: a sentence below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def print(self) -> None:
        """Print the table, an empty line, and the note."""
        texts = [[self.title, *self.columns], *([_text(value) for value in r] for r in self.rows)]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        for row in texts:
            rest = (f"{text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True))
            print("  ".join([f"{row[0]:{widths[0]}}", *rest]).rstrip())
        print()
        if self.note:
            print(f"{self.note}\n")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if value < 1000 and value % 1 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_figures(summary: dict[str, Any]) -> None:
    """Print tables of everything that is known before media are decoded."""
    tables = [source_table(summary["sources"])]
    if summary["heldout"]:
        rows = [(row["file"], *_counts(row)) for row in summary["heldout"]]
        tables.append(Table("held-out questions", COUNTED, rows))
    tables += [
        length_table(summary["lengths"]),
        epoch_table(summary["epochs"]),
        bucket_table(summary["buckets"]),
    ]
    for table in tables:
        table.print()
    run, stop = summary["run"], ""
    if run["last_step"] < run["steps"]:
        stop = f" (run.max_steps stops it after {run['last_step']:,})"
    print(
        f"run: {run['steps']:,} optimizer steps{stop}, {run['batches']:,} batches, "
        f"{run['samples']:,} samples, {run['tokens']:,} tokens, {run['padded_share']:.1%} padding\n"
    )


COUNTED = ("records", "used", "good", "bad")
"""Numbers of records of a data file, in its row of `source_figures`."""


def _counts(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row[name] for name in COUNTED)


def source_table(sources: list[dict[str, Any]]) -> Table:
    """Make the table of `source_figures`, without kinds of samples that no source has."""
    kinds = [name for name in KINDS if any(row["kinds"][name] for row in sources)]
    rows = [
        (
            row["file"],
            *_counts(row),
            *(row["kinds"][name] for name in kinds),
            round(row["samples_an_epoch"], 1),
            row["tokens_an_epoch"],
            row["epochs"],
        )
        for row in sources
    ]
    return Table("sources", (*COUNTED, *kinds, "an epoch", "tokens", "epochs"), rows)


def length_table(lengths: dict[str, Any]) -> Table:
    """Make the table of `length_figures`."""
    columns = ("min", "median", "mean", "p95", "max", "sum")
    names = {
        "tokens": "tokens",
        "text": "  of text",
        "visual": "  visual",
        "beacons": "  beacons",
        "labelled": "labelled tokens",
        "frames": "frames or tiles",
    }
    rows = [(title, *(lengths[name][c] for c in columns)) for name, title in names.items()]
    for name, part in lengths["by_kind"].items():
        rows.append((f"tokens of {name}", *(part["tokens"][c] for c in columns)))
    note = (
        f"{lengths['labelled_share']:.1%} of all tokens are labelled, "
        f"{lengths['labelled_share_of_text']:.1%} of those of text; beacons are those of the "
        "lowest ratio; frames are of samples with media"
    )
    return Table(f"lengths of {lengths['samples']:,} samples", columns, rows, note)


def epoch_table(epochs: list[dict[str, Any]]) -> Table:
    """Make the table of `epoch_figures`."""
    rows = [
        (
            f"{row['first']} to {row['last']}" if row["last"] > row["first"] else row["first"],
            row["samples"],
            row["tokens"],
            row["batches"],
            f"{row['padded_share']:.1%}",
        )
        for row in epochs
    ]
    return Table("epochs", ("samples", "tokens", "batches", "padding"), rows)


def bucket_table(buckets: list[dict[str, Any]]) -> Table:
    """Make the table of `bucket_figures`."""
    rows = [
        (
            f"{row['tokens']:,}",
            row["frames"] or "text",
            row["places"],
            row["samples"],
            row["batches_run"],
            f"{row['padded_share']:.1%}" if row["batches_run"] else "-",
        )
        for row in buckets
    ]
    columns = ("frames", "places", "samples", "batches in the run", "padding")
    return Table("buckets: tokens", columns, rows)


def print_bad(summary: dict[str, Any], bad: BadNames, out: Path, every: bool) -> None:
    """Bad samples by reason and, with `every`, all of them; what was decoded."""
    figures, checked = summary["bad"], summary["media_checked"]
    if checked:
        print(
            f"decoded {checked['samples']:,} samples with {checked['frames']:,} frames or tiles "
            f"in {checked['seconds']:.1f} s: {checked['bad']:,} bad"
        )
    if not figures["count"]:
        print("no bad samples" + ("" if checked else " (their media were not decoded)"))
        return
    share = figures["count"] / figures["of"]
    verdict = "more than" if figures["too_many"] else "within"
    print(
        f"{figures['count']:,} of {figures['of']:,} samples are bad ({share:.2%}; {verdict} "
        f"data.max_bad_share {figures['max_bad_share']:g}"
        f"{': training would stop' if figures['too_many'] else ''})"
    )
    if every:
        for name, reason in bad.reasons.items():
            print(f"  {name}: {reason}")
        return
    for group in figures["reasons"][:REASONS_SHOWN]:
        print(f"{group['count']:>7,} × {group['reason']}")
        for name in group["names"]:
            print(f"          {name}")
        if group["count"] > len(group["names"]):
            print("          …")
    if len(figures["reasons"]) > REASONS_SHOWN:
        print(f"and {len(figures['reasons']) - REASONS_SHOWN} other reasons")
    print(f"all are listed in {out}/bad_samples.jsonl")
