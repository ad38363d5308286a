"""Runs on several devices, in a separate process: what they do is left in files for tests.

    python -m tests.support.on_meshes JOBS.json

A job is {"arguments": of `train.finetune`, "path": where `out.txt` and `placed.json` go}, or
{"plan": shape of a mesh, "path": a file for the bytes and arrays of a compiled step}, or
{"load": a checkpoint, "mesh": shape, "path": a file for where its parameters lie}, or
{"replicate": a line to print before XLA is made to replicate an array, "path": a file to touch}.
"""

import contextlib
import functools
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from train import finetune
from train.config.cli import load_config
from train.run.fit import StepEstimator
from train.run.setup import read_model_config
from train.run.step import fingerprint
from vxl_jax.checkpoints import load as checkpoint
from vxl_jax.checkpoints.hf_config import read_config
from vxl_jax.nn.sharding import make_mesh, param_placement


def main(jobs: list[dict[str, Any]]) -> None:
    """Do the jobs one after the other; processes of one run have the same."""
    finetune.start_processes = functools.cache(finetune.start_processes)
    for job in jobs:
        path = Path(job["path"])
        if "arguments" in job:
            train(job["arguments"], path)
        elif "plan" in job:
            path.write_text(json.dumps(plan(job["plan"], job["config"])))
        elif "replicate" in job:
            print(job["replicate"], file=sys.stderr, flush=True)
            replicate()
            path.touch()
        else:
            path.write_text(json.dumps(loaded(job["load"], job["mesh"])))


def train(arguments: list[str], path: Path) -> None:
    """A run of which is noted where its arrays lie."""
    with watched() as placed, contextlib.redirect_stdout(io.StringIO()) as out:
        status = finetune.main(arguments)
    if status:
        sys.exit(status)
    if jax.process_index() == 0:
        (path / "out.txt").write_text(out.getvalue())
    (path / f"placed-{jax.process_index()}.json").write_text(json.dumps(placed))


@contextlib.contextmanager
def watched() -> Any:
    """Notes of the run in this block where parameters, state, gradients and batches lie, and the
    fingerprint of the parameters that it begins with.
    """
    placed: dict[str, Any] = {"batches": []}
    update, place_batch = finetune.update, finetune.place_batch

    def watched_update(optimizer: Any, trained: Any, opt_state: Any, sums: Any) -> Any:
        if "parameters" not in placed:
            placed["began"] = fingerprint(trained)
            placed["parameters"] = where(trained)
            placed["state"] = where(opt_state)
            placed["gradients"] = where(sums["gradients"])
        return update(optimizer, trained, opt_state, sums)

    def watched_place_batch(*batch: Any) -> Any:
        streams, pixels = place_batch(*batch)
        arrays = [(streams.kind, 1), (streams.label, 0)] + (
            [(pixels, 0)] if pixels is not None else []
        )
        placed["batches"].append([rows_of(x, axis) for x, axis in arrays])
        return streams, pixels

    finetune.update, finetune.place_batch = watched_update, watched_place_batch
    try:
        yield placed
    finally:
        finetune.update, finetune.place_batch = update, place_batch


def where(tree: Any) -> dict[str, list[int]]:
    """Of each array: its bytes, the most bytes of it on one device, and on how many devices of this
    process it is.
    """
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        shards = x.addressable_shards
        most = max(shard.data.nbytes for shard in shards)
        devices = len({shard.device for shard in shards})
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = [x.nbytes, most, devices]
    return found


def rows_of(x: jax.Array, axis: int) -> list[int]:
    """Rows of all samples, the most on one device, and devices of this process."""
    shards = x.addressable_shards
    most = max(shard.data.shape[axis] for shard in shards)
    return [x.shape[axis], most, len({shard.device for shard in shards})]


def plan(shape: list[int], config_arguments: list[str]) -> dict[str, Any]:
    """Bytes on one device of a compiled step, and the shapes of all its floating-point arrays."""
    texts: list[str] = []

    class Compiler(StepEstimator):
        def _temporaries(self, lowered: Any) -> int:
            compiled = lowered.compile()
            texts.append(compiled.as_text())
            return int(compiled.memory_analysis().temp_size_in_bytes)

    config = load_config(config_arguments).config
    count = int(np.prod(shape))
    mesh = make_mesh(*shape, devices=jax.devices()[:count])
    step = Compiler(config, read_model_config(config), mesh).step(frames=FRAMES)
    shapes = re.findall(r"f32\[([\d,]+)\]", "".join(texts))
    arrays = {tuple(map(int, shape.split(","))) for shape in shapes}
    return {**vars(step), "arrays": sorted(arrays)}


FRAMES = 7
"""Of each sample of a plan."""


def loaded(directory: str, shape: list[int]) -> dict[str, Any]:
    """Where the parameters of a published checkpoint lie, their fingerprint, and for each of them
    the most numbers that were read at once.
    """
    read_part, most = checkpoint.read_part, dict[str, int]()

    def watched_read_part(row: Any, tensors: Any, index: Any, *rest: Any) -> np.ndarray:
        part = read_part(row, tensors, index, *rest)
        name = "/".join(row.ours)
        most[name] = max(most.get(name, 0), part.size)
        return part

    checkpoint.read_part = watched_read_part
    placement = param_placement(make_mesh(*shape), read_config(Path(directory)))
    params = nnx.to_pure_dict(nnx.state(checkpoint.load_network(directory, placement=placement)))
    return {"where": where(params), "fingerprint": fingerprint(params), "most": most}


def replicate() -> None:
    """Compile a change of layout for which XLA has to put the whole array on every device."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rows, columns = NamedSharding(mesh, P("b", None)), NamedSharding(mesh, P(None, "a"))

    @jax.jit
    def change(x: jax.Array) -> jax.Array:
        x = jax.lax.with_sharding_constraint(x, rows)
        return jax.lax.with_sharding_constraint(x, columns)

    change.lower(jax.ShapeDtypeStruct((8, 10), np.float32)).compile()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
