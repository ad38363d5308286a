"""Open a container with PyAV; read packets and frames of the stream that a player shows."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from vxl_jax.errors import MediaError
from vxl_jax.media.heartbeat import beat
from vxl_jax.media.paths import printable
from vxl_jax.media.video.containers import ENCODE_AGAIN, FORMATS, why_unreadable
from vxl_jax.media.video.index import VideoIndex

_SKIPPABLE = {"h264", "hevc", "vvc", "mpeg4", "mpeg2video", "mpeg1video"}
"""Codecs of which frames that no other needs may be left out. AV1 and VP9 show hidden frames later,
which are then missing."""


@dataclass
class Wanted:
    """Presentation times of the frames that are wanted next, and the last of them."""

    times: set[int] = field(default_factory=set)
    last: int = 0


class AvInput:
    """An open file. container, stream and context are PyAV's."""

    def __init__(self, path: Path, num_threads: int = 1):
        """num_threads: threads that decode.

        Raises:
          MediaError: it cannot be opened, has no video stream, or its codec has no decoder.
        """
        import av
        from av.stream import Discard

        self.container: Any = None
        self._source = _Source(path)
        name = printable(path)
        try:
            self.container = av.open(
                self._source.opened,
                options={"protocol_whitelist": "file", "format_whitelist": FORMATS},
                metadata_errors="ignore",
            )
        except (av.error.FFmpegError, ValueError) as error:
            raise MediaError(f"{name}: {why_unreadable(path, error)}") from error
        self.stream = _choose_stream(self.container, name)
        for stream in self.container.streams:
            if stream is not self.stream:
                stream.discard = Discard.all
        self.context = self.stream.codec_context
        self.context.thread_count = num_threads
        self.context.thread_type = "AUTO" if num_threads > 1 else "NONE"

    def close(self) -> None:
        """Free the decoder and close the file."""
        if self.container is not None:
            self.container.close()
            self.container = None
        self._source.close()

    def __del__(self) -> None:
        """Closes: objects of PyAV hold each other until the garbage collector runs."""
        self.close()

    def frames(
        self,
        torn: bool = False,
        wanted: Wanted | None = None,
        packets: Any = None,
        first_key: Any = None,
        counted: bool = False,
    ) -> Iterator[Any]:
        """Yield decoded frames from the beginning, or of the packets from `seek`.

        torn: leave out the last packet. wanted: leave out frames that are not wanted and that no
        other frame needs, where the codec allows that. first_key: see `seek`. counted: end where a
        packet cannot be decoded, since the frames after it would count as others.
        """
        packets = self.container.demux(self.stream) if packets is None else packets
        packets = _without_last(packets) if torn else packets
        can_skip = self.context.name in _SKIPPABLE
        return _decode(packets, self.context, first_key, wanted if can_skip else None, counted)

    def seek(self, index: VideoIndex, key: int) -> tuple[Iterator[Any], int] | None:
        """Packets from a key frame of an index on, and its time; None where seeking leads astray.

        In program streams, FFmpeg makes up other times after a seek: the first key frame has to be
        one of the index.
        """
        import av

        try:
            self.container.seek(index.keys[key].target, stream=self.stream)
            packets = self.container.demux(self.stream)
            for packet in packets:
                beat()
                if packet.size and packet.is_keyframe:
                    if index.has_key(packet.pts, packet.size):
                        return chain([packet], packets), packet.pts
                    return None
        except av.error.FFmpegError:
            pass
        return None


def _decode(
    packets: Iterable[Any],
    context: Any,
    first_key: int | None = None,
    wanted: Wanted | None = None,
    counted: bool = False,
) -> Iterator[Any]:
    """Decoded frames of packets.

    first_key: time of the key frame that they begin with, after a seek: frames shown before it are
    not complete. wanted: leave out frames that are not wanted and that no other frame needs.

    No method of AvInput, which would then live until the garbage collector finds the circle.
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
            if counted:
                return
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

    Raises: MediaError: no video stream, or no decoder for it.
    """
    from av.stream import Disposition

    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        kinds = {"sound": container.streams.audio, "a cover picture": container.streams.video}
        only = " and ".join(kind for kind, streams in kinds.items() if streams)
        has = f"only {only}" if only else "and nothing else"
        raise MediaError(f"{name}: has no video, {has}; remove it or give another file")
    try:
        best = container.streams.best("video")
    except IndexError:  # a stream that appeared while the file was probed
        best = None
    stream = best if best in videos else videos[0]
    if stream.codec_context is None:
        raise MediaError(f"{name}: is in a codec that no decoder here knows; {ENCODE_AGAIN}")
    return stream
