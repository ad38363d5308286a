"""The kinds of video files, and what is in them."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import numpy as np

from tests.media.video_makers import (
    HALVES,
    Maker,
    cover,
    cut_start,
    default,
    film,
    hevc_cut_start,
    hidden_ends,
    hidden_start,
    joined,
    other_video,
    packed,
    shown_by,
    sound,
    subtitles,
    time_base,
    translucent,
    with_colours,
    x264,
    x265,
)
from tests.media.videos import FRAMES, RATE
from vxl_jax.media import VideoFile, open_video


def open_kind(name: str, num_threads: int = 1) -> VideoFile:
    video = open_video(made(name), num_threads=num_threads)
    assert isinstance(video, VideoFile)
    return video


def pictures(video: VideoFile, indices: Sequence[int] | None = None) -> list[np.ndarray]:
    """Frames at full size, all unless told."""
    return [frame for _, frame in video.decode(indices or range(video.frames))]


@dataclass(frozen=True)
class Kind:
    """A kind of video file.

    name: of the file. numbers: of its frames in the order in which they are shown. seconds: when
    each is shown, None for 1 / fps apart. fps: None where it is not constant. end: second at which
    the last frame ends; None where the container does not say. corners: see `corners_of`.
    """

    name: str
    make: Maker = field(repr=False)
    numbers: Sequence[int] = range(FRAMES)
    seconds: Sequence[float] | None = None
    fps: float | None = RATE
    end: float | None = None
    corners: str = "RGBY"

    @property
    def times(self) -> np.ndarray:
        """The second of each frame, float64 [F]."""
        if self.seconds is not None:
            return np.array(self.seconds, np.float64)
        assert self.fps is not None
        return np.arange(len(self.numbers)) / self.fps

    @property
    def duration(self) -> float | None:
        """Second at which the last frame ends, if it is known."""
        if self.end is not None or self.fps is None:
            return self.end
        return float(self.times.max()) + 1 / self.fps


_AAC, _MP2 = 1024 / 16_000, 481 / 16_000
"""Seconds by which these encoders of sound begin before the sound does."""


_EVEN = tuple(i / RATE for i in range(FRAMES))


_GAP = tuple(i / RATE + 10 * (i > 24) for i in range(FRAMES))


_OPEN = "keyint=12:min-keyint=12:open-gop=1:bframes=3:scenecut=0:b-adapt=0"


_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


_LIVE = {"live": "1"}


_LAST_LATE = [*range(49), 49 + 30 * RATE]


_TABLE = (
    # Containers of H.264.
    Kind("plain.mp4", film()),
    Kind("faststart.mp4", film(container={"movflags": "faststart"})),
    Kind("fragmented.mp4", film(container=_FRAGMENTS)),
    Kind("fragment_each.mp4", film(container={"movflags": "frag_every_frame+empty_moov"})),
    Kind("fragment_dash.mp4", film(container={"movflags": "dash+global_sidx+frag_keyframe"})),
    Kind("fragment_first.mp4", film(container={"movflags": "frag_keyframe"})),
    Kind("hybrid.mp4", film(container={"movflags": "hybrid_fragmented"})),
    Kind("plain.mov", film()),
    Kind("plain.mkv", film()),
    Kind("pipe.mkv", film(is_piped=True)),
    Kind("plain.flv", film()),
    Kind("pipe.flv", film(is_piped=True)),
    Kind("h264.avi", film()),
    Kind("plain.nut", film()),
    Kind("plain.h264", film()),
    Kind("wrong_mp4.avi", film(muxer="mp4")),
    Kind("wrong_mp4.jpg", film(muxer="mp4")),
    Kind("no_suffix", film(muxer="mp4")),
    Kind("wrong_ts.mp4", film(muxer="mpegts")),
    # Transport streams.
    Kind("plain.ts", film()),
    Kind("start10.ts", film(container={"output_ts_offset": "10"})),
    Kind("wrap.ts", film(container={"output_ts_offset": "95442.7"})),
    Kind("camera.m2ts", film(container={"mpegts_m2ts_mode": "1"})),
    Kind(
        "long_group.ts",
        film(options={"g": "170", "bf": "3"}, size=(32, 32), numbers=range(200)),
        range(200),
    ),
    Kind("cut_start.ts", cut_start, range(20, 50), [i / RATE for i in range(13, 43)]),
    Kind(
        "cut_start_odd.ts",
        partial(cut_start, before=94),  # in the middle of a packet
        range(20, 50),
        [i / RATE for i in range(13, 43)],
    ),
    Kind("cut_start_open.ts", hevc_cut_start, range(24, 50)),
    Kind(
        "joined.ts",
        joined(*(film(numbers=half) for half in HALVES)),
        seconds=[*_EVEN[:25], *_EVEN[:25]],
        fps=None,
    ),
    Kind(
        "size_changes.ts",
        joined(
            film(numbers=HALVES[0], container={"output_ts_offset": "1"}),
            film(numbers=HALVES[1], size=(96, 64), container={"output_ts_offset": "2"}),
        ),
    ),
    Kind("one_frame.ts", film(numbers=[9]), [9], seconds=[0], fps=None),
    Kind("sound.ts", film(after=sound()), seconds=[_AAC + t for t in _EVEN]),
    Kind("mpeg2.ts", film("mpeg2video", {"bf": "2"})),
    # Other containers and codecs.
    Kind("mpeg1.mpg", film("mpeg1video", {"bf": "2"})),
    Kind("mpeg2.mpg", film("mpeg2video", {"bf": "2"}, muxer="vob")),
    Kind("mpeg2_plain.mpg", film("mpeg2video", {"bf": "0"}, muxer="svcd")),
    Kind(
        "dvd.vob",
        film("mpeg2video", {"bf": "2"}, after=sound(codec="mp2")),
        seconds=[_MP2 + t for t in _EVEN],
    ),
    Kind("mpeg1.m1v", film("mpeg1video", {"bf": "2"}, muxer="mpeg1video")),
    Kind("wmv2.wmv", film("wmv2")),
    Kind("wmv1.asf", film("wmv1")),
    Kind("h263.3gp", film("h263", size=(128, 96))),
    Kind("flv1.flv", film("flv")),
    Kind("mpeg4.avi", film("mpeg4")),
    Kind("mpeg4_b.avi", film("mpeg4", {"bf": "2"})),
    Kind("packed_b.avi", packed),
    Kind("mpeg4_b.mp4", film("mpeg4", {"bf": "2"})),
    Kind("mjpeg.avi", film("mjpeg", pix_fmt="yuvj420p")),
    Kind("raw.avi", film("rawvideo", pix_fmt="bgr24")),
    Kind("raw.mov", film("rawvideo", pix_fmt="uyvy422")),
    Kind("vp8.webm", film("libvpx")),
    Kind("vp8.ogv", film("libvpx", muxer="ogg")),
    Kind("vp9.webm", film("libvpx-vp9")),
    Kind("vp9_altref.webm", film("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16"})),
    Kind("vp9.ivf", film("libvpx-vp9")),
    Kind("live.webm", film("libvpx", container=_LIVE, is_piped=True)),
    Kind("hevc.mp4", x265("open-gop=0")),
    Kind("hevc_open.mp4", x265("open-gop=1")),
    Kind("hevc_open.ts", x265("open-gop=1")),
    Kind("hevc10.mp4", x265("open-gop=1", pix_fmt="yuv420p10le")),
    Kind("hevc.mkv", x265("open-gop=1")),
    Kind("av1.mp4", film("libsvtav1")),
    Kind("av1.webm", film("libsvtav1", muxer="webm")),
    Kind("prores.mov", film("prores_ks", pix_fmt="yuv422p10le")),
    Kind("prores_alpha.mov", film("prores_ks", pix_fmt="yuva444p10le", picture=translucent)),
    Kind("qtrle.mov", film("qtrle", pix_fmt="rgb24")),
    Kind("png.mov", film("png", pix_fmt="rgb24")),
    Kind("ffv1.mkv", film("ffv1")),
    Kind("mpeg2.mxf", film("mpeg2video", {"bf": "2"})),
    Kind("hevc.hevc", x265("open-gop=1", muxer="hevc")),
    Kind("mpeg2.m2v", film("mpeg2video", {"bf": "2"}, muxer="mpeg2video")),
    Kind("mpeg4.m4v", film("mpeg4", {"bf": "2"}, muxer="m4v")),
    Kind("raw.y4m", film("wrapped_avframe", muxer="yuv4mpegpipe")),
    Kind("av1.obu", film("libsvtav1")),
    Kind("vp9.mp4", film("libvpx-vp9")),
    Kind("mpeg2.wtv", film("mpeg2video", {"bf": "2"}, muxer="wtv")),
    Kind("interlaced.mp4", x264("tff=1")),
    Kind("interlaced.ts", x264("tff=1")),
    # Groups of pictures.
    Kind("open_group.mp4", x264(_OPEN)),
    Kind("open_group.mkv", x264(_OPEN)),
    Kind("open_group.ts", x264(_OPEN)),
    Kind("intra_refresh.mp4", x264("intra-refresh=1:keyint=12:bframes=0")),
    Kind("intra_refresh.mkv", x264("intra-refresh=1:keyint=12:bframes=0")),
    Kind("pyramid.mp4", x264("bframes=7:b-pyramid=normal:b-adapt=0:keyint=30")),
    Kind(
        "long_group.mp4",
        film(options={"g": "1000"}, size=(32, 32), numbers=range(1000)),
        range(1000),
    ),
    Kind("no_b.mp4", film(options={"bf": "0"})),
    Kind("one_frame.mp4", film(numbers=[9]), [9]),
    Kind("one_frame.webm", film("libvpx", numbers=[9]), [9]),
    Kind("two_frames.mp4", film(numbers=[8, 9]), [8, 9]),
    # Pixels.
    Kind("yuv422.mp4", film(pix_fmt="yuv422p")),
    Kind("yuv444.mp4", film(pix_fmt="yuv444p")),
    Kind("yuv422_10.mp4", film(pix_fmt="yuv422p10le")),
    Kind("full_range.mp4", film(pix_fmt="yuvj420p", setup=with_colours(color_range=2))),
    Kind("grey.mp4", film(pix_fmt="gray"), corners="rgby"),
    Kind("grey.mkv", film("ffv1", pix_fmt="gray"), corners="rgby"),
    Kind("grey16.mkv", film("ffv1", pix_fmt="gray16le"), corners="rgby"),
    Kind("rgb.mp4", film("libx264rgb", pix_fmt="rgb24")),
    Kind("odd.mp4", film(pix_fmt="yuv444p", size=(171, 95))),
    Kind("odd.webm", film("libvpx", size=(171, 95))),
    Kind("odd.avi", film("mpeg4", size=(171, 95))),
    Kind("tiny.mp4", film(options={"crf": "1"}, size=(16, 16))),
    Kind("wide.mp4", film(size=(4096, 64), numbers=[8, 9]), [8, 9]),
    Kind("tall.mp4", film(size=(64, 4096), numbers=[8, 9]), [8, 9]),
    Kind("alpha_vp9.webm", film("libvpx-vp9", pix_fmt="yuva420p", picture=translucent)),
    Kind("alpha_qtrle.mov", film("qtrle", pix_fmt="argb", picture=translucent)),
    # Times.
    Kind("fps_tenth.mp4", film(rate=Fraction(1, 10), numbers=range(12)), range(12), fps=0.1),
    Kind("fps_1.mp4", film(rate=1, numbers=range(12)), range(12), fps=1),
    Kind("fps_29.mp4", film(rate=Fraction(30_000, 1001)), fps=30_000 / 1001),
    Kind("fps_29.mkv", film(rate=Fraction(30_000, 1001)), fps=30_000 / 1001),
    Kind("fps_120.mp4", film(rate=120), fps=120),
    Kind("fps_240.mp4", film(rate=240), fps=240),
    Kind("gap.mp4", film(times=[round(RATE * t) for t in _GAP]), seconds=_GAP, fps=None, end=12),
    Kind("gap.mkv", film(times=[round(RATE * t) for t in _GAP]), seconds=_GAP, fps=None, end=12),
    Kind(
        "accelerates.mp4",
        film(times=[i * i for i in range(FRAMES)], clock=time_base(250)),
        seconds=[0.004 * i * i for i in range(FRAMES)],
        fps=None,
        end=9.644,
    ),
    Kind(
        "last_late.mp4",
        film(times=_LAST_LATE),
        seconds=[t / RATE for t in _LAST_LATE],
        fps=None,
        end=32,
    ),
    Kind("start10.mkv", film(times=range(250, 300))),
    Kind("start10.mp4", film(times=range(250, 300), container={"use_editlist": "0"})),
    Kind("hidden_start.mp4", hidden_start({"g": "50", "bf": "2"}, 20), range(20, 50)),
    Kind("hidden_start.mov", hidden_start({"g": "10"}, 23), range(23, 50)),
    Kind("hidden_open.mp4", hidden_start({"x264-params": _OPEN}, 23), range(23, 50)),
    Kind("hidden_ends.mp4", hidden_ends, range(20, 35)),
    Kind(
        "late_start.mp4",
        film(times=range(75, 125), before=sound(6)),
        seconds=[3 + t for t in _EVEN],
    ),
    Kind(
        "late_start.mkv",
        film(times=range(75, 125), before=sound(6)),
        seconds=[3 + t for t in _EVEN],
    ),
    # Turned and mirrored.
    Kind("turned_90.mp4", shown_by((0, 1, -1, 0))),
    Kind("turned_180.mp4", shown_by((-1, 0, 0, -1))),
    Kind("turned_270.mp4", shown_by((0, -1, 1, 0))),
    Kind("turned_90.mov", shown_by((0, 1, -1, 0), "libx265", pix_fmt="yuv420p10le")),
    Kind("turned_90.mkv", shown_by((0, 1, -1, 0))),
    Kind("mirrored_x.mp4", shown_by((-1, 0, 0, 1))),
    Kind("mirrored_y.mp4", shown_by((1, 0, 0, -1))),
    Kind("mirrored_main.mp4", shown_by((0, 1, 1, 0))),
    Kind("mirrored_anti.mp4", shown_by((0, -1, -1, 0))),
    # Several streams.
    Kind("sound_first.mp4", film(before=sound())),
    Kind("sound_first.mkv", film(before=sound())),
    Kind("sound_longer.mp4", film(after=sound(5))),
    Kind("cover_first.mp4", film(before=cover)),
    Kind("cover.mkv", film(after=cover)),
    Kind("second_is_default.mkv", film(before=other_video, setup=default)),
    Kind("subtitles.mkv", film(before=subtitles, after=sound())),
)


KINDS = {kind.name: kind for kind in _TABLE}
assert len(KINDS) == len(_TABLE)


_folder = tempfile.TemporaryDirectory(prefix="vxl_jax_videos_")


@cache
def made(name: str) -> Path:
    """The file of a kind. It is made once, and no test may change it."""
    path = Path(_folder.name) / name
    KINDS[name].make(path)
    return path
