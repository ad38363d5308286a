"""Open a run before its first step, and check that its processes agree."""

from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from train.config import TrainConfig
from train.config.resume import OF_A_MACHINE, shared_digest
from train.data.dataset import Dataset, open_dataset
from train.data.epochs import Epochs, padded_share, plan_run
from train.data.loader import Shards
from train.data.records.sample import BadSample
from train.errors import DataError
from train.run.bad_samples import BadSamples
from train.run.checkpoints import Checkpoints, Position
from train.run.distributed import (
    check_batch_size,
    count_distinct,
    first_then_others,
    is_first,
    open_mesh,
    own_shards,
    same_everywhere,
    together,
)
from train.run.optimizer import Optimizer
from train.run.setup import (
    count_steps,
    init_opt_state,
    keep_compiled,
    load_run_tokenizer,
    make_model,
    open_heldout,
    read_model_config,
)
from train.run.step import split_parts
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import ConfigError
from vxl_jax.models.functions import parameter_count
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn.sharding import param_placement, sample_shards
from vxl_jax.typing import ParamTree


@dataclass
class TrainState:
    """The numbers that a step of training changes, and how many steps are done.

    trained: parameters that get gradients. opt_state: from `Optimizer.init`. Both are given up
    (donated) in each update. position: in the run's data.
    """

    trained: ParamTree
    opt_state: Any
    position: Position
    step: int


@dataclass(frozen=True)
class OpenRun:
    """A run that is ready for its next step: all that its loop reads, and the state it changes.

    own_dir: where this process writes its metrics and bad samples. last_step: the step that ends
    the run. parameters: how many the model has. graph, frozen: the model without its trained
    parameters, from `split_parts`.
    """

    config: TrainConfig
    run_dir: Path
    own_dir: Path
    mesh: Mesh
    shards: Shards
    tokenizer: Any
    checkpoints: Checkpoints
    data: Dataset
    heldout: Dataset | None
    bad: BadSamples
    plans: Epochs
    last_step: int
    optimizer: Optimizer
    parameters: int
    graph: Any
    frozen: ParamTree
    state: TrainState

    def model(self) -> VideoXL:
        """Merge the model from its parameters of this moment; the next update takes them."""
        return nnx.merge(self.graph, self.state.trained, self.frozen)

    def save(self, accuracy: float | None = None) -> None:
        """Write a checkpoint of the state; see `Checkpoints.save`."""
        state = self.state
        self.checkpoints.save(state.step, state.trained, state.opt_state, state.position, accuracy)


def open_run(config: TrainConfig, run_dir: Path, stack: ExitStack) -> OpenRun:
    """Open a run: mesh, tokenizer, checkpoints, data, model, and the state of its last checkpoint.

    Every process of the run has to call it. What one process does on its host, where it may fail,
    it does with `together` or `first_then_others`: an error in one ends all.

    Args:
        config: from `TrainConfig.resolved`.
        run_dir: made by `start_directory`.
        stack: gets what has to be closed at the end of the run, and the mesh as JAX's own.

    Raises: VxlError if the configuration, the data or a checkpoint cannot be used.
    """
    mesh = open_mesh(config.mesh)
    shards = own_shards(mesh)
    check_batch_size(config.data.batch_size, shards.count)
    model_config = together(lambda: read_model_config(config))
    tokenizer = together(lambda: load_run_tokenizer(config, model_config))
    own_dir = together(lambda: own_directory(run_dir))
    keep_compiled(run_dir)
    stack.enter_context(jax.set_mesh(mesh))
    checkpoints = together(lambda: Checkpoints(run_dir, config))
    stack.enter_context(closing(checkpoints))
    step = checkpoints.last or 0

    data, heldout = first_then_others(
        lambda: open_data(config, run_dir, model_config, tokenizer, resume=step > 0)
    )
    stack.enter_context(data)
    if heldout:
        stack.enter_context(heldout)
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
    if step:  # the numbers are given up before the checkpoint's are read
        trained = jax.tree.map(struct_of, trained)
    opt_state = init_opt_state(optimizer, trained, placement)
    if step:
        trained, opt_state, position = checkpoints.restore(step, trained, opt_state, position)
    print_run(config, mesh, parameters, data, heldout, plans, step)
    return OpenRun(
        config=config,
        run_dir=run_dir,
        own_dir=own_dir,
        mesh=mesh,
        shards=shards,
        tokenizer=tokenizer,
        checkpoints=checkpoints,
        data=data,
        heldout=heldout,
        bad=bad,
        plans=plans,
        last_step=last_step,
        optimizer=optimizer,
        parameters=parameters,
        graph=graph,
        frozen=frozen,
        state=TrainState(trained, opt_state, position, step),
    )


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
