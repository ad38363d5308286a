"""Media files to uint8 pixels, for training and inference alike. No JAX in here.

This package runs in data worker processes, where importing JAX would claim the accelerator. Pixels
leave it as uint8 (a quarter of the bytes of float32); the device normalises them.

Sizes are (width, height) in pixels, as in Pillow; arrays are [rows, columns, RGB]. What is
computed follows the published Video-XL data code and the CLIP image processor it calls.

In import order: `tiles`, `frames` (squares for the vision tower), `sampling` (which frames),
`paths`, `images`, `folder` (a folder of frames), `video` (video files), `truncated_mp4`.
"""

from vxl_jax.errors import MediaError
from vxl_jax.media.folder import PICTURES, FrameFolder
from vxl_jax.media.frames import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop
from vxl_jax.media.images import image_size, load_image
from vxl_jax.media.paths import resolve_media
from vxl_jax.media.sampling import (
    Sampling,
    choose_frames,
    frame_indices,
    jitter_indices,
    uniform_indices,
)
from vxl_jax.media.tiles import Size, best_resolution, grid_pinpoints, tile_grid, tile_image
from vxl_jax.media.video import VideoFile, VideoInfo, load_video_frames, probe_video

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "PICTURES",
    "FrameFolder",
    "MediaError",
    "Sampling",
    "Size",
    "VideoFile",
    "VideoInfo",
    "best_resolution",
    "choose_frames",
    "frame_indices",
    "grid_pinpoints",
    "image_size",
    "jitter_indices",
    "load_image",
    "load_video_frames",
    "normalize",
    "probe_video",
    "resize_and_crop",
    "resolve_media",
    "tile_grid",
    "tile_image",
    "uniform_indices",
]
