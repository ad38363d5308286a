"""Train a Video-XL.

    python -m train.finetune                                   # the embedded demo
    python -m train.finetune --config finetune_video --run-dir runs/mine --optim.learning-rate 2e-5

Started again on the same directory, it goes on from the last checkpoint and arrives at the same
parameters as a run that was never interrupted. docs/clusters.md tells how to start it on several
machines.

A script that trains with another loss takes the same options (`train.run.step.LossFn` says what a
loss returns):

    import sys
    from train.finetune import main
    from vxl_jax.models.loss import loss_and_metrics

    def scaled(model, streams, pixels):
        loss, sums = loss_and_metrics(model, streams, pixels)
        return 0.5 * loss, {**sums, "cross_entropy": loss}

    sys.exit(main(loss_fn=scaled))
"""

import json
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from train.config import RunSection, TrainConfig
from train.config.cli import OwnOptions, Prepare, load_config
from train.data.dataset import Dataset
from train.data.loader import Batch, Loader
from train.rows import write_text
from train.run.checkpoints import quiet_orbax
from train.run.distributed import (
    count_distinct,
    counted_share,
    first_then_others,
    gather,
    is_first,
    leave,
    place_batch,
    start_processes,
    together,
)
from train.run.evaluate import evaluate, evaluate_at_end
from train.run.failures import IN_EVALUATION, IN_TRAINING, enough_memory, not_finite_error
from train.run.fit import print_training_plan
from train.run.opening import OpenRun, check_same_config, open_run
from train.run.report import PROFILED, RunLog, Trace, draw_accuracy, draw_loss
from train.run.setup import count_flops, prepare_data, start_directory
from train.run.step import LossFn, add_batch, empty_sums, fingerprint, metric_names, update
from vxl_jax.errors import VxlError
from vxl_jax.interrupts import stop_request, sure_interrupt
from vxl_jax.models.loss import loss_and_metrics
from vxl_jax.planning.cards import claim_memory
from vxl_jax.typing import ParamTree


def main(arguments: list[str] | None = None, loss_fn: LossFn = loss_and_metrics) -> int:
    """Run the command line, with a loss function that only Python can give.

    Args:
        arguments: of the command line; default: those of this process.
        loss_fn: see `train.run.step.LossFn`. `--plan` compiles the default loss.

    Returns: the exit status: 0 also after SIGTERM, when all is saved.
    """
    options, rest = read_train_options(sys.argv[1:] if arguments is None else arguments)
    config, prepare = load_config(rest)
    claim_memory()
    status = run_training(options, config, prepare, loss_fn)
    if status and jax.distributed.is_initialized():
        leave(status)
    return status


def run_training(
    options: Namespace, config: TrainConfig, prepare: Prepare | None, loss_fn: LossFn
) -> int:
    """Plan or train, with errors that a user can correct as one line; returns the exit status."""
    run_dir = Path(config.run.run_dir)
    goes_on = f"the same command goes on from what {run_dir} holds"
    try:
        if options.plan:
            print_training_plan(config.resolved(), options.card, options.memory_gb)
            return 0
        start_processes()
        check_same_config(config)
        first_then_others(lambda: start_directory(config, run_dir, write=is_first()))
        first_then_others(lambda: prepare_data(config, prepare))
        with sure_interrupt(), quiet_orbax(), enough_memory("training", IN_TRAINING):
            stopped = train(config.resolved(), run_dir, options.profile, loss_fn)
    except VxlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full, as a rule
        print(f"error: a file cannot be read or written ({error}); {goes_on}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {goes_on}", file=sys.stderr)
        return 130
    if stopped is not None and is_first():
        print(f"stopped by SIGTERM, step {stopped:,} is saved: {goes_on}", file=sys.stderr)
    return 0


def read_train_options(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Split arguments into this command's options and those of the configuration."""
    parser = OwnOptions("train.finetune", "Train Video-XL.")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print bytes and operations of a step, compiled for the mesh; no data, no training",
    )
    parser.add_argument(
        "--card", default="h100", help="accelerator of --plan: h100, a100, 4090 … (default: h100)"
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        metavar="GB",
        help="memory that --plan may use on a device (default: 92 %% of the card's)",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help=f"write a trace of {PROFILED} steps to RUN_DIR/profile, for TensorBoard or Perfetto",
    )
    return parser.split(argv)


