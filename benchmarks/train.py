"""Training steps: seconds, share of the measured peak, memory; what remat and the scan cost.

    python -m benchmarks.train                    # a model that two CPU cores can train
    python -m benchmarks.train --size 7b          # the recipes for one 80 GB card, on a GPU
    python -m benchmarks.train --growth           # bytes of a step at 7B by frames, on any machine

Every measurement runs in a separate process. A step is `train.run.step.add_batch` and `update` on
one sample: a video and 512 tokens of text, random weights. The peak is the fastest product of two
square matrices that the same device manages in the same run, in the dtype of training. On a GPU,
JAX's memory is limited to 80 GB. Writes benchmarks/results/train-{cpu,7b,growth}.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from typing import Any

from benchmarks.core import device_peak_bytes, peak_bytes, write_results

RECIPES = ("beacon_7b", "lora_7b", "full_7b")
LIMIT = 80e9
"""Bytes of a card that the recipes are for."""
STEPS = 3


# In a separate process.


def small_config() -> Any:
    """Video-XL's geometry and all of its parts in 204 million parameters, float32."""
    from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig
    from vxl_jax.config import LanguageConfig, VisionConfig
    from vxl_jax.presets import video_xl_7b

    model = video_xl_7b(
        vision=VisionConfig(width=512, layers=7, heads=8, mlp_width=2048),
        language=LanguageConfig(
            vocab_size=8192, width=1024, layers=12, heads=8, kv_heads=2, mlp_width=2816
        ),
        ratios=(8,),
    )
    config = TrainConfig(
        model=ModelSection(tokenizer="none", dtype="float32"),
        data=DataSection(train_json=("none",), media_root="none"),
        optim=OptimSection(),
        run=RunSection(run_dir="none"),
    )
    return config, model


def recipe_config(name: str) -> Any:
    """A recipe of `configs/` with the sizes of the published model."""
    from train.config.cli import load_config
    from train.run.fit import planned_model

    config = load_config(["--config", name]).config
    return config, planned_model(config)[0]


def time_steps(recipe: str, frames: int, remat: str, unrolled: bool) -> dict[str, Any]:
    """Seconds to compile and to run a step, and its bytes."""
    import jax
    import numpy as np

    from train.data.loader import Batch
    from train.run.distributed import own_shards, place_batch
    from train.run.fit import StepEstimator
    from train.run.optimizer import Optimizer
    from train.run.setup import count_flops, init_opt_state, random_model
    from train.run.step import add_batch, split_parts, update
    from vxl_jax.models.lora import add_lora
    from vxl_jax.nn import qwen2 as language
    from vxl_jax.nn.sharding import make_mesh, param_placement
    from vxl_jax.stream.batch import StreamShape, batch_streams

    config, model_config = small_config() if recipe == "small" else recipe_config(recipe)
    model_config = replace(model_config, remat=remat)
    if unrolled:
        language.lax = _Unrolled(jax.lax)  # type: ignore[attr-defined]
    mesh = make_mesh(1, devices=jax.devices()[:1])
    placement = param_placement(mesh, model_config)
    stream = StepEstimator(config, model_config, mesh).stream(frames)
    size = model_config.tower.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, frames, size, size, 3), np.uint8)
    streams = batch_streams([stream], StreamShape.of(stream))
    batch = Batch(streams, pixels, [None], frames, stream.length, stream.length)
    with jax.set_mesh(mesh):
        model = random_model(model_config, 0, placement)
        add_lora(model, config.lora, 0, placement)
        graph, trained, frozen = split_parts(model, config.optim.train, config.optim.param_dtype)
        del model
        optimizer = Optimizer(config.optim, 1000, 0)
        opt_state = init_opt_state(optimizer, trained, placement)
        placed = place_batch(batch, mesh, own_shards(mesh))
        seconds = []
        for _ in range(STEPS + 1):
            began = time.perf_counter()
            sums = add_batch(graph, trained, frozen, None, *placed)
            trained, opt_state, metrics = update(optimizer, trained, opt_state, sums)
            del sums
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - began)
    return {
        "tokens": stream.length,
        "flops": count_flops(config, model_config, trained)(batch),
        "first_seconds": seconds[0],
        "seconds": min(seconds[1:]),
        "loss": loss,
        "peak_bytes": device_peak_bytes("jax") or peak_bytes(),
    }


class _Unrolled:
    """`jax.lax` whose scan has no loop."""

    def __init__(self, lax: Any):
        self._lax = lax

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lax, name)

    def scan(self, *args: Any, **options: Any) -> Any:
        return self._lax.scan(*args, unroll=True, **options)


def measure_peak(dtype: str) -> dict[str, Any]:
    """Fastest product of two square matrices, FLOP/s, and the limit of the device's memory."""
    import jax
    import jax.numpy as jnp

    best = 0.0
    for size in (2048, 4096) if jax.default_backend() == "cpu" else (8192, 16384):
        x = jnp.ones((size, size), dtype)
        multiply = jax.jit(lambda a, b: a @ b)
        jax.block_until_ready(multiply(x, x))
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(multiply(x, x))
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_flops": best, "bytes_limit": stats.get("bytes_limit")}


