"""Decode video files with PyAV: the frames that a player shows, by presentation time."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vxl_jax.errors import MediaError
from vxl_jax.media.frames import Resize, fit_square
from vxl_jax.media.options import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.media.paths import printable
from vxl_jax.media.sampling import Timeline
from vxl_jax.media.video.av_input import AvInput, Wanted
from vxl_jax.media.video.av_pixels import FrameToPixels
from vxl_jax.media.video.containers import check_video, cut_off, why_unreadable
from vxl_jax.media.video.index import read_index

_NEAR = 8
"""A key frame at most this many frames ahead is reached by decoding on, which costs less than a
seek."""


class VideoFile:
    """An open video file. For one process and one thread at a time.

    Attributes:
      frames: frames that can be decoded.
      promised: frames that the container lists; more than `frames` if the file was cut off.
      seconds: presentation time of each promised frame, float64 [promised].
      duration: second at which the last promised frame ends.
      fps: frames per second on average.
      truncated: where a truncated file ends, for a message; None if it is complete.
    """

    def __init__(
        self, path: str | Path, num_threads: int = 1, options: MediaOptions = DEFAULT_OPTIONS
    ):
        """Read the container; frames are decoded only if it does not list those shown.

        num_threads: threads that decode, and threads that resize.

        Raises: MediaError: missing, no video, cut off before its index, or no decoder for it.
        """
        self.path, self.num_threads, self.options = Path(path), num_threads, options
        self._name, self._absolute = printable(path), Path(os.path.abspath(path))
        # While decoding: the frames, the index of the last one found, the time of the first one,
        # and the times that are wanted.
        self._decoding: Iterator[Any] | None = None
        self._at = -1
        self._first: int | None = None
        self._wanted = Wanted()
        self._can_seek = True
        self._input: AvInput | None = None
        self._decoding_threads = 1  # with more, not all damage is told
        check_video(path)
        is_cut = cut_off(path)
        opened = self._open()
        try:
            self._index = read_index(opened.container, opened.stream, is_cut, self._all_frames)
        except ffmpeg_errors() as error:
            raise MediaError(f"{self._name}: {why_unreadable(path, error)}") from error
        self.frames = len(self._index.pts)
        if not self.frames:
            raise MediaError(
                f"{self._name}: has a video stream without frames; fetch or encode it again"
            )
        self._is_cut = is_cut or self._index.torn
        self._set_times()
        self.truncated = self._how_far()
        self._to_pixels = FrameToPixels(options)
        if num_threads > 1:
            self._decoding_threads = num_threads
            self._open()

    def _open(self) -> AvInput:
        """Open the file again, at its beginning."""
        self._decoding = None
        if self._input is not None:
            self._input.close()
        self._input = AvInput(self._absolute, self._decoding_threads)
        return self._input

    @property
    def _opened(self) -> AvInput:
        return self._open() if self._input is None else self._input

    def _set_times(self) -> None:
        container, stream = self._opened.container, self._opened.stream
        index, base = self._index, stream.time_base
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        zero = (container.start_time or 0) / 1e6
        first = float(index.pts.min() * base)
        if abs(first - zero) < 1e-5:  # FFmpeg rounds the former to microseconds
            zero = first
        if index.timed:
            seconds = index.pts * base.numerator / base.denominator - zero
            end = float(index.end * base) - zero
        else:
            seconds = index.pts / rate
            end = self.frames / rate
        declared_rate = rate
        # The container's rate where its frames agree with it: it is exact, their times are rounded.
        if self.frames == 1 and end > seconds[0]:
            rate = 1 / float(end - seconds[0])
        if not Timeline(seconds, end, rate).is_constant:
            steps = np.diff(seconds)
            rate = float((steps > 0).sum() / steps[steps > 0].sum()) if (steps > 0).any() else rate
        self.fps, self.promised = rate, self.frames
        if self._is_cut and "mp4" in container.format.name:
            listed = [e for e in stream.index_entries if e.size and not e.is_discard]
            self.promised = max(self.frames, len(listed))
            missing = self.promised - self.frames
            # Evenly until where the tables say that the track ends; fragments tell the times alone.
            if stream.frames:
                length = (stream.start_time or 0) + (stream.duration or 0)
                track_end = float(length * base) - zero
            else:
                length = listed[-1].timestamp - listed[0].timestamp
                track_end = float(seconds[0] + length * base) + 1 / declared_rate
            step = (track_end - float(seconds[-1])) / (missing + 1)
            if step <= 0:
                step = 1 / declared_rate
            seconds = np.append(seconds, seconds[-1] + step * np.arange(1, missing + 1))
            end = float(seconds[-1]) + step
        self.seconds, self.duration = seconds, end
        if self.promised == self.frames and Timeline(seconds, end, rate).is_constant:
            self.duration = float(seconds[-1]) + 1 / rate
        if self.duration <= seconds.max():  # the container does not say how long the last one is
            self.duration = float(seconds.max()) + 1 / rate

    def _how_far(self) -> str | None:
        """Describe where a truncated file ends, for a message; None if it is complete."""
        if not self._is_cut:
            return None
        if self.promised > self.frames:
            return f"ends early, {self.frames} of its {self.promised} frames are there"
        container, stream = self._opened.container, self._opened.stream
        declared = (container.duration or 0) / 1e6
        if container.format.name == "avi":  # the header's; FFmpeg makes an estimate
            declared = stream.frames / self.fps
        whole = f" of {declared:.2f} s" if declared > self.duration + 0.5 / self.fps else ""
        return f"ends early, at {self.duration:.2f} s{whole}"

    def read(
        self,
        indices: Sequence[int],
        size: int,
        out: np.ndarray | None = None,
        resize: Resize = "crop",
    ) -> np.ndarray:
        """Decode frames, each through `fit_square`.

        Args:
          indices: frame numbers, in any order; one may occur several times.
          size: side of the result in pixels.
          out: array for the result; None allocates one.
          resize: how a frame becomes a square.

        Returns:
          uint8 [F, size, size, 3].

        Raises:
          MediaError: an index is outside the video, or a frame cannot be decoded. Frames before it
            are in `out`.
        """
        check_frames(self, indices)
        result = np.empty((len(indices), size, size, 3), np.uint8) if out is None else out
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(int(index), []).append(place)

        def put(index: int, frame: np.ndarray) -> None:
            pixels = fit_square(frame, size, resize)
            for place in places[index]:
                result[place] = pixels

        if self.num_threads == 1:
            for index, frame in self.decode(sorted(places)):
                put(index, frame)
            return result
        with ThreadPoolExecutor(self.num_threads) as pool:
            running: deque[Future[None]] = deque()
            for index, frame in self.decode(sorted(places)):
                running.append(pool.submit(put, index, frame))
                if len(running) > self.num_threads:
                    running.popleft().result()
            for future in running:
                future.result()
        return result

    def decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield frames of rising indices as (index, uint8 [H, W, 3]), upright and at full size.

        Raises:
          MediaError: a frame cannot be decoded.
        """
        pts, index = self._index.pts, indices[0]
        self._wanted.times = {int(pts[i]) for i in indices}
        self._wanted.last = int(pts[indices[-1]])
        done = False
        try:
            for index in indices:
                yield index, self._to_pixels(self._find(index), self._opened.stream)
            done = True
        except ffmpeg_errors() as error:
            raise self._damaged(index) from error
        finally:
            if not done:  # frames that were not wanted may have been skipped
                self._decoding = None

    # Finding a frame.

    def _find(self, index: int) -> Any:
        pts = int(self._index.pts[index])
        key = last_key = self._index.key_before(pts) if self._index.seekable else -1
        if self._decoding is None or index <= self._at or self._is_far(key):
            self._begin(key)
        while True:
            frame = self._next(index, pts)
            if frame is not None:
                self._at = index
                return frame
            if key < 0 or (self._first is not None and self._first <= pts):
                if self._decoding_threads > 1:  # the error of one loses frames of the others
                    self._decoding_threads, key = 1, last_key
                    self._open()
                    self._begin(key)
                    continue
                raise self._damaged(index)
            key -= 1  # it was sought too late, or the decoder needs more to begin with
            self._begin(key)

    def _damaged(self, index: int) -> MediaError:
        return MediaError(
            f"{self._name}: video cannot be decoded at frame {index} "
            f"({self.seconds[index]:.2f} s), it is damaged there; fetch it again, or take the "
            "parts before and after it"
        )

    def _is_far(self, key: int) -> bool:
        """Return whether seeking to a key frame is faster than decoding on."""
        if key < 0 or not self._can_seek:
            return False
        ahead = int(np.searchsorted(self._index.pts, self._index.keys[key].pts))
        return ahead > self._at + _NEAR * self.num_threads

    def _begin(self, key: int) -> None:
        """Start decoding at a key frame, or at the start of the file for -1."""
        self._first, self._at = None, -1
        begun = None
        if key >= 0 and self._can_seek:
            begun = self._opened.seek(self._index, key)
            self._can_seek = begun is not None
        opened = self._open() if begun is None else self._opened
        wanted = self._wanted if self._index.seekable else None
        packets, first_key = begun or (None, None)
        counted = not self._index.seekable
        self._decoding = opened.frames(self._index.torn, wanted, packets, first_key, counted)

    def _next(self, index: int, pts: int) -> Any:
        """Return the frame of an index, by its time or, in streams without times, by counting."""
        assert self._decoding is not None
        for frame in self._decoding:
            if not self._index.seekable:
                self._at += 1
                if self._at == index:
                    return frame
            elif frame.pts is not None:
                self._first = frame.pts if self._first is None else self._first
                if frame.pts >= pts:
                    return frame if frame.pts == pts else None
        return None

    def _all_frames(self, torn: bool) -> Iterator[Any]:
        return self._open().frames(torn)


def ffmpeg_errors() -> tuple[type[Exception], ...]:
    """Exceptions that PyAV raises when FFmpeg fails."""
    import av

    return (av.error.FFmpegError,)


def check_frames(video: Any, indices: Sequence[int]) -> None:
    """Check that a video has the frames asked for.

    Raises: MediaError.
    """
    if not len(indices):
        raise MediaError(f"{printable(video.path)}: no frames asked for; give at least one index")
    low, high = min(indices), max(indices)
    if low < 0 or high >= video.frames:
        why = f"{video.truncated}: " if video.truncated else ""
        raise MediaError(
            f"{printable(video.path)}: {why}frames {low}..{high} asked for, but the video has "
            f"{video.frames} (0..{video.frames - 1}); choose the indices from probe_video"
        )
