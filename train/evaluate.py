"""Answer held-out questions and score them, with and without seeing the media."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train.batches import Epochs, Loader, blank, bucket_of, load_batches
from train.config import RunSection
from train.progress import progress_bar
from train.records import BadSample, Preparer, Sample
from vxl_jax.generate import generate
from vxl_jax.model import VideoXL

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
    model: VideoXL,
    samples: Sequence[Sample],
    preparer: Preparer,
    tokenizer: Any,
    run: RunSection,
    see: bool = True,
) -> tuple[list[Answer], list[BadSample]]:
    """Greedy answers to all samples (made with `prompts=True`), through compressed memory.

    see: False gives the model black pixels in place of the media, and leaves out samples that have
    none; what it still gets right, it guesses.
    """
    config = model.config
    ratios = (run.eval_ratio,) if run.eval_ratio else tuple(sorted(config.ratios)[:1])
    if not see:
        samples = [sample for sample in samples if sample.blocks]
    if not samples:
        return [], []
    buckets = [bucket_of(sample, preparer, ratios) for sample in samples]
    plans = Epochs(buckets, [range(len(samples))], run.eval_batch_size, seed=0)
    loader = Loader(samples, preparer, ratios, run.eval_batch_size)
    stop = tuple({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")})
    answers: list[Answer] = []
    bad: list[BadSample] = []
    name = "answering" if see else "answering blind"
    with progress_bar(total=len(samples), desc=name, unit="question") as progress:
        for batch in load_batches(plans, loader, workers=0):
            bad += batch.bad
            seen = batch if see else blank(batch)
            new = generate(
                model,
                seen.streams,
                seen.pixels,
                max_new_tokens=run.max_new_tokens,
                stop_ids=stop,
            )
            for index, ids in zip(batch.samples, new, strict=True):
                if index >= 0:
                    text = tokenizer.decode(ids, skip_special_tokens=True)
                    answers.append(Answer(samples[index], text.strip()))
            progress.update(sum(index >= 0 for index in batch.samples) + len(batch.bad))
    return answers, bad


def accuracy(answers: Sequence[Answer]) -> dict[str, float]:
    """Share of right answers by question type, and over all of them under `ALL`."""
    by_type: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        by_type[answer.sample.question_type].append(answer.right)
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
