"""Bounds of 7B programs on a GPU, from what XLA compiles for it: no measurement, and no GPU.

    make gpu-bound                                   # in an environment with JAX's CUDA plugin
    python -m benchmarks.gpu_bound --card a100       # in one that has it already

A kernel takes at least its operations at the peak of dense bfloat16 products, and its bytes at the
bandwidth of the memory; a program takes at least the sum over its kernels. Attention kernels are
counted by the pairs of tokens that see each other. Nothing is said of clocks, caches, launches or
how near to the peak a kernel comes. Writes benchmarks/results/gpu-bound-{card}.json.
"""

import argparse
import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.core import write_results
from benchmarks.hlo_costs import Kernel, kernels_of

FILMS = (
    ("video_xl_7b", 2048, 16, None),
    ("video_xl_7b", 2048, 8, None),
    ("video_xl_7b", 2048, 16, "int8"),
    ("llava_video_7b", 64, None, None),
)
"""Preset, frames, ratio, weights."""

RUNS = (("lora_7b", 64), ("beacon_7b", 64), ("full_7b", 64), ("llava_video_lora_7b", 64))
"""Configuration, frames of a sample."""

PRODUCTS = ("cublas", "dot", "few_rows_product")
FORWARD, BACKWARD, CUDNN_BACKWARD = 1.0, 3.5, 2.5
"""Operations of the attention kernels, in those of one pass over all pairs, which makes 2 products
of that size: the two kernels of our backward pass make 3 and 4, cuDNN's 5."""


@dataclass(frozen=True)
class Bound:
    """Least seconds of a compiled program. products: those of matrix products and attention."""

    seconds: float
    products: float
    flops: float
    bytes: float
    kernels: float
    dynamic: int
    temporaries: int
    compile_seconds: float


def bound_of(lowered: Any, compiler: Any, attention: float) -> Bound:
    """Compile a program and bound its time. attention: operations of its attention kernels."""
    began = time.perf_counter()
    compiled = compiler.compile(lowered)
    took = time.perf_counter() - began
    peak = compiler.card.flops, compiler.card.bandwidth
    kernels = kernels_of(compiled.as_text())
    fused = [k for k in kernels if k.is_attention]
    of_attention = max(attention / peak[0], sum(k.times * k.bytes for k in fused) / peak[1])
    products = of_attention if fused else 0.0
    products += sum(k.seconds(*peak) for k in kernels if _is_product(k))
    others = sum(k.seconds(*peak) for k in kernels if not (k.is_attention or _is_product(k)))
    return Bound(
        seconds=products + others,
        products=products,
        flops=sum(k.times * k.flops for k in kernels) + (attention if fused else 0.0),
        bytes=sum(k.times * k.bytes for k in kernels),
        kernels=sum(k.times for k in kernels),
        dynamic=sum(k.dynamic for k in kernels),
        temporaries=int(compiled.memory_analysis().temp_size_in_bytes),
        compile_seconds=took,
    )


def _is_product(kernel: Kernel) -> bool:
    return any(name in kernel.opcode for name in PRODUCTS) or kernel.flops > 0


def tower_attention(config: Any, frames: int) -> int:
    """Operations of the attention of a vision tower in one pass over some frames."""
    tower = config.tower
    tokens = tower.grid**2 + (tower.kind == "clip")
    return int(4 * tower.width * tokens**2 * tower.layers_used * frames)


