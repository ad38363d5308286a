"""One run in several processes, on one machine or many: how they start, agree and share batches."""

import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Collection
from threading import Thread
from typing import Any, NoReturn, TypeVar
from zlib import crc32

import jax
import numpy as np
from jax._src.distributed import global_state  # JAX has no public barrier outside devices
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from train.config import MeshSection
from train.data.loader import Batch, Shards
from train.errors import TrainingError
from vxl_jax.errors import ConfigError
from vxl_jax.nn.groups import map_by_sample
from vxl_jax.nn.sharding import make_mesh, sample_shards, sample_spec

Result = TypeVar("Result")

PATIENCE = 60
"""Seconds that a process which ends waits for the others to end; then JAX ends them."""

HOST_WORK_HOURS = 24
"""Hours that a process waits for the work of the others on their hosts: reading data, measuring it,
loading weights."""

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

LAUNCHERS = tuple(
    tuple(row.split())
    for row in """
    OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE
    SLURM_STEP_NUM_TASKS SLURM_PROCID         SLURM_LOCALID              SLURM_STEP_TASKS_PER_NODE
    PMI_SIZE             PMI_RANK             MPI_LOCALRANKID            MPI_LOCALNRANKS
    """.strip().splitlines()
)
"""What Open MPI's `mpirun`, `srun` and other MPIs tell a task: how many there are, its number, its
number on its machine, and how many a machine has. Open MPI comes first: under SLURM it is itself
started by `srun`."""


def start_processes() -> None:
    """Join the other processes of the run, if the environment names them.

    That is: the variables `VARIABLES`, all three; or several tasks of one of `LAUNCHERS`, for which
    `JAX_COORDINATOR_ADDRESS` alone may be given. A process has all devices that it sees, but of
    several that a launcher has started on one machine, each has one. Call it before anything asks
    for a device.

    Raises: ConfigError if the variables make no sense, or the others do not come.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    address = given.get(VARIABLES[0])
    launched = [names for names in LAUNCHERS if os.environ.get(names[0], "1") != "1"]
    if len(given) == len(VARIABLES):
        _join_processes(address, *_numbers(*list(given.values())[1:]))
    elif launched and given.keys() <= {VARIABLES[0]}:
        count, number, local, here = (os.environ.get(name, "") for name in launched[0])
        alone = re.fullmatch(r"1(\(x\d+\))?", here)
        sees_one = re.fullmatch(r"[^,]+", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        device = None if alone or sees_one or not local.isdecimal() else int(local)
        _join_processes(address, *_numbers(count, number), device)
    elif given:
        missing = ", ".join(name for name in VARIABLES if name not in given)
        raise ConfigError(
            f"the environment has {', '.join(given)} but not {missing}; a run of several processes "
            "needs all three, a single one none"
        )


def _numbers(count: str, number: str) -> tuple[int, int]:
    if not (count.isdecimal() and number.isdecimal()):
        raise ConfigError(
            f"{count!r} processes, of which this is {number!r}: both must be whole numbers"
        )
    if not int(number) < int(count):
        raise ConfigError(f"of {count} processes this is number {number}; they count from 0")
    return int(count), int(number)


def _join_processes(
    address: str | None, count: int, number: int, device: int | None = None
) -> None:
    # The service would take SIGTERM for itself: before the loop, it would end nothing.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            local_device_ids=device,
            shutdown_timeout_seconds=PATIENCE,
            # Under SLURM, JAX knows the address; and that a process has one device, which we undo.
            cluster_detection_method="deactivate" if address else None,
        )
    except Exception as error:  # it raises anything
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"process {number} of {count} has not found the others: {reason}; set "
            "JAX_COORDINATOR_ADDRESS to HOST:PORT of the first, which all of them can reach"
        ) from error
    if device is None:
        jax.config.update("jax_cuda_visible_devices", "all")


def leave(status: int) -> NoReturn:
    """End this process of several at once, after an error or Ctrl-C.

    The interpreter would wait minutes for the others at its end, and they for this one in the step
    that they are in. The first goes last: JAX ends the others when it is gone, and they may be
    about to say the same.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(2)
    os._exit(status)


def is_first() -> bool:
    """Whether this is the process that prints and writes what the run has once."""
    return jax.process_index() == 0


def gather(*values: float) -> np.ndarray:
    """The values of all processes, [processes, values]; every process has to call it."""
    own = np.asarray(values)
    return own[None] if jax.process_count() == 1 else multihost_utils.process_allgather(own)


