"""Which frames of a video are taken, by index or by presentation time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video are shown.

    seconds: presentation time of each frame, float64 [F], counted from the start of the file. They
        rise, except in files that were joined without rewriting their times.
    duration: second at which the last frame ends.
    fps: frames per second on average.
    """

    seconds: np.ndarray
    duration: float
    fps: float

    @classmethod
    def of_rate(cls, frames: int, fps: float) -> "Timeline":
        """The timeline of frames at one rate, from second 0 on."""
        return cls(np.arange(frames) / fps, frames / fps, fps)

    @cached_property
    def is_constant(self) -> bool:
        """Whether each frame is within half a frame of where a constant rate puts it."""
        steady = self.seconds[0] + np.arange(len(self.seconds)) / self.fps
        return bool(np.abs(self.seconds - steady).max() <= 0.5 / self.fps + 1e-9)

    @cached_property
    def tolerance(self) -> float:
        """Seconds by which a frame may miss the bounds of a clip: half of the shortest interval."""
        if self.is_constant:
            return 0.5 / self.fps
        steps = np.diff(self.seconds)
        return 0.5 * float(steps[steps > 0].min(initial=1 / self.fps))

    def clip(self, start: float | None = None, end: float | None = None) -> np.ndarray:
        """Returns the indices of the frames on the screen between two seconds, at least one.

        Args:
          start: where the clip begins; None: with the first frame.
          end: where it ends; None: with the last frame.

        Raises:
          MediaError: the clip is empty or outside the video. The message names no file.
        """
        count = len(self.seconds)
        if start is None and end is None:
            return np.arange(count)
        begin = 0.0 if start is None else start
        stop = self.duration if end is None else end
        if begin >= self.duration:
            raise MediaError(
                f"the clip starts at {begin:g} s but the video is {self.duration:.2f} s long; "
                "fix start and end"
            )
        first_second = float(self.seconds.min())
        if not 0 <= begin < stop:
            raise MediaError(
                f"the clip from {begin:g} s to {stop:g} s has no frames; fix start and end"
            )
        if stop <= first_second:
            raise MediaError(
                f"the clip ends at {stop:g} s but the first frame is shown at {first_second:.2f} "
                "s; fix start and end"
            )
        shown_before = np.flatnonzero(self.seconds <= begin + self.tolerance)
        first = int(shown_before[-1]) if len(shown_before) else 0
        inside = self.seconds < stop - self.tolerance
        if end is None:
            inside[:] = True
        inside &= self.seconds >= self.seconds[first]
        inside[first] = True
        return np.flatnonzero(inside)

    def at_rate(
        self, clip: np.ndarray, fps: float, start: float | None = None, end: float | None = None
    ) -> list[int]:
        """Returns the frames of a clip that are on the screen at its start and every 1/fps s on.

        Files that were joined begin again: each of their parts is gone through by itself.
        """
        seconds = self.seconds[clip]
        stop = self.duration if end is None else min(end, self.duration)
        taken: list[int] = []
        parts = np.split(np.arange(len(clip)), np.flatnonzero(np.diff(seconds) < 0) + 1)
        for number, part in enumerate(parts):
            shown = seconds[part]
            begin = max(0.0 if start is None else start, shown[0]) if number == 0 else shown[0]
            is_last = number == len(parts) - 1
            until = stop if is_last else shown[-1] + 1 / self.fps
            next_shown = np.append(shown[1:], max(until, shown[-1]))
            # The first point of time from which on a frame is on the screen, if there is one.
            points = begin + np.maximum(0, np.ceil((shown - begin - 1e-6) * fps)) / fps
            is_taken = points < next_shown - 1e-6
            if number == 0 and not is_taken.any():
                is_taken[0] = True
            taken += [int(index) for index in clip[part[is_taken]]]
        return taken


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a video or of a clip of it are shown.

    Attributes:
      seconds: of each frame, counted from the beginning of the file.
      begin: second at which the clip begins.
      end: second at which the clip ends.
    """

    seconds: tuple[float, ...]
    begin: float
    end: float

    def extended(self, later: "FrameTimes") -> "FrameTimes":
        """Append later frames of the same video, up to their end."""
        return FrameTimes(self.seconds + later.seconds, self.begin, later.end)


FrameSampling = Literal["capped", "uniform", "fps", "strided", "forced"]
"""How frames are chosen, see `choose_frames`."""


def choose_frames(
    timeline: Timeline,
    sampling: FrameSampling,
    max_frames: int,
    wanted_fps: float = 1.0,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """Returns the frame indices of a video or of a clip of it, in order.

    Where the frame rate is constant, `capped` and `uniform` count frames, as published. Where it
    varies, `capped` and `fps` go by presentation time: the frame on the screen at each point in
    time, once.

    Args:
      timeline: when the video's frames are shown.
      sampling: `capped`: `wanted_fps` a second, and `max_frames` evenly where that is more;
        `uniform`: `max_frames` evenly by index, or all where there are fewer; `fps`: `wanted_fps` a
        second, and an error where that is more than `max_frames`. As LLaVA-Video samples:
        `strided`: as `capped`, with a frame of a last second that is not full; `forced`:
        `max_frames` evenly by index always, some of them repeated where there are fewer.
      max_frames: most frames to take.
      wanted_fps: frames wanted per second.
      start: second of the video where the clip begins; its first frame if None.
      end: second where it ends; the video's end if None.

    Raises:
      MediaError: the clip is empty or outside the video, or `fps` gives too many frames. The
        message names no file.
    """
    clip = timeline.clip(start, end)
    count = len(clip)
    if sampling == "forced":
        return [int(clip[i]) for i in uniform_indices(count, max_frames)]
    if sampling == "uniform":
        return [int(clip[i]) for i in uniform_indices(count, min(max_frames, count))]
    if not timeline.is_constant:
        chosen = timeline.at_rate(clip, wanted_fps, start, end)
        if sampling in ("capped", "strided") and len(chosen) > max_frames:
            chosen = [chosen[i] for i in uniform_indices(len(chosen), max_frames)]
    elif sampling == "capped":
        chosen = [int(clip[i]) for i in frame_indices(count, timeline.fps, max_frames, wanted_fps)]
    elif sampling == "strided":
        chosen = [int(i) for i in clip[:: max(1, round(timeline.fps / wanted_fps))]]
        if len(chosen) > max_frames:
            chosen = [int(clip[i]) for i in uniform_indices(count, max_frames)]
    else:
        step = max(1.0, timeline.fps / wanted_fps)  # not rounded: 10 a second of 24 are 10
        chosen = [int(clip[int(i * step)]) for i in range(max(1, int(count / step + 1e-9)))]
    if len(chosen) > max_frames:
        raise MediaError(
            f"{len(chosen)} frames at {wanted_fps:g} a second are over max_frames {max_frames}; "
            "use a clip of it, or another sampling"
        )
    return chosen


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
