"""What a run opens before its first step, and what processes have to agree on."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from train.config import TrainConfig
from train.config.resume import OF_A_MACHINE, shared_digest
from train.data.dataset import Dataset, open_dataset
from train.data.epochs import Epochs, padded_share
from train.data.records.sample import BadSample
from train.errors import DataError
from train.run.bad_samples import BadSamples
from train.run.distributed import is_first, same_everywhere
from train.run.setup import count_steps, open_heldout
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import ConfigError
from vxl_jax.nn.sharding import sample_shards


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


def print_run(
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
