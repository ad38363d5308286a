"""The 7B programs as they are compiled for an H100: bytes, copies, padding, bounds."""

from functools import cache
from typing import Any

import pytest

from benchmarks.gpu_bound import film
from benchmarks.hlo_costs import Kernel, kernels_of
from train.config.cli import load_config
from train.run.fit import StepEstimator, planned_model
from vxl_jax.nn.sharding import make_mesh
from vxl_jax.planning.cards import find_card
from vxl_jax.planning.compiler import PlanCompiler
from vxl_jax.planning.inference_bytes import TEXT_ROOM, Estimator, Programs, video_entries
from vxl_jax.presets import PRESETS
from vxl_jax.stream.batch import round_up

H100 = PlanCompiler(find_card("h100"))
FRAMES = {"video_xl_7b": (2048, 100_000), "llava_video_7b": (64, 2048)}
"""A film and a longer one, for each preset."""
RATIO = {"video_xl_7b": 16, "llava_video_7b": None}


@cache
def programs(preset: str, frames: int, weights: str | None = None) -> Programs:
    config = PRESETS[preset](dtype="bfloat16", param_dtype="bfloat16")
    entries = TEXT_ROOM + video_entries(config, frames, RATIO[preset])
    return Estimator(config, weights, H100).programs(round_up(entries, 16), RATIO[preset])


@cache
def compiled(preset: str, frames: int, name: str, weights: str | None = None) -> Any:
    return H100.compile(programs(preset, frames, weights).lowered[name])


def temporaries(program: Any) -> int:
    return int(program.memory_analysis().temp_size_in_bytes)


@cache
def kernels(preset: str, name: str, weights: str | None = None) -> list[Kernel]:
    return kernels_of(compiled(preset, FRAMES[preset][0], name, weights).as_text())


@pytest.mark.parametrize("preset", FRAMES)
@pytest.mark.parametrize("name", ["read", "decode_step"])
def test_temporaries_do_not_grow_with_the_memory(preset: str, name: str):
    short, long = (temporaries(compiled(preset, frames, name)) for frames in FRAMES[preset])
    assert long < 1.05 * short + 2**20
    assert long < {"read": 1.3e9, "decode_step": 0.05e9}[name]


@pytest.mark.parametrize("preset", FRAMES)
@pytest.mark.parametrize("name", ["read", "decode_step"])
def test_the_memory_is_read_where_it_lies(preset: str, name: str):
    """No kernel but attention gets more than a layer of it; only updates in place write to it."""
    frames = FRAMES[preset][0]
    capacity = round_up(TEXT_ROOM + video_entries(PRESETS[preset](), frames, RATIO[preset]), 16)
    text = compiled(preset, frames, name).as_text()
    whole = f"bf16[28,1,4,{capacity},128]"
    made = [line for line in text.splitlines() if f"= {whole}" in line]
    assert made  # as a parameter and in the carry of loops
    assert {line.split(f"= {whole}")[1].split(" ")[1].split("(")[0] for line in made} <= {
        *("parameter", "get-tuple-element", "bitcast"),
    }
    assert f"bf16[1,4,{capacity},128]" not in text  # nor is a layer of it copied


@pytest.mark.parametrize("preset", FRAMES)
def test_attention_is_fused(preset: str):
    assert any(k.is_attention and "window" in k.source for k in kernels(preset, "read"))
    assert any("window_attention_few" in k.source for k in kernels(preset, "decode_step"))
    assert any("fmha" in k.opcode for k in kernels(preset, "encode"))
    for name in ("encode", "read", "decode_step"):
        assert not any(k.dynamic for k in kernels(preset, name)), name


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_token_reads_every_weight_once(weights: str | None):
    config = PRESETS["video_xl_7b"](dtype="bfloat16", param_dtype="bfloat16")
    stored = Estimator(config, weights, H100).weights
    # The tower, the projector, beacon projections and the table of embeddings are not read.
    read = sum(k.times * k.bytes for k in kernels("video_xl_7b", "decode_step", weights))
    assert 0.75 * stored < read < 1.08 * stored


BOUNDS = {
    ("video_xl_7b", 2048, 16, None): (8.0, 5.5e-3),
    ("video_xl_7b", 2048, 8, None): (10.0, 5.5e-3),
    ("video_xl_7b", 2048, 16, "int8"): (9.0, 3.3e-3),
}
"""Seconds of watching and of a token."""


@pytest.mark.parametrize("case", BOUNDS)
def test_bounds_of_a_film(case: Any):
    found = film(H100, *case)
    watch, token = BOUNDS[case]
    assert found["seconds_of_needed_products"] < found["seconds"] < watch
    assert found["seconds_of_a_token"] < token
    # Products that are made twice are the q, k and v of the other kind of token: 7 %.
    assert 1 < found["language_products_made_to_needed"] < 1.07 + 0.05


@pytest.mark.parametrize("name", ["lora_7b", "full_7b"])
def test_the_update_is_in_place(name: str):
    config = load_config(["--config", name]).config
    mesh = make_mesh(1, devices=H100.devices())
    planner = StepEstimator(config, planned_model(config)[0], mesh, H100)
    assert planner.update_bytes < 0.3e9


def test_a_gradient_on_eight_cards():
    """Every device has the attention of its samples; nothing is gathered for it."""
    options = ["--config", "lora_7b", "--mesh.fsdp", "8", "--data.batch-size", "8"]
    config = load_config(options).config
    mesh = make_mesh(1, 8, 1, devices=H100.devices(8))
    planner = StepEstimator(config, planned_model(config)[0], mesh, H100)
    program = H100.compile(planner.lowered_batch(planner.batch(64)))
    found = kernels_of(program.as_text())
    fused = [k for k in found if k.is_attention and "window" in k.source]
    assert {k.opcode for k in fused} >= {
        "window_attention",
        "window_attention_of_queries",
        "window_attention_of_keys",
    }
    assert any(k.is_collective for k in found)
    largest = max(k.bytes for k in found if k.is_collective)
    assert largest < 1.5e9  # a kernel of one layer or the head, never the activations of 8 samples
