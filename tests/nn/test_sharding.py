"""The table of logical axes: where each parameter and each array of the optimizer lies."""

import math
import re
from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, PartitionSpec

from train.config import MeshSection, OptimSection
from train.data.loader import Shards
from train.run.distributed import open_mesh
from train.run.optimizer import Optimizer
from vxl_jax.config import LoRAConfig, LoRATarget, VideoXLConfig
from vxl_jax.errors import ConfigError
from vxl_jax.models.int8 import new_network
from vxl_jax.models.lora import add_lora
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.nn.sharding import (
    _TABLE,
    AXES,
    SMALL,
    by_sample,
    from_table,
    logical_axes,
    param_placement,
    place_tree,
)
from vxl_jax.presets import PRESETS, tiny, tiny_llava

BIG = 2**20
"""Bytes of a parameter that no device should have whole."""


def params_of(config: VideoXLConfig, lora: LoRAConfig | None = None) -> dict[tuple[str, ...], Any]:
    """Shapes of all parameters."""

    def make() -> Any:
        model = VideoXL(config, rngs=nnx.Rngs(0))
        if lora:
            add_lora(model, lora, seed=0)
        return nnx.to_pure_dict(nnx.state(model))

    return flatten_dict(jax.eval_shape(make))


def placed(
    data: int, fsdp: int, tensor: int, config: VideoXLConfig, params: dict[tuple[str, ...], Any]
) -> dict[str, tuple[PartitionSpec, float]]:
    """How each parameter is cut, and the share of it that a device has."""
    mesh: Any = AbstractMesh((data, fsdp, tensor), AXES)
    place = param_placement(mesh, config)
    found = {}
    for path, x in params.items():
        sharding = place(path, x.shape)
        share = math.prod(sharding.shard_shape(x.shape)) / math.prod(x.shape)
        found["/".join(path)] = sharding.spec, share
    return found


B7 = PRESETS["video_xl_7b"]()


@pytest.mark.parametrize(
    ("mesh", "share"), [((1, 8, 1), 1 / 8), ((1, 1, 4), 1 / 4), ((2, 4, 2), 1 / 8), ((8, 1, 1), 1)]
)
def test_every_large_parameter_of_7b_is_cut(mesh: tuple[int, int, int], share: float):
    params = params_of(B7)
    found = placed(*mesh, B7, params)
    large = {"/".join(path) for path, x in params.items() if x.size * 2 > BIG}
    assert len(large) > 20
    only_width = {"vision/patch_embed/kernel", "vision/position_embed"}
    for name in large - only_width:
        assert found[name][1] == share, name
    assert found["vision/patch_embed/kernel"][1] == 1 / mesh[1]
    assert params[("vision", "position_embed")].size * 2 < 1.2 * BIG
    total = sum(x.size for x in params.values())
    whole = sum(x.size * found["/".join(path)][1] for path, x in params.items())
    assert whole / total < 1.005 * share


