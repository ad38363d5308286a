"""Media of a record: opened for their lengths, then read for their pixels."""

from pathlib import Path

import numpy as np

from train.config import DataSection
from train.data.records.sample import Clip, VisualBlock
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import MediaError
from vxl_jax.media import (
    FrameChoice,
    grid_pinpoints,
    image_size,
    jitter_indices,
    load_image,
    open_video,
    resize_and_crop,
    select_frames,
    tile_grid,
    tile_image,
)


class Preparer:
    """Turns media files into blocks and pixels, for one configuration of data and model."""

    def __init__(self, data: DataSection, model: VideoXLConfig):
        self.data, self.model = data, model
        self.size = model.tower.image_size
        self.pinpoints = grid_pinpoints(self.size, data.max_tiles, data.min_tiles)

    def image(self, path: Path) -> "ImageMedium":
        """An image of which only the header is read. Raises: MediaError."""
        return ImageMedium(self, path)

    def video(self, path: Path, clip: "Clip", follow_links: bool) -> "VideoMedium":
        """A video file or folder of frames of which no frame is decoded. Raises: MediaError."""
        return VideoMedium(self, path, clip, follow_links)


class ImageMedium:
    """An image, open until its pixels are read."""

    def __init__(self, preparer: Preparer, path: Path):
        self.preparer, self.path = preparer, path
        size = image_size(path)
        if preparer.data.image_mode == "square":
            self.block = VisualBlock(path, 1)
            return
        columns, rows = tile_grid(size, preparer.pinpoints, preparer.size)
        self.block = VisualBlock(path, columns * rows)

    def read(self, out: np.ndarray, rng: np.random.Generator | None) -> None:
        """Put the tiles into uint8 [F, S, S, 3]. Raises: MediaError."""
        image = load_image(self.path, self.preparer.data.media_options)
        if self.preparer.data.image_mode == "square":
            out[0] = resize_and_crop(image, self.preparer.size)
            return
        tiles = tile_image(image, self.preparer.pinpoints, self.preparer.size)
        if len(tiles) != len(out):
            raise MediaError(
                f"{self.path}: {len(tiles)} tiles, but its header promised {len(out)}; the file "
                "was changed or is damaged, replace it"
            )
        out[...] = tiles


class VideoMedium:
    """A video, open until its frames are read."""

    def __init__(self, preparer: Preparer, path: Path, clip: Clip, follow_links: bool):
        data = preparer.data
        self.preparer, self.path = preparer, path
        options = data.media_options
        self.video = open_video(path, clip.fps or 1.0, options=options, follow_links=follow_links)
        choice = FrameChoice(
            data.frame_sampling, data.max_frames, data.video_fps, clip.start, clip.end
        )
        self.selection = select_frames(self.video, choice)
        if self.selection.missing:
            raise MediaError(f"{path}: {self.selection.missing}; fetch it again")
        self.block = VisualBlock(path, len(self.selection.indices), is_video=True)

    def read(self, out: np.ndarray, rng: np.random.Generator | None) -> None:
        """Put the frames into uint8 [F, S, S, 3], moved in time if there is `rng`.

        Raises: MediaError.
        """
        indices = self.selection.indices
        if rng is not None:
            jitter = self.preparer.data.frame_jitter
            indices = jitter_indices(indices, self.selection.after, jitter, rng)
        self.video.read(indices, self.preparer.size, out)

    def time_prompt(self) -> str:
        """Where the frames lie, in the words of LLaVA-Video."""
        begin = self.selection.begin
        times = np.maximum(self.selection.seconds - begin, 0.0)
        shown = ",".join(f"{time:.2f}s" for time in times)
        return (
            f"The video lasts for {self.selection.end - begin:.2f} seconds, and {len(times)} "
            f"frames are uniformly sampled from it. These frames are located at {shown}. "
            "Please answer the following questions related to this video."
        )


Medium = ImageMedium | VideoMedium
