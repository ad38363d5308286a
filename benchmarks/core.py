"""Seconds and peak memory of each phase, compared with PyTorch at the same shapes, in one run.

    python -m benchmarks.core                 # a model for two CPU cores, needs the extra `bench`
    python -m benchmarks.core --size 7b --no-torch        # the real shapes, on a GPU

Every (phase, framework) runs in a separate process, which has its peak memory; the two
frameworks take turns, and the least seconds of all rounds count. PyTorch's side is transformers'
CLIP and SigLIP towers and Qwen2 (which knows no compression: prefill, decoding and the gradient of
the loss are compared on text alone, both without rematerialisation). Growth is how one prefill from
visual features, and the temporaries of the compiled gradient with rematerialisation, grow with the
frames of a video; the tower's share is its time for one frame, times their number. Writes
benchmarks/results/core-{size}.json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
PHASES = ("vision", "siglip", "prefill", "decode", "gradient")
TOWERS = ("vision", "siglip")
TEXT, NEW_TOKENS, VISION_FRAMES = 2048, 64, 8
RATIO, TRAIN_RATIO = 16, 8


def config_of(size: str, tower: str = "vision") -> Any:
    """Model sizes: `cpu` has the geometry of the published models at a width that two cores can
    run. Towers: `vision` is Video-XL's, `siglip` LLaVA-Video's.
    """
    from vxl_jax.config import LanguageConfig, VisionConfig
    from vxl_jax.presets import llava_video_7b, video_xl_7b

    if size == "7b":
        make = llava_video_7b if tower == "siglip" else video_xl_7b
        return make(param_dtype="bfloat16", dtype="bfloat16")
    language = LanguageConfig(
        vocab_size=8192, width=512, layers=8, heads=8, kv_heads=2, mlp_width=1408
    )
    sizes = {"width": 512, "layers": 7, "heads": 8, "mlp_width": 2048}
    if tower == "siglip":
        return llava_video_7b(vision=replace(llava_video_7b().tower, **sizes), language=language)
    return video_xl_7b(vision=VisionConfig(**sizes), language=language)


# One phase in this process.


def run_phase(framework: str, phase: str, size: str, frames: int) -> dict[str, Any]:
    """Seconds (first call, and least of the next three) and peak memory of one phase."""
    make = jax_phase if framework == "jax" else torch_phase
    call = make(phase, size, frames)
    before = peak_bytes()
    began = time.perf_counter()
    call()
    first = time.perf_counter() - began
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return {
        "first_seconds": first,
        "seconds": min(seconds),
        "peak_bytes": device_peak_bytes(framework) or peak_bytes(),
        "bytes_before": before,
    }


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_peak_bytes(framework: str) -> int | None:
    """Peak of the accelerator's memory, None on a CPU."""
    if framework != "jax":
        return None
    import jax

    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def jax_phase(phase: str, size: str, frames: int) -> Callable[[], Any]:
    """A function that runs the phase once and waits for it."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from vxl_jax import VideoXL, batch_streams, decode_step, loss_and_metrics, plan_stream, prefill
    from vxl_jax.models.video_xl import scan_groups
    from vxl_jax.nn.memory import empty_memory
    from vxl_jax.text.template import IMAGE_TOKEN

    # PyTorch's side keeps all activations too.
    config = replace(config_of(size, phase), remat="none")
    model = nnx.jit(lambda: VideoXL(config, rngs=nnx.Rngs(0)))()
    graph, params = nnx.split(model)
    ids = np.arange(TEXT) % config.language.vocab_size
    text = plan_stream(ids, [], window=config.window, ratio=RATIO, labels=ids)
    if phase in TOWERS:
        side = config.tower.image_size
        pixels = np.zeros((1, VISION_FRAMES, side, side, 3), np.uint8)
        encode = jax.jit(lambda params, pixels: nnx.merge(graph, params).vision(pixels[0]))
        return lambda: jax.block_until_ready(encode(params, pixels))
    if phase == "prefill":
        streams = batch_streams([text], windows_per_group=1)
        return lambda: jax.block_until_ready(prefill(graph, params, streams, None, TEXT + 128))
    if phase == "decode":
        streams = batch_streams([text], windows_per_group=1)
        state = [prefill(graph, params, streams, None, TEXT + 8 * NEW_TOKENS)[1]]

        def decode() -> None:
            memory = state.pop()
            for token in range(NEW_TOKENS):
                logits, memory = decode_step(graph, params, memory, jnp.array([token], jnp.int32))
                np.asarray(logits.argmax(-1))
            state.append(memory)

        return decode
    if phase == "gradient":
        streams = batch_streams([text])
        gradient = jax.jit(
            jax.grad(lambda p: loss_and_metrics(nnx.merge(graph, p), streams, None)[0])
        )
        return lambda: jax.block_until_ready(gradient(params))

    tokens = config.layout.count(frames)  # phase "video": from visual features
    stream = plan_stream([1, IMAGE_TOKEN, 2], [tokens], window=config.window, ratio=RATIO)
    streams = batch_streams([stream], windows_per_group=1)
    visual = jnp.ones((1, tokens, config.language.width), config.dtype)

    @jax.jit
    def watch(params: Any, streams: Any, visual: Any) -> Any:
        model = nnx.merge(graph, params)
        memory = empty_memory(config, 1, streams.memory)
        return scan_groups(model, streams, visual, memory, keep_hidden=False)

    return lambda: jax.block_until_ready(watch(params, streams, visual))


def train_step_bytes(size: str, frames: int) -> int:
    """Temporary bytes of the compiled gradient of one video (nothing is run or allocated)."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from vxl_jax import VideoXL, batch_streams, plan_stream
    from vxl_jax.text.template import IMAGE_TOKEN

    config = config_of(size)
    graph, params = nnx.split(nnx.eval_shape(lambda: VideoXL(config, rngs=nnx.Rngs(0))))
    tokens = config.layout.count(frames)
    stream = plan_stream([1, IMAGE_TOKEN, 2], [tokens], window=config.window, ratio=TRAIN_RATIO)
    streams = batch_streams([stream])
    visual = jax.ShapeDtypeStruct((1, tokens, config.language.width), config.dtype)

    def loss(params: Any, streams: Any, visual: Any) -> Any:
        model = nnx.merge(graph, params)
        return model.logits(model(streams, visual)[:, -1]).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss)).lower(params, streams, visual).compile()
    analysis = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes)


