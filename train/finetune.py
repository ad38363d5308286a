"""Train a Video-XL.

    python -m train.finetune                                   # the embedded demo
    python -m train.finetune --config finetune_video --run-dir runs/mine --optim.learning-rate 2e-5

Started again on the same directory, it goes on from the last checkpoint and arrives at the same
parameters as a run that was never interrupted.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from train.batches import Host, Loader
from train.config import TrainConfig, compare, load_config, save_config
from train.dataset import Dataset, open_dataset
from train.errors import DataError
from train.evaluate import accuracy, answer_questions, chance, eval_ratios
from train.optimizer import Optimizer
from train.plan import Epochs, padded_share, plan_run
from train.records import BadSample
from train.report import BadSamples, RunLog, TooManyBadSamples, draw_loss, write_text
from train.signals import stop_request, sure_interrupt
from train.step import (
    add_batch,
    empty_sums,
    fingerprint,
    split_parts,
    update,
)
from train.workers import WorkerError
from vxl_jax.chat import encode_prompt
from vxl_jax.checkpoint import load
from vxl_jax.config import PRESETS, ConfigError, VideoXLConfig, cross_check_vocabulary
from vxl_jax.model import VideoXL, parameter_count
from vxl_jax.published import read_config
from vxl_jax.tensors import CheckpointError


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    config, prepare = load_config(sys.argv[1:] if arguments is None else arguments)
    run_dir = Path(config.run.run_dir)
    try:
        start_directory(config, run_dir)
        prepare_data(config, prepare)
        with sure_interrupt():
            train(config.resolved(), run_dir)
    except (
        CheckpointError,
        ConfigError,
        DataError,
        ImportError,  # a decoder that is not there for this platform
        TooManyBadSamples,
        TrainingError,
        WorkerError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from what {run_dir} holds", file=sys.stderr)
        return 130
    return 0


def prepare_data(config: TrainConfig, prepare: Callable[[TrainConfig], None] | None) -> None:
    """Make or fetch the data, if the configuration says how.

    Raises: DataError if that fails.
    """
    if prepare is None:
        return
    try:
        prepare(config)
    except (ImportError, OSError, ValueError) as error:
        raise DataError(f"the data cannot be made: {error}") from error


def start_directory(config: TrainConfig, run_dir: Path) -> None:
    """Make the run's directory; if a run has saved steps in it, check that it is this one.

    Raises: ConfigError listing every field that differs from the run's own configuration.
    """
    saved, checkpoints = run_dir / "config.json", run_dir / "checkpoints"
    if checkpoints.is_dir() and ocp.utils.checkpoint_steps(checkpoints):
        try:
            before = json.loads(saved.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{saved} cannot be read ({error}); repair it, or use another --run-dir"
            ) from error
        if changed := compare(config, before):
            raise ConfigError(
                f"{run_dir} holds a run with another configuration ({'; '.join(changed)}); "
                "use its configuration to resume it, or another --run-dir"
            )
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        part = saved.with_suffix(".part")
        save_config(config, part)
        part.replace(saved)
    except OSError as error:
        raise ConfigError(f"--run-dir {run_dir}: cannot be made ({error.strerror})") from error


def train(config: TrainConfig, run_dir: Path) -> None:
    """The whole run: data, model, restore, loop, held-out questions, summary."""
    began = time.perf_counter()
    checkpoints = ocp.CheckpointManager(
        (run_dir / "checkpoints").absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=config.run.keep_checkpoints),
    )
    step = checkpoints.latest_step() or 0
    model_config = read_model_config(config)
    tokenizer = load_tokenizer(config, model_config)
    with (
        open_dataset(
            config.data.train_json,
            config.data,
            model_config,
            tokenizer,
            config.run.seed,
            kept=run_dir / "samples",
            resume=step > 0,
        ) as data,
        open_heldout(config, model_config, tokenizer) as heldout,
    ):
        bad = check_data(config, run_dir, step, data, heldout)
        plans = plan_run(data, config.data, config.run.seed)
        steps, last_step = count_steps(config, plans)
        optimizer = Optimizer(config.optim, steps, config.run.seed)

        model = make_model(config, model_config)
        parameters = parameter_count(nnx.state(model))
        graph, trained, frozen = split_parts(model, config.optim.train, config.optim.param_dtype)
        opt_state = optimizer.init(trained)
        position = Position(0, data.fingerprint)
        if step:
            trained, opt_state, position = restore(
                checkpoints, step, trained, opt_state, position, run_dir
            )
        describe(config, model_config, parameters, data, heldout, plans, steps, last_step, step)

        log = RunLog(run_dir, step, last_step, config.run.log_every, began)
        loader = Loader(plans, data, host=Host(jax.process_index(), jax.process_count()))
        stream = loader.batches(position.batch)
        with (
            closing(checkpoints),
            closing(log),
            closing(stream),
            stop_request() as stop,
        ):
            while step < last_step:
                sums = empty_sums(trained) if config.optim.accumulate > 1 else None
                count = min(config.optim.accumulate, len(plans) - position.batch)
                for _ in range(count):
                    batch = next(stream)
                    bad.add(batch.bad, step + 1)
                    log.count(
                        places=batch.token_places,
                        samples=sum(sample is not None for sample in batch.samples),
                        tokens=batch.tokens,
                        frames=batch.frames,
                    )
                    sums = add_batch(graph, trained, frozen, sums, batch.streams, batch.pixels)
                trained, opt_state, metrics = update(optimizer, trained, opt_state, sums)
                del sums  # before the next step makes its own
                step += 1
                position = replace(position, batch=position.batch + count)
                stopping = stop.is_set()
                saving = stopping or step % config.run.save_every == 0 or step == last_step
                if saving or log.due(step):
                    del metrics["finite"]  # says nothing that the others do not
                    values = {name: float(value) for name, value in metrics.items()}
                    check_finite(values, step)
                if log.due(step):
                    log.log(step, {**values, "learning_rate": float(optimizer.schedule(step - 1))})
                if saving:
                    save(checkpoints, step, trained, opt_state, position)
                log.progress.update()
                if stopping:
                    raise KeyboardInterrupt
        if log.history:
            draw_loss(log.history, run_dir / "loss.png")

        data.pool.close()
        del loader, stream  # with the media that they keep
        model = nnx.merge(graph, trained, frozen)
        results, found = evaluate(model, heldout, tokenizer, config)
    bad.note(found, step + 1)  # training is done: too many of them are no reason to lose it
    summary = {
        "steps": step,
        "final_loss": log.history[-1]["loss"] if log.history else None,
        **results,
        "bad_samples": bad.summary(),
        "parameters": parameters,
        "params_sha256": fingerprint(trained, frozen),
        "seconds": log.seconds,
    }
    write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"wrote {run_dir}/summary.json, loss.png, metrics.jsonl, checkpoints/{step}")


def count_steps(config: TrainConfig, plans: Epochs) -> tuple[int, int]:
    """Optimizer steps of all batches, and the step at which `run.max_steps` ends the run."""
    steps = math.ceil(len(plans) / config.optim.accumulate)
    return steps, min(steps, config.run.max_steps or steps)


def read_model_config(config: TrainConfig) -> VideoXLConfig:
    """Sizes of the checkpoint or the preset, with the changes of the `model` section."""
    if config.model.checkpoint is None:
        return PRESETS[config.model.preset](**config.model.changes())
    return read_config(Path(config.model.checkpoint), **config.model.changes())


def load_tokenizer(config: TrainConfig, model_config: VideoXLConfig) -> Any:
    """The tokenizer of a local directory; nothing is downloaded."""
    # transformers advises to install torch when it is imported without it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    directory = config.model.tokenizer or config.model.checkpoint
    if directory is None or not Path(directory).is_dir():
        raise ConfigError(f"model.tokenizer {directory}: there is no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        encode_prompt("", tokenizer)  # refuses one without the chat template's tokens
    except Exception as error:  # damaged files raise anything
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"model.tokenizer {directory}: cannot be loaded ({reason})") from error
    cross_check_vocabulary(model_config.language, len(tokenizer), f"model.tokenizer {directory}")
    return tokenizer


def open_heldout(
    config: TrainConfig, model_config: VideoXLConfig, tokenizer: Any
) -> AbstractContextManager[Dataset | None]:
    """The held-out questions, if there are any."""
    if not config.data.eval_json:
        return nullcontext()
    ratios = eval_ratios(model_config, config.run)
    return open_dataset(
        config.data.eval_json, config.data, model_config, tokenizer, prompts=True, ratios=ratios
    )


def check_data(
    config: TrainConfig, run_dir: Path, step: int, data: Dataset, heldout: Dataset | None
) -> BadSamples:
    """Note the samples that cannot be used, for a run that has done `step` steps.

    Raises: TooManyBadSamples.
    """
    counts: dict[str, int] = {}
    found: list[BadSample] = []
    for dataset in (data, heldout) if heldout else (data,):
        for count in dataset.counts:
            name = str(count.source.path)
            counts[name] = counts.get(name, 0) + count.selected
        found += dataset.bad
        dataset.pool.rest()
    bad = BadSamples(run_dir, counts, config.data.max_bad_share, step)
    bad.add(found, step=0)
    return bad


def make_model(config: TrainConfig, model_config: VideoXLConfig) -> VideoXL:
    """Published weights, or random ones from the run's seed."""
    if config.model.checkpoint is not None:
        return load(config.model.checkpoint, **config.model.changes())
    return random_model(model_config, config.run.seed)


