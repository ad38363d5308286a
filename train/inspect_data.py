"""Look at the data before training on it: what there is, what is bad, how it becomes batches.

    python -m train.inspect_data --config finetune_video --data.train-json my.yaml --check-media

Takes the options of `train.finetune` and a few of its own (`--help`). No weights are loaded.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from train.config import OwnOptions, TrainConfig, load_config
from train.dataset import KINDS, Dataset, open_dataset
from train.inspect_figures import (
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
from train.inspect_pictures import (
    CONTEXT,
    LEFT_OUT,
    LOSS,
    MEDIA,
    KindLengths,
    Picture,
    draw_lengths,
    draw_samples,
)
from train.plan import Epochs, plan_run
from train.records import BadSample, Block, Sample
from train.report import write_text
from train.setup import (
    count_steps,
    load_tokenizer,
    open_heldout,
    prepare_data,
    read_model_config,
)
from train.signals import sure_interrupt
from train.workers import Loaded
from vxl_jax.chat import IGNORE, IMAGE_TOKEN
from vxl_jax.errors import ConfigError, VxlError
from vxl_jax.progress import progress_bar

MOST_SAMPLES = 64
"""Samples on the sheet at most."""
MOST_FRAMES = 6
"""Frames of a sample on the sheet at most."""
FIRST_TOKENS, LAST_TOKENS = 140, 200
"""Tokens of a long text on the sheet, from its beginning and its end."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options, rest = read_options(sys.argv[1:] if arguments is None else arguments)
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


