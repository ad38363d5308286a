"""Products of a few rows with a layer of a stack, and decoding with them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.networks import relative_error
from vxl_jax.config import LanguageConfig
from vxl_jax.models.functions import decode_step, prefill
from vxl_jax.models.int8 import quantize
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn import few_rows, qwen2
from vxl_jax.nn.few_rows import LayerKernel, few_rows_product, layer_in_place
from vxl_jax.presets import tiny
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import plan_stream

IN, OUT = 192, 128


@pytest.mark.parametrize("rows", [(1, 1), (3, 5), (16, 1)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_a_layer_is_multiplied(rows: tuple[int, int], dtype: Any):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*rows, IN)), jnp.bfloat16)
    stack = jnp.asarray(rng.integers(-127, 128, (3, IN, OUT)), dtype)
    for layer in (0, 2):
        found = few_rows_product(x, LayerKernel(stack, layer), interpret=True)
        expected = np.asarray(x, np.float64) @ np.asarray(stack[layer], np.float64)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


def test_only_kernels_that_fit_stay_in_place():
    params = {
        "kernel": jnp.zeros((2, 64, 128), jnp.bfloat16),
        "int8": jnp.zeros((2, 64, 128), jnp.int8),
        "float32": jnp.zeros((2, 64, 128)),
        "narrow": jnp.zeros((2, 64, 96), jnp.bfloat16),
        "scale": jnp.zeros((2, 128), jnp.bfloat16),
    }
    found = layer_in_place(params, jnp.bfloat16, jnp.asarray(1))
    in_place = {name for name, x in found.items() if isinstance(x, LayerKernel)}
    assert in_place == {"kernel", "int8"}
    assert found["float32"].shape == (64, 128)
    assert found["scale"].shape == (128,)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_decoding_in_place_equals_decoding(weights: str, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, with the kernels run as JAX operations."""
    sizes = LanguageConfig(
        vocab_size=96, width=64, layers=2, heads=4, kv_heads=4, mlp_width=128, rope_theta=1e4
    )
    model = VideoXL(
        tiny(language=sizes, dtype="bfloat16", param_dtype="bfloat16"), rngs=nnx.Rngs(0)
    )
    if weights == "int8":
        quantize(model)
    graph, params = nnx.split(model)
    streams = batch_streams([plan_stream(np.arange(9), [], window=16, ratio=4)])
    _, memory = prefill(graph, params, streams, None, 16)
    token = jnp.array([5], jnp.int32)

    def step() -> np.ndarray:
        jax.clear_caches()  # programs are told apart by their arguments alone
        copy = jax.tree.map(jnp.copy, memory)
        return np.asarray(decode_step(graph, params, copy, token)[0])

    calls: list[Any] = []

    def product(x: Any, kernel: LayerKernel) -> Any:
        calls.append(kernel.stack.shape)
        return few_rows_product(x, kernel, interpret=True)

    expected = step()
    monkeypatch.setattr(qwen2, "reads_in_place", lambda x: True)
    monkeypatch.setattr(few_rows, "few_rows_product", product)
    monkeypatch.setattr("vxl_jax.models.int8.few_rows_product", product)
    found = step()
    jax.clear_caches()
    assert len(calls) == 7  # the linears of a layer
    assert relative_error(found, expected) < 0.02  # bfloat16 has 8 bits
