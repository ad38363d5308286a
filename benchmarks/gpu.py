"""All that only a GPU can tell, in one command: for one 80 GB card, 25 minutes at most, no network.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --size cpu --only parity,attention     # the machinery, on any machine

Weights are random. Each step runs in a separate process with a limit of time; one that fails leaves
the others' figures, and after `MOST_SECONDS` no other step begins. What a plan says is compiled
with JAX's CUDA plugin, which such a machine has.
Writes benchmarks/results/gpu-{size}.json with card, driver and versions.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core import config_of, machine, write_results

MOST_SECONDS = 22 * 60
"""After which no step is begun."""

MICRO = Path(__file__).parents[1] / "tests" / "golden" / "micro"


@dataclass(frozen=True)
class Step:
    """A measurement: a module and its arguments, and the most seconds that it gets."""

    call: tuple[str, ...]
    limit: int


def steps_of(size: str) -> dict[str, Step]:
    """Every step by name, in order."""
    frames = "2048" if size == "7b" else "64"
    ours = ("benchmarks.gpu", "--size", size, "--worker")
    inference, train = ("benchmarks.inference", "--worker"), ("benchmarks.train", "--worker")
    recipes = ("lora_7b", "beacon_7b", "full_7b") if size == "7b" else ("small",)
    return {
        "parity": Step((*ours, "parity", "vision"), 180),
        "parity of LLaVA-Video": Step((*ours, "parity", "siglip"), 180),
        "published numbers": Step(("convert.parity", str(MICRO / "hf"), str(MICRO)), 120),
        "attention": Step((*ours, "attention"), 240),
        "peaks": Step((*train, "measure_peak", '["bfloat16"]'), 60),
        "bandwidth": Step((*inference, "bandwidth"), 60),
        "film": Step((*ours, "film", frames), 240),
        "prefill": Step((*inference, "prefill", size, "none"), 120),
        "decode": Step((*inference, "answers", size, "1", "none"), 120),
        "decode int8": Step((*inference, "answers", size, "1", "int8"), 120),
        "long memory": Step((*ours, "long_memory"), 180),
        **{
            f"train {recipe}": Step(
                (
                    *train,
                    "time_steps",
                    json.dumps([recipe, 64 if size == "7b" else 8, "full", False]),
                ),
                200,
            )
            for recipe in recipes
        },
    }


# Steps of this file.


def parity(size: str, tower: str) -> dict[str, float]:
    """bfloat16 against float32 with the same weights: two layers at the real width.

    tower: see `benchmarks.core.config_of`.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from vxl_jax import VideoXL, batch_streams, plan_stream
    from vxl_jax.models.functions import decode_step, prefill
    from vxl_jax.stream.visual import batch_visual
    from vxl_jax.text.template import IMAGE_TOKEN

    whole = config_of(size, tower)
    config = replace(
        whole,
        vision=replace(whole.tower, layers=3),
        language=replace(whole.language, layers=2),
    )
    draw = np.random.default_rng(0)
    frames, side = 20, config.tower.image_size
    pixels = draw.integers(0, 256, (1, frames, side, side, 3), np.uint8)
    ids = [1, IMAGE_TOKEN, *range(2, 40)]
    tokens, ratio = [config.layout.video_count(frames)], 16 if config.compression else None
    stream = plan_stream(ids, tokens, window=config.window, ratio=ratio)
    streams = batch_streams([stream], windows_per_group=1)
    visual = batch_visual(config.layout, pixels, [config.layout.video_tokens(frames)])

    def logits(dtype: str) -> np.ndarray:
        made = replace(config, dtype=dtype, param_dtype=dtype)
        model = nnx.jit(lambda: VideoXL(replace(made, param_dtype="float32"), rngs=nnx.Rngs(0)))()
        graph, _ = nnx.split(nnx.eval_shape(lambda: VideoXL(made, rngs=nnx.Rngs(0))))
        params = jax.tree.map(lambda x: x.astype("bfloat16").astype(dtype), nnx.split(model)[1])
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            first, memory = prefill(graph, params, streams, visual, streams.memory + 16)
            second, _ = decode_step(graph, params, memory, jnp.array([5], jnp.int32))
        return np.concatenate([np.asarray(first), np.asarray(second)]).astype(np.float64)

    exact, found = logits("float32"), logits("bfloat16")
    spread = exact - exact.mean(-1, keepdims=True)
    error = np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(spread, axis=-1)
    return {"prefill_relative_error": float(error[0]), "decode_relative_error": float(error[1])}


