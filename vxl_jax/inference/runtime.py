"""A network ready to run, with its tokenizer, its limits and its digest."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import Array, lax

from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import ArgumentError, VisualMemoryError
from vxl_jax.inference.ratios import Ratios, check_ratios, default_ratio
from vxl_jax.media.layout import ImageLayout, VisualLayout
from vxl_jax.media.open import Film, MediaLike, as_media, open_together
from vxl_jax.media.sampling import FrameTimes
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.planning.inference_bytes import STEP_TOKENS
from vxl_jax.text.chat import DEFAULT_SYSTEM, encode_prompt, with_marks
from vxl_jax.text.template import IMAGE_MARK, IMAGE_TOKEN
from vxl_jax.text.time_prompt import with_time_prompt

CPU_STEP_TOKENS = 2048
"""Visual tokens that are put into a memory at once on a CPU."""


class Runtime:
    """A network with its tokenizer and its limits. Any number of threads may use it.

    default_ratio: the largest ratio that the network was trained with; None without compression.
    max_context: trained positions, entries and text together; None: unknown. windows_at_once:
    windows of frames that are put into a memory in one step; memory and speed depend on it, the
    result does not.
    """

    def __init__(self, network: VideoXL, tokenizer: Any, max_context: int | None = None):
        self.network, self.tokenizer, self.max_context = network, tokenizer, max_context
        self.config: VideoXLConfig = network.config
        self.graph, self.params = nnx.split(network)
        self.default_ratio = default_ratio(self.config.ratios)
        tokens = CPU_STEP_TOKENS if jax.default_backend() == "cpu" else STEP_TOKENS
        self.windows_at_once = max(1, tokens // self.config.window)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of configuration and parameters: equal digests make equal memories.

        Computed on the device that holds the parameters.
        """
        digest = hashlib.sha256(repr(sorted(_of_memory(self.config).items())).encode())
        flat = flatten_dict(nnx.to_pure_dict(self.params))
        for path in sorted(flat, key=str):
            leaf = flat[path]
            name = f"{'/'.join(map(str, path))} {leaf.dtype} {leaf.shape}"
            digest.update(f"{name} {np.asarray(_digest(leaf)).tolist()}\n".encode())
        return digest.hexdigest()

    def checked_ratios(self, ratio: Ratios | Literal["model"]) -> Ratios:
        """A usable ratio; "model" stands for the default.

        Raises: ArgumentError if a window cannot have it.
        """
        ratios: Any = self.default_ratio if isinstance(ratio, str) and ratio == "model" else ratio
        check_ratios(ratios, self.config)
        return ratios

    def check_context(self, positions: int, name: str) -> None:
        """Check that `positions` is within the trained context.

        Raises: VisualMemoryError.
        """
        if self.max_context is not None and positions > self.max_context:
            raise VisualMemoryError(
                f"{name}: makes {positions:,} positions with the memory, and the model has "
                f"learned {self.max_context:,}; use fewer frames, a higher ratio or a shorter "
                "answer, or load the model with another max_context"
            )

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        ends = {self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids("<|im_end|>")}
        return sorted(ends - {None})

    def head_ids(self, system: str = DEFAULT_SYSTEM) -> np.ndarray:
        """Ids of a conversation before its first block, or its first question without one."""
        ids = encode_prompt(IMAGE_MARK, self.tokenizer, system, False, self.config.family)
        return ids[: int(np.flatnonzero(ids == IMAGE_TOKEN)[0])]

    def open_films(self, media: Sequence[MediaLike], **fields: Any) -> list[Film]:
        """Open media for watching, with the pixels that the model was trained with.

        Args:
          media: as for `Model.watch`.
          fields: of each `Video` that is not one yet.

        Raises:
          MediaError: a file cannot be opened; ConfigError: the model reads text alone.
        """
        if not media:
            return []
        size, preprocessing = self.config.tower.image_size, self.config.preprocessing
        return open_together([as_media(item, **fields) for item in media], size, preprocessing)

    def layout_of(self, film: Film) -> VisualLayout | ImageLayout:
        """Lay out the visual tokens of a film.

        Raises:
          ArgumentError: it is to have fast frames, and the model has none.
        """
        layout = self.config.layout
        if film.image is not None:
            return layout.image(film.image.tiles, film.image.grid, film.image.size)
        every = film.slow_every
        if every is None or every == layout.slow_every:
            return layout
        if layout.is_uniform:
            raise ArgumentError(
                f"{film.name}: slow_every is {every}, but the model pools all frames alike; leave "
                "it out"
            )
        return replace(layout, slow_every=every)

    def first_turn(self, blocks: int, question: str, video: FrameTimes | None = None) -> np.ndarray:
        """Encode the first question after a memory, to where its answer begins.

        Args:
          blocks: visual blocks of the memory.
          question: may have marks of media that come with it.
          video: when the frames of the one video of the conversation are shown. The question says
            so if the model was trained with that.

        Returns:
          int32 [T].
        """
        # What people type is text: a control token in it stays letters.
        family = self.config.family
        prompt = with_marks(blocks, question, family)
        if video is not None and self.config.preprocessing.time_prompt:
            prompt = with_time_prompt(prompt, video, family)
        # Without a block, the memory has the ids up to the newline before the question.
        prompt = prompt if blocks else prompt.lstrip("\n")
        ids = encode_prompt(prompt, self.tokenizer, control_tokens=False, family=family)
        return ids[len(self.head_ids()) + blocks :]

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def video_times(blocks: int, times: FrameTimes | None, films: Sequence[Film]) -> FrameTimes | None:
    """When the frames are shown of the one video of a memory and the films that follow it.

    Args:
      blocks: visual blocks of the memory.
      times: of the memory's one video.
      films: what is watched after it.

    Returns:
      None if there is more than one block, or an image, or if it is not known.
    """
    if not films:
        return times
    return films[0].times if blocks + len(films) == 1 else None


def _of_memory(config: VideoXLConfig) -> dict[str, Any]:
    """Select the fields of a configuration that entries depend on."""
    unused = ("remat", "compression", "param_dtype", "preprocessing", "family", "slow_every")
    fields = {name: value for name, value in asdict(config).items() if name not in unused}
    # Fields that older versions did not have count where they say something new.
    for field in dataclasses.fields(config):
        if field.name in ADDED and fields[field.name] == field.default:
            del fields[field.name]
    if fields["vision"] is not None and fields["vision"]["kind"] == "clip":
        del fields["vision"]["kind"]
    return fields | {"window": config.window}


ADDED = ("pool_mode", "newline", "faster_token", "image_tokens", "max_image_tiles")
"""Fields of `VideoXLConfig` that memories of version 0.1 were saved without."""


@jax.jit
def _digest(x: Array) -> Array:
    """Two sums, uint32 [2], over the bits of all numbers, each weighted by its place."""
    size = jnp.dtype(x.dtype).itemsize
    bits = lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size])
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
        place = place * jnp.uint32(length) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)

    def total(factor: int, shift: int) -> Array:
        weight = (place * jnp.uint32(factor)) ^ (place >> shift)
        return jnp.sum((bits.astype(jnp.uint32) + jnp.uint32(1)) * (2 * weight + 1))

    return jnp.stack([total(0x9E3779B1, 15), total(0x85EBCA77, 13)])
