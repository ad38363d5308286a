"""What a run is made of, before it begins: its directory, data, model and optimizer state."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from train.config import TrainConfig
from train.config.cli import Prepare
from train.config.resume import MOVABLE, config_changes, save_config
from train.data.dataset import Dataset, open_dataset
from train.data.epochs import Epochs
from train.data.loader import Batch
from train.errors import DataError
from train.run.distributed import is_first
from train.run.evaluate import eval_ratios
from train.run.optimizer import Optimizer
from train.run.step import split_parts
from vxl_jax.checkpoints import hf_config as published
from vxl_jax.checkpoints.load import abstract_params, load_network
from vxl_jax.config import VideoXLConfig, with_changes
from vxl_jax.errors import ConfigError, VxlError
from vxl_jax.models.lora import add_lora
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn.sharding import place_tree
from vxl_jax.planning.flops import PassSize, step_flops
from vxl_jax.presets import PRESETS
from vxl_jax.text import tokenizer as tokenizer_module
from vxl_jax.typing import ParamTree, Placement


def start_directory(config: TrainConfig, run_dir: Path, write: bool = True) -> None:
    """Make the run's directory; if a run has saved steps in it, check that it is this one.

    write: note the configuration in it, which one process does for all.

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
        if changed := config_changes(config, before):
            paths = not config.run.moved and {x.partition(" is ")[0] for x in changed} <= MOVABLE
            moved = ", or --moved if the same files are in another place now" if paths else ""
            raise ConfigError(
                f"{run_dir} holds a run with another configuration ({'; '.join(changed)}); "
                f"use its configuration to resume it, or another --run-dir{moved}"
            )
        return
    if not write:
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        part = saved.with_suffix(".part")
        save_config(config, part)
        part.replace(saved)
    except OSError as error:
        raise ConfigError(f"--run-dir {run_dir}: cannot be made ({error.strerror})") from error


def keep_compiled(run_dir: Path) -> None:
    """Keep compiled programs in the run's directory, unless JAX keeps them elsewhere: a run of many
    shapes that starts again would spend minutes on them. Not on a CPU, whose programs fit one
    machine alone.
    """
    kept = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if kept is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str((run_dir / "compiled").absolute()))


def prepare_data(config: TrainConfig, prepare: Prepare | None) -> None:
    """Make or fetch the data, if the configuration says how.

    Raises: DataError if that fails.
    """
    if prepare is None:
        return
    try:
        prepare(config)
    except (ImportError, OSError, VxlError) as error:  # ImportError: a package that it needs
        raise DataError(f"the data cannot be made: {error}") from error


def read_model_config(config: TrainConfig) -> VideoXLConfig:
    """Read the sizes of the checkpoint or preset, with the changes of the `model` section.

    Raises:
      ConfigError: the model has no vision tower, or not the beacons that are to be trained.
    """
    if config.model.checkpoint is None:
        model_config = PRESETS[config.model.preset](**config.model.changes())
        preprocessing = config.data.preprocessing_for(model_config.preprocessing)
        return with_changes(model_config, preprocessing=preprocessing)
    directory = Path(config.model.checkpoint)
    model_config = published.read_config(directory, **config.model.changes())
    expected = PRESETS[config.model.preset]().family
    if model_config.vision is not None and model_config.family != expected:
        raise ConfigError(
            f"model.checkpoint {directory}: is of the family {model_config.family}, and "
            f"model.preset {config.model.preset} is of {expected}, for which the configuration was "
            "made; name another checkpoint or preset"
        )
    if model_config.vision is None:
        raise ConfigError(
            f"model.checkpoint {directory}: has no vision tower; python -m convert.init makes a "
            "Video-XL of it and a tower"
        )
    beacons = [name for name in config.lora.targets if name.startswith("beacon_")]
    trained = "beacon" in config.optim.train or (config.lora.rank and beacons)
    if model_config.compression is None and trained:
        raise ConfigError(
            f"model.checkpoint {directory}: has no beacons; leave 'beacon' out of optim.train and "
            "beacon_q, beacon_k and beacon_v out of lora.targets"
        )
    if model_config.compression is None and config.run.eval_ratio is not None:
        raise ConfigError(
            f"run.eval_ratio is {config.run.eval_ratio}, but model.checkpoint {directory} has no "
            "beacons to compress with; leave it out"
        )
    before = model_config.preprocessing
    preprocessing = config.data.preprocessing_for(before)
    if is_first() and before != preprocessing:
        names = (each.name for each in dataclasses.fields(before))
        changed = [name for name in names if getattr(before, name) != getattr(preprocessing, name)]
        print(
            f"{directory} is asked with other preprocessing than the data section has "
            f"({', '.join(changed)}); checkpoints of this run are asked with that of the section"
        )
    return with_changes(model_config, preprocessing=preprocessing)