def grow(recipe: str, frames: list[int]) -> dict[str, Any]:
    """Bytes of a step by frames, compiled and not allocated."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from train.run.fit import StepEstimator
    from vxl_jax.nn.sharding import make_mesh
    from vxl_jax.planning.cards import find_card
    from vxl_jax.planning.compiler import compiler_for

    config, model_config = recipe_config(recipe)
    compiler = compiler_for(find_card("h100"))
    mesh = make_mesh(1, devices=compiler.devices())
    planner = StepEstimator(config, model_config, mesh, compiler)
    steps = [planner.step(count) for count in frames]
    return {
        "compiler": compiler.name,
        "steps": [asdict(step) | {"peak": step.peak} for step in steps],
    }


# The whole.


def work(call: str, *arguments: Any, fraction: float | None = None) -> dict[str, Any]:
    """The result of a function above in a new process; {"failed": why} if it fails."""
    command = [sys.executable, "-m", "benchmarks.train", "--worker", call, json.dumps(arguments)]
    environment = dict(os.environ)
    if fraction is not None:
        environment["XLA_CLIENT_MEM_FRACTION"] = f"{fraction:.4f}"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        return {"failed": reason[:300]}
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, row: dict[str, Any], peak: float) -> dict[str, Any]:
    """Print a row and add its rates."""
    if "failed" in row:
        print(f"{name:34} {row['failed'][:90]}", flush=True)
        return row
    row["tokens_per_second"] = row["tokens"] / row["seconds"]
    row["peak_share"] = row["flops"] / row["seconds"] / peak
    print(
        f"{name:34}{row['first_seconds']:9.1f}{row['seconds']:9.2f}"
        f"{row['tokens_per_second']:10.0f}{row['peak_share']:8.1%}{row['peak_bytes'] / 1e9:9.2f}",
        flush=True,
    )
    return row


HEAD = f"{'':34}{'first s':>9}{'step s':>9}{'tokens/s':>10}{'peak':>8}{'GB':>9}"


def run_small(frames: int) -> None:
    """Remat and scan side by side on a small model."""
    found = work("measure_peak", "float32")
    print(f"measured peak: {found['peak_flops'] / 1e9:.0f} GFLOP/s\n{HEAD}")
    cases = [("full", False), ("full", True), ("products", False), ("none", False)]
    rows = {}
    for remat, unrolled in cases:
        name = f"remat {remat}" + ", layers unrolled" * unrolled
        row = work("time_steps", "small", frames, remat, unrolled)
        rows[name] = show(name, row, found["peak_flops"])
    write_results("train-cpu", {"frames": frames, **found, "steps": rows})


def limited() -> tuple[float, dict[str, Any]]:
    """The share of a GPU's memory that is at most `LIMIT`, and what `measure_peak` finds in it."""
    free = work("measure_peak", "bfloat16", fraction=0.9)
    if not free.get("bytes_limit"):
        raise SystemExit("--size 7b needs a GPU: this device does not limit its memory")
    fraction = min(0.95, LIMIT * 0.9 / free["bytes_limit"])
    found = work("measure_peak", "bfloat16", fraction=fraction)
    assert found["bytes_limit"] <= LIMIT, found
    return fraction, found


def run_7b(frames: list[int]) -> None:
    """The recipes at the real shapes, within 80 GB."""
    fraction, found = limited()
    print(f"measured peak: {found['peak_flops'] / 1e12:.0f} TFLOP/s\n{HEAD}")
    rows = {}
    for recipe in RECIPES:
        for count in frames:
            name = f"{recipe}, {count} frames"
            row = work("time_steps", recipe, count, "full", False, fraction=fraction)
            rows[name] = show(name, row, found["peak_flops"])
    write_results("train-7b", {**found, "steps": rows})


def run_growth(frames: list[int]) -> None:
    """Bytes by frames, of each recipe."""
    from benchmarks.core import machine

    rows = {}
    print(f"{'peak GB by frames':18}" + "".join(f"{count:9}" for count in frames))
    for recipe in RECIPES:
        rows[recipe] = work("grow", recipe, frames)
        steps = rows[recipe]["steps"]
        print(f"{recipe:18}" + "".join(f"{s['peak'] / 1e9:9.2f}" for s in steps), flush=True)
    write_results("train-growth", {"recipes": rows}, machine())


def main() -> None:
    """Measure, print tables, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("cpu", "7b"), default="cpu")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--frames", type=int, nargs="*", help="8; 32 128 512; or 64 … 1024")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        call, arguments = options.worker
        print(json.dumps(globals()[call](*json.loads(arguments))))
    elif options.growth:
        run_growth(options.frames or [64, 128, 256, 512, 1024])
    elif options.size == "7b":
        run_7b(options.frames or [32, 128, 512])
    else:
        run_small((options.frames or [8])[0])


if __name__ == "__main__":
    main()
