"""Video files to frames, by PyAV: the frames that a player shows, found by presentation time."""

import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from vxl_jax.errors import MediaError
from vxl_jax.media.containers import ENCODE_AGAIN, FORMATS, check_video, cut_off, why_unreadable
from vxl_jax.media.frames import resize_and_crop
from vxl_jax.media.heartbeat import beat
from vxl_jax.media.options import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.media.paths import printable
from vxl_jax.media.sampling import Timeline
from vxl_jax.media.tone_map import tone_map
from vxl_jax.media.video_index import read_index

_NEAR = 8
"""A key frame at most this many frames ahead is reached by decoding on, which costs less than a
seek."""
_SKIPPABLE = {"h264", "hevc", "vvc", "mpeg4", "mpeg2video", "mpeg1video"}
"""Codecs of which frames that no other needs may be left out. AV1 and VP9 show hidden frames later,
which are then missing."""
_TRANSFERS: dict[int, Literal["pq", "hlg"]] = {16: "pq", 18: "hlg"}
"""HDR transfer functions, by their number in ITU-T H.273."""
_FULL_RANGE, _LIMITED_WHITE = 2, 65283
"""Color range of frames that use all values, and what swscale makes of white in the others."""


class VideoFile:
    """An open video file. For one process and one thread at a time.

    Attributes:
      frames: frames that can be decoded.
      promised: frames that the container lists; more than `frames` if the file was cut off.
      seconds: presentation time of each promised frame, float64 [promised].
      duration: second at which the last promised frame ends.
      fps: frames per second on average.
      truncated: how far a file goes that was cut off, for a message; None if it is whole.
    """

    def __init__(
        self, path: str | Path, num_threads: int = 1, options: MediaOptions = DEFAULT_OPTIONS
    ):
        """Reads the container; decodes only where that cannot tell which frames are shown.

        num_threads: threads that decode, and threads that resize.

        Raises: MediaError: missing, no video, cut off before its index, or no decoder for it.
        """
        # While decoding: the frames, the index of the last one found, the time of the first one,
        # and the times that are wanted.
        self._decoding: Iterator[Any] | None = None
        self._at, self._first = -1, None
        self._wanted = _Wanted()
        self._can_seek = True
        self._container: Any = None
        self._source: _Source | None = None
        self.path, self.num_threads, self.options = Path(path), num_threads, options
        self._name = printable(path)
        check_video(path)
        self._decoding_threads = 1  # with more, not all damage is told
        self._open()
        is_cut = cut_off(path)
        try:
            self._index = read_index(self._container, self._stream, is_cut, self._all_frames)
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
        self._matrix: tuple[int, ...] | None = None
        self._reformatter = video_reformatter()
        if num_threads > 1:
            self._decoding_threads = num_threads
            self._open()

    def _open(self) -> None:
        import av
        from av.stream import Discard

        self.close()
        self._source = _Source(self.path)
        try:
            self._container = av.open(
                self._source.opened,
                options={"protocol_whitelist": "file", "format_whitelist": FORMATS},
                metadata_errors="ignore",
            )
        except (av.error.FFmpegError, ValueError) as error:
            raise MediaError(f"{self._name}: {why_unreadable(self.path, error)}") from error
        self._stream = _choose_stream(self._container, self._name)
        for stream in self._container.streams:
            if stream is not self._stream:
                stream.discard = Discard.all
        context = self._stream.codec_context
        context.thread_count = self._decoding_threads
        context.thread_type = "AUTO" if self._decoding_threads > 1 else "NONE"

    def close(self) -> None:
        """Frees the decoder and the file; reading opens them again."""
        self._decoding = None
        if self._container is not None:
            self._container.close()
            self._container = None
        if self._source is not None:
            self._source.close()

    def __del__(self) -> None:
        """Closes: objects of PyAV hold each other until the garbage collector runs."""
        self.close()

    def _set_times(self) -> None:
        index, base = self._index, self._stream.time_base
        rate = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        zero = (self._container.start_time or 0) / 1e6
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
        if self._is_cut and "mp4" in self._container.format.name:
            listed = [e for e in self._stream.index_entries if e.size and not e.is_discard]
            self.promised = max(self.frames, len(listed))
            missing = self.promised - self.frames
            # Evenly until where the tables say that the track ends; fragments tell the times alone.
            if self._stream.frames:
                length = (self._stream.start_time or 0) + (self._stream.duration or 0)
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
        """How far a file goes that was cut off, for a message; None if it is whole."""
        if not self._is_cut:
            return None
        if self.promised > self.frames:
            return f"ends early, {self.frames} of its {self.promised} frames are there"
        declared = (self._container.duration or 0) / 1e6
        if (
            self._container.format.name == "avi"
        ):  # FFmpeg estimates the duration; this is the header's
            declared = self._stream.frames / self.fps
        whole = f" of {declared:.2f} s" if declared > self.duration + 0.5 / self.fps else ""
        return f"ends early, at {self.duration:.2f} s{whole}"

    def read(self, indices: Sequence[int], size: int, out: np.ndarray | None = None) -> np.ndarray:
        """Decodes frames, each through `resize_and_crop`.

        Args:
          indices: frame numbers, in any order; one may occur several times.
          size: side of the result in pixels.
          out: where the result goes; a new array if None.

        Returns:
          uint8 [F, size, size, 3].

        Raises:
          MediaError: an index is outside the video, or a frame cannot be decoded. Frames before it
            are in `out`.
        """
        check_indices(self, indices)
        result = np.empty((len(indices), size, size, 3), np.uint8) if out is None else out
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(int(index), []).append(place)

        def resize(index: int, frame: np.ndarray) -> None:
            pixels = resize_and_crop(frame, size)
            for place in places[index]:
                result[place] = pixels

        if self.num_threads == 1:
            for index, frame in self.decode(sorted(places)):
                resize(index, frame)
            return result
        with ThreadPoolExecutor(self.num_threads) as pool:
            running: deque[Future[None]] = deque()
            for index, frame in self.decode(sorted(places)):
                running.append(pool.submit(resize, index, frame))
                if len(running) > self.num_threads:
                    running.popleft().result()
            for future in running:
                future.result()
        return result

    def decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields frames of rising indices as (index, uint8 [H, W, 3]), upright and at full size.

        Raises:
          MediaError: a frame cannot be decoded.
        """
        pts = self._index.pts
        self._wanted.times = {int(pts[i]) for i in indices}
        self._wanted.last = int(pts[indices[-1]])
        done = False
        try:
            for index in indices:
                yield index, self._picture(self._find(index))
            done = True
        except ffmpeg_errors() as error:
            raise MediaError(f"{self._name}: {why_unreadable(self.path, error)}") from error
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
                raise MediaError(
                    f"{self._name}: video cannot be decoded at frame {index} "
                    f"({self.seconds[index]:.2f} s), it is damaged there; fetch it again, or take "
                    "the parts before and after it"
                )
            key -= 1  # it was sought too late, or the decoder needs more to begin with
            self._begin(key)

    def _is_far(self, key: int) -> bool:
        """Whether a key frame is so far ahead that seeking is faster than decoding on."""
        if key < 0 or not self._can_seek:
            return False
        ahead = int(np.searchsorted(self._index.pts, self._index.keys[key].pts))
        return ahead > self._at + _NEAR * self.num_threads

    def _begin(self, key: int) -> None:
        """Begin to decode at a key frame; -1: at the beginning of the file."""
        self._first, self._at = None, -1
        packets, first_key = (
            self._packets_from(key) if key >= 0 and self._can_seek else (None, None)
        )
        if packets is None:
            self._open()
            packets = self._container.demux(self._stream)
        if self._index.torn:
            packets = _without_last(packets)
        context = self._stream.codec_context
        can_skip = self._index.seekable and context.name in _SKIPPABLE
        self._decoding = _frames(packets, context, first_key, self._wanted if can_skip else None)

    def _packets_from(self, key: int) -> tuple[Iterator[Any] | None, int | None]:
        """Packets from a key frame on, and its time; None where seeking leads astray.

        In program streams, FFmpeg makes up other times after a seek: the first key frame has to be
        one of the index.
        """
        import av

        try:
            self._container.seek(self._index.keys[key].target, stream=self._stream)
            packets = self._container.demux(self._stream)
            for packet in packets:
                beat()
                if packet.size and packet.is_keyframe:
                    if self._index.has_key(packet.pts, packet.size):
                        return chain([packet], packets), packet.pts
                    break
        except av.error.FFmpegError:
            pass
        self._can_seek = False
        return None, None

    def _next(self, index: int, pts: int) -> Any:
        """The frame of an index, by its time or, in streams without times, by counting."""
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
        self._open()
        packets = self._container.demux(self._stream)
        return _frames(_without_last(packets) if torn else packets, self._stream.codec_context)

    # A frame as a picture.

    def _picture(self, frame: Any) -> np.ndarray:
        transfer = _TRANSFERS.get(int(frame.color_trc)) if self.options.tone_map else None
        if transfer is None:
            # With more threads than one, swscale is slower by far.
            pixels = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        else:
            deep = self._reformatter.reformat(frame, format="rgb48le", threads=1).to_ndarray()
            white = 65535 if frame.color_range == _FULL_RANGE else _LIMITED_WHITE
            pixels = tone_map(deep * np.float32(1 / white), transfer)
        if self._matrix is None:  # once: asking a frame for its side data keeps it from being freed
            self._matrix = _display_matrix(frame)
        if self.options.square_pixels:
            pixels = _with_square_pixels(pixels, self._pixel_aspect())
        return np.ascontiguousarray(_UPRIGHT.get(self._matrix, _as_it_is)(pixels))

    def _pixel_aspect(self) -> float:
        """Width of a stored pixel by its height."""
        context = self._stream.codec_context
        ratio = self._stream.sample_aspect_ratio or context.sample_aspect_ratio
        return float(ratio) if ratio else 1.0


@dataclass
class _Wanted:
    """Presentation times of the frames that are wanted next, and the last of them."""

    times: set[int] = field(default_factory=set)
    last: int = 0


def _frames(
    packets: Iterable[Any],
    context: Any,
    first_key: int | None = None,
    wanted: _Wanted | None = None,
) -> Iterator[Any]:
    """Decoded frames of packets.

    first_key: time of the key frame that they begin with, after a seek: frames shown before it are
    not complete. wanted: leave out frames that are not wanted and that no other frame needs.

    No method of VideoFile, which would then live until the garbage collector finds the circle.
    """
    import av

    skipping = False
    context.skip_frame = "DEFAULT"
    for packet in packets:
        beat()
        if wanted is not None:
            unwanted = (
                packet.size > 0
                and packet.pts is not None
                and packet.pts <= wanted.last
                and packet.pts not in wanted.times
            )
            if unwanted != skipping:
                skipping = unwanted
                context.skip_frame = "NONREF" if unwanted else "DEFAULT"
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:  # damaged; what follows may be sound
            continue
        for frame in frames:
            beat()
            if first_key is None or (frame.pts is not None and frame.pts >= first_key):
                yield frame


def _without_last(packets: Iterable[Any]) -> Iterator[Any]:
    """All packets but the last one that has data."""
    held = None
    for packet in packets:
        if packet.size:
            if held is not None:
                yield held
            held = packet
        else:
            yield packet


def video_reformatter() -> Any:
    """A converter of pixel formats, which keeps its tables from frame to frame."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def ffmpeg_errors() -> tuple[type[Exception], ...]:
    """What PyAV raises where FFmpeg fails."""
    import av

    return (av.error.FFmpegError,)