def attention(size: str) -> dict[str, Any]:
    """Implementations at the shapes of a step of a film: error against float32, TFLOP/s both ways.

    cuDNN has the own window alone, causally: its figures are of fewer pairs.
    """
    import jax
    import jax.numpy as jnp

    from vxl_jax.nn.attention import window_attention
    from vxl_jax.nn.attention.key_values import KeyValues

    c = config_of(size).language
    windows, window, slots = (5, 1536, 18_432) if size == "7b" else (2, 128, 256)
    tokens = windows * window
    on_gpu = jax.default_backend() == "gpu"
    draw = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return jnp.asarray(draw.standard_normal(shape, np.float32))

    q = random(1, tokens, c.heads, c.head_size) * c.head_size**-0.5
    k, v = (random(1, tokens, c.kv_heads, c.head_size) for _ in range(2))
    stored = tuple(random(1, 1, c.kv_heads, slots, c.head_size) for _ in range(2))
    start = jnp.asarray(np.arange(tokens)[None] // window * window, jnp.int32)
    seen = jnp.full((1, tokens), slots, jnp.int32)
    pairs = tokens * slots + windows * window * (window + 1) // 2
    own = windows * window * (window + 1) // 2

    def ours(name: Any) -> Callable[..., Any]:
        def run(q: Any, k: Any, v: Any, keys: Any, values: Any) -> Any:
            return window_attention(q, k, v, start, [KeyValues(keys, values, 0, seen)], name)

        return run

    def cudnn(q: Any, k: Any, v: Any, keys: Any, values: Any) -> Any:
        q, k, v = (x.reshape(windows, window, *x.shape[2:]) for x in (q, k, v))
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, scale=1.0, implementation="cudnn"
        )

    arrays = tuple(x.astype(jnp.bfloat16) for x in (q, k, v, *stored))
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    with jax.default_matmul_precision("highest"):
        exact = np.asarray(jax.jit(ours("tiled"))(*wide), np.float64)
    ways = {"tiled": (ours("tiled"), pairs)}
    if on_gpu:
        ways |= {"fused": (ours("fused"), pairs), "cudnn, own window alone": (cudnn, own)}
    rows: dict[str, Any] = {}
    for name, (way, count) in ways.items():

        def both(*arrays: Any, way: Callable[..., Any] = way) -> Any:
            out, backward = jax.vjp(way, *arrays)
            return backward(jnp.ones_like(out))

        flops = 4 * count * c.heads * c.head_size
        forward = jax.jit(way)
        seconds, step = best(forward, arrays), best(jax.jit(both), arrays)
        rows[name] = {
            "forward_tflops": flops / seconds / 1e12,
            "forward_and_backward_tflops": 3.5 * flops / step / 1e12,
            "seconds": seconds,
            "forward_and_backward_seconds": step,
        }
        if count == pairs:
            out = np.asarray(forward(*arrays), np.float64)
            rows[name]["relative_error"] = float(
                np.linalg.norm(out - exact) / np.linalg.norm(exact)
            )
    return rows


def best(call: Callable[..., Any], arrays: tuple[Any, ...]) -> float:
    """Least seconds of five calls, after two that compile and warm up."""
    import jax

    seconds = []
    for i in range(7):
        began = time.perf_counter()
        jax.block_until_ready(call(*arrays))
        if i > 1:
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def film(size: str, frames: str) -> dict[str, Any]:
    """A film from a file, end to end, and the bytes that a plan says next to the device's peak."""
    from benchmarks.inference import a_film, film as watch

    with a_film() as path:
        row = watch(size, path, int(frames))
    done = run_module("benchmarks.gpu", "--size", size, "--worker", "plan", frames, platform="cpu")
    plan_found = _last_json(done.stdout) if done.returncode == 0 else done.stderr[-300:]
    return {**row, "plan": plan_found}


def plan(size: str, frames: str) -> dict[str, Any]:
    """Bytes that watching is said to need, compiled for an H100 where JAX's plugin is installed."""
    from vxl_jax.planning.cards import find_card
    from vxl_jax.planning.compiler import compiler_for
    from vxl_jax.planning.inference_bytes import Estimator

    compiler = compiler_for(find_card("h100"))
    estimate = Estimator(config_of(size), None, compiler).estimate(int(frames), 16)
    return {"compiler": compiler.name, **vars(estimate), "peak": estimate.peak}