def random_model(config: VideoXLConfig, seed: int) -> VideoXL:
    """A model that has learned nothing."""
    return nnx.jit(lambda: VideoXL(config, rngs=nnx.Rngs(seed)))()


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data: batches taken, of the data with this fingerprint."""

    batch: int
    data: str


def save(
    manager: ocp.CheckpointManager, step: int, trained: Any, opt_state: Any, position: Position
) -> None:
    """Write a checkpoint in the background, whole or not at all."""
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave({"params": trained, "opt_state": opt_state}),
            position=ocp.args.JsonSave(asdict(position)),
        ),
    )


def restore(
    manager: ocp.CheckpointManager,
    step: int,
    trained: Any,
    opt_state: Any,
    start: Position,
    run_dir: Path,
) -> tuple[Any, Any, Position]:
    """Read a checkpoint into arrays like the given ones.

    start: the beginning of the data that there is now. The order of samples follows from their
    number and lengths: with others, a run that starts again would train on some twice and on some
    never.

    Raises: DataError if the data is not what the run began with.
    """
    like = jax.tree.map(
        ocp.utils.to_shape_dtype_struct, {"params": trained, "opt_state": opt_state}
    )
    found = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore()
        ),
    )
    position = Position(**found["position"])
    if position.data != start.data:
        raise DataError(
            f"{run_dir} holds a run that began with other training samples than there are now; "
            "restore its data, or use another --run-dir"
        )
    return found["state"]["params"], found["state"]["opt_state"], position


def check_finite(metrics: dict[str, float], step: int) -> None:
    """Stop a run whose loss or gradient is not a number any more.

    Raises: TrainingError; checkpoints written before are intact.
    """
    if not np.isfinite(list(metrics.values())).all():
        raise TrainingError(
            f"step {step}: {metrics} is not finite; lower optim.learning_rate, or look at the data "
            "of the last steps. The last checkpoint is intact"
        )


def describe(
    config: TrainConfig,
    model_config: VideoXLConfig,
    parameters: int,
    data: Dataset,
    heldout: Dataset | None,
    plans: Epochs,
    steps: int,
    last_step: int,
    step: int,
) -> None:
    """Print what is about to run."""
    state = f", resumed at step {step:,}" if step else ""
    if step >= last_step:
        state = f", {step:,} are done: nothing is left to train"
    device = jax.devices()[0]
    print(
        f"model: {parameters:,} parameters, trains {', '.join(config.optim.train)}; "
        f"ratios {model_config.ratios or 'none'}; {device.device_kind} x {jax.device_count()}\n"
        f"data: {len(data):,} samples in {len(plans.buckets)} shapes, "
        f"{padded_share(data.lengths, plans):.1%} padding; "
        f"{len(heldout or ()):,} held-out questions\n"
        f"run: {steps:,} steps of {config.optim.accumulate} x up to {config.data.batch_size} "
        f"samples{state}"
    )


def evaluate(
    model: VideoXL, heldout: Dataset | None, tokenizer: Any, config: TrainConfig
) -> tuple[dict[str, Any], list[BadSample]]:
    """Answer the held-out questions and print accuracies by question type.

    Returns the accuracies and the samples whose media cannot be decoded.
    """
    if heldout is None:
        return {"heldout_accuracy": {}, "blank_accuracy": {}, "chance": {}}, []
    answers, found = answer_questions(model, heldout, tokenizer, config.run)
    blind, _ = answer_questions(model, heldout, tokenizer, config.run, see=False)
    result = {
        "heldout_accuracy": accuracy(answers),
        "blank_accuracy": accuracy(blind),
        "chance": chance(answers),
    }
    if not answers:
        return result, found
    print(f"\n{'held-out questions':20}{'accuracy':>10}{'blank':>8}{'chance':>8}")
    for name, share in result["heldout_accuracy"].items():
        blank_share = result["blank_accuracy"].get(name)
        blank_text = "-" if blank_share is None else f"{blank_share:.0%}"
        print(f"{name:20}{share:>10.0%}{blank_text:>8}{result['chance'][name]:>8.0%}")
    print()
    every = max(1, len(answers) // max(1, config.run.answers_shown))
    for answer in answers[::every][: config.run.answers_shown]:
        sample = answer.sample
        media = ", ".join(block.path.name for block in sample.blocks) or "no media"
        verdict = "right" if answer.right else f"expected {sample.answer}"
        print(f"[{media}] {sample.question} -> {answer.answer} ({verdict})")
    return result, found


if __name__ == "__main__":
    sys.exit(main())
