"""Video files to frames."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vxl_jax.errors import MediaError
from vxl_jax.media.frames import resize_and_crop
from vxl_jax.media.paths import check_file

# Frames decoded at a stretch. For 3840 x 2160: 8 frames, and 0.6 to 0.95 GB at the process's peak,
# measured. Fewer cost time where the frames lie closer than key frames do.
_BYTES_AT_ONCE = 200_000_000
# FFmpeg follows what is in these to other files.
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]", b"<?xml", b"<MPD", b"v=0", b"[Reference]")


@dataclass(frozen=True)
class VideoInfo:
    """What a video's container and first frame say: frames, frames per second, pixels."""

    frames: int
    fps: float
    width: int
    height: int


def probe_video(path: str | Path, num_threads: int = 1) -> VideoInfo:
    """Returns frame count, average frame rate and frame size; decodes one frame.

    Raises:
      MediaError: missing, no video, no frames, no frame rate, or damaged at its start.
    """
    video = VideoFile(path, num_threads)
    height, width, _ = _read_frames(video._reader, path, [0])[0].shape
    return VideoInfo(frames=video.frames, fps=video.fps, width=width, height=height)


def load_video_frames(
    path: str | Path, indices: Sequence[int], size: int, num_threads: int = 1
) -> np.ndarray:
    """Decodes frames of a video, each through `resize_and_crop`.

    Few frames at a time stand in memory at full size.

    Args:
      path: the video file.
      indices: frame numbers, in any order; one may stand several times.
      size: side of the result in pixels.
      num_threads: decoding threads; 1 is right in a data worker.

    Returns:
      uint8 [F, size, size, 3].

    Raises:
      MediaError: missing, no video, damaged, or an index past the end.
    """
    return VideoFile(path, num_threads).read(indices, size)


class VideoFile:
    """An open video: `frames`, `fps` (frames a second), and its pixels. For one process only."""

    def __init__(self, path: str | Path, num_threads: int = 1):
        """Reads the container. Raises: MediaError: missing, no video, no frames or frame rate.

        num_threads: that decode, and that resize.
        """
        self.path, self._reader = Path(path), _open_video(path, num_threads)
        self.num_threads = num_threads
        self.frames, self.fps = len(self._reader), float(self._reader.get_avg_fps())
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise MediaError(f"{path}: video with a frame rate of {self.fps}; encode it again")

    def read(self, indices: Sequence[int], size: int, out: np.ndarray | None = None) -> np.ndarray:
        """As `load_video_frames`; into `out` if it is given."""
        _check_indices(self._reader, self.path, indices)
        result = np.empty((len(indices), size, size, 3), np.uint8) if out is None else out

        def resize(place: int, frame: np.ndarray) -> None:
            result[place] = resize_and_crop(frame, size)

        done = 0
        with ThreadPoolExecutor(self.num_threads) as pool:
            many = pool.map if self.num_threads > 1 else map
            while done < len(indices):
                frames = _read_frames(self._reader, self.path, indices[done:])
                list(many(resize, range(done, done + len(frames)), frames))
                done += len(frames)
        return result


def _open_video(path: str | Path, num_threads: int) -> Any:
    """Opens a decord reader; for one call only, since one opened before a fork hangs after it."""
    # Imported here: there are platforms without decord, and images do not need it.
    from decord import VideoReader, logging

    logging.set_level(logging.QUIET)  # FFmpeg writes a line for each damaged part of a frame
    check_file(path)
    try:
        with open(path, "rb") as file:
            beginning = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror})") from error
    if beginning.startswith(_PLAYLISTS):
        raise MediaError(f"{path}: is a playlist of other files, not a video; replace it")
    try:
        reader = VideoReader(str(path), num_threads=num_threads)
    except Exception as error:  # decord raises RuntimeError or its own DECORDError.
        raise _video_error(path, "not a readable video", error) from error
    if len(reader) == 0:
        raise MediaError(f"{path}: video without frames; replace it")
    return reader


def _check_indices(reader: Any, path: str | Path, indices: Sequence[int]) -> None:
    if not len(indices):
        raise MediaError(f"{path}: no frames asked for; give at least one index")
    low, high = min(indices), max(indices)
    if low < 0 or high >= len(reader):
        raise MediaError(
            f"{path}: frames {low}..{high} asked for, but the video has {len(reader)} "
            f"(0..{len(reader) - 1}); choose the indices from probe_video"
        )


def _read_frames(reader: Any, path: str | Path, indices: Sequence[int]) -> list[np.ndarray]:
    """Returns frames as uint8 [H, W, 3], of the first indices: at most `_BYTES_AT_ONCE`, or one.

    decord's thread decodes on while its caller does something else, and keeps every frame
    (decord issue 208): several GB of a 3840 x 2160 video. So frames are fetched without a pause,
    one by one (`get_batch` lets it run ahead too), and a seek at the end stops the thread.
    """
    try:
        frames = []
        for index in indices:
            frame = reader[int(index)].asnumpy()
            # Rows of narrow videos are padded, and decord takes the padding for more channels.
            height, width, _ = frame.shape
            frames.append(frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3))
            if (len(frames) + 1) * frames[0].nbytes > _BYTES_AT_ONCE:
                break
        reader.seek(0)
        return frames
    except Exception as error:  # As in `_open_video`.
        raise _video_error(path, "video cannot be decoded", error) from error


def _video_error(path: str | Path, fault: str, error: Exception) -> MediaError:
    # decord appends a C++ stack trace to its message.
    reason = str(error).partition("\n")[0]
    return MediaError(f"{path}: {fault} ({reason}); truncated or damaged, replace it")
