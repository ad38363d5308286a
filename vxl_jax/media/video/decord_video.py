"""Decode video files with decord, the optional decoder of the published code.

decord 0.6 seeks by frame numbers that are wrong for some kinds of files. Those kinds are refused.
"""

import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vxl_jax.errors import MediaError
from vxl_jax.media.frames import Resize, fit_square
from vxl_jax.media.heartbeat import beat
from vxl_jax.media.kinds import first_bytes
from vxl_jax.media.paths import printable
from vxl_jax.media.sampling import Timeline
from vxl_jax.media.video.containers import boxes, check_video, container_of, cut_off
from vxl_jax.media.video.pyav import VideoFile, check_frames

_BYTES_AT_ONCE = 200_000_000
"""Bytes of frames decoded at a stretch. Fewer cost time where frames lie closer than key frames."""

_COMPARED, _MOST_DIFFERENT = 112, 3.0
"""Side of the frames that are compared with PyAV's, and their largest mean difference."""

_WRONG = {
    "ts": "an MPEG transport stream",
    "ps": "an MPEG program stream",
    "asf": "a Windows Media file",
}
_OTHER = "use the decoder pyav, or encode it again (ffmpeg -i IN -c:v libx264 OUT.mp4)"


class DecordVideo:
    """An open video file, with the attributes of `VideoFile`."""

    truncated: str | None = None

    def __init__(self, path: str | Path, num_threads: int = 1):
        """Open the file and read its container.

        Raises: MediaError: missing, no video, damaged, cut off, or a kind that decord gets wrong.
        """
        check_video(path)
        name = printable(path)
        self.path, self.num_threads = Path(path), num_threads
        kind = container_of(first_bytes(path))
        fault = _WRONG.get(kind or "")
        if fault is None and kind == "mp4" and _hides_frames(path):
            fault = "an MP4 whose edit list hides frames"
        if fault is not None:
            raise MediaError(f"{name}: is {fault}, of which decord gives wrong frames; {_OTHER}")
        if kind is not None and cut_off(path):
            raise MediaError(f"{name}: ends early, and decord cannot read that; {_OTHER}")
        try:
            # Here, since there are platforms without decord.
            from decord import VideoReader, logging
        except ImportError as error:
            raise MediaError(
                f"{name}: decord is not installed here; use the decoder pyav, or pip install decord"
            ) from error

        logging.set_level(logging.QUIET)  # FFmpeg writes a line for each damaged part of a frame
        try:
            self._reader = VideoReader(str(path), num_threads=num_threads)
            self.fps = float(self._reader.get_avg_fps())
            self.frames = len(self._reader)
            times = self._reader.get_frame_timestamp(range(self.frames))
        except Exception as error:  # decord raises RuntimeError or its own DECORDError
            raise MediaError(f"{name}: cannot be read by decord; {_OTHER}") from error
        if not self.frames or not (np.isfinite(self.fps) and self.fps > 0):
            raise MediaError(f"{name}: has no frames or no frame rate in decord; {_OTHER}")
        order = np.argsort(times[:, 0], kind="stable")  # decord gives the order of decoding
        if not (np.isfinite(times).all() and (np.abs(times) < 1e9).all()):
            raise MediaError(f"{name}: has no times for decord, which gives wrong frames; {_OTHER}")
        self.seconds = times[order, 0].astype(np.float64)
        self.duration = max(float(times[order[-1], 1]), float(self.seconds[-1] + 0.5 / self.fps))
        if Timeline(self.seconds, self.duration, self.fps).is_constant:
            self.seconds = self.seconds[0] + np.arange(self.frames) / self.fps
            self.duration = float(self.seconds[-1] + 1 / self.fps)
        elif self.frames > 1:
            self.fps = (self.frames - 1) / float(self.seconds[-1] - self.seconds[0])

        if find_spec("av") is not None and not self._agrees(VideoFile(path)):
            raise MediaError(
                f"{name}: decord gives other frames, or other times, than are shown; {_OTHER}"
            )

    def _agrees(self, shown: VideoFile) -> bool:
        """Whether frames and times are those of PyAV; four frames are compared."""
        if shown.frames != self.frames:
            return False
        if np.abs(shown.seconds - self.seconds).max() > 0.5 / self.fps:
            return False
        some = sorted({self.frames * i // 4 for i in (1, 2, 3)} | {self.frames - 1})
        ours, theirs = self.read(some, _COMPARED), shown.read(some, _COMPARED)
        difference = np.abs(ours.astype(np.int16) - theirs).mean((1, 2, 3))
        return bool(difference.max() < _MOST_DIFFERENT)

    def read(
        self,
        indices: Sequence[int],
        size: int,
        out: np.ndarray | None = None,
        resize: Resize = "crop",
    ) -> np.ndarray:
        """Decode frames; see `VideoFile.read`."""
        check_frames(self, indices)
        result = np.empty((len(indices), size, size, 3), np.uint8) if out is None else out

        def put(place: int, frame: np.ndarray) -> None:
            result[place] = fit_square(frame, size, resize)

        done = 0
        with ThreadPoolExecutor(self.num_threads) as pool:
            while done < len(indices):
                frames = self._read_some(indices[done:])
                list(pool.map(put, range(done, done + len(frames)), frames))
                done += len(frames)
        return result

    def decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield frames; see `VideoFile.decode`."""
        for index in indices:
            yield index, self._read_some([index])[0]

    def _read_some(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Frames of the first indices, uint8 [H, W, 3]: at most `_BYTES_AT_ONCE`, or one.

        decord's thread decodes on while its caller does something else, and keeps every frame
        (decord issue 208): several GB of a 3840 x 2160 video. So frames are fetched without a
        pause, one by one (`get_batch` lets it run ahead too), and a seek at the end stops it.
        """
        try:
            frames: list[np.ndarray] = []
            for index in indices:
                frame: Any = self._reader[int(index)].asnumpy()
                beat()
                # Rows of narrow videos are padded, and decord takes the padding for more channels.
                height, width, _ = frame.shape
                frames.append(frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3))
                if (len(frames) + 1) * frames[0].nbytes > _BYTES_AT_ONCE:
                    break
            self._reader.seek(0)
            return frames
        except Exception as error:
            raise MediaError(
                f"{printable(self.path)}: video cannot be decoded by decord near frame "
                f"{indices[0]}; {_OTHER}"
            ) from error


def _hides_frames(path: str | Path) -> bool:
    """Whether an MP4's edit list begins later than its first frame is shown."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for kind, start, end in boxes(data):
            if kind == b"moov" and end <= len(data):
                return any(
                    _track_hides_frames(data, first, last)
                    for child, first, last in boxes(data, start, end)
                    if child == b"trak"
                )
    return False


def _track_hides_frames(data: mmap.mmap, start: int, end: int) -> bool:
    found = _children(data, start, end)
    if (
        not {b"elst", b"hdlr"} <= {*found}
        or data[found[b"hdlr"] + 8 : found[b"hdlr"] + 12] != b"vide"
    ):
        return False
    place = found[b"elst"]
    wide = data[place] == 1
    first_shown = 0
    if b"ctts" in found:
        first_shown = int.from_bytes(data[found[b"ctts"] + 12 : found[b"ctts"] + 16], signed=True)
    for edit in range(int.from_bytes(data[place + 4 : place + 8])):
        at = place + 8 + edit * (20 if wide else 12) + (8 if wide else 4)
        media_time = int.from_bytes(data[at : at + (8 if wide else 4)], signed=True)
        if media_time > first_shown:
            return True
    return False


def _children(data: mmap.mmap, start: int, end: int) -> dict[bytes, int]:
    """Where the content of a track's tables begins."""
    found: dict[bytes, int] = {}
    for kind, first, last in boxes(data, start, end):
        if kind in {b"edts", b"mdia", b"minf", b"stbl"}:
            found = _children(data, first, last) | found
        else:
            found.setdefault(kind, first)
    return found
