"""Train a Video-XL.

    python -m train.finetune                                   # the embedded demo
    python -m train.finetune --config finetune_video --run-dir runs/mine --optim.learning-rate 2e-5

Started again on the same directory, it goes on from the last checkpoint and arrives at the same
parameters as a run that was never interrupted. docs/clusters.md tells how to start it on several
machines.
"""

import json
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from train.config import RunSection, TrainConfig
from train.config.cli import OwnOptions, Prepare, load_config
from train.data.epochs import plan_run
from train.data.loader import Loader
from train.rows import write_text
from train.run.checkpoints import Checkpoints, Position, quiet_orbax
from train.run.distributed import (
    check_batch_size,
    count_distinct,
    counted_share,
    first_then_others,
    gather,
    is_first,
    leave,
    open_mesh,
    own_shards,
    place_batch,
    start_processes,
    together,
)
from train.run.evaluate import evaluate, evaluate_at_end
from train.run.failures import IN_EVALUATION, IN_TRAINING, enough_memory, not_finite_error
from train.run.fit import print_training_plan
from train.run.opening import (
    check_same_config,
    check_same_data,
    note_bad,
    open_data,
    own_directory,
    print_run,
    struct_of,
)
from train.run.optimizer import Optimizer
from train.run.report import PROFILED, RunLog, Trace, draw_loss
from train.run.setup import (
    count_flops,
    count_steps,
    init_opt_state,
    keep_compiled,
    load_run_tokenizer,
    make_model,
    prepare_data,
    read_model_config,
    start_directory,
)
from train.run.step import add_batch, empty_sums, fingerprint, split_parts, update
from vxl_jax.errors import VxlError
from vxl_jax.interrupts import stop_request, sure_interrupt
from vxl_jax.models.functions import parameter_count
from vxl_jax.nn.sharding import param_placement
from vxl_jax.planning.cards import claim_memory


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 also after SIGTERM, when all is saved."""
    options, rest = read_train_options(sys.argv[1:] if arguments is None else arguments)
    config, prepare = load_config(rest)
    claim_memory()
    status = run_training(options, config, prepare)
    if status and jax.distributed.is_initialized():
        leave(status)
    return status


def run_training(options: Namespace, config: TrainConfig, prepare: Prepare | None) -> int:
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
            stopped = train(config.resolved(), run_dir, profile=options.profile)
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
    """The command's own options, and those of the configuration."""
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


