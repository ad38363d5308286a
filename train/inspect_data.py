"""Look at the data before training on it: what there is, what is bad, how it becomes batches.

    python -m train.inspect_data --config finetune_video --data.train-json my.yaml --check-media

Takes the options of `train.finetune` and a few more (`--help`). No weights are loaded.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from train.config import TrainConfig
from train.config.cli import OwnOptions, load_config
from train.data.dataset import Dataset, open_dataset
from train.data.epochs import Epochs, plan_run
from train.data.lengths import KINDS
from train.data.records.sample import BadSample
from train.inspect.figures import (
    BadNames,
    bad_figures,
    bucket_figures,
    epoch_figures,
    length_figures,
    print_bad,
    print_figures,
    run_figures,
    source_figures,
)
from train.inspect.media import check_media
from train.inspect.pictures import (
    KindLengths,
    draw_lengths,
    draw_samples,
)
from train.inspect.sheet import choose_samples, load_shown, sheet_sample
from train.rows import write_text
from train.run.setup import (
    count_steps,
    load_run_tokenizer,
    open_heldout,
    prepare_data,
    read_model_config,
)
from vxl_jax.errors import ConfigError, VxlError
from vxl_jax.interrupts import sure_interrupt

MOST_SAMPLES = 64
"""Samples on the sheet at most."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options, rest = read_inspect_options(sys.argv[1:] if arguments is None else arguments)
    config, prepare = load_config(
        rest, prog="train.inspect_data", description="Look at the data before training on it."
    )
    out = options.out or Path(config.run.run_dir, "inspect")
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be made ({error.strerror})") from error
        prepare_data(config, prepare)
        with sure_interrupt():
            bad = inspect(config.resolved(), out, options)
    except (VxlError, OSError) as error:  # OSError: --out cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return int(options.check_media and bad > 0)


# Options.


class Options(NamedTuple):
    """The command's own options. out: directory for what it writes; None: in the run's."""

    out: Path | None
    check_media: bool
    samples: int


def read_inspect_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The command's own options, and the others, which are those of `train.finetune`.

    Anything wrong is one message on stderr and SystemExit(2).
    """
    parser = OwnOptions(
        "train.inspect_data",
        "Look at the data before training on it. Exit status: 0; 1 if --check-media is given and a "
        "sample is bad; 2 after an error.",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write (default: RUN_DIR/inspect)"
    )
    parser.add_argument("--check-media", action="store_true", help="decode all that is used")
    parser.add_argument(
        "--samples", type=int, default=12, metavar="N", help="samples in samples.png (default: 12)"
    )
    found, rest = parser.split(argv)
    if not 0 <= found.samples <= MOST_SAMPLES:
        parser.error(f"--samples is {found.samples}; it must be between 0 and {MOST_SAMPLES}")
    return Options(found.out, found.check_media, found.samples), rest


# The whole.


def inspect(config: TrainConfig, out: Path, options: Options) -> int:
    """Print, draw and write everything; returns how many samples are bad."""
    model = read_model_config(config)
    tokenizer = load_run_tokenizer(config, model)
    with (
        open_dataset(
            config.data.train_json, config.data, model, tokenizer, config.run.seed
        ) as data,
        open_heldout(config, model, tokenizer) or nullcontext() as heldout,
    ):
        datasets = [data, heldout] if heldout else [data]
        bad = BadNames(out / "bad_samples.jsonl")
        for dataset in datasets:
            bad.add(dataset.bad)
        plans = plan_run(data, config.data, config.run.seed)
        buckets = bucket_figures(data, plans)
        summary: dict[str, Any] = {
            "sources": source_figures(data, plans),
            "heldout": source_figures(heldout) if heldout else [],
            "lengths": length_figures(data),
            "epochs": epoch_figures(data, plans),
            "buckets": buckets,
            "run": run_figures(buckets, plans, *count_steps(config, plans)),
        }
        print_figures(summary)
        wrote = ["lengths.png", "summary.json", "bad_samples.jsonl"]
        draw_lengths(kind_lengths(data, plans), out / "lengths.png")
        if options.samples:
            pictures = [
                sheet_sample(data, index, loaded, frames, tokenizer)
                for index, loaded, frames in load_shown(
                    data, choose_samples(data, options.samples, config.run.seed)
                )
            ]
            bad.add([BadSample(p.name, p.fault) for p in pictures if p.fault])
            title = f"{len(pictures)} of {len(data):,} samples"
            draw_samples(pictures, title, out / "samples.png")
            wrote.insert(1, "samples.png")
        summary["media_checked"] = None
        selected = sum(count.selected for dataset in datasets for count in dataset.counts)
        if options.check_media:
            bad.write()  # in case that this is interrupted
            for dataset in datasets:
                dataset.pool.rest()
            summary["media_checked"] = check_media(datasets, bad)
        summary["bad"] = bad_figures(bad, selected, config.data.max_bad_share)
    bad.write()
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print_bad(summary, bad, out, every=options.check_media)
    print(f"wrote {out}/{', '.join(wrote)}")
    return len(bad.reasons)


# What is drawn.


def kind_lengths(data: Dataset, plans: Epochs) -> dict[str, KindLengths]:
    """Lengths of each kind of sample in the data, for `draw_lengths`."""
    found = {}
    for number, name in enumerate(KINDS):
        some = data.kind == number
        if some.any():
            ends = [b.shape.tokens for b in plans.buckets if (b.frames > 0) == (number > 0)]
            found[name] = KindLengths(data.lengths.tokens[some], data.lengths.frames[some], ends)
    return found


if __name__ == "__main__":
    sys.exit(main())