def load_run_tokenizer(config: TrainConfig, model_config: VideoXLConfig) -> Any:
    """The tokenizer of a local directory; nothing is downloaded."""
    directory = config.model.tokenizer or config.model.checkpoint
    if directory is None:
        raise ConfigError("model.tokenizer is not set; name the directory of one")
    return tokenizer_module.load_tokenizer(
        Path(directory), model_config.language, "model.tokenizer"
    )


def open_heldout(
    config: TrainConfig, model_config: VideoXLConfig, tokenizer: Any
) -> Dataset | None:
    """The held-out questions, if there are any."""
    if not config.data.eval_json:
        return None
    ratios = eval_ratios(model_config, config.run)
    return open_dataset(
        config.data.eval_json, config.data, model_config, tokenizer, prompts=True, ratios=ratios
    )


def count_steps(config: TrainConfig, plans: Epochs) -> tuple[int, int]:
    """Optimizer steps of all batches, and the step at which `run.max_steps` ends the run."""
    steps = math.ceil(len(plans) / config.optim.accumulate)
    return steps, min(steps, config.run.max_steps or steps)


def make_model(
    config: TrainConfig, model_config: VideoXLConfig, placement: Placement | None = None
) -> VideoXL:
    """Published weights, or random ones from the run's seed; with LoRA if the run asks for it.

    Each device reads or draws its own part of each parameter.
    """
    if config.model.checkpoint is not None:
        model = load_network(config.model.checkpoint, placement=placement, **config.model.changes())
    else:
        model = random_model(model_config, config.run.seed, placement)
    add_lora(model, config.lora, config.run.seed, placement)
    return model


def abstract_state(
    config: TrainConfig, model_config: VideoXLConfig, placement: Placement
) -> tuple[Any, ParamTree, ParamTree]:
    """What `split_parts` gives of the run's model, as shapes with shardings."""
    graph: Any = None

    def split() -> tuple[ParamTree, ParamTree]:
        nonlocal graph
        model = VideoXL(model_config, rngs=nnx.Rngs(0))
        add_lora(model, config.lora, 0)
        graph, *states = split_parts(model, config.optim.train, config.optim.param_dtype)
        return states[0], states[1]

    trained, frozen = (with_shardings(shapes, placement) for shapes in jax.eval_shape(split))
    return graph, trained, frozen


def with_shardings(shapes: Any, placement: Placement) -> Any:
    """A tree of shapes with the shardings that a placement gives them."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        place_tree(placement, shapes),
    )


def random_model(config: VideoXLConfig, seed: int, placement: Placement | None = None) -> VideoXL:
    """A model that has learned nothing; its numbers do not depend on the placement."""

    def make() -> Any:
        return nnx.to_pure_dict(nnx.state(VideoXL(config, rngs=nnx.Rngs(seed))))

    graph, shapes = abstract_params(config)
    shardings = None if placement is None else place_tree(placement, unflatten_dict(shapes))
    return nnx.merge(graph, jax.jit(make, out_shardings=shardings)())


def count_flops(
    config: TrainConfig, model_config: VideoXLConfig, trained: ParamTree
) -> Callable[[Batch], int]:
    """A function from a batch to the floating-point operations that its forward and backward pass
    need; see `vxl_jax.planning.flops`.
    """
    adapters = [x.size for path, x in flatten_dict(trained).items() if "lora_" in path[-1]]

    def of(batch: Batch) -> int:
        work = PassSize.of(batch.streams, batch.frames)
        return step_flops(model_config, work, config.optim.train, sum(adapters)).total

    return of


def init_opt_state(optimizer: Optimizer, trained: ParamTree, placement: Placement) -> Any:
    """The optimizer's state, placed as the parameters; shapes alone where these are shapes."""
    shapes = jax.eval_shape(optimizer.init, trained)
    if not isinstance(jax.tree.leaves(trained)[0], jax.Array):
        return with_shardings(shapes, placement)
    return jax.jit(optimizer.init, out_shardings=place_tree(placement, shapes))(trained)
