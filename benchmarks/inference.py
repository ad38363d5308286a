"""Watching and answering compared with PyTorch; long films, batches, int8, and bytes.

    python -m benchmarks.inference                    # a model for two CPU cores; extra `bench`
    python -m benchmarks.inference --size 7b          # the real shapes, on a GPU
    python -m benchmarks.inference --plan             # bytes at 7B, compiled, on any machine

Weights are random. Every measurement runs in a separate process. Phases: those of
`benchmarks.core`, with transformers' CLIP and Qwen2. Films: an H.264 file, decoded, encoded and
put into a memory at ratio 16. Answers: tokens a second of questions about one memory, answered
together. int8: logits and next tokens against those of the stored weights. Attention: our tiles and
`jax.nn.dot_product_attention` against float32, on one window that sees no memory. On a GPU, JAX has
at most 80 GB, and figures are given with peaks of the same run: the fastest product of
matrices, and the bytes a second of reading a large array. Writes
benchmarks/results/inference-{cpu,7b,plan}.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core import (
    PHASES,
    compare_phases,
    config_of,
    device_peak_bytes,
    peak_bytes,
    write_results,
)
from benchmarks.train import limited

RATIO = 16
FILMS = {"cpu": (64, 128, 256), "7b": (512, 2048, 8192)}
BATCHES = {"cpu": (1, 2, 4, 8), "7b": (1, 4, 16, 64)}
NEW_TOKENS = 64
PLAN = (
    *((frames, 16) for frames in (512, 2048, 8192, 32768, 100_000, 131_072)),
    *((2048, ratio) for ratio in (2, 4, 8)),
)


# One measurement in this process.


def make_model(size: str, weights: str | None = None) -> Any:
    """A model with random weights. Its tokenizer is not asked for anything."""
    import jax
    from flax import nnx

    from vxl_jax import Model
    from vxl_jax.models.int8 import new_network

    model = Model(nnx.jit(lambda: new_network(config_of(size), weights))(), tokenizer=None)
    model.__dict__["stop_ids"] = []
    jax.block_until_ready(model.params)
    return model


def begin(model: Any, text: int = 14) -> Any:
    """A memory of text; fourteen tokens come before a film."""
    from vxl_jax import VisualMemory

    ids = np.arange(text, dtype=np.int32) % model.config.language.vocab_size
    memory = VisualMemory(ids)
    memory.attach(model)
    return memory


def film(size: str, path: str, frames: int) -> dict[str, Any]:
    """Watch a number of frames of a file, twice: the first time compiles."""
    model = make_model(size)
    before = device_peak_bytes("jax") or peak_bytes()
    began = time.perf_counter()
    begin(model).extend(path, frames=frames, ratio=RATIO)
    first = time.perf_counter() - began
    began = time.perf_counter()
    memory = begin(model)
    memory.extend(path, frames=frames, ratio=RATIO)
    seconds = time.perf_counter() - began
    assert memory.watched[0].frames == frames, memory
    began = time.perf_counter()
    from vxl_jax.media import load_video_frames, probe_video, uniform_indices

    info = probe_video(path)
    indices = uniform_indices(info.frames, frames)
    load_video_frames(path, indices, model.config.tower.image_size, num_threads=16)
    return {
        "frames": frames,
        "entries": memory.length,
        "first_seconds": first,
        "seconds": seconds,
        "seconds_of_decoding_alone": time.perf_counter() - began,
        "frames_per_second": frames / seconds,
        "peak_bytes_of_making_the_model": before,
        "peak_bytes": device_peak_bytes("jax") or peak_bytes(),
        "peak_host_bytes": peak_bytes(),
    }


def prefill(size: str, weights: str | None) -> dict[str, Any]:
    """Seconds of putting visual features into a memory that is filled already: of 2048 frames on a
    GPU, of 64 on a CPU.
    """
    import jax
    import jax.numpy as jnp

    from vxl_jax.inference.watching import Block, Watcher, no_features
    from vxl_jax.planning.flops import PassSize, forward_flops
    from vxl_jax.stream.plan import plan_stream
    from vxl_jax.text.template import IMAGE_TOKEN

    model = make_model(size, None if weights == "none" else weights)
    memory = begin(model)
    config = model.config
    frames = 2048 if size == "7b" else 64
    entries, start = memory.entries, memory.snapshot().length
    entries.reserve(start + config.layout.count(frames) // RATIO + 2000)
    at_once = config.layout.frames_of(model.windows_at_once * config.window)
    tokens = config.layout.count(at_once)
    features = jnp.ones((tokens, config.language.width), config.dtype)
    watcher = Watcher([(entries, start)], Block(start, no_features(config), config.layout))

    def step() -> None:
        watcher.take(features, np.zeros(at_once), RATIO)

    step(), step()
    jax.block_until_ready(watcher.block.features)
    steps = frames // at_once
    began = time.perf_counter()
    for _ in range(steps):
        step()
    watcher.finish()
    seconds = time.perf_counter() - began
    stream = plan_stream([IMAGE_TOKEN], [steps * tokens], window=config.window, ratio=RATIO)
    work = PassSize.of(stream, prefill=True)
    return {
        "visual_tokens": steps * tokens,
        "seconds": seconds,
        "tokens_per_second": steps * tokens / seconds,
        "flops_per_second": forward_flops(config, work).total / seconds,
    }


def answers(size: str, batch: int, weights: str | None) -> dict[str, Any]:
    """Answer questions of 32 tokens together, about a memory of 2048 (CPU) or 18,446 entries."""
    model = make_model(size, None if weights == "none" else weights)
    memory = begin(model, 2048 if size == "cpu" else 18_446)
    vocabulary = model.config.language.vocab_size
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, vocabulary, 32) for _ in range(batch)]

    def ask(new: int) -> float:
        began = time.perf_counter()
        model.ask_ids(memory, prompts, max_new_tokens=new)
        return time.perf_counter() - began

    ask(1), ask(NEW_TOKENS)
    # The reading of the questions is in both.
    seconds = min(ask(NEW_TOKENS) for _ in range(3)) - min(ask(1) for _ in range(3))
    from vxl_jax.planning.inference_bytes import tree_bytes

    return {
        "questions": batch,
        "tokens_per_second": batch * (NEW_TOKENS - 1) / seconds,
        "seconds_per_step": seconds / (NEW_TOKENS - 1),
        "weight_bytes_read": tree_bytes(model.params["language"])
        - tree_bytes(model.params["language"]["embed"]),
        "memory_bytes_read": memory.length * memory_bytes(model),
    }


def memory_bytes(model: Any) -> int:
    """Bytes of one entry."""
    from vxl_jax.planning.inference_bytes import entry_bytes

    return entry_bytes(model.config)


def int8_error(size: str) -> dict[str, Any]:
    """Logits and next tokens of int8 weights against those stored, over text and one film."""
    import jax
    from flax import nnx

    from vxl_jax.models.int8 import quantize
    from vxl_jax.planning.inference_bytes import tree_bytes
    from vxl_jax.stream.batch import batch_streams
    from vxl_jax.stream.plan import plan_stream
    from vxl_jax.text.template import IMAGE_TOKEN

    model = make_model(size).network
    config = model.config
    draw = np.random.default_rng(0)
    text = draw.integers(0, config.language.vocab_size, 512)
    ids = np.concatenate([text[:14], [IMAGE_TOKEN], text[14:]])
    side = config.tower.image_size
    pixels = draw.integers(0, 256, (1, 20, side, side, 3), np.uint8)
    stream = plan_stream(ids, [config.layout.count(20)], window=config.window, ratio=RATIO)
    streams = batch_streams([stream])
    index = np.flatnonzero(stream.kind == 0)

    @nnx.jit
    def logits(model: Any) -> Any:
        hidden = model(streams, model.encode(pixels))
        return model.logits(hidden[:, index])[0]

    stored, before = np.asarray(logits(model), np.float64), tree_bytes(nnx.state(model))
    quantize(model)
    after = tree_bytes(nnx.state(model))
    ours = np.asarray(logits(model), np.float64)
    spread = stored - stored.mean(-1, keepdims=True)
    likely, shared = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (stored, ours))
    divergence = (np.exp(likely) * (likely - shared)).sum(-1)
    jax.clear_caches()
    return {
        "bytes_stored": before,
        "bytes_int8": after,
        "relative_error_of_logits": float(np.linalg.norm(ours - stored) / np.linalg.norm(spread)),
        "same_next_token": float((ours.argmax(-1) == stored.argmax(-1)).mean()),
        "mean_divergence_nats": float(divergence.mean()),
    }


def attention_error(size: str) -> list[dict[str, Any]]:
    """Seconds and errors of attention over one window, by implementation."""
    import jax
    import jax.numpy as jnp

    from vxl_jax.nn.attention import window_attention

    language = config_of(size).language
    dtype, tokens = config_of(size).dtype, 1530
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (language.heads, language.kv_heads, language.kv_heads)
    q, k, v = (
        jax.random.normal(key, (1, tokens, n, language.head_size), jnp.float32)
        for key, n in zip(keys, heads, strict=True)
    )
    zero = jnp.zeros((1, tokens), jnp.int32)

    def tiles(q: Any, k: Any, v: Any) -> Any:
        return window_attention(q, k, v, zero, implementation="tiled")

    def library(name: str) -> Callable[..., Any]:
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=name
        )

    ways: dict[str, Any] = {"tiles": tiles, "xla": library("xla")}
    if jax.default_backend() == "gpu":
        ways["cudnn"] = library("cudnn")
    with jax.default_matmul_precision("highest"):
        exact = np.asarray(jax.jit(library("xla"))(q, k, v), np.float64)
    rows = []
    for name, way in ways.items():
        scaled = q * language.head_size**-0.5 if name == "tiles" else q
        arrays = [x.astype(dtype) for x in (scaled, k, v)]
        call = jax.jit(way)
        out = np.asarray(call(*arrays), np.float64)
        seconds = []
        for _ in range(10):
            began = time.perf_counter()
            jax.block_until_ready(call(*arrays))
            seconds.append(time.perf_counter() - began)
        error = float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
        rows.append({"attention": name, "seconds": min(seconds), "relative_error": error})
    return rows


def bytes_per_second() -> float:
    """Reading a large array on this device."""
    import jax
    import jax.numpy as jnp

    big = jnp.ones(2**31 if jax.default_backend() == "gpu" else 2**26, jnp.bfloat16)
    total = jax.jit(lambda x: jnp.sum(x.astype(jnp.float32)))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        total(big).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return big.nbytes / min(seconds)


# The run.


def measure(name: str, *arguments: Any) -> Any:
    """Run one measurement in a separate process."""
    command = [sys.executable, "-m", "benchmarks.inference", "--worker", name]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} {arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


WORKERS: dict[str, Callable[..., Any]] = {
    "film": lambda size, path, frames: film(size, path, int(frames)),
    "prefill": prefill,
    "answers": lambda size, batch, weights: answers(size, int(batch), weights),
    "int8": int8_error,
    "attention": attention_error,
    "bandwidth": bytes_per_second,
}


@contextmanager
def a_film() -> Iterator[str]:
    """A file of ten minutes at 15 frames a second, 640 x 360."""
    from benchmarks.data_files import QUICK, make_videos

    with tempfile.TemporaryDirectory() as folder:
        yield str(make_videos(Path(folder), replace(QUICK, videos=1, seconds=(600,)))[0])


def plan() -> None:
    """Bytes at 7B by frames and ratio, compiled for an H100."""
    from vxl_jax.planning.cards import find_card
    from vxl_jax.planning.compiler import compiler_for
    from vxl_jax.planning.inference_bytes import USABLE, Estimator, estimate_table

    rows, compiler = [], compiler_for(find_card("h100"))
    print(f"compiled by {compiler.name}")
    for weights in ("bfloat16", "int8"):
        given = None if weights == "bfloat16" else weights
        estimator = Estimator(config_of("7b"), given, compiler)
        estimates = [estimator.estimate(frames, ratio) for frames, ratio in PLAN]
        print(f"{weights}: {estimator.weights / 1e9:.2f} GB of weights")
        print(estimate_table(estimates), flush=True)
        most = {
            card: estimator.most_frames(estimates[0], int(find_card(card).memory * USABLE))
            for card in ("4090", "h100")
        }
        print(f"most frames at ratio 16: {most}\n", flush=True)
        rows.append(
            {
                "weights": weights,
                "most_frames_at_16": most,
                "films": [{**vars(e), "peak": e.peak} for e in estimates],
            }
        )
    figures = {"compiler": compiler.name, "usable_share_of_a_card": USABLE, "plans": rows}
    write_results("inference-plan", figures)


def run(size: str, torch: bool) -> None:
    """All sections, printed and written."""
    figures: dict[str, Any] = {}
    if size == "7b":
        fraction, figures["peaks"] = limited()
        os.environ["XLA_CLIENT_MEM_FRACTION"] = f"{fraction:.4f}"
        figures["peaks"]["bytes_per_second"] = measure("bandwidth")
        print(figures["peaks"])
    if torch:
        figures["phases"] = compare_phases(
            [phase for phase in PHASES if phase != "gradient"], size, 3, ("jax", "torch")
        )
    print(f"\n{'frames':>7}{'seconds':>9}{'frames/s':>10}{'decoding alone':>16}{'peak MB':>9}")
    figures["films"] = []
    with a_film() as path:
        for frames in FILMS[size]:
            row = measure("film", size, path, frames)
            figures["films"].append(row)
            print(
                f"{frames:7}{row['seconds']:9.2f}{row['frames_per_second']:10.1f}"
                f"{row['seconds_of_decoding_alone']:16.2f}{row['peak_bytes'] / 1e6:9.0f}",
                flush=True,
            )
    first, last = figures["films"][0], figures["films"][-1]
    longer = first["frames_per_second"] / last["frames_per_second"]
    figures["time_per_frame_longest_to_shortest"] = longer
    print(f"time a frame, {last['frames']} frames to {first['frames']}: {longer:.2f} x")
    print(f"\n{'weights':>9}{'prefill tokens/s':>18}{'questions':>11}{'tokens/s':>10}")
    figures["prefill"], figures["answers"] = [], []
    for weights in ("none", "int8"):
        row = {"weights": weights, **measure("prefill", size, weights)}
        figures["prefill"].append(row)
        print(f"{weights:>9}{row['tokens_per_second']:18.0f}", flush=True)
        for batch in BATCHES[size]:
            row = {"weights": weights, **measure("answers", size, batch, weights)}
            figures["answers"].append(row)
            print(f"{weights:>9}{'':18}{batch:11}{row['tokens_per_second']:10.1f}", flush=True)
    figures["int8"] = measure("int8", size)
    print(f"\nint8: {figures['int8']}")
    figures["attention"] = measure("attention", size)
    for row in figures["attention"]:
        print(row)
    if size == "7b":
        figures |= shares(figures)
    write_results(f"inference-{size}", figures)


def shares(figures: dict[str, Any]) -> dict[str, float]:
    """What was reached of what the device can do."""
    peak, stored = figures["peaks"], figures["answers"][0]
    read = stored["weight_bytes_read"] / peak["bytes_per_second"]
    found = {
        "prefill_share_of_peak": figures["prefill"][0]["flops_per_second"] / peak["peak_flops"],
        "decoding_share_of_reading_weights": read / stored["seconds_per_step"],
    }
    print(found)
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("cpu", "7b"), default="cpu")
    parser.add_argument("--plan", action="store_true", help="bytes at 7B alone")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch's side out")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, *arguments = options.worker
        print(json.dumps(WORKERS[name](*arguments)))
    elif options.plan:
        os.environ["JAX_PLATFORMS"] = "cpu"
        plan()
    else:
        run(options.size, torch=not options.no_torch and options.size == "cpu")


if __name__ == "__main__":
    main()
