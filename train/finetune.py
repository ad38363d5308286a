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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from train.batches import Loader
from train.checkpoints import Checkpoints, Position, quiet_orbax
from train.config import (
    OF_A_MACHINE,
    OwnOptions,
    Prepare,
    RunSection,
    TrainConfig,
    load_config,
    shared_digest,
)
from train.dataset import Dataset, open_dataset
from train.distributed import (
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
    same_everywhere,
    start_processes,
    together,
)
from train.errors import DataError, TrainingError
from train.evaluate import evaluate, evaluate_at_end
from train.optimizer import Optimizer
from train.plan import Epochs, padded_share, plan_run
from train.planning import print_plan
from train.records import BadSample
from train.report import PROFILED, BadSamples, RunLog, Trace, draw_loss, write_text
from train.setup import (
    count_flops,
    count_steps,
    init_opt_state,
    keep_compiled,
    load_tokenizer,
    make_model,
    open_heldout,
    prepare_data,
    read_model_config,
    start_directory,
)
from train.signals import stop_request, sure_interrupt
from train.step import add_batch, empty_sums, fingerprint, split_parts, update
from vxl_jax.cards import DEVICE_ERRORS, claim_memory, is_out_of_memory
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import ConfigError, VxlError
from vxl_jax.model import parameter_count
from vxl_jax.sharding import param_placement, sample_shards


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 also after SIGTERM, when all is saved."""
    options, rest = read_options(sys.argv[1:] if arguments is None else arguments)
    config, prepare = load_config(rest)
    claim_memory()
    status = run(options, config, prepare)
    if status and jax.distributed.is_initialized():
        leave(status)
    return status


def run(options: Namespace, config: TrainConfig, prepare: Prepare | None) -> int:
    """Plan or train, with errors that a user can correct as one line; returns the exit status."""
    run_dir = Path(config.run.run_dir)
    goes_on = f"the same command goes on from what {run_dir} holds"
    try:
        if options.plan:
            print_plan(config.resolved(), options.card, options.memory_gb)
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


IN_TRAINING = (
    "lower data.max_frames, data.batch_size or data.max_tokens_per_batch, set model.remat to full, "
    "or cut the model over more devices (mesh.fsdp, mesh.tensor); --plan shows what fits. This run "
    "can go on from its last checkpoint with another mesh; other values of data and model need a "
    "new --run-dir"
)

IN_EVALUATION = (
    "lower run.eval_batch_size, or cut the model over more devices (mesh.fsdp, mesh.tensor); the "
    "same command with that goes on from the last checkpoint"
)


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Turn an error of a device that is out of memory into one line; others stay what they are.

    Raises: TrainingError.
    """
    try:
        yield
    except VxlError:  # a ValueError too; one of evaluation has its own advice
        raise
    except DEVICE_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(f"out of device memory in {what} ({reason}): {advice}") from error


