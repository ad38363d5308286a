"""One reader of videos for training and inference: files, animations and folders of frames."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from vxl_jax.errors import MediaError
from vxl_jax.media.frames import Resize
from vxl_jax.media.images.animation import Animation, is_animation
from vxl_jax.media.images.folder import FrameFolder
from vxl_jax.media.kinds import image_format
from vxl_jax.media.options import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.media.paths import check_file, printable
from vxl_jax.media.sampling import FrameSampling, Timeline, choose_frames
from vxl_jax.media.video.decord_video import DecordVideo
from vxl_jax.media.video.pyav import VideoFile

MEDIA_VERSION = 2
"""Changes when other frames or tiles are found in the same files: caches are then built again."""


class VideoReader(Protocol):
    """An open video.

    Attributes:
      path: the file or folder.
      frames: frames that can be decoded.
      seconds: presentation time of each frame, float64 [frames]; of a file that was cut off, also
        of those that its container lists.
      duration: second at which the last frame ends.
      fps: frames per second on average.
      truncated: how far a file goes that was cut off, for a message; None if it is whole.
    """

    path: Path
    frames: int
    seconds: np.ndarray
    duration: float
    fps: float
    truncated: str | None

    def read(
        self,
        indices: Sequence[int],
        size: int,
        out: np.ndarray | None = None,
        resize: Resize = "crop",
    ) -> np.ndarray:
        """Frames through `fit_square`, uint8 [F, size, size, 3]; see `VideoFile.read`."""
        ...


def open_video(
    path: str | Path,
    fps: float = 1.0,
    num_threads: int = 1,
    options: MediaOptions = DEFAULT_OPTIONS,
    follow_links: bool = True,
) -> VideoReader:
    """Opens a video file, an animation, or a folder of frames.

    Args:
      path: the file or folder.
      fps: frames per second of a folder of frames.
      num_threads: threads that decode, and threads that resize; 1 is right in a data worker.
      options: how pixels are decoded.
      follow_links: whether links in a folder of frames are frames.

    Raises:
      MediaError: missing, no video, damaged, cut off before its index, or no decoder for it.
    """
    if os.path.isdir(path):  # Path.is_dir would raise for a name that is too long
        return FrameFolder(path, fps, follow_links, options)
    check_file(path)
    form = image_format(path)
    if form == "GIF" or (form is not None and is_animation(path)):
        return Animation(path, options)
    if options.decoder == "decord":
        return DecordVideo(path, num_threads)
    if find_spec("av") is None:
        if options.square_pixels or options.tone_map:
            raise MediaError(f"{printable(path)}: square_pixels and tone_map need pip install av")
        return DecordVideo(path, num_threads)
    return VideoFile(path, num_threads, options)


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video are taken: the arguments of `choose_frames`.

    max_frames: None: all.
    """

    sampling: FrameSampling = "capped"
    max_frames: int | None = None
    fps: float = 1.0
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Selection:
    """The frames that were chosen of a video.

    Attributes:
      indices: frame numbers, rising; those from `there` on cannot be decoded.
      there: frames of the video that can be decoded.
      seconds: presentation time of each chosen frame, float64 [F].
      begin: second at which the clip begins, as asked for; 0 of a whole video.
      end: second at which the video or clip ends.
      after: one past the last frame of the video or clip.
      missing: how far a file goes that was cut off before the end of what was asked for; else None.
    """

    indices: list[int]
    there: int
    seconds: np.ndarray
    begin: float
    end: float
    after: int
    missing: str | None


def select_frames(video: VideoReader, choice: FrameChoice) -> Selection:
    """Chooses frames of a video.

    Raises:
      MediaError: a clip outside the video, or more frames than allowed; it names the file.
    """
    timeline = Timeline(video.seconds, video.duration, video.fps)
    count = len(video.seconds)
    most = count if choice.max_frames is None else choice.max_frames
    try:
        clip = timeline.clip(choice.start, choice.end)
        indices = choose_frames(
            timeline, choice.sampling, most, choice.fps, choice.start, choice.end
        )
    except MediaError as error:
        raise MediaError(f"{printable(video.path)}: {error}") from None
    after = int(clip[-1]) + 1
    missing = video.truncated
    if choice.end is not None and after <= video.frames and choice.end <= video.duration:
        missing = None
    return Selection(
        indices=indices,
        there=video.frames,
        seconds=video.seconds[indices],
        begin=choice.start or 0.0,
        end=video.duration if choice.end is None else min(choice.end, video.duration),
        after=after,
        missing=missing,
    )


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself: frames, frames per second, and (width, height) in pixels."""

    frames: int
    fps: float
    width: int
    height: int


def probe_video(path: str | Path, num_threads: int = 1) -> VideoInfo:
    """Returns frame count, average frame rate and frame size of a video file; decodes one frame.

    Raises:
      MediaError: as `VideoFile`, or damaged at its start.
    """
    video = VideoFile(path, num_threads)
    ((_, frame),) = video.decode([0])
    return VideoInfo(video.frames, video.fps, frame.shape[1], frame.shape[0])


def load_video_frames(
    path: str | Path,
    indices: Sequence[int],
    size: int,
    num_threads: int = 1,
    resize: Resize = "crop",
) -> np.ndarray:
    """Decodes frames of a video, each through `fit_square`: `open_video(path).read(...)`."""
    return open_video(path, num_threads=num_threads).read(indices, size, resize=resize)