def check_indices(video: Any, indices: Sequence[int]) -> None:
    """Refuses frame numbers that a video does not have.

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


class _Source:
    """What PyAV opens: a path that is taken as it is, or a file without a name."""

    def __init__(self, path: Path):
        """An absolute path, since a name with a colon would be taken for a protocol."""
        absolute = os.path.abspath(path)
        self.opened: Any = f"file:{absolute}"
        self._file: BinaryIO | None = None
        # FFmpeg takes names with % for sequences of images, and all names for UTF-8.
        if "%" in absolute or not _is_utf8(absolute):
            file = self._file = open(path, "rb")  # noqa: SIM115
            self.opened = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)

    def close(self) -> None:
        """Close the file, if it is one."""
        if self._file is not None:
            self._file.close()


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _choose_stream(container: Any, name: str) -> Any:
    """The video stream that a player shows.

    Raises: MediaError: there is none, or no decoder for it.
    """
    from av.stream import Disposition

    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        kinds = {"sound": container.streams.audio, "a cover picture": container.streams.video}
        only = " and ".join(kind for kind, streams in kinds.items() if streams)
        has = f"only {only}" if only else "and nothing else"
        raise MediaError(f"{name}: has no video, {has}; remove it or give another file")
    best = container.streams.best("video")
    stream = best if best in videos else videos[0]
    if stream.codec_context is None:
        raise MediaError(f"{name}: is in a codec that no decoder here knows; {ENCODE_AGAIN}")
    return stream


def _display_matrix(frame: Any) -> tuple[int, ...]:
    """Signs of the four numbers that turn and mirror a frame."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack("<5i", bytes(data)[:20])
            return tuple(int(np.sign(x)) for x in (a, b, c, d))
    return 1, 0, 0, 1


def _as_it_is(pixels: np.ndarray) -> np.ndarray:
    return pixels


_UPRIGHT: dict[tuple[int, ...], Callable[[np.ndarray], np.ndarray]] = {
    (-1, 0, 0, -1): lambda x: x[::-1, ::-1],
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1),
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: np.rot90(x, 2).swapaxes(0, 1),
}
"""Turns and mirror images, by the signs of the display matrix."""


def _with_square_pixels(pixels: np.ndarray, aspect: float) -> np.ndarray:
    if abs(aspect - 1) < 1e-3 or not 1 / 32 < aspect < 32:
        return pixels
    height, width, _ = pixels.shape
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(
        image.resize((max(1, round(width * aspect)), height), Image.Resampling.BICUBIC)
    )
