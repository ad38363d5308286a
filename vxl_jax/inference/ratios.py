"""Compression ratios of what is watched: one for all windows, or by second."""

from collections.abc import Mapping, Sequence
from numbers import Integral

from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import ArgumentError

Ratios = int | None | Mapping[float, int | None]
"""How frames are compressed: one ratio; or from which second on which ratio, such as
`{0: 16, 60: 4, 90: 16}`. None leaves visual tokens as they are. A window of frames has the ratio of
its first frame."""


def default_ratio(trained: Sequence[int]) -> int | None:
    """Choose the ratio of whoever names none: the largest that the model was trained with.

    `Model.watch` and the held-out questions of a training run use the same one. A memory is then
    as small, and a film as long, as the model can do. None without compression.
    """
    return max(trained, default=None)


def ratio_at(ratios: Ratios, second: float) -> int | None:
    """The ratio of a window whose first frame is at a second."""
    if isinstance(ratios, Mapping):
        # Files that were joined may have times before their start.
        ratios = ratios[max(start for start in ratios if start <= max(second, 0.0))]
    return None if ratios is None else int(ratios)


def check_ratios(ratios: Ratios, config: VideoXLConfig) -> None:
    """Refuse ratios that no window of a model can have.

    Raises: ArgumentError.
    """
    window = config.window
    pairs = ratios if isinstance(ratios, Mapping) else {0: ratios}
    if not pairs or min(pairs) > 0:
        raise ArgumentError(f"ratio {ratios!r}: say which one holds from second 0 on")
    for ratio in pairs.values():
        whole = isinstance(ratio, Integral) and not isinstance(ratio, bool)
        if ratio is not None and not (whole and 1 <= ratio <= window):
            raise ArgumentError(
                f"ratio {ratio!r}: it must be a whole number from 1 to {window}, the visual tokens "
                "of a window, or None for no compression"
            )
        if ratio is not None and config.compression is None:
            raise ArgumentError(
                f"ratio {ratio!r}: the model has no beacons to compress with; leave it out, or use "
                "None"
            )
