"""Which frames of a video are taken."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from vxl_jax.errors import MediaError


def uniform_indices(total_frames: int, count: int) -> list[int]:
    """Returns `count` frame indices from the first to the last frame, truncated to integers.

    Sampling at inference, as published: a video with fewer than `count` frames gives some of
    them more than once.

    Raises:
      ValueError: `total_frames` or `count` is below 1.
    """
    if total_frames < 1 or count < 1:
        raise ValueError(f"cannot choose {count} of {total_frames} frames")
    return [int(index) for index in np.linspace(0, total_frames - 1, count)]


def frame_indices(
    total_frames: int, average_fps: float, max_frames: int, fps: float = 1.0
) -> list[int]:
    """Returns the frame indices of a training video: `fps` a second, at most `max_frames`.

    One frame is taken at the start of every complete period of round(average_fps / fps) frames:
    a last, incomplete period gives none (`golden/preprocess`: 132 frames at 25 fps give 5), but a
    video always gives its first frame. Where that is more than `max_frames`, `uniform_indices`.

    Args:
      total_frames: frames in the video.
      average_fps: its frames per second.
      max_frames: most frames to take.
      fps: frames wanted per second of video; where the video has fewer, all frames are taken.

    Raises:
      ValueError: an argument is not positive.
    """
    if total_frames < 1 or max_frames < 1 or not (average_fps > 0 and fps > 0):
        raise ValueError(
            f"cannot sample {total_frames} frames at {average_fps} fps: "
            f"at most {max_frames}, {fps} a second"
        )
    step = max(1, round(average_fps / fps))
    count = max(1, total_frames // step)
    if count > max_frames:
        return uniform_indices(total_frames, max_frames)
    return [i * step for i in range(count)]


Sampling = Literal["capped", "uniform", "fps"]
"""How frames are chosen, see `choose_frames`."""


def choose_frames(
    frames: int,
    fps: float,
    sampling: Sampling,
    max_frames: int,
    wanted_fps: float = 1.0,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """Returns the frame indices of a training video or of a clip of it, in order.

    Args:
      frames: frames in the video.
      fps: its frames per second.
      sampling: `capped`: `wanted_fps` a second, and `max_frames` uniformly where that is more;
        `uniform`: `max_frames` uniformly, or all where there are fewer; `fps`: `wanted_fps` a
        second, and an error where that is more than `max_frames`.
      max_frames: most frames to take.
      wanted_fps: frames wanted per second.
      start: second of the video where the clip begins; its beginning if None.
      end: second where it ends; the video's end if None.

    Raises:
      MediaError: the clip is empty or outside the video, or `fps` gives too many frames. The
        message names no file.
    """
    first, last = _clip_range(frames, fps, start, end)
    count = last - first
    if sampling == "uniform":
        chosen = uniform_indices(count, min(max_frames, count))
    elif sampling == "capped":
        chosen = frame_indices(count, fps, max_frames, wanted_fps)
    else:
        step = max(1.0, fps / wanted_fps)  # not rounded: 10 a second of 24 are 10
        chosen = [int(i * step) for i in range(max(1, int(count / step + 1e-9)))]
    if len(chosen) > max_frames:
        raise MediaError(
            f"{len(chosen)} frames at {wanted_fps:g} a second are over max_frames {max_frames}; "
            "use a clip of it, or another sampling"
        )
    return [first + index for index in chosen]


def _clip_range(frames: int, fps: float, start: float | None, end: float | None) -> tuple[int, int]:
    """First frame of a clip and one past its last."""
    seconds = frames / fps
    begin, stop = 0.0 if start is None else start, seconds if end is None else end
    if begin >= seconds:
        raise MediaError(
            f"a clip from {begin:g} s on, but the video has {seconds:.2f} s; mend start and end"
        )
    if not 0 <= begin < stop:
        raise MediaError(f"a clip from {begin:g} s to {stop:g} s has no frames; mend start and end")
    first = min(round(begin * fps), frames - 1)
    return first, max(first + 1, min(round(stop * fps), frames))


def jitter_indices(
    indices: Sequence[int], end: int, share: float, rng: np.random.Generator
) -> list[int]:
    """Returns each frame index moved later at random, by up to `share` of the way to the next.

    Args:
      indices: rising frame indices.
      end: one past the last frame that may be taken.
      share: 0 (not at all) to 1.
      rng: where the randomness is from.
    """
    index = np.asarray(indices, np.int64)
    # The last one has as much room as the one before it.
    room = np.diff(index, append=min(end, 2 * index[-1] - index[-2]) if len(index) > 1 else end)
    return [
        int(i) for i in index + np.floor(rng.random(len(index)) * share * room).astype(np.int64)
    ]
