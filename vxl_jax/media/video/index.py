"""Index the frames of a video file, in presentation order, from its packets.

Frames are decoded only if the packets do not give their order.
Times are integers in the stream's time base.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from vxl_jax.media.heartbeat import beat

_PACKED = re.compile(rb"DivX\d+[bB]\d+p")
"""What encoders that pack two frames into one packet of an AVI write into the first one."""

_RAW = {"h264", "hevc", "vvc", "obu", "m4v", "mpegvideo", "vc1", "h263"}
"""Streams without a container, which have no times; FFmpeg makes some up."""

_NEVER_TORN = {"mpegts", "mpeg", "asf"}
"""Containers of which FFmpeg does not tell that the last packet is incomplete."""
_LONGEST_TAIL = 600
"""Packets from the last key frame on that are decoded to find out; with more, it counts as torn."""


@dataclass(frozen=True)
class KeyFrame:
    """A frame at which decoding can begin: its time, where to seek, and the bytes of its packet."""

    pts: int
    target: int
    size: int


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a stream in the order in which they are shown.

    pts: presentation time of each frame, int64 [F]. They rise if `seekable`; otherwise frames are
        found by decoding from the beginning: several have the same time, or the container has none.
    keys: frames at which decoding can begin, by time.
    timed: whether `pts` are times of the container. If not, they only count the frames.
    end: when the last frame ends.
    torn: whether the last packet is incomplete; its frame is not counted.
    """

    pts: np.ndarray
    keys: Sequence[KeyFrame] = ()
    end: int = 0
    seekable: bool = True
    timed: bool = True
    torn: bool = False

    def has_key(self, pts: int | None, size: int) -> bool:
        """Return whether a packet holds a key frame."""
        place = -1 if pts is None else self.key_before(pts)
        return place >= 0 and (self.keys[place].pts, self.keys[place].size) == (pts, size)

    def key_before(self, pts: int) -> int:
        """Find the last key frame, by its index in `keys`, that is not after a time; -1 if none."""
        return bisect_right(self.keys, pts, key=lambda key: key.pts) - 1


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    duration: int
    size: int
    is_key: bool


def read_index(
    container: Any, stream: Any, is_cut: bool, decode: Callable[[bool], Iterator[Any]]
) -> VideoIndex:
    """Build the frame index of a stream.

    container, stream: of PyAV, at the beginning. is_cut: whether the file ends in the middle of its
        structure. decode: opens the file again and gives its decoded frames, without its last
        packet if the argument is true; called only if the packets do not tell which frames are
        shown.
    """
    name = container.format.name
    packets, torn, packed = _read_packets(container, stream, is_cut and name in _NEVER_TORN)
    if torn and packets:
        packets.pop()
    if packed or name in _RAW:
        return _decoded(decode(torn), torn, timed=False)
    if name == "avi" and any(p.pts != p.dts for p in packets):
        # No presentation times: FFmpeg makes some up, which are wrong where frames are reordered.
        return VideoIndex(np.arange(len(packets)), seekable=False, timed=False, torn=torn)
    timed = [(p.pts, p) for p in packets if p.pts is not None]
    pts = np.sort(np.array([time for time, _ in timed], np.int64))
    if len(timed) < len(packets) or _is_joined(packets) or (np.diff(pts) == 0).any():
        return _decoded(decode(torn), torn)
    by_pts = "matroska" in name  # other containers are searched by decoding time
    keys = sorted(
        (
            KeyFrame(time, time if by_pts or p.dts is None else p.dts, p.size)
            for time, p in timed
            if p.is_key
        ),
        key=lambda key: key.pts,
    )
    last, packet = max(timed, key=lambda pair: pair[0], default=(0, None))
    end = last + (packet.duration if packet else 0)
    listed = (stream.start_time or 0) + (stream.duration or 0)
    if "mp4" in name and last < listed < end:  # an MP4's packet lasts until the next is decoded
        end = listed
    if len(pts) and (not keys or keys[0].pts > pts[0]):
        pts = _without_undecodable_start(pts, keys, decode(torn))
    return VideoIndex(pts, keys, end, torn=torn)


def _read_packets(
    container: Any, stream: Any, may_be_torn: bool
) -> tuple[list[_Packet], bool, bool]:
    """Packets of shown frames; whether the last is incomplete; whether B frames are packed.

    may_be_torn: decode the last packet, since the container does not tell whether it is complete.
    """
    packets: list[_Packet] = []
    torn = packed = False
    tail: list[Any] = []  # from the last key frame on
    for packet in container.demux(stream):
        beat()
        if not packet.size or packet.is_discard:  # the end; hidden by an edit list
            continue
        torn = packet.is_corrupt
        if not packets and stream.codec_context.name == "mpeg4":
            extradata = stream.codec_context.extradata or b""
            packed = bool(_PACKED.search(extradata + bytes(packet)))
        packets.append(
            _Packet(packet.pts, packet.dts, packet.duration or 0, packet.size, packet.is_keyframe)
        )
        if may_be_torn:
            if packet.is_keyframe:
                tail.clear()
            if len(tail) < _LONGEST_TAIL:
                tail.append(packet)
    if may_be_torn and packets and not torn:
        torn = len(tail) == _LONGEST_TAIL or _is_last_torn(tail, stream.codec_context)
    return packets, torn, packed


def _is_last_torn(packets: Sequence[Any], context: Any) -> bool:
    """Whether a decoder finds the last of some packets incomplete; that of HEVC does not tell."""
    import av

    if context.name == "hevc":
        return True

    for packet in (*packets, None):
        try:
            frames = context.decode(packet)
        except av.error.InvalidDataError:
            continue
        for frame in frames:
            beat()
            if frame.pts == packets[-1].pts:
                return bool(frame.is_corrupt)
    return True


def _is_joined(packets: Iterable[_Packet]) -> bool:
    """Whether decoding times fall: files that were joined start again."""
    times = [p.dts for p in packets if p.dts is not None]
    return any(later < time for time, later in pairwise(times))


def _without_undecodable_start(
    pts: np.ndarray, keys: Sequence[KeyFrame], frames: Iterator[Any]
) -> np.ndarray:
    """Leaves out frames shown before the first key frame that a decoder does not give.

    A recording that begins in the middle has them. Decoding up to the second key frame tells.
    """
    enough = keys[1].pts if len(keys) > 1 else None
    decoded: list[int] = []
    for frame in frames:
        if frame.pts is not None:
            decoded.append(frame.pts)
            if enough is not None and frame.pts >= enough:
                break
    if not decoded:
        return pts[:0]
    known = pts <= max(decoded)
    return np.concatenate([np.unique(np.array(decoded, np.int64)), pts[~known]])


def _decoded(frames: Iterator[Any], torn: bool, timed: bool = True) -> VideoIndex:
    """Build the index by decoding all frames."""
    times = [frame.pts for frame in frames]
    if not timed or None in times:
        return VideoIndex(np.arange(len(times)), seekable=False, timed=False, torn=torn)
    return VideoIndex(
        np.array(times, np.int64), end=max(times, default=0), seekable=False, torn=torn
    )
