"""Count the floating-point operations of the model (on the host, with NumPy).

Counted as for "model FLOPs utilisation" (PaLM, arXiv 2204.02311, appendix B): matrix products
alone, two operations for a multiplication and its addition; no padding, nothing that is made again
for the backward pass. Attention counts the pairs of a token and a key that it sees, no others.

The network computes more than this: where a stream has beacons, q, k and v of all tokens with both
sets of projections (a token needs one of them), and the scores of all pairs of a tile of which one
is seen. At 7B the second set of projections is 7 % of the layers' products.
"""

from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from vxl_jax.config import VideoXLConfig
from vxl_jax.stream.batch import StreamBatch, StreamShape
from vxl_jax.stream.plan import BEACON, PAD, Stream, plan_stream
from vxl_jax.text.template import IGNORE, IMAGE_TOKEN

PARTS = ("vision", "projector", "language", "beacon", "lora")
"""Parts of the model that are trained or frozen; `lora` are adapters of the language layers."""


@dataclass(frozen=True)
class PassSize:
    """Sizes that determine the operations of a forward pass, without padding.

    frames: frames or tiles that are encoded. tokens: of the streams, of all kinds; beacons: how
    many of them are beacons. pairs: of a token and a key that it sees, itself included. logits:
    tokens whose next token is predicted.
    """

    frames: int = 0
    tokens: int = 0
    beacons: int = 0
    pairs: int = 0
    logits: int = 0

    def __add__(self, other: "PassSize") -> "PassSize":
        return PassSize(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of(
        cls, streams: Stream | StreamBatch, frames: int = 0, *, prefill: bool = False
    ) -> "PassSize":
        """Return the exact sizes of a stream, or of a batch of streams on the host.

        frames: to encode; 0 where visual tokens are given. Predicted are the tokens with a label,
        or with `prefill` one for each sample.
        """
        if isinstance(streams, Stream):
            length = streams.window_lengths.astype(np.int64)
            return cls(
                frames,
                tokens=streams.length,
                beacons=_count(streams.kind == BEACON),
                pairs=int((length * streams.window_memory + length * (length + 1) // 2).sum()),
                logits=1 if prefill else _count(streams.target != IGNORE),
            )
        real = streams.kind != PAD
        own = np.arange(1, real.shape[-1] + 1) - streams.window_start
        return cls(
            frames,
            tokens=_count(real),
            beacons=_count(streams.kind == BEACON),
            pairs=int(np.sum(own + streams.window_memory, where=real, dtype=np.int64)),
            logits=_count(real.any((0, 2)) if prefill else streams.label != IGNORE),
        )

    @classmethod
    def of_shape(
        cls, config: VideoXLConfig, shape: StreamShape, frames: int, places: int = 1
    ) -> "PassSize":
        """Estimate the sizes of a full batch of a padded shape, before any stream is known.

        Each of `places` samples is taken as one video of `frames` frames under the lowest of
        `config.ratios`, and text behind it that fills the shape.
        """
        video, memory = cls(), 0
        if frames:
            visual = [config.layout.video_count(frames)]
            ratio = min(config.ratios, default=None) if shape.beacons else None
            stream = plan_stream([IMAGE_TOKEN], visual, window=config.window, ratio=ratio)
            video, memory = cls.of(stream, frames), stream.persistent
        text = max(0, shape.groups * shape.tokens - video.tokens)
        one = video + cls.of_text(text, memory, logits=shape.labels)
        return cls(*(places * count for count in astuple(one)))

    @classmethod
    def of_text(cls, tokens: int, memory: int = 0, *, logits: int | None = None) -> "PassSize":
        """`tokens` of text after `memory` entries, at once or decoded one after another.

        logits: tokens whose next one is predicted; all of them if None, as in decoding.
        """
        pairs = tokens * memory + tokens * (tokens + 1) // 2
        return cls(tokens=tokens, pairs=pairs, logits=tokens if logits is None else logits)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by part.

    vision: the tower, its attention included. projector: before pooling. language: linear maps of
    the layers. attention: scores and mixtures of the language layers. lora: the adapters' own
    products.
    """

    vision: int = 0
    projector: int = 0
    language: int = 0
    attention: int = 0
    head: int = 0
    lora: int = 0

    @property
    def total(self) -> int:
        """Operations of all parts."""
        return sum(astuple(self))


@dataclass(frozen=True)
class StepFlops:
    """Operations of one forward and one backward pass."""

    forward: Flops
    backward: Flops

    @property
    def total(self) -> int:
        """Operations of both passes."""
        return self.forward.total + self.backward.total


def frame_flops(config: VideoXLConfig) -> Flops:
    """Count the operations of encoding one frame or tile.

    Counts the used layers of the tower, and the projector.
    """
    c = config.tower
    patches = c.grid**2
    tokens = patches + (c.kind == "clip")  # its class token
    of_token = 2 * c.width * (4 * c.width + 2 * c.mlp_width) + 4 * c.width * tokens
    up, down = _projector(config)
    return Flops(
        vision=_patch_embedding(config) + c.layers_used * tokens * of_token,
        projector=patches * (up + down),
    )


def stream_flops(config: VideoXLConfig, work: PassSize, lora_parameters: int = 0) -> Flops:
    """Count the operations of the language model's forward pass.

    lora_parameters: numbers in the adapters of all layers; every token passes through each once.
    """
    c = config.language
    others = 2 * c.width * (c.width + 3 * c.mlp_width)
    return Flops(
        language=c.layers * work.tokens * (_qkv(config) + others),
        attention=c.layers * work.pairs * 4 * c.width,
        head=work.logits * 2 * c.width * c.vocab_size,
        lora=work.tokens * 2 * lora_parameters,
    )


def forward_flops(config: VideoXLConfig, work: PassSize, lora_parameters: int = 0) -> Flops:
    """Count the operations of a forward pass of the whole model, for prefill and decoding."""
    frame, streams = frame_flops(config), stream_flops(config, work, lora_parameters)
    return Flops(work.frames * frame.vision, work.frames * frame.projector, *astuple(streams)[2:])


def step_flops(
    config: VideoXLConfig, work: PassSize, trained: Collection[str], lora_parameters: int = 0
) -> StepFlops:
    """Count the operations of one forward and one backward pass over a batch.

    trained: some of `PARTS`. The backward pass takes as much as the forward for the gradient of
    activations, and as much for that of weights; it counts the second where the weights are
    trained, the first where something that is trained stands before. Attention has no weights:
    both its sides are activations. Parts are told apart, not layers: with adapters alone, the
    gradient of the first layer's input counts though nothing needs it.

    Raises:
      ValueError: a part is unknown.
    """
    if unknown := set(trained) - set(PARTS):
        raise ValueError(f"{sorted(unknown)}: unknown parts of the model; choose from {PARTS}")
    c = config.language
    forward = forward_flops(config, work, lora_parameters)
    # What is trained and takes part: a batch of text alone teaches the tower nothing.
    amount = {"vision": work.frames, "projector": work.frames, "beacon": work.beacons}
    parts = {part for part in trained if amount.get(part, work.tokens)}
    if not parts:
        return StepFlops(forward, Flops())
    vision, projector, language, beacon, lora = (part in parts for part in PARTS)
    up, down = (work.frames * config.tower.grid**2 * each for each in _projector(config))
    of_beacons = c.layers * work.beacons * _qkv(config)
    backward = Flops(
        vision=vision * (2 * forward.vision - work.frames * _patch_embedding(config)),
        projector=projector * (up + down) + (projector or vision) * down + vision * up,
        language=forward.language
        + language * (forward.language - of_beacons)
        + beacon * of_beacons,
        attention=2 * forward.attention,
        head=(1 + language) * forward.head,
        lora=(1 + lora) * forward.lora,
    )
    return StepFlops(forward, backward)


def _patch_embedding(config: VideoXLConfig) -> int:
    """Of one frame."""
    c = config.tower
    return c.grid**2 * 2 * 3 * c.patch_size**2 * c.width


def _projector(config: VideoXLConfig) -> tuple[int, int]:
    """Of one patch: first and second layer."""
    width = config.language.width
    return 2 * config.tower.width * width, 2 * width * width


def _qkv(config: VideoXLConfig) -> int:
    """Of one token in one language layer: its own q, k, v, or those of a beacon."""
    c = config.language
    return 2 * c.width * (c.width + 2 * c.kv_heads * c.head_size)


def _count(mask: Any) -> int:
    return int(np.count_nonzero(mask))