def read_options(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
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
    tokenizer = together(lambda: load_tokenizer(config, model_config))
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
        describe(config, mesh, parameters, data, heldout, plans, step)

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
                        raise not_finite(own_dir, step + 1, values, samples)
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


def check_same_config(config: TrainConfig) -> None:
    """See that all processes were started with the same configuration, but for `OF_A_MACHINE`.

    Raises: ConfigError if they were not.
    """
    if not same_everywhere(shared_digest(config)):
        raise ConfigError(
            "the processes of this run have different configurations; start all of them with the "
            f"same command (only {', '.join(sorted(OF_A_MACHINE))} may differ)"
        )


def own_directory(run_dir: Path) -> Path:
    """Where this process writes what each has: the run's directory, or one in it."""
    own = run_dir if is_first() else run_dir / "processes" / str(jax.process_index())
    own.mkdir(parents=True, exist_ok=True)
    return own


def open_data(
    config: TrainConfig, run_dir: Path, model_config: VideoXLConfig, tokenizer: Any, resume: bool
) -> tuple[Dataset, Dataset | None]:
    """The training samples and the held-out questions, if there are any.

    resume: the samples are those that the run has begun with.
    """
    data = open_dataset(
        config.data.train_json,
        config.data,
        model_config,
        tokenizer,
        config.run.seed,
        kept=run_dir / "samples",
        resume=resume or not is_first(),
    )
    try:
        return data, open_heldout(config, model_config, tokenizer)
    except BaseException:
        data.pool.close()
        raise


def note_bad(
    config: TrainConfig, own_dir: Path, step: int, data: Dataset, heldout: Dataset | None
) -> BadSamples:
    """The samples that cannot be used, of a run that has done `step` steps."""
    counts: dict[str, int] = {}
    found: list[BadSample] = []
    for dataset in (data, heldout) if heldout else (data,):
        for count in dataset.counts:
            name = str(count.source.path)
            counts[name] = counts.get(name, 0) + count.selected
        found += dataset.bad
        dataset.pool.rest()
    bad = BadSamples(own_dir, counts, config.data.max_bad_share, step)
    bad.note(found, step=0)
    bad.since_asked()
    return bad


def check_same_data(fingerprint: str) -> None:
    """See that all processes have the same training data.

    Raises: DataError if they do not.
    """
    if not same_everywhere(fingerprint):
        raise DataError(
            "the processes of this run see different training data: every machine needs the same "
            "files at the paths of data.train_json and data.media_root"
        )


def struct_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array, which may then be given up."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def evaluates(run: RunSection, step: int, last_step: int) -> bool:
    """Whether held-out questions are asked after a step of training."""
    return run.eval_every is not None and step % run.eval_every == 0 and step < last_step


def saves(run: RunSection, step: int, last_step: int, score: float | None) -> bool:
    """Whether a checkpoint is written after a step; one that has a score may be the best."""
    scored = run.keep_best > 0 and score is not None
    return scored or step % run.save_every == 0 or step == last_step


def not_finite(
    own_dir: Path, step: int, values: dict[str, float], samples: list[str]
) -> TrainingError:
    """The error of a step whose loss or gradient is NaN or infinite; its samples are written down.

    The step has changed nothing: the checkpoint before it is that of the run so far.
    """
    path = own_dir / "not_finite.json"
    write_text(path, json.dumps({"step": step, **values, "samples": samples}, indent=2) + "\n")
    names = ", ".join(samples[:4]) + (f" and {len(samples) - 4} more" if samples[4:] else "")
    return TrainingError(
        f"step {step}: loss {values['loss']:g}, gradient_norm {values['gradient_norm']:g}: the "
        f"update was not made, and step {step - 1} is saved. Its samples: {names} ({path} lists "
        f"them). Look at these, or lower optim.learning_rate in a new run; --run.skip-steps {step} "
        "goes on without them"
    )


def describe(
    config: TrainConfig,
    mesh: Mesh,
    parameters: int,
    data: Dataset,
    heldout: Dataset | None,
    plans: Epochs,
    step: int,
) -> None:
    """Print what is about to run, in the first process."""
    if not is_first():
        return
    steps, last_step = count_steps(config, plans)
    state = f", resumed at step {step:,}" if step else ""
    if step >= last_step:
        state = f", {step:,} are done: nothing is left to train"
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    ratios = data.model.ratios or "none"
    padding = padded_share(data.lengths, plans, shards=sample_shards(mesh))
    print(
        f"model: {parameters:,} parameters, trains {', '.join(config.optim.train)}; "
        f"ratios {ratios}\n"
        f"mesh: {shape}; {mesh.devices.flat[0].device_kind} x {mesh.size}, "
        f"{jax.process_count()} process(es)\n"
        f"data: {len(data):,} samples in {len(plans.buckets)} shapes, "
        f"{padding:.1%} padding; "
        f"{len(heldout or ()):,} held-out questions\n"
        f"run: {steps:,} steps of {config.optim.accumulate} x up to {config.data.batch_size} "
        f"samples{state}"
    )


if __name__ == "__main__":
    quiet_orbax()  # for good: threads of a failed write may print until the process ends
    sys.exit(main())
