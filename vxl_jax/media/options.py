"""How pixels are decoded, where there is a choice."""

from dataclasses import dataclass
from typing import Literal

from vxl_jax.errors import ArgumentError


@dataclass(frozen=True)
class MediaOptions:
    """Choices for pixels that differ from the published pipeline; all are off by default.

    decoder: `pyav`, or `decord`, which the published code uses: it gives the same pixels for plain
        H.264, and refuses here what it is known to get wrong.
    square_pixels: stretch frames whose pixels are not square (DVD, some phones) to their shape on a
        screen. Off: as stored.
    tone_map: map HDR video (PQ and HLG) to the range of ordinary video. Off: as stored, which looks
        grey.
    color_profile: convert images with an ICC profile to sRGB. Off: the profile is ignored.

    Raises: ArgumentError for another decoder, or for an option that the decoder does not have.
    """

    decoder: Literal["pyav", "decord"] = "pyav"
    square_pixels: bool = False
    tone_map: bool = False
    color_profile: bool = False

    def __post_init__(self) -> None:
        if self.decoder not in ("pyav", "decord"):
            raise ArgumentError(f"decoder is {self.decoder!r}; it must be pyav or decord")
        for name in ("square_pixels", "tone_map", "color_profile"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if self.decoder == "decord" and (self.square_pixels or self.tone_map):
            raise ArgumentError("square_pixels and tone_map need the decoder pyav")


DEFAULT_OPTIONS = MediaOptions()
