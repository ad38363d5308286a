"""The table of names: every tensor of the published checkpoint and where it stands here.

One row a tensor (or a tensor a layer, where the name has `{i}`). `ours` is the path in
`nnx.state(VideoXL)`; rows with `{i}` are stacked there along a new first axis. All directions of
conversion read this table and nothing else.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict

from vxl_jax.config import VideoXLConfig


@dataclass(frozen=True)
class TensorLayout:
    """How one tensor is laid out there and here; `to_ours` and `to_theirs` are inverses."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = TensorLayout(lambda x: x, lambda x: x)
LINEAR = TensorLayout(np.transpose, np.transpose)  # torch (out, in), here (in, out)


def patch_layout(patch: int) -> TensorLayout:
    """torch's patch convolution (out, in, p, q) and our linear map (p q in, out)."""
    return TensorLayout(
        lambda x: rearrange(x, "D C p q -> (p q C) D"),
        lambda x: rearrange(x, "(p q C) D -> D C p q", p=patch, q=patch),
    )


@dataclass(frozen=True)
class NameRow:
    """One line of the table."""

    theirs: str
    ours: tuple[str, ...]
    layout: TensorLayout
    layers: int = 0  # 0: a single tensor

    def names(self) -> list[str]:
        """Published names that this row covers, in layer order."""
        return [self.theirs.format(i=i) for i in range(self.layers)] or [self.theirs]

    def published_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each published tensor, from that of our array."""
        one = ours[1:] if self.layers else ours
        # A view of one number: nothing of this size is allocated.
        return self.layout.to_theirs(np.broadcast_to(np.int8(0), one)).shape

    def run(self, ours: tuple[int, ...], most: int) -> tuple[int, ...]:
        """Shape of the largest part of our array that is one run of numbers in a published tensor,
        or several such tensors whole.

        most: numbers in it, as far as one row of a published tensor allows.
        """
        one = ours[1:] if self.layers else ours
        size = int(np.prod(one))
        if size <= most or self.layout not in (LINEAR, SAME):
            return (min(ours[0], max(1, most // size)), *one) if self.layers else one
        axis = 1 if self.layout is LINEAR else 0
        rows = max(1, most * one[axis] // size)
        part = (*one[:axis], rows, *one[axis + 1 :])
        return (1, *part) if self.layers else part


EMBEDDING_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"
BEACON_EMBEDDING_NAME = "model.beacon_embed_tokens.weight"
NEWLINE_NAME, FASTER_NAME = "model.image_newline", "model.faster_token"
PUBLISHED_TOWER = "model.vision_tower.vision_tower.vision_model."


def name_rows(config: VideoXLConfig) -> list[NameRow]:
    """All rows for a model of this configuration."""
    return list(_name_rows(config))


def _name_rows(config: VideoXLConfig) -> Iterator[NameRow]:
    def linear(theirs: str, ours: str, layers: int = 0, bias: bool = True) -> Iterator[NameRow]:
        path = tuple(ours.split("."))
        yield NameRow(f"{theirs}.weight", (*path, "kernel"), LINEAR, layers)
        if bias:
            yield NameRow(f"{theirs}.bias", (*path, "bias"), SAME, layers)

    def one(theirs: str, ours: str, layers: int = 0) -> NameRow:
        return NameRow(theirs, tuple(ours.split(".")), SAME, layers)

    yield one(EMBEDDING_NAME, "language.embed.embedding")
    beacons: tuple[str, ...] = ()
    if config.compression is not None:
        yield one(BEACON_EMBEDDING_NAME, "language.beacon_embed")
        beacons = ("beacon_q", "beacon_k", "beacon_v")
    there, here, n = "model.layers.{i}.", "language.layers.", config.language.layers
    for name in ("q", "k", "v", *beacons):
        yield from linear(f"{there}self_attn.{name}_proj", f"{here}attention.{name}", n)
    yield from linear(f"{there}self_attn.o_proj", f"{here}attention.o", n, bias=False)
    for name in ("gate", "up", "down"):
        yield from linear(f"{there}mlp.{name}_proj", f"{here}mlp.{name}", n, bias=False)
    yield one(f"{there}input_layernorm.weight", f"{here}attention_norm.scale", n)
    yield one(f"{there}post_attention_layernorm.weight", f"{here}mlp_norm.scale", n)
    yield one("model.norm.weight", "language.norm.scale")
    if not config.language.tie_embeddings:
        yield from linear("lm_head", "language.head", bias=False)
    if config.vision is None:
        return

    yield from linear("model.mm_projector.0", "projector.up")
    yield from linear("model.mm_projector.2", "projector.down")
    if config.layout.has_newline:
        yield one(NEWLINE_NAME, "projector.newline")
    if config.faster_token:
        yield one(FASTER_NAME, "projector.faster")

    yield one(f"{PUBLISHED_TOWER}embeddings.position_embedding.weight", "vision.position_embed")
    yield NameRow(
        f"{PUBLISHED_TOWER}embeddings.patch_embedding.weight",
        ("vision", "patch_embed", "kernel"),
        patch_layout(config.tower.patch_size),
    )
    if config.tower.kind == "siglip":
        yield one(f"{PUBLISHED_TOWER}embeddings.patch_embedding.bias", "vision.patch_embed.bias")
    else:
        yield one(f"{PUBLISHED_TOWER}embeddings.class_embedding", "vision.class_embed")
        yield one(f"{PUBLISHED_TOWER}pre_layrnorm.weight", "vision.pre_norm.scale")
        yield one(f"{PUBLISHED_TOWER}pre_layrnorm.bias", "vision.pre_norm.bias")
    there, here, n = (
        f"{PUBLISHED_TOWER}encoder.layers.{{i}}.",
        "vision.layers.",
        config.tower.layers_used,
    )
    for theirs, ours in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
        yield from linear(f"{there}self_attn.{theirs}", f"{here}{ours}", n)
    for theirs, ours in (("fc1", "up"), ("fc2", "down")):
        yield from linear(f"{there}mlp.{theirs}", f"{here}{ours}", n)
    for theirs, ours in (("layer_norm1", "attention_norm"), ("layer_norm2", "mlp_norm")):
        yield one(f"{there}{theirs}.weight", f"{here}{ours}.scale", n)
        yield one(f"{there}{theirs}.bias", f"{here}{ours}.bias", n)


def is_unused(name: str, config: VideoXLConfig) -> bool:
    """Whether a published tensor is one that the network never reads.

    They are the tower's layers above the features, its last norm, SigLIP's pooling head, position
    ids that old releases of transformers wrote, the head of a model with tied embeddings, learned
    vectors that the layout has no place for, and beacons of a model that is loaded without
    compression.
    """
    ends = (f"{PUBLISHED_TOWER}post_layernorm.", f"{PUBLISHED_TOWER}head.")
    if name.startswith(ends) or name.endswith("embeddings.position_ids"):
        return True
    if name == FASTER_NAME:
        return not config.faster_token
    if name == NEWLINE_NAME:
        return config.vision is None or not config.layout.has_newline
    if name == HEAD_NAME:
        return config.language.tie_embeddings
    if is_beacon(name):
        return config.compression is None
    if config.vision is None:
        return False
    layer = re.match(re.escape(f"{PUBLISHED_TOWER}encoder.layers.") + r"(\d+)\.", name)
    if layer is None:
        return False
    return config.tower.layers_used <= int(layer[1]) < config.tower.layers


def is_beacon(name: str) -> bool:
    """Whether a published tensor is of the beacons."""
    return name == BEACON_EMBEDDING_NAME or ".self_attn.beacon_" in name


def first_layer(name: str) -> str:
    """The name of the same tensor in the first layer of its tower or language model."""
    return re.sub(r"layers\.\d+\.", "layers.0.", name)


def to_published(params: dict[str, Any], config: VideoXLConfig) -> dict[str, np.ndarray]:
    """Parameters (`nnx.to_pure_dict(nnx.state(model))`), or gradients, under published names."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    named = {}
    for row in name_rows(config):
        value = flat[row.ours]
        layers = value if row.layers else value[None]
        for name, layer in zip(row.names(), layers, strict=True):
            # safetensors would store the memory of a transposed view, in the wrong order.
            named[name] = np.ascontiguousarray(row.layout.to_theirs(layer))
    return named