def train(config: TrainConfig, run_dir: Path, profile: bool = False) -> int | None:
    """The whole run: mesh, data, model, restore, loop, held-out questions, summary.

    profile: write a trace of a few steps.

    Returns the step after which SIGTERM has stopped it, None at the end.
    """
    began = time.perf_counter()
    mesh = open_mesh(config.mesh)
    shards = own_shards(mesh)
    check_batch_size(config.data.batch_size, shards.count)
    model_config = together(lambda: read_model_config(config))
    tokenizer = together(lambda: load_run_tokenizer(config, model_config))
    own_dir = together(lambda: own_directory(run_dir))
    keep_compiled(run_dir)
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = together(lambda: Checkpoints(run_dir, config))
        stack.enter_context(closing(checkpoints))
        step = checkpoints.last or 0
        data, heldout = first_then_others(
            lambda: open_data(config, run_dir, model_config, tokenizer, resume=step > 0)
        )
        stack.enter_context(data)
        stack.enter_context(heldout or nullcontext())
        bad = together(lambda: note_bad(config, own_dir, step, data, heldout))
        bad.check(count_distinct(bad.reasons))
        plans = plan_run(data, config.data, config.run.seed)
        steps, last_step = count_steps(config, plans)
        optimizer = Optimizer(config.optim, steps, config.run.seed)

        placement = param_placement(mesh, model_config)
        model = together(lambda: make_model(config, model_config, placement))
        parameters = parameter_count(nnx.state(model))
        graph, trained, frozen = split_parts(model, config.optim.train, config.optim.param_dtype)
        del model
        position = Position(0, together(lambda: data.fingerprint))
        check_same_data(position.data)
        if step:
            trained = jax.tree.map(struct_of, trained)
        opt_state = init_opt_state(optimizer, trained, placement)
        if step:
            trained, opt_state, position = checkpoints.restore(step, trained, opt_state, position)
        print_run(config, mesh, parameters, data, heldout, plans, step)

        counted = counted_share(mesh, shards), count_flops(config, model_config, trained)
        log = RunLog(own_dir, step, last_step, config.run.log_every, began, *counted)
        loader = Loader(plans, data, shards=shards)
        stream = loader.batches(position.batch)
        first = max(step, min(step + PROFILED, last_step - PROFILED))
        trace = Trace(own_dir / "profile" if profile else None, first)
        stopping = 0
        with closing(log), closing(stream), closing(trace), stop_request() as stop:
            while step < last_step and not stopping:
                trace.before(step)
                count = min(config.optim.accumulate, len(plans) - position.batch)
                sums: Any = empty_sums(trained) if config.optim.accumulate > 1 else None
                samples: list[str] = []
                for _ in range(count):
                    with log.waiting():
                        batch = next(stream)
                    bad.note(batch.bad, step + 1)
                    log.count(batch)
                    samples += [sample.name for sample in batch.samples if sample]
                    placed = place_batch(batch, mesh, shards)
                    sums = add_batch(graph, trained, frozen, sums, *placed)
                if step + 1 in config.run.skip_steps:
                    values = None
                else:
                    trained, opt_state, metrics = update(optimizer, trained, opt_state, sums)
                    values = {n: float(value) for n, value in jax.device_get(metrics).items()}
                    if not values.pop("finite"):  # then the update has changed nothing
                        log.keep_unlogged(step)
                        checkpoints.save(step, trained, opt_state, position)
                        raise not_finite_error(own_dir, step + 1, values, samples)
                    log.add(values)
                del sums, placed  # before the next step makes its own
                step += 1
                position = replace(position, batch=position.batch + count)

                signals, found_bad = gather(stop.signal or 0, bad.since_asked()).T
                stopping = int(signals.max())
                if values and log.due(step):
                    log.log(step)
                score = None
                if heldout and not stopping and evaluates(config.run, step, last_step):
                    model = nnx.merge(graph, trained, frozen)
                    with log.aside(), enough_memory("evaluation", IN_EVALUATION):
                        answered = evaluate(model, heldout, tokenizer, config.run)
                    score = log.evaluated(step, answered)
                checkpoints.check()
                if stopping or saves(config.run, step, last_step, score):
                    log.keep_unlogged(step)
                    checkpoints.save(step, trained, opt_state, position, score)
                log.progress.update()
                if found_bad.any():
                    bad.check(count_distinct(bad.reasons))
        checkpoints.wait()
        if step < last_step:
            if stopping == signal.SIGINT:
                raise KeyboardInterrupt
            return step

        del opt_state, loader, stream  # with the media that they keep
        data.pool.close()
        model = nnx.merge(graph, trained, frozen)
        with enough_memory("evaluation", IN_EVALUATION):
            results, unseen = evaluate_at_end(
                model, heldout, tokenizer, config.run, show=is_first()
            )
        # Training is done: too many are no reason to lose it. All note theirs before one collects.
        together(lambda: bad.note(unseen, step + 1))
        params_sha256 = fingerprint(trained, frozen)

    def write() -> None:
        bad.collect(run_dir / "processes", jax.process_count())
        summary = {
            "steps": step,
            "final_loss": log.final_loss,
            "steps_without_labels": log.steps_without_labels,
            **results,
            "bad_samples": bad.summary(),
            "parameters": parameters,
            "params_sha256": params_sha256,
            "seconds": log.seconds,
        }
        if log.history:
            draw_loss(log.history, run_dir / "loss.png")
        write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        if log.steps_without_labels:
            print(
                f"{log.steps_without_labels:,} of {step:,} steps had no labelled token and changed "
                f"nothing: {run_dir}/bad_samples.jsonl lists samples that were left out"
            )
        print(f"wrote {run_dir}/summary.json, loss.png, metrics.jsonl, checkpoints/{step}")

    together(write, turn=is_first())
    return None


def evaluates(run: RunSection, step: int, last_step: int) -> bool:
    """Whether held-out questions are asked after a step of training."""
    return run.eval_every is not None and step % run.eval_every == 0 and step < last_step


def saves(run: RunSection, step: int, last_step: int, score: float | None) -> bool:
    """Whether a checkpoint is written after a step; one that has a score may be the best."""
    scored = run.keep_best > 0 and score is not None
    return scored or step % run.save_every == 0 or step == last_step


if __name__ == "__main__":
    quiet_orbax()  # for good: threads of a failed write may print until the process ends
    sys.exit(main())
