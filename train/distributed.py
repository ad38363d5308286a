"""One run in several processes, on one machine or many: how they start, agree and share batches."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.batches import Batch, Shards
from train.config import MeshSection
from train.errors import TrainingError
from vxl_jax.config import ConfigError
from vxl_jax.model import GROUP_FIELDS
from vxl_jax.sharding import SAMPLES, make_mesh

Result = TypeVar("Result")

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start_processes() -> None:
    """Join the other processes of the run, if the environment says that there are any.

    That is: the variables `VARIABLES`, all three; or a step of SLURM (`srun`) or of Open MPI
    (`mpirun`) with more than one task. Call it before anything asks for a device.

    Raises: ConfigError if the variables make no sense, or the others do not come.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    arguments: dict[str, Any] = {}
    if given:
        if missing := [name for name in VARIABLES if name not in given]:
            raise ConfigError(
                f"the environment has {', '.join(given)} but not {', '.join(missing)}; a run of "
                "several processes needs all three, a single one none"
            )
        address, *numbers = given.values()
        try:
            count, index = map(int, numbers)
        except ValueError:
            raise ConfigError(
                f"JAX_NUM_PROCESSES {numbers[0]!r} and JAX_PROCESS_ID {numbers[1]!r}: not numbers"
            ) from None
        if not 0 <= index < count:
            raise ConfigError(f"JAX_PROCESS_ID is {index}; it must be in [0, {count})")
        arguments = {"coordinator_address": address, "num_processes": count, "process_id": index}
    else:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE")
        if int(tasks or 1) == 1:
            return
    try:
        jax.distributed.initialize(**arguments)
    except Exception as error:  # it raises anything
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"the processes of the run did not find each other: {reason}") from error


def is_first() -> bool:
    """Whether this is the process that prints and writes what the run has once."""
    return jax.process_index() == 0


def gather(*values: float) -> np.ndarray:
    """The values of all processes, [processes, values]; every process has to call it."""
    own = np.asarray(values)
    return own[None] if jax.process_count() == 1 else multihost_utils.process_allgather(own)


def first_then_others(work: Callable[[], Result]) -> Result:
    """Do what leaves files behind in the first process, then in the others, which find them.

    Raises: what `work` raises in this process; TrainingError where it raised in another.
    """
    result: Any = None
    error: BaseException | None = None
    for turn in (True, False)[: jax.process_count()]:
        if is_first() == turn:
            try:
                result = work()
            except Exception as raised:
                error = raised
        if gather(error is not None).any():
            raise error or TrainingError(
                "another process of the run cannot go on; its own message says why"
            )
    return result


def open_mesh(section: MeshSection) -> Mesh:
    """The mesh of a run over all devices of all its processes.

    Raises: ConfigError if there are not as many devices.
    """
    devices, inner = jax.device_count(), section.fsdp * section.tensor
    data = devices // inner if section.data is None else section.data
    if data * inner != devices:
        asked = "data" if section.data is None else section.data
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor is {asked} x {section.fsdp} x {section.tensor}, "
            f"but the run has {devices} device{'s' * (devices > 1)} in {jax.process_count()} "
            "process(es); their product must be the number of devices"
        )
    return make_mesh(data, section.fsdp, section.tensor)


def _by_sample(mesh: Mesh, axis: int) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, SAMPLES))


def own_shards(mesh: Mesh) -> Shards:
    """The shares of every batch that the devices of this process work on."""
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    indices = _by_sample(mesh, 0).addressable_devices_indices_map((count,)).values()
    return Shards(tuple(sorted({index[0].start or 0 for index in indices if index})), count)


def place_batch(batch: Batch, mesh: Mesh, shards: Shards) -> tuple[Any, Any]:
    """Streams and pixels of a batch on the devices: arrays over all processes, of which each has
    loaded its own shards.
    """

    def put(x: np.ndarray, axis: int) -> jax.Array:
        each = x.shape[axis] // len(shards.own)
        shape = (*x.shape[:axis], each * shards.count, *x.shape[axis + 1 :])

        def part(index: Any) -> np.ndarray:
            row = shards.own.index((index[axis].start or 0) // each) * each
            return x[(slice(None),) * axis + (slice(row, row + each),)]

        return jax.make_array_from_callback(shape, _by_sample(mesh, axis), part)

    arrays: dict[str, Any] = {
        name: put(value, 1 if name in GROUP_FIELDS else 0)
        for name, value in vars(batch.streams).items()
        if isinstance(value, np.ndarray)
    }
    pixels = None if batch.pixels is None else put(batch.pixels, 0)
    return replace(batch.streams, **arrays), pixels


def to_host(x: Any) -> np.ndarray:
    """A whole array in every process; every process has to call it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