def train(
    config: TrainConfig,
    run_dir: Path,
    profile: bool = False,
    loss_fn: LossFn = loss_and_metrics,
) -> int | None:
    """Train a model from its first or last saved step to the end, and write the run's summary.

    A run that is started again goes on from its last checkpoint, whose configuration and data have
    to be the same. A function is not part of a configuration: whoever starts the run again gives
    the same `loss_fn`, and nothing checks it.

    Args:
        config: from `TrainConfig.resolved`.
        run_dir: made by `start_directory`.
        profile: write a trace of a few steps.
        loss_fn: see `train.run.step.LossFn`; default: next-token cross-entropy.

    Returns: the step after which SIGTERM has stopped the run, None at its end.

    Raises: VxlError for what a user can correct; KeyboardInterrupt after SIGINT.
    """
    began = time.perf_counter()
    with ExitStack() as stack:
        run = open_run(config, run_dir, stack)
        log = open_log(run, began)
        stopped_by = train_steps(run, log, loss_fn, profile)
        run.checkpoints.wait()
        if run.state.step < run.last_step:
            if stopped_by == signal.SIGINT:
                raise KeyboardInterrupt
            return run.state.step
        results, params_sha256 = ask_at_end(run)
    together(lambda: write_summary(run, log, results, params_sha256), turn=is_first())
    return None


def open_log(run: OpenRun, began: float) -> RunLog:
    """Open the metrics of a run that began at `time.perf_counter() == began`."""
    return RunLog(
        run.own_dir,
        run.state.step,
        run.last_step,
        run.config.run.log_every,
        began,
        counted_share(run.mesh, run.shards),
        count_flops(run.config, run.data.model, run.state.trained),
    )


def train_steps(run: OpenRun, log: RunLog, loss_fn: LossFn, profile: bool) -> int:
    """Train until the last step, or until a process gets a signal.

    Returns: the signal's number, 0 without one.
    """
    state, section = run.state, run.config.run
    batches = Loader(run.plans, run.data, shards=run.shards).batches(state.position.batch)
    first = max(state.step, min(state.step + PROFILED, run.last_step - PROFILED))
    trace = Trace(run.own_dir / "profile" if profile else None, first)
    stopping = 0
    with closing(log), closing(batches), closing(trace), stop_request() as stop:
        while state.step < run.last_step and not stopping:
            trace.before(state.step)
            with jax.profiler.StepTraceAnnotation("train", step_num=state.step):
                values = train_step(run, log, batches, loss_fn)

            signals, found_bad = gather(stop.signal or 0, run.bad.since_asked()).T
            stopping = int(signals.max())
            if values and log.due(state.step):
                log.log(state.step)
            score = None
            if run.heldout and not stopping and evaluates(section, state.step, run.last_step):
                score = ask_heldout(run, run.heldout, log)
            run.checkpoints.check()
            if stopping or saves(section, state.step, run.last_step, score):
                log.keep_unlogged(state.step)
                run.save(score)
            log.progress.update()
            if found_bad.any():
                run.bad.check(count_distinct(run.bad.reasons))
    return stopping


def train_step(
    run: OpenRun, log: RunLog, batches: Iterator[Batch], loss_fn: LossFn
) -> dict[str, float] | None:
    """Take one step: the batches that it accumulates, and the update unless it is to be skipped.

    Returns: the metrics of `update`, None for a skipped step.

    Raises: TrainingError if the loss or a gradient is not finite; the step before it is saved.
    """
    state, config = run.state, run.config
    count = min(config.optim.accumulate, len(run.plans) - state.position.batch)
    sums, samples = sum_batches(run, log, batches, count, loss_fn)
    values = None
    if state.step + 1 not in config.run.skip_steps:
        state.trained, state.opt_state, metrics = update(
            run.optimizer, state.trained, state.opt_state, sums
        )
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not values.pop("finite"):  # then the update has changed nothing
            log.keep_unlogged(state.step)
            run.save()
            raise not_finite_error(run.own_dir, state.step + 1, values, samples)
        log.add(values)
    state.step += 1
    state.position = replace(state.position, batch=state.position.batch + count)
    return values


