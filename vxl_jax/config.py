"""Model configuration: frozen dataclasses and named presets.

Every field is read by the network, its stream plan, or what makes its pixels. Combinations that
cannot work are refused when the dataclass is made, with the name of the field.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from vxl_jax.errors import ConfigError
from vxl_jax.media.frames import CLIP_MEAN, CLIP_STD
from vxl_jax.media.layout import ImageTokens, Newline, PoolMode, VisualLayout
from vxl_jax.media.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from vxl_jax.typing import Family

Remat = Literal["full", "products", "none"]
"""Rematerialisation. full: a layer keeps its input alone; products: the results of its matrix
products too; none: all that the backward pass needs. Hidden values of an MLP that takes its tokens
in turns are computed again in any case."""

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


WINDOW = 1440
"""Visual tokens in a compression window of the published model."""


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(
                f"{type(config).__name__}.{name} is {getattr(config, name)}; it must be at least 1"
            )


TowerKind = Literal["clip", "siglip"]
"""CLIP (Radford et al. 2021), or SigLIP (Zhai et al. 2023)."""


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower. Defaults: CLIP ViT-L/14 at 336 px; `siglip_so400m` is LLaVA-Video's."""

    kind: TowerKind = "clip"
    image_size: int = 336
    """Side of the square input, in pixels."""
    patch_size: int = 14
    """Side of a patch, in pixels."""
    width: int = 1024
    layers: int = 24
    """Layers of the published tower; only those below `feature_layer` are built and run."""
    feature_layer: int = -2
    """Hidden state used as features, counted as Hugging Face does: -1 is the last layer's."""
    heads: int = 16
    mlp_width: int = 4096
    norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = CLIP_MEAN
    """Mean subtracted from RGB in [0, 1]."""
    image_std: tuple[float, float, float] = CLIP_STD
    """Standard deviation that RGB in [0, 1] is divided by."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(TowerKind):
            raise ConfigError(
                f"VisionConfig.kind is {self.kind!r}; use one of {', '.join(get_args(TowerKind))}"
            )
        _positive(self, "image_size", "patch_size", "width", "layers", "heads", "mlp_width")
        if self.width % self.heads:
            raise ConfigError(
                f"VisionConfig.width {self.width} is not a multiple of heads {self.heads}"
            )
        if not -self.layers <= self.feature_layer < 0:
            raise ConfigError(
                f"VisionConfig.feature_layer {self.feature_layer} must be between "
                f"-{self.layers} and -1"
            )

    @property
    def layers_used(self) -> int:
        """Number of layers that have to run for the chosen hidden state."""
        return self.layers + 1 + self.feature_layer

    @property
    def grid(self) -> int:
        """Patches along one side of a frame; a remainder of pixels is dropped as a strided
        convolution drops it.
        """
        return self.image_size // self.patch_size


def siglip_so400m() -> VisionConfig:
    """SigLIP so400m/14 at 384 px, whose 27th layer is not used."""
    return VisionConfig(
        kind="siglip",
        image_size=384,
        width=1152,
        layers=27,
        heads=16,
        mlp_width=4304,
        norm_eps=1e-6,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


@dataclass(frozen=True)
class LanguageConfig:
    """Qwen2 (Yang et al. 2024) with beacon projections. Defaults: Qwen2-7B-Instruct."""

    vocab_size: int = 152064
    width: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    mlp_width: int = 18944
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    """Read the logits with the transposed token embedding instead of a separate head."""

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width")
        if self.width % self.heads:
            raise ConfigError(
                f"LanguageConfig.width {self.width} is not a multiple of heads {self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"LanguageConfig.heads {self.heads} is not a multiple of kv_heads {self.kv_heads}"
            )
        if self.head_size % 2:
            raise ConfigError(
                f"LanguageConfig: head size {self.head_size} (width / heads) must be even for RoPE"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head (H)."""
        return self.width // self.heads


@dataclass(frozen=True)
class Compression:
    """Visual tokens compressed by beacon tokens (arXiv 2409.14485, section 3.2)."""

    window: int = WINDOW
    """Visual tokens in one compression window (10 frames of 144)."""
    ratios: tuple[int, ...] = (2, 4, 8, 12, 16)
    """Compression ratios that training draws from. (): beacons have parameters, but training leaves
    visual tokens uncompressed."""

    def __post_init__(self) -> None:
        _positive(self, "window")
        bad = [ratio for ratio in self.ratios if not 1 <= ratio <= self.window]
        if bad:
            raise ConfigError(
                f"Compression.ratios {bad} must be between 1 and the window {self.window}"
            )


