"""The project's kernels compile for GPUs of two makes, without spilled registers."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from vxl_jax.nn.attention import window_attention
from vxl_jax.nn.attention.key_values import KeyValues
from vxl_jax.nn.few_rows import LayerKernel, few_rows_product
from vxl_jax.planning.cards import CARDS, find_card
from vxl_jax.planning.compiler import PlanCompiler, compiler_for

MAKES = ("h100", "a100", "4090")
LAYERS, KV_HEADS, HEADS, HEAD_SIZE = 28, 4, 28, 128
"""Of Qwen2-7B."""


def ptxas() -> str:
    wheel = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cuda_nvcc/bin/ptxas")
    found = next(map(str, wheel), None) or shutil.which("ptxas")
    assert found, "ptxas: pip install nvidia-cuda-nvcc-cu12"
    return found


def registers(
    card: str, tmp_path: Path, function: Callable[..., Any], *shapes: Any
) -> dict[str, int]:
    """Compile a function for a card; registers of each Pallas kernel, of which none is spilled."""
    compiler = PlanCompiler(find_card(card))
    sharding = jax.sharding.SingleDeviceSharding(compiler.devices()[0])
    placed = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    with compiler.tracing():
        lowered = jax.jit(function).lower(*placed)
    lowered.compile({"xla_dump_to": str(tmp_path), "xla_gpu_enable_triton_gemm": False})
    found: dict[str, int] = {}
    for path in tmp_path.glob("*.ptx"):
        target = re.search(r"\.target (\w+)", path.read_text())
        if target is None:  # a module without kernels, of constants
            continue
        command = [ptxas(), "-v", f"-arch={target[1]}", str(path), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        kernel = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        for name, spilled, used in re.findall(kernel, said, re.DOTALL):
            if name.startswith(("window_attention", "few_rows")):
                assert int(spilled) == 0, f"{card}: {name} spills {spilled} bytes"
                found[name] = int(used)
    return found


def attend(
    q: Any, k: Any, v: Any, start: Any, keys: Any, values: Any, layer: Any, seen: Any
) -> jax.Array:
    return window_attention(q, k, v, start, [KeyValues(keys, values, layer, seen)])


def shapes_of(tokens: int, slots: int, layers: int = LAYERS) -> list[Any]:
    half, count = jnp.bfloat16, jnp.int32
    own, stored = (1, tokens, KV_HEADS, HEAD_SIZE), (layers, 1, KV_HEADS, slots, HEAD_SIZE)
    return [
        *(((1, tokens, HEADS, HEAD_SIZE), half), (own, half), (own, half), ((1, tokens), count)),
        *((stored, half), (stored, half), ((), count), ((1, tokens), count)),
    ]


@pytest.mark.parametrize("slots", [19_456, 900_512])
@pytest.mark.parametrize("tokens", [7680, 40, 1])
@pytest.mark.parametrize("card", MAKES)
def test_window_attention(card: str, tokens: int, slots: int, tmp_path: Path):
    """Also behind memories of more than 2**31 numbers."""
    found = registers(card, tmp_path, attend, *shapes_of(tokens, slots))
    assert list(found) == ["window_attention" if tokens > 1000 else "window_attention_few"]


@pytest.mark.parametrize("card", MAKES)
def test_gradients_of_window_attention(card: str, tmp_path: Path):
    def gradients(q: Any, k: Any, v: Any, start: Any, keys: Any, values: Any, *rest: Any) -> Any:
        def run(q: Any, k: Any, v: Any, keys: Any, values: Any) -> Any:
            return attend(q, k, v, start, keys, values, *rest)

        return jax.vjp(run, q, k, v, keys, values)[1](q)

    found = registers(card, tmp_path, gradients, *shapes_of(7680, 2048, layers=1))
    assert {re.sub(r"_+\d+$", "", name) for name in found} == {
        "window_attention",
        "window_attention_of_queries",
        "window_attention_of_keys",
    }


@pytest.mark.parametrize("card", [each.name for each in CARDS if each.gpu is not None])
def test_every_card_takes_the_kernels(card: str, tmp_path: Path):
    """Blocks that do not fit the shared memory of a card would be an error here."""
    assert compiler_for(find_card(card)).is_exact
    assert registers(card, tmp_path, attend, *shapes_of(1536, 2048, layers=2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("card", MAKES)
def test_product_of_a_row(card: str, dtype: Any, tmp_path: Path):
    def run(x: Any, stack: Any, layer: Any) -> Any:
        return few_rows_product(x, LayerKernel(stack, layer))

    shapes = ((1, 1, 3584), jnp.bfloat16), ((LAYERS, 3584, 18_944), dtype), ((), jnp.int32)
    assert list(registers(card, tmp_path, run, *shapes)) == ["few_rows_product"]


def test_heads_that_the_kernels_cannot_take_fall_back_with_one_warning(recwarn: Any):
    compiler = PlanCompiler(find_card("h100"))
    shapes = [((1, 64, 4, 24), jnp.bfloat16), *[((1, 64, 2, 24), jnp.bfloat16)] * 2]
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in (*shapes, ((1, 64), jnp.int32))]
    for _ in range(2):
        with compiler.tracing():
            jax.jit(window_attention).lower(*arrays)
    said = [str(each.message) for each in recwarn if "fused attention" in str(each.message)]
    assert len(said) == 1
    assert "heads of 24" in said[0]