def long_memory(size: str) -> dict[str, Any]:
    """A memory of more than 2**31 numbers: the last entries are read, by two implementations."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from vxl_jax.models.functions import decode_step
    from vxl_jax.models.video_xl import VideoXL
    from vxl_jax.nn.memory import Memory, empty_memory

    config = config_of(size)
    slots = 320_000 if size == "7b" else 4096
    model = nnx.jit(lambda: VideoXL(config, rngs=nnx.Rngs(0)))()
    film = empty_memory(config, 1, slots)
    last = jnp.asarray(np.random.default_rng(0).standard_normal((64, config.language.head_size)))

    @partial(jax.jit, donate_argnums=0)
    def filled(x: Any, scale: float) -> Any:
        """Entries of the end alone: a wrong offset reads zeros."""
        return x.at[:, :, :, -64:].set((scale * last).astype(x.dtype))

    # All keys have about the same weight: values of the end are as much more as they are fewer.
    keys, values = filled(film.keys, 1.0), filled(film.values, slots / 64)
    film = Memory(keys, values, jnp.array([slots], jnp.int32))
    found = {}
    for name in ("tiled", None):
        model.language.layers.attention.implementation = name
        graph, params = nnx.split(model)
        token = jnp.array([5], jnp.int32)
        logits, _ = decode_step(graph, params, empty_memory(config, 1, 128), token, (film,))
        found[name] = np.asarray(logits, np.float64)
    error = np.linalg.norm(found[None] - found["tiled"]) / np.linalg.norm(found["tiled"])
    return {
        "numbers": int(film.keys.size),
        "is_finite": bool(np.isfinite(found[None]).all()),
        "relative_error_to_tiled": float(error),
    }


def about(size: str) -> dict[str, Any]:
    """The machine; asked in a process that ends, since it takes hold of the card."""
    return machine()


WORKERS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (parity, attention, film, plan, long_memory, about)
}


# The run.


def run_module(
    *call: str, limit: int | None = None, platform: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module with arguments in another process.

    limit: most seconds. platform: of JAX, where it is not the first that it finds.

    Raises: subprocess.TimeoutExpired.
    """
    # JAX would end its messages with a line about removed frames.
    environment = {**os.environ, "JAX_TRACEBACK_FILTERING": "off"}
    if platform:
        environment["JAX_PLATFORMS"] = platform
    command = [sys.executable, "-m", *call]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)


def run_step(step: Step) -> dict[str, Any]:
    """Run a step; its figures, or why there are none."""
    began = time.perf_counter()
    try:
        done = run_module(*step.call, limit=step.limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {step.limit} s"}
    seconds = time.perf_counter() - began
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return {"failed": "\n".join(lines[-12:])[-2000:] or "no message", "step_seconds": seconds}
    return {"figures": _last_json(done.stdout), "step_seconds": seconds}


def _last_json(text: str) -> Any:
    """The last line, as JSON where it is some."""
    line = text.strip().splitlines()[-1] if text.strip() else ""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line


def driver() -> str:
    """Card and driver as NVIDIA's tool names them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no nvidia-smi"


def main() -> None:
    """Run the steps, print what each found, write the results after every step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("cpu", "7b"), default="7b")
    parser.add_argument("--only", help="steps, with commas between")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, *arguments = options.worker
        print(json.dumps(WORKERS[name](options.size, *arguments)))
        return
    steps = steps_of(options.size)
    chosen = options.only.split(",") if options.only else list(steps)
    if unknown := [name for name in chosen if name not in steps]:
        raise SystemExit(f"--only {', '.join(unknown)}: choose from {', '.join(steps)}")
    found: dict[str, Any] = {"driver": driver(), "steps": {}}
    on = _last_json(run_module("benchmarks.gpu", "--worker", "about").stdout)
    began = time.perf_counter()
    for name in chosen:
        late = time.perf_counter() - began > MOST_SECONDS
        row = {"failed": "left out: there was no time"} if late else run_step(steps[name])
        found["steps"][name] = row
        print(f"{name:22} {json.dumps(row)}", flush=True)
        write_results(f"gpu-{options.size}", found, on)
    failed = [name for name, row in found["steps"].items() if "failed" in row]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