def torch_phase(phase: str, size: str, frames: int) -> Callable[[], Any]:
    """The same phase with transformers' CLIP tower or Qwen2."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        Qwen2Config,
        Qwen2ForCausalLM,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    config = config_of(size, phase)
    if phase in TOWERS:
        v = config.tower
        siglip = (SiglipVisionModel, SiglipVisionConfig)
        make, make_config = siglip if phase == "siglip" else (CLIPVisionModel, CLIPVisionConfig)
        tower = make(
            make_config(
                hidden_size=v.width,
                intermediate_size=v.mlp_width,
                num_hidden_layers=v.layers_used,  # it would run the layers above too
                num_attention_heads=v.heads,
                image_size=v.image_size,
                patch_size=v.patch_size,
                vision_use_head=False,  # SigLIP's pooling, which no model here has
            )
        ).eval()
        pixels = torch.zeros(VISION_FRAMES, 3, v.image_size, v.image_size)

        @torch.no_grad()
        def encode() -> None:
            tower(pixels)

        return encode
    c = config.language
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=c.vocab_size,
            hidden_size=c.width,
            intermediate_size=c.mlp_width,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
        )
    ).eval()
    ids = torch.arange(TEXT)[None] % c.vocab_size
    if phase == "gradient":

        def step() -> None:
            model.zero_grad()
            model(ids, labels=ids).loss.backward()

        return step

    @torch.no_grad()
    def read() -> Any:
        return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    if phase == "prefill":
        return read
    cache = read()

    @torch.no_grad()
    def decode() -> None:
        for token in range(NEW_TOKENS):
            logits = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
            logits.argmax(-1).item()

    return decode


# The run: processes that take turns.


def measure(framework: str, phase: str, size: str, frames: int = 0) -> dict[str, Any]:
    """Run one phase in a separate process."""
    command = [sys.executable, "-m", "benchmarks.core", "--size", size]
    command += ["--worker", framework, phase, str(frames)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{framework} {phase} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def best_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Least seconds, largest memory."""
    return {
        "seconds": min(r["seconds"] for r in rounds),
        "first_seconds": min(r["first_seconds"] for r in rounds),
        "peak_bytes": max(r["peak_bytes"] for r in rounds),
    }