def count_distinct(names: Collection[str]) -> int:
    """How many different names all processes have together; every process has to call it."""
    if jax.process_count() == 1:
        return len(names)
    longest = int(gather(len(names)).max())
    own = np.zeros(longest, np.uint32)  # no name gives 0
    own[: len(names)] = [crc32(name.encode()) for name in names]
    found = np.unique(multihost_utils.process_allgather(own)) if longest else own
    return int(np.count_nonzero(found))


_meetings = itertools.count()


def exchange(value: str) -> list[str]:
    """Wait for all processes on their hosts; returns a short text from each, in any order. Every
    process has to call it.

    They wait at a barrier of JAX's coordination service. In a collective of devices (`gather`) work
    of minutes would run into the collective's own time limits.

    Raises: TrainingError if a process does not come: it has died, or hangs.
    """
    if jax.process_count() == 1:
        return [value]
    client: Any = global_state.client
    meeting = f"vxl_jax/together/{next(_meetings)}/"
    client.key_value_set(f"{meeting}{jax.process_index()}", value)
    failed: list[Exception] = []

    def wait() -> None:
        try:
            client.wait_at_barrier(meeting, int(HOST_WORK_HOURS * 3_600_000))
        except Exception as error:
            failed.append(error)

    # In a thread, so that Ctrl-C ends the wait: the client would not hear it.
    thread = Thread(target=wait, daemon=True)
    thread.start()
    thread.join()
    if failed:
        reason = str(failed[0]).partition("\n")[0]
        raise TrainingError(
            f"another process of the run has not come within {HOST_WORK_HOURS:g} hours, or has "
            f"died; look at what it printed ({reason})"
        ) from failed[0]
    return [value for _, value in client.key_value_dir_get(meeting)]


def all_fine(fine: bool) -> bool:
    """Whether every process is fine; they wait for each other as in `exchange`."""
    return all(value == "1" for value in exchange(str(int(fine))))


def together(work: Callable[[], Result], turn: bool = True) -> Result:
    """Do on every host what may fail on one of them; with `turn` False, nothing on this one.

    The processes wait for each other outside the devices, as long as it takes (`exchange`).

    Raises: what `work` raises in this process; TrainingError where it raised in another.
    """
    result: Any = None
    error: BaseException | None = None
    if turn:
        try:
            result = work()
        except Exception as raised:
            error = raised
    if not all_fine(error is None):
        raise error or TrainingError(
            "another process of the run cannot go on; its own message says why"
        )
    return result


def first_then_others(work: Callable[[], Result]) -> Result:
    """Do what leaves files behind in the first process, then in the others, which find them.

    Raises: as `together`.
    """
    if jax.process_count() == 1:
        return work()
    first = together(work, turn=is_first())
    others = together(work, turn=not is_first())
    return first if is_first() else others


def same_everywhere(sha256: str) -> bool:
    """Whether all processes have the same digest."""
    return len(np.unique(gather(int(sha256[:6], 16)))) == 1


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


def check_batch_size(batch_size: int, shards: int) -> None:
    """Refuse batches of which most devices would have no sample.

    Raises: ConfigError.
    """
    if batch_size < shards:
        raise ConfigError(
            f"data.batch_size is {batch_size}, but samples are divided over {shards} devices "
            "(mesh.data x mesh.fsdp), and a device without one computes as long as the others; "
            f"use a multiple of {shards}, and fewer batches a step (optim.accumulate)"
        )


def own_shards(mesh: Mesh) -> Shards:
    """The shares of every batch that the devices of this process work on."""
    count = sample_shards(mesh)
    indices = NamedSharding(mesh, sample_spec()).addressable_devices_indices_map((count,)).values()
    return Shards(tuple(sorted({index[0].start or 0 for index in indices if index})), count)


def counted_share(mesh: Mesh, shards: Shards) -> float:
    """Which part of what it loads a process counts as its own.

    Processes whose devices share samples, along the `tensor` axis, load the same ones.
    """
    return jax.local_device_count() / (len(shards.own) * mesh.shape["tensor"])


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

        return jax.make_array_from_callback(shape, NamedSharding(mesh, sample_spec(axis)), part)

    return map_by_sample(put, batch.streams), jax.tree.map(lambda x: put(x, 0), batch.pixels)


def to_host(x: Any) -> np.ndarray:
    """A whole array in every process; every process has to call it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