@dataclass(frozen=True)
class VideoXLConfig:
    """The whole model. Defaults: Video-XL-7B (arXiv 2409.14485)."""

    family: Family = "video_xl"
    """Decides the text around questions and what of it is learned, and nothing of the network."""
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    """None: a language model alone (plain Qwen2), which reads text."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    compression: Compression | None = field(default_factory=Compression)
    """None: no beacons. Their parameters are not built, and visual tokens stay uncompressed."""
    pool_stride: int = 2
    """Projected patches of a frame become fewer by this factor along each side; 1 leaves them."""
    pool_mode: PoolMode = "average"
    newline: Newline = "none"
    slow_every: int = 1
    """Every such frame of a video is slow, and the others are fast: pooled by twice the stride."""
    faster_token: bool = False
    """Whether a learned token follows every frame of a video."""
    image_tokens: ImageTokens = "pooled"
    max_image_tiles: int | None = None
    """An unpadded image is downscaled to about as many patches as this many tiles have."""
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING
    """How images and videos become frames and tiles, in training and when it is asked."""
    param_dtype: str = "float32"
    """Dtype in which parameters are stored: float32 or bfloat16."""
    dtype: str = "float32"
    """Dtype of activations and products. Norms, softmax, RoPE angles and loss are float32."""
    remat: Remat = "full"
    """What each layer keeps for the backward pass; the rest is computed again."""

    def __post_init__(self) -> None:
        _positive(self, "pool_stride")
        for name in ("param_dtype", "dtype"):
            if getattr(self, name) not in DTYPES:
                raise ConfigError(
                    f"VideoXLConfig.{name} is {getattr(self, name)!r}; use one of {sorted(DTYPES)}"
                )
        if self.remat not in get_args(Remat):
            raise ConfigError(
                f"VideoXLConfig.remat is {self.remat!r}; use one of {', '.join(get_args(Remat))}"
            )
        if self.family not in get_args(Family):
            raise ConfigError(
                f"VideoXLConfig.family is {self.family!r}; use one of {', '.join(get_args(Family))}"
            )
        if self.vision is not None and self.pool_stride > self.vision.grid:
            raise ConfigError(
                f"VideoXLConfig.pool_stride {self.pool_stride} is larger than the tower's grid of "
                f"{self.vision.grid} patches"
            )
        if self.vision is not None:
            _ = self.layout  # checks the other fields
            self._check_family()

    def _check_family(self) -> None:
        """Refuse visual tokens that no checkpoint of the family has, or that cannot be made."""
        family, layout = self.family, self.layout
        if family == "video_xl" and not layout.is_uniform:
            raise ConfigError(
                "VideoXLConfig: a Video-XL averages all frames and tiles alike; leave pool_mode, "
                "newline, slow_every, faster_token and image_tokens out, or set family"
            )
        if family == "llava_video" and (
            layout.images == "pooled" or (layout.images == "flat" and layout.newline != "none")
        ):
            raise ConfigError(
                f"VideoXLConfig.image_tokens is {layout.images!r} with newline {layout.newline!r}; "
                "a LLaVA has 'unpad', or 'flat' without newlines"
            )
        rules = self.preprocessing
        if layout.images == "unpad" and rules.image_mode == "anyres" and not rules.base_tile:
            raise ConfigError(
                "VideoXLConfig.image_tokens is 'unpad', so Preprocessing.base_tile must be true"
            )

    @property
    def tower(self) -> VisionConfig:
        """The vision tower.

        Raises:
          ConfigError: the model has none.
        """
        if self.vision is None:
            raise ConfigError(
                "VideoXLConfig.vision is None: the model reads text alone; load a checkpoint with "
                "a vision tower to give it images or videos"
            )
        return self.vision

    @property
    def window(self) -> int:
        """Visual tokens that are processed together: the compression window, if there is one."""
        return WINDOW if self.compression is None else self.compression.window

    @property
    def ratios(self) -> tuple[int, ...]:
        """Compression ratios that training draws from; () without compression."""
        return () if self.compression is None else self.compression.ratios

    @property
    def layout(self) -> VisualLayout:
        """Which visual tokens frames and tiles give to the language model."""
        return VisualLayout(
            grid=self.tower.grid,
            pool_stride=self.pool_stride,
            pool_mode=self.pool_mode,
            newline=self.newline,
            slow_every=self.slow_every,
            faster_token=self.faster_token,
            images=self.image_tokens,
            max_tiles=self.max_image_tiles,
        )


def with_changes(config: VideoXLConfig, **changes: Any) -> VideoXLConfig:
    """Replace fields of a configuration; `window` and `ratios` are those of its compression.

    Raises:
      ConfigError: an unknown field, or `window` or `ratios` of a model without compression.
    """
    inner = {name: changes.pop(name) for name in ("window", "ratios") if name in changes}
    known = {each.name for each in dataclasses.fields(config)}
    if unknown := sorted(changes.keys() - known):
        raise ConfigError(f"{', '.join(unknown)}: not a field of VideoXLConfig")
    config = dataclasses.replace(config, **changes)
    if not inner or (inner == {"ratios": ()} and config.compression is None):
        return config
    if config.compression is None:
        raise ConfigError(
            f"{', '.join(inner)}: the model has no compression, and so no beacons; leave it out"
        )
    return dataclasses.replace(config, compression=dataclasses.replace(config.compression, **inner))


LoRATarget = Literal["q", "k", "v", "o", "gate", "up", "down", "beacon_q", "beacon_k", "beacon_v"]
"""A linear of every layer of the language model."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank updates of the language model's linears (arXiv 2106.09685). alpha and targets are
    those of QLoRA (arXiv 2305.14314), with its rank of 64.
    """

    rank: int = 0
    """Rank of each linear's update; 0: no updates."""
    alpha: float = 16.0
    """An update is multiplied by alpha / rank."""
    targets: tuple[LoRATarget, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Linears that get an update, in all layers. Beacon tokens have separate q, k and v."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank is {self.rank}; it must be at least 0")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha is {self.alpha}; it must be more than 0")
        names = get_args(LoRATarget)
        once = len(set(self.targets)) == len(self.targets)
        if not (self.targets and once and set(self.targets) <= set(names)):
            raise ConfigError(
                f"lora.targets is {self.targets!r}; it must be some of {', '.join(names)}, "
                "each once"
            )

    @property
    def scale(self) -> float:
        """Factor of the updates."""
        return self.alpha / self.rank