def film(
    compiler: Any, preset: str, frames: int, ratio: int | None, weights: Any
) -> dict[str, Any]:
    """Watching a film, and a token decoded behind it."""
    from vxl_jax.planning.flops import PassSize, forward_flops
    from vxl_jax.planning.inference_bytes import TEXT_ROOM, Estimator, video_entries
    from vxl_jax.presets import PRESETS
    from vxl_jax.stream.batch import round_up
    from vxl_jax.stream.plan import plan_stream
    from vxl_jax.text.template import IMAGE_TOKEN

    config = PRESETS[preset](dtype="bfloat16", param_dtype="bfloat16")
    estimator = Estimator(config, weights, compiler)
    entries = TEXT_ROOM + video_entries(config, frames, ratio)
    programs = estimator.programs(round_up(entries, 16), ratio)
    visual = [config.layout.video_count(frames)]
    stream = plan_stream([IMAGE_TOKEN], visual, window=config.window, ratio=ratio)
    steps = -(-visual[0] // programs.tokens)
    work = PassSize.of(stream, frames, prefill=True)
    needed = forward_flops(config, work)
    attention = {
        "encode": tower_attention(config, programs.frames),
        "read": needed.attention / steps,
        "decode_step": 4 * config.language.width * entries * config.language.layers,
    }
    bounds = {
        name: bound_of(lowered, compiler, attention[name])
        for name, lowered in programs.lowered.items()
    }
    seconds = steps * (bounds["encode"].seconds + bounds["read"].seconds)
    made = steps * bounds["read"].flops - needed.attention
    return {
        "preset": preset,
        "frames": frames,
        "ratio": ratio,
        "weights": weights or "bfloat16",
        "steps": steps,
        "seconds": seconds,
        "seconds_of_products": steps * (bounds["encode"].products + bounds["read"].products),
        "seconds_of_needed_products": needed.total / compiler.card.flops,
        "language_products_made_to_needed": made / (needed.language + needed.head),
        "seconds_of_a_token": bounds["decode_step"].seconds,
        "programs": {name: vars(bound) for name, bound in bounds.items()},
    }


def training_step(compiler: Any, name: str, frames: int) -> dict[str, Any]:
    """One batch of one sample, and the optimizer's update."""
    from train.run.fit import StepEstimator, planned_model
    from vxl_jax.nn.sharding import make_mesh
    from vxl_jax.planning.flops import PassSize, stream_flops

    config = importlib.import_module(f"configs.{name}").CONFIG
    model, _ = planned_model(config)
    mesh = make_mesh(1, devices=compiler.devices())
    estimator = StepEstimator(config, model, mesh, compiler)
    planned = estimator.batch(frames)
    work = PassSize.of(planned.streams, frames * planned.samples)
    passes = FORWARD * (1 + (config.model.remat != "none")) + BACKWARD
    of_tower = passes - BACKWARD + CUDNN_BACKWARD if "vision" in config.optim.train else FORWARD
    attention = passes * stream_flops(model, work).attention
    attention += of_tower * tower_attention(model, work.frames)
    bounds = {
        "gradient": bound_of(estimator.lowered_batch(planned), compiler, attention),
        "update": bound_of(estimator.lowered_update(), compiler, 0.0),
    }
    seconds = sum(bound.seconds for bound in bounds.values())
    return {
        "config": name,
        "frames": frames,
        "tokens": planned.tokens,
        "samples": planned.samples,
        "seconds": seconds,
        "share_not_of_products": 1 - sum(bound.products for bound in bounds.values()) / seconds,
        "programs": {name: vars(bound) for name, bound in bounds.items()},
    }


def _film_rows(films: Sequence[dict[str, Any]]) -> str:
    head = (
        "| model, frames, ratio, weights | watch | of products | needed products alone "
        "| products made / needed | a token | temporaries: read, token |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    rows = [
        f"| {f['preset']}, {f['frames']}, {f['ratio'] or '-'}, {f['weights']} "
        f"| {f['seconds']:.2f} s | {f['seconds_of_products']:.2f} s "
        f"| {f['seconds_of_needed_products']:.2f} s "
        f"| {f['language_products_made_to_needed']:.2f} | {1e3 * f['seconds_of_a_token']:.2f} ms "
        f"| {f['programs']['read']['temporaries'] / 1e9:.2f} GB, "
        f"{f['programs']['decode_step']['temporaries'] / 1e6:.0f} MB |"
        for f in films
    ]
    return "\n".join([head, *rows])


def _step_rows(steps: Sequence[dict[str, Any]]) -> str:
    head = (
        "| configuration, frames | tokens | a step | not of products | activations "
        "| temporaries of the update |\n| --- | --- | --- | --- | --- | --- |"
    )
    rows = [
        f"| {s['config']}, {s['frames']} | {s['samples']} x {s['tokens']:,} | {s['seconds']:.2f} s "
        f"| {s['share_not_of_products']:.0%} "
        f"| {s['programs']['gradient']['temporaries'] / 1e9:.2f} GB "
        f"| {s['programs']['update']['temporaries'] / 1e9:.2f} GB |"
        for s in steps
    ]
    return "\n".join([head, *rows])


def main() -> None:
    """Compile all programs, print tables, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--card", default="h100")
    parser.add_argument(
        "--films", action="store_true", help="leave training out, and write nothing"
    )
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"

    from vxl_jax.planning.cards import find_card
    from vxl_jax.planning.compiler import compiler_for

    card = find_card(options.card)
    compiler = compiler_for(card)
    if not compiler.is_exact:
        raise SystemExit("JAX's CUDA plugin is not installed: pip install vxl-jax[gpu-compile]")
    films = [film(compiler, *each) for each in FILMS]
    print(_film_rows(films), flush=True)
    steps = [] if options.films else [training_step(compiler, *each) for each in RUNS]
    if steps:
        print(f"\n{_step_rows(steps)}")
        figures = {"compiler": compiler.name, "films": films, "steps": steps}
        write_results(f"gpu-bound-{card.name}", figures)


if __name__ == "__main__":
    main()
