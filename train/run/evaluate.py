"""Answer held-out questions and score them, with and without seeing the media."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from train.config import RunSection
from train.data.dataset import Dataset
from train.data.epochs import Epochs, Share, make_buckets
from train.data.lengths import KINDS, kinds_of
from train.data.loader import Batch, Loader, blank, leave_out
from train.data.records.sample import BadSample, Sample
from train.run.distributed import exchange, is_first
from vxl_jax.config import VideoXLConfig
from vxl_jax.inference.decode import generate
from vxl_jax.inference.ratios import default_ratio
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.progress import progress_bar

ALL = "all"


@dataclass(frozen=True)
class Answer:
    """One held-out question with the model's answer."""

    sample: Sample
    answer: str

    @property
    def right(self) -> bool:
        """Equal to the expected answer but for case and white space."""
        return _normal(self.answer) == _normal(self.sample.answer)


def answer_questions(
    model: VideoXL, dataset: Dataset, tokenizer: Any, run: RunSection, see: bool = True
) -> tuple[list[Answer], list[BadSample]]:
    """Greedy answers to all samples (made with `prompts=True`), through compressed memory.

    see: False gives the model black pixels in place of the media, and leaves out samples that have
    none; what it still gets right, it guesses.
    """
    data = replace(dataset.reader.preparer.data, max_tokens_per_batch=None)
    buckets, bucket_of = make_buckets(dataset.lengths, data, run.eval_batch_size)
    plans = Epochs(buckets, bucket_of, [Share(range(len(dataset)), len(dataset))], seed=0)
    loader = Loader(plans, dataset, random=False)
    stop = tuple({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")})
    answers: list[Answer] = []
    bad: list[BadSample] = []
    name = "answering" if see else "answering blind"
    total = len(dataset) if see else int((dataset.lengths.frames > 0).sum())
    with (
        progress_bar(total=total, desc=name, unit="question", show=is_first()) as progress,
        closing(loader.batches()) as batches,
    ):
        for batch in batches:
            bad += batch.bad
            if batch.pixels is None and not see:
                continue
            batch = leave_out(batch, unread_anywhere(batch))
            seen = batch if see else blank(batch)
            new = generate(
                model,
                seen.streams,
                seen.pixels,
                max_new_tokens=run.max_new_tokens,
                stop_ids=stop,
            )
            for sample, ids in zip(batch.samples, new, strict=True):
                if sample is not None:
                    text = tokenizer.decode(ids, skip_special_tokens=True)
                    answers.append(Answer(sample, text.strip()))
            progress.update(sum(s is not None for s in batch.samples) + len(batch.bad))
    return answers, bad


def unread_anywhere(batch: Batch) -> list[int]:
    """Places that hold a sample here, but not in every process of the run.

    All of them load all questions, and compute as one: one that cannot be read on one machine is
    left out on all. Reading takes each host a different time: they wait outside the devices.
    """
    here = [str(int(sample is not None)) for sample in batch.samples]
    everywhere = zip(*exchange("".join(here)), strict=True)  # for each place, that of all processes
    return [i for i, place in enumerate(everywhere) if here[i] == "1" and "0" in place]


def evaluate(
    model: VideoXL, dataset: Dataset, tokenizer: Any, run: RunSection
) -> dict[str, dict[str, float]]:
    """Share of right answers by question type and by modality, while training goes on."""
    answers, _ = answer_questions(model, dataset, tokenizer, run)
    return {"accuracy": accuracy(answers), "modality": accuracy(answers, modality)}


def evaluate_at_end(
    model: VideoXL, dataset: Dataset | None, tokenizer: Any, run: RunSection, show: bool = True
) -> tuple[dict[str, Any], list[BadSample]]:
    """Answer the held-out questions, with and without seeing the media, and print what came of it.

    Returns the accuracies and the samples whose media cannot be decoded.
    """
    if dataset is None:
        return {"heldout_accuracy": {}, "blank_accuracy": {}, "chance": {}}, []
    answers, found = answer_questions(model, dataset, tokenizer, run)
    blind, _ = answer_questions(model, dataset, tokenizer, run, see=False)
    result = {
        "heldout_accuracy": accuracy(answers),
        "blank_accuracy": accuracy(blind),
        "chance": chance(answers),
    }
    if not answers or not show:
        return result, found
    print(f"\n{'held-out questions':20}{'accuracy':>10}{'blank':>8}{'chance':>8}")
    for name, share in result["heldout_accuracy"].items():
        blank_share = result["blank_accuracy"].get(name)
        blank_text = "-" if blank_share is None else f"{blank_share:.0%}"
        print(f"{name:20}{share:>10.0%}{blank_text:>8}{result['chance'][name]:>8.0%}")
    print()
    every = max(1, len(answers) // max(1, run.answers_shown))
    for answer in answers[::every][: run.answers_shown]:
        sample = answer.sample
        media = ", ".join(block.path.name for block in sample.blocks) or "no media"
        verdict = "right" if answer.right else f"expected {sample.answer}"
        print(f"[{media}] {sample.question} -> {answer.answer} ({verdict})")
    return result, found


def modality(sample: Sample) -> str:
    """What a question is about, as in `train.data.lengths.KINDS`."""
    is_video = any(block.is_video for block in sample.blocks)
    return KINDS[int(kinds_of(np.array(len(sample.blocks)), np.array(is_video)))]


def question_type(sample: Sample) -> str:
    """The record's own name for its kind of question."""
    return sample.question_type


def eval_ratios(model: VideoXLConfig, run: RunSection) -> tuple[int, ...]:
    """Choose the one ratio for held-out questions, () where the model does not compress."""
    ratio = run.eval_ratio or default_ratio(model.ratios)
    return () if ratio is None else (ratio,)


def accuracy(
    answers: Sequence[Answer], kind: Callable[[Sample], str] = question_type
) -> dict[str, float]:
    """Share of right answers by kind of sample, and over all of them under `ALL`."""
    by_type: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        by_type[kind(answer.sample)].append(answer.right)
        by_type[ALL].append(answer.right)
    return {name: sum(right) / len(right) for name, right in sorted(by_type.items())}


def chance(answers: Sequence[Answer]) -> dict[str, float]:
    """What a blind guess gets, by question type and over all of them under `ALL`.

    Where records say among how many `choices` the answer is, 1 / choices; else the share of the
    type's most frequent answer.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        counts[answer.sample.question_type][_normal(answer.sample.answer)] += 1
    frequent = {name: max(count.values()) / count.total() for name, count in counts.items()}
    by_type: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        name, choices = answer.sample.question_type, answer.sample.choices
        guess = 1 / choices if choices else frequent[name]
        by_type[name].append(guess)
        by_type[ALL].append(guess)
    return {name: sum(guesses) / len(guesses) for name, guesses in sorted(by_type.items())}


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()
