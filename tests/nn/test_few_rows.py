"""Products of a few rows with a layer of a stack, and decoding with them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.networks import relative_error
from vxl_jax.config import LanguageConfig, LoRAConfig
from vxl_jax.models.functions import decode_step, prefill
from vxl_jax.models.int8 import quantize
from vxl_jax.models.lora import add_lora
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn import few_rows, qwen2
from vxl_jax.nn.few_rows import LayerKernel, few_rows_product, fits, layer_in_place
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


def test_gradients_are_those_of_a_product():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, IN)), jnp.bfloat16)
    stack = jnp.asarray(rng.normal(size=(2, IN, OUT)), jnp.bfloat16)

    def ours(x: Any, stack: Any) -> Any:
        return (few_rows_product(x, LayerKernel(stack, 1), interpret=True) ** 2).sum()

    def plain(x: Any, stack: Any) -> Any:
        return (jnp.matmul(x, stack[1], preferred_element_type=jnp.float32) ** 2).sum()

    for found, expected in zip(
        jax.grad(ours, (0, 1))(x, stack), jax.grad(plain, (0, 1))(x, stack), strict=True
    ):
        assert found.dtype == expected.dtype
        assert relative_error(found, expected) < 0.01
    whole = jnp.ones((2, IN, OUT), jnp.int8)
    assert jax.grad(ours)(x, whole).shape == x.shape


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(17, 64, 64), (1, 96, 64), (1, 64, 96)])
def test_what_does_not_fit_is_refused(rows: int, inputs: int, outputs: int):
    stack = jnp.zeros((1, inputs, outputs), jnp.int8)
    with pytest.raises(ValueError, match="at most 16 rows and kernels that fit"):
        few_rows_product(jnp.zeros((rows, inputs), jnp.bfloat16), LayerKernel(stack, 0))


def test_stacks_whose_offsets_would_overflow_do_not_fit():
    stack = jax.ShapeDtypeStruct((48, 5120, 13_824), jnp.int8)  # of a 14B model
    assert not fits(stack, jnp.bfloat16)  # type: ignore[arg-type]


def test_only_kernels_that_fit_stay_in_place():
    shapes = {
        ("kernel", "wide"): ((2, 64, 128), jnp.bfloat16),
        ("kernel", "int8"): ((2, 64, 128), jnp.int8),
        ("kernel", "float32"): ((2, 64, 128), jnp.float32),
        ("kernel", "narrow"): ((2, 64, 96), jnp.bfloat16),
        ("lora_a", "wide"): ((2, 128, 64), jnp.bfloat16),
        ("scale", "wide"): ((2, 128), jnp.bfloat16),
    }
    params: dict[str, dict[str, Any]] = {}
    for (kind, name), shape in shapes.items():
        params.setdefault(kind, {})[name] = jnp.zeros(*shape)
    found = layer_in_place(params, jnp.bfloat16, jnp.asarray(1))
    in_place = {(kind, name) for kind, name in shapes if isinstance(found[kind][name], LayerKernel)}
    assert in_place == {("kernel", "wide"), ("kernel", "int8")}
    assert found["kernel"]["float32"].shape == (64, 128)
    assert found["scale"]["wide"].shape == (128,)


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "lora"])
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
    if weights == "lora":  # of a rank that would fit
        add_lora(model, LoRAConfig(rank=64, alpha=64), seed=0)
        lora = nnx.state(model, nnx.LoRAParam)
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), lora))
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
