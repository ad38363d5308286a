"""Media files to uint8 pixels, for training and inference alike. No JAX in here.

This package runs in data worker processes, where importing JAX would claim the accelerator. Pixels
leave it as uint8 (a quarter of the bytes of float32); the device normalises them.

Sizes are (width, height) in pixels, as in Pillow; arrays are [rows, columns, RGB]. What is
computed follows the published Video-XL data code and the CLIP image processor it calls.

In import order: `options`, `heartbeat`, `tiles` (images cut up), `frames` (squares for the tower),
`sampling` (which frames), `paths`, `kinds` (what a file is), `images/` (pictures, animations,
folders of frames), `video/` (files by PyAV and decord), `reader` (all of these as one), `children/`
(the reader in a process that can be ended), `open` (what is watched, in chunks), `prefetch`.
"""

from vxl_jax.media.frames import (
    CLIP_MEAN,
    CLIP_STD,
    Resize,
    fit_square,
    normalize,
    resize_and_crop,
)
from vxl_jax.media.images.animation import Animation, is_animation
from vxl_jax.media.images.folder import PICTURES, FrameFolder
from vxl_jax.media.images.loading import image_size, load_image
from vxl_jax.media.kinds import image_format
from vxl_jax.media.options import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.media.paths import resolve_media
from vxl_jax.media.reader import (
    MEDIA_VERSION,
    FrameChoice,
    Selection,
    VideoInfo,
    VideoReader,
    load_video_frames,
    open_video,
    probe_video,
    select_frames,
)
from vxl_jax.media.sampling import (
    FrameSampling,
    Timeline,
    choose_frames,
    frame_indices,
    jitter_indices,
    uniform_indices,
)
from vxl_jax.media.tiles import Size, best_resolution, grid_pinpoints, tile_grid, tile_image
from vxl_jax.media.video.pyav import VideoFile

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "DEFAULT_OPTIONS",
    "MEDIA_VERSION",
    "PICTURES",
    "Animation",
    "FrameChoice",
    "FrameFolder",
    "FrameSampling",
    "MediaOptions",
    "Resize",
    "Selection",
    "Size",
    "Timeline",
    "VideoFile",
    "VideoInfo",
    "VideoReader",
    "best_resolution",
    "choose_frames",
    "fit_square",
    "frame_indices",
    "grid_pinpoints",
    "image_format",
    "image_size",
    "is_animation",
    "jitter_indices",
    "load_image",
    "load_video_frames",
    "normalize",
    "open_video",
    "probe_video",
    "resize_and_crop",
    "resolve_media",
    "select_frames",
    "tile_grid",
    "tile_image",
    "uniform_indices",
]