def sum_batches(
    run: OpenRun, log: RunLog, batches: Iterator[Batch], count: int, loss_fn: LossFn
) -> tuple[ParamTree, list[str]]:
    """Sum loss and gradients of the next `count` batches; returns them and the samples' names."""
    model = run.graph, run.state.trained, run.frozen
    sums: Any = None
    samples: list[str] = []
    for _ in range(count):
        with log.waiting():
            batch = next(batches)
        run.bad.note(batch.bad, run.state.step + 1)
        log.count(batch)
        samples += [sample.name for sample in batch.samples if sample]
        placed = place_batch(batch, run.mesh, run.shards)
        if sums is None and run.config.optim.accumulate > 1:
            sums = empty_sums(run.state.trained, metric_names(loss_fn, *model, *placed))
        sums = add_batch(*model, sums, *placed, loss_fn)
    return sums, samples


def ask_heldout(run: OpenRun, heldout: Dataset, log: RunLog) -> float | None:
    """Answer the held-out questions between steps; returns the share of right answers."""
    with log.aside(), enough_memory("evaluation", IN_EVALUATION):
        answered = evaluate(run.model(), heldout, run.tokenizer, run.config.run)
    return log.evaluated(run.state.step, answered)


def ask_at_end(run: OpenRun) -> tuple[dict[str, Any], str]:
    """Answer the held-out questions after the last step.

    Returns: accuracies (see `evaluate_at_end`), and the `fingerprint` of the parameters.
    """
    run.state.opt_state = None  # its memory is for the answers
    run.data.pool.close()
    with enough_memory("evaluation", IN_EVALUATION):
        results, unseen = evaluate_at_end(
            run.model(), run.heldout, run.tokenizer, run.config.run, show=is_first()
        )
    # Training is done: bad samples do not fail it now. All note theirs before one collects.
    together(lambda: run.bad.note(unseen, run.state.step + 1))
    return results, fingerprint(run.state.trained, run.frozen)


def write_summary(run: OpenRun, log: RunLog, results: dict[str, Any], params_sha256: str) -> None:
    """Write summary.json, loss.png and heldout.png, and print where they are."""
    run_dir, step = run.run_dir, run.state.step
    run.bad.collect(run_dir / "processes", jax.process_count())
    summary = {
        "steps": step,
        "final_loss": log.final_loss,
        "steps_without_labels": log.steps_without_labels,
        **results,
        "bad_samples": run.bad.summary(),
        "parameters": run.parameters,
        "params_sha256": params_sha256,
        "seconds": log.seconds,
    }
    if log.history:
        draw_loss(log.history, run_dir / "loss.png")
    if results["heldout_accuracy"]:
        draw_accuracy(results, run_dir / "heldout.png")
    write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    if log.steps_without_labels:
        print(
            f"{log.steps_without_labels:,} of {step:,} steps had no labelled token and changed "
            f"nothing: {run_dir}/bad_samples.jsonl lists samples that were left out"
        )
    print(f"wrote {run_dir}/summary.json, loss.png, metrics.jsonl, checkpoints/{step}")


def evaluates(run: RunSection, step: int, last_step: int) -> bool:
    """Decide whether held-out questions are asked after a step of training."""
    return run.eval_every is not None and step % run.eval_every == 0 and step < last_step


def saves(run: RunSection, step: int, last_step: int, score: float | None) -> bool:
    """Decide whether a checkpoint is written after a step; one with a score may be the best."""
    scored = run.keep_best > 0 and score is not None
    return scored or step % run.save_every == 0 or step == last_step


if __name__ == "__main__":
    quiet_orbax()  # for good: threads of a failed write may print until the process ends
    sys.exit(main())