def test_the_spec_of_each_kind():
    found = {name: spec for name, (spec, _) in placed(2, 2, 2, B7, params_of(B7)).items()}
    layers = "language/layers"
    assert found["language/embed/embedding"] == PartitionSpec("tensor", "fsdp")
    assert found["language/head/kernel"] == PartitionSpec("fsdp", "tensor")
    for name in ("q", "k", "v", "beacon_q", "beacon_k", "beacon_v"):
        kernel = f"{layers}/attention/{name}/kernel"
        assert found[kernel] == PartitionSpec(None, "fsdp", "tensor")
        assert found[f"{layers}/attention/{name}/bias"] == PartitionSpec(None, "tensor")
    assert found[f"{layers}/attention/o/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    for name in ("gate", "up"):
        assert found[f"{layers}/mlp/{name}/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert found[f"{layers}/mlp/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert found["vision/layers/q/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert found["vision/layers/up/bias"] == PartitionSpec(None, "tensor")
    assert found["projector/down/kernel"] == PartitionSpec("tensor", "fsdp")
    for name in ("language/norm/scale", f"{layers}/mlp_norm/scale", "language/beacon_embed"):
        assert found[name] == PartitionSpec()


@pytest.mark.parametrize("tensor", [2, 4, 8, 7, 28])
def test_heads_stay_whole(tensor: int):
    """28 heads and 4 of keys and values: an axis is cut where it is cut between heads, or not."""
    found = placed(1, 1, tensor, B7, params_of(B7))
    for name, heads in (("q", 28), ("k", 4), ("v", 4), ("o", 28)):
        for kind in ("kernel", "bias") if name != "o" else ("kernel",):
            share = found[f"language/layers/attention/{name}/{kind}"][1]
            assert share == (1 / tensor if heads % tensor == 0 else 1), name
    share = found["vision/layers/q/kernel"][1]  # 16 heads
    assert share == (1 / tensor if 16 % tensor == 0 else 1)


def test_what_the_mesh_does_not_divide_stays_whole():
    tiny = PRESETS["tiny"]()  # width 32, 96 tokens, mlp 48
    found = placed(1, 3, 5, tiny, params_of(tiny))
    assert {spec for spec, _ in found.values()} == {PartitionSpec()}
    found = placed(1, 1, 3, tiny, params_of(tiny))
    assert found["language/embed/embedding"][0] == PartitionSpec("tensor")
    assert found["language/layers/mlp/gate/kernel"][0] == PartitionSpec(None, None, "tensor")
    assert found["language/layers/attention/q/kernel"][0] == PartitionSpec()


def test_updates_of_low_rank_are_cut_as_their_kernels():
    lora = LoRAConfig(rank=8, targets=("q", "o", "gate", "down"))
    found = placed(2, 2, 2, B7, params_of(B7, lora))
    layers = "language/layers"
    expected = {
        "attention/q": ("fsdp", "tensor"),
        "attention/o": ("tensor", "fsdp"),
        "mlp/gate": ("fsdp", "tensor"),
        "mlp/down": ("tensor", "fsdp"),
    }
    updates = {name for name in found if "lora_" in name}
    assert updates == {f"{layers}/{name}/lora_{x}" for name in expected for x in "ab"}
    for name, (inputs, outputs) in expected.items():
        assert found[f"{layers}/{name}/lora_a"][0] == PartitionSpec(None, inputs)
        assert found[f"{layers}/{name}/lora_b"][0] == PartitionSpec(None, None, outputs)
    assert logical_axes(("language", "layers", "mlp", "up", "lora_a")) == (None, "in", None)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_moments_lie_where_their_parameters_do(optimizer: Any):
    demo = PRESETS["demo"]()
    mesh: Any = AbstractMesh((1, 8, 1), AXES)
    place = param_placement(mesh, demo)
    params = params_of(demo)
    tree = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(VideoXL(demo, rngs=nnx.Rngs(0)))))
    state = jax.eval_shape(Optimizer(OptimSection(optimizer=optimizer), 10, 0).init, tree)
    shardings = place_tree(place, state)
    rows = list(zip(*map(jax.tree_util.tree_leaves_with_path, (state, shardings)), strict=True))
    seen = set()
    for (path, x), (_, sharding) in rows:
        keys = tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        if keys and x.shape == params[keys].shape:
            seen.add(keys)
            assert sharding == place(keys, x.shape)
        else:  # counts, and Adafactor's rows and columns
            assert sharding.is_fully_replicated
            assert x.size <= 512 * demo.language.layers
    if optimizer == "adamw":
        assert seen == params.keys()


def test_rows_of_adafactor_are_whole_however_large():
    mesh: Any = AbstractMesh((1, 8, 1), AXES)
    tree = unflatten_dict(params_of(B7))
    state = jax.eval_shape(Optimizer(OptimSection(optimizer="adafactor"), 10, 0).init, tree)
    shardings = place_tree(param_placement(mesh, B7), state)
    whole = [
        x.size
        for x, sharding in zip(*map(jax.tree.leaves, (state, shardings)), strict=True)
        if sharding.is_fully_replicated
    ]
    assert max(whole) > SMALL


# The table.


LINEARS = get_args(LoRATarget)


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_has_a_row_of_its_rank(name: str):
    config = PRESETS[name]()
    has_beacons = config.compression is not None
    targets = [name for name in LINEARS if has_beacons or not name.startswith("beacon_")]
    lora = LoRAConfig(rank=8, targets=tuple(targets))
    for path, x in params_of(config, lora).items():
        axes = logical_axes(path)
        assert axes is not None, path
        assert len(axes) == x.ndim, path


def test_the_table_has_no_other_rows():
    tied, untied = (
        tiny(language=replace(tiny().language, tie_embeddings=tie)) for tie in (True, False)
    )
    configs = (tied, untied, tiny_llava(faster_token=True))
    names = {"/".join(path) for config in configs for path in params_of(config)}
    assert names == _TABLE.keys()


def test_scales_of_int8_kernels_have_rows():
    shapes = nnx.eval_shape(lambda: new_network(B7, weights="int8"))
    for path, x in flatten_dict(nnx.to_pure_dict(nnx.state(shapes))).items():
        axes = logical_axes(path)
        assert axes is not None, path
        assert len(axes) == x.ndim, path
    assert logical_axes(("language", "layers", "mlp", "down", "scale")) == (None, "out")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        # Each of these ends, or begins, as a name of the table.
        ("language/layers/attention/photo/kernel", (4, 512, 512), "no row for it"),
        ("language/layers/extra/attention/o/kernel", (4, 512, 512), "no row for it"),
        ("adapter/language/head/kernel", (512, 512), "no row for it"),
        ("language/head/kernel/more", (512, 512), "no row for it"),
        ("language/layers/mlp/lora_a", (4, 512, 512), "no row for it"),
        ("head/kernel", (512, 512), "no row for it"),
        ("language/head/kernel", (4, 512, 512), "2 axes for it"),
        ("language/layers/mlp/gate/kernel", (512, 512), "3 axes for it"),
        ("language/norm/scale", (512, 512), "1 axes for it"),
    ],
)
def test_a_large_parameter_that_is_not_in_the_table_is_an_error(
    name: str, shape: tuple[int, ...], message: str
):
    for size in ((1, 8, 1), (1, 1, 1)):
        mesh: Any = AbstractMesh(size, AXES)
        place = param_placement(mesh, B7)
        with pytest.raises(ValueError, match=re.escape(f"{name} {shape}: ")) as refused:
            place(tuple(name.split("/")), shape)
        assert message in str(refused.value)
        small = (8,) * len(shape)
        assert place(tuple(name.split("/")), small).is_fully_replicated


# The mesh of a run.


@pytest.mark.parametrize(
    ("section", "asked"),
    [
        (MeshSection(data=2), "2 x 1 x 1"),
        (MeshSection(fsdp=8), "data x 8 x 1"),
        (MeshSection(data=1, tensor=3), "1 x 1 x 3"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(section: MeshSection, asked: str):
    with pytest.raises(ConfigError) as refused:
        open_mesh(section)
    assert str(refused.value) == (
        f"mesh.data x mesh.fsdp x mesh.tensor is {asked}, but the run has 1 device in 1 "
        "process(es); their product must be the number of devices"
    )


def test_data_takes_the_devices_that_are_left():
    assert dict(open_mesh(MeshSection()).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_places_of_a_batch_are_shared_out():
    shares = [Shards((i,), 4).places(6) for i in range(4)]
    assert shares == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert Shards((0, 2), 4).places(8) == [0, 1, 4, 5]
    assert Shards().places(3) == [0, 1, 2]


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.zeros((3, 2, 4))
    assert by_sample(x) is x
    assert from_table(x) is x
