"""int8 weights: what they are, what they cost, and that they are loaded as they are made."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from convert.from_hf import convert_from_hf
from vxl_jax import Model, VisualMemory, VisualMemoryError, load_network
from vxl_jax.errors import ConfigError
from vxl_jax.models.int8 import INT8_LINEARS, is_quantized, quantize, quantize_kernel
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import plan_stream
from vxl_jax.text.template import IMAGE_TOKEN

MICRO = Path(__file__).parents[1] / "golden" / "micro" / "hf"


def params_of(model):
    return flatten_dict(nnx.to_pure_dict(nnx.state(model)))


def test_each_column_is_rounded_by_a_scale_of_its_own():
    draw = np.random.default_rng(0)
    kernel = draw.normal(size=(3, 40, 7)).astype(np.float32) * 10.0 ** np.arange(-3, 4)
    ours, scale = map(np.asarray, quantize_kernel(jnp.asarray(kernel)))
    assert ours.dtype == np.int8
    assert scale.shape == (3, 7)
    np.testing.assert_allclose(scale, np.abs(kernel).max(1) / 127, rtol=1e-6)
    error = np.abs(ours * scale[:, None] - kernel)
    assert (error <= scale[:, None] * 0.5001).all()
    assert (np.abs(ours).max(1) == 127).all()


def test_a_column_of_zeros_stays_zero():
    ours, scale = quantize_kernel(jnp.zeros((5, 2), jnp.bfloat16))
    assert not np.asarray(ours).any()
    assert np.isfinite(np.asarray(scale)).all()


def test_kernels_of_the_language_model_and_nothing_else():
    model = load_network(MICRO)
    before = params_of(model)
    quantize(model)
    after = params_of(model)
    changed = {path for path in before if after[path].dtype != before[path].dtype}
    layers = {
        ("language", "layers", block, name, "kernel")
        for name in INT8_LINEARS
        for block in ("attention", "mlp")
    }
    assert changed == (layers & before.keys()) | {("language", "head", "kernel")}
    assert changed == {path for path in before if is_quantized(path)}
    assert len(changed) == len(INT8_LINEARS) + 1
    for path in before.keys() - changed:
        assert np.array_equal(before[path], after[path])
    assert {path[:-1] for path in after.keys() - before.keys()} == {path[:-1] for path in changed}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_network_computes_nearly_what_it_did(dtype: str):
    model = load_network(MICRO, dtype=dtype, param_dtype=dtype)
    draw = np.random.default_rng(0)
    ids = [*draw.integers(0, 500, 14), IMAGE_TOKEN, *draw.integers(0, 500, 60)]
    streams = batch_streams([plan_stream(ids, [64], window=160, ratio=8)])
    pixels = draw.integers(0, 256, (1, 4, 112, 112, 3), np.uint8)

    @nnx.jit
    def logits(model):
        return model.logits(model(streams, model.encode(pixels)))

    stored = np.asarray(logits(model), np.float32)
    quantize(model)
    ours = np.asarray(logits(model), np.float32)
    error = np.linalg.norm(ours - stored) / np.linalg.norm(stored)
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("converted", [False, True])
def test_loaded_as_int8_is_loaded_and_then_made_int8(
    converted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = MICRO
    if converted:
        directory = tmp_path / "ours"
        convert_from_hf(MICRO, directory)
        monkeypatch.setattr("vxl_jax.checkpoints.load.READ_BYTES", 20_000)  # several handings-on
    expected = load_network(MICRO)
    quantize(expected)
    ours = load_network(directory, weights="int8")
    assert jax.tree.structure(nnx.graphdef(ours)) == jax.tree.structure(nnx.graphdef(expected))
    theirs = params_of(expected)
    found = params_of(ours)
    assert found.keys() == theirs.keys()
    for path, value in found.items():
        assert value.dtype == theirs[path].dtype
        assert np.array_equal(value, theirs[path]), path


def test_other_weights_are_refused():
    with pytest.raises(ConfigError, match="weights 'int4': use 'int8'"):
        load_network(MICRO, weights="int4")  # type: ignore[arg-type]


def test_a_memory_belongs_to_its_weights():
    memory = VisualMemory(np.arange(5, dtype=np.int32))
    memory.attach(Model(load_network(MICRO), None))
    with pytest.raises(VisualMemoryError, match="was made by another model"):
        memory.attach(Model(load_network(MICRO, weights="int8"), None))