def compare_phases(
    phases: Sequence[str], size: str, rounds: int, frameworks: Sequence[str]
) -> dict[str, Any]:
    """Best of some rounds of each phase, the frameworks taking turns, with a line for each."""
    found: dict[str, Any] = {}
    print(f"{'phase':10}{'jax s':>9}{'torch s':>9}{'torch/jax':>11}{'jax MB':>9}{'torch MB':>10}")
    for phase in phases:
        turns: dict[str, list[Any]] = {framework: [] for framework in frameworks}
        for _ in range(rounds):
            for framework in frameworks:
                turns[framework].append(measure(framework, phase, size))
        best = {framework: best_of(turns[framework]) for framework in frameworks}
        ours = best["jax"]
        row = f"{phase:10}{ours['seconds']:9.3f}"
        if "torch" in best:
            theirs = best["torch"]
            best["speed_ratio"] = theirs["seconds"] / ours["seconds"]
            row += f"{theirs['seconds']:9.3f}{best['speed_ratio']:11.2f}"
            row += f"{ours['peak_bytes'] / 1e6:9.0f}{theirs['peak_bytes'] / 1e6:10.0f}"
        found[phase] = best
        print(row, flush=True)
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for name in ("jax", "flax", "torch", "transformers", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def write_results(name: str, figures: dict[str, Any], about: dict[str, Any] | None = None) -> None:
    """Write benchmarks/results/NAME.json: the command, the machine and the figures.

    about: the machine; what `machine` says if None.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip()
    result = {"command": command, "machine": about or machine(), **figures}
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwrote {path}")


def main() -> None:
    """Run all phases, print a table, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("cpu", "7b"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch's side out")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        framework, phase, frames = options.worker
        if phase == "train_bytes":
            print(json.dumps({"temporary_bytes": train_step_bytes(options.size, int(frames))}))
        else:
            print(json.dumps(run_phase(framework, phase, options.size, int(frames))))
        return

    frameworks = ("jax",) if options.no_torch else ("jax", "torch")
    phases = compare_phases(PHASES, options.size, options.rounds, frameworks)

    growth = []
    print(f"\n{'frames':>7}{'prefill s':>11}{'peak MB':>9}{'training temporaries MB':>25}")
    for frames in options.frames:
        row_data = measure("jax", "video", options.size, frames)
        training = measure("jax", "train_bytes", options.size, frames)
        growth.append({"frames": frames, **row_data, **training})
        print(
            f"{frames:7}{row_data['seconds']:11.2f}{row_data['peak_bytes'] / 1e6:9.0f}"
            f"{training['temporary_bytes'] / 1e6:25.0f}",
            flush=True,
        )
    figures = {
        "text_tokens": TEXT,
        "new_tokens": NEW_TOKENS,
        "vision_frames": VISION_FRAMES,
        "ratio": RATIO,
        "train_ratio": TRAIN_RATIO,
        "phases": phases,
        "growth": growth,
    }
    write_results(f"core-{options.size}", figures)


if __name__ == "__main__":
    main()