def read_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
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
    tokenizer = load_tokenizer(config, model)
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
                picture(data, index, loaded, frames, tokenizer)
                for index, loaded, frames in load_shown(
                    data, choose(data, options.samples, config.run.seed)
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


# Media.

T = TypeVar("T")


def load_each(
    data: Dataset,
    indices: Sequence[int],
    keep: Callable[[int, Loaded | BadSample, np.ndarray], T],
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
                index: int, loaded: Loaded | BadSample, _: np.ndarray, data: Dataset = data
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


# What is drawn.


def kind_lengths(data: Dataset, plans: Epochs) -> dict[str, KindLengths]:
    """Lengths of the kinds that there are, for `draw_lengths`."""
    found = {}
    for number, name in enumerate(KINDS):
        some = data.kind == number
        if some.any():
            ends = [b.shape.tokens for b in plans.buckets if (b.frames > 0) == (number > 0)]
            found[name] = KindLengths(data.lengths.tokens[some], data.lengths.frames[some], ends)
    return found


def choose(data: Dataset, count: int, seed: int) -> list[int]:
    """Samples for the sheet: in turn one of every source and kind, at random; in their order."""
    rng = np.random.default_rng(seed)
    groups = []
    for samples in data.ranges:
        kinds = data.kind[samples.start : samples.stop]
        for kind in np.unique(kinds):
            members = samples.start + np.flatnonzero(kinds == kind)
            groups.append(deque(rng.choice(members, min(count, len(members)), replace=False)))
    chosen: list[int] = []
    while len(chosen) < count and any(groups):
        for i in rng.permutation(len(groups)):
            if groups[i] and len(chosen) < count:
                chosen.append(int(groups[i].popleft()))
    return sorted(chosen)


Frames = list[tuple[str, np.ndarray]]


def load_shown(
    data: Dataset, indices: Sequence[int]
) -> Iterator[tuple[int, Loaded | BadSample, Frames]]:
    """Samples with the few frames that are shown of each."""

    def keep(
        index: int, loaded: Loaded | BadSample, pixels: np.ndarray
    ) -> tuple[int, Loaded | BadSample, Frames]:
        if isinstance(loaded, BadSample):
            return index, loaded, []
        shown = shown_frames(loaded.sample.blocks)
        return index, loaded, [(caption, pixels[i].copy()) for i, caption in shown]

    return load_each(data, indices, keep)


def shown_frames(blocks: Sequence[Block]) -> list[tuple[int, str]]:
    """The frames to show, and their captions: all blocks have some as long as there is room; of a
    video they are spread from its first to its last, of an image they are the first tiles.
    """
    room = [0] * len(blocks)
    while sum(room) < min(MOST_FRAMES, sum(block.frames for block in blocks)):
        for i, block in enumerate(blocks):
            if room[i] < block.frames and sum(room) < MOST_FRAMES:
                room[i] += 1
    shown = []
    start = 0
    for number, (block, count) in enumerate(zip(blocks, room, strict=True), 1):
        where = np.arange(count)
        if block.is_video and count > 1:
            where = np.linspace(0, block.frames - 1, count).round().astype(int)
        which = f"{number}: " if len(blocks) > 1 else ""
        shown += [(start + int(i), f"{which}{i + 1} of {block.frames}") for i in where]
        start += block.frames
    return shown


def picture(
    data: Dataset, index: int, loaded: Loaded | BadSample, frames: Frames, tokenizer: Any
) -> Picture:
    """A sample for the sheet; one that cannot be decoded is there with its reason."""
    kind = KINDS[data.kind[index]]
    if isinstance(loaded, BadSample):
        pieces = [(loaded.reason, LEFT_OUT)]
        return Picture(loaded.name, kind, "bad sample", [], pieces, loaded.reason)
    sample, lengths = loaded.sample, data.lengths
    text, visual, beacons = (int(a[index]) for a in (lengths.text, lengths.visual, lengths.beacons))
    parts = [f"{text + visual + beacons:,} tokens"]
    if visual:
        parts[0] += f" ({text:,} of text, {visual:,} visual, {_plural(beacons, 'beacon')})"
        parts.append(_amount(sample.blocks))
    parts.append(f"{lengths.labels[index]:,} labelled")
    return Picture(sample.name, kind, " · ".join(parts), frames, text_pieces(sample, tokenizer))


def _amount(blocks: Sequence[Block]) -> str:
    frames = sum(block.frames for block in blocks)
    where = "" if len(blocks) == 1 else f" of {len(blocks)} files"
    return _plural(frames, "frame" if blocks[0].is_video else "tile") + where


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def text_pieces(sample: Sample, tokenizer: Any) -> list[tuple[str, int]]:
    """The sample's text in pieces, each with its style; the middle of a long one left out."""
    styles = np.where(sample.labels == IGNORE, CONTEXT, LOSS)
    styles[sample.ids == IMAGE_TOKEN] = MEDIA
    count = len(sample.ids)
    left_out = range(0)
    if count > FIRST_TOKENS + LAST_TOKENS:
        left_out = range(FIRST_TOKENS, count - LAST_TOKENS)
    pieces: list[tuple[str, int]] = []
    marks = iter(sample.blocks)
    start = 0
    # A run of one style ends where the style changes, at every mark, and where text is left out.
    for end in range(1, count + 1):
        inside = end < count and end not in (left_out.start, left_out.stop)
        if inside and styles[end] == styles[start] != MEDIA:
            continue
        block = next(marks) if styles[start] == MEDIA else None
        if start == left_out.start and left_out:
            pieces.append((f" [{len(left_out):,} tokens left out] ", LEFT_OUT))
        if start not in left_out:
            text = (
                f"⟨{block.path.name}: {_amount([block])}⟩"
                if block
                else _decode(tokenizer, sample.ids[start:end])
            )
            pieces.append((text, int(styles[start])))
        start = end
    return pieces


def _decode(tokenizer: Any, ids: np.ndarray) -> str:
    text = tokenizer.decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    # A turn a line; other newlines are marked.
    return text.replace("<|im_end|>\n", "<|im_end|>\0").replace("\n", "↵").replace("\0", "↵\n")


if __name__ == "__main__":
    sys.exit(main())
