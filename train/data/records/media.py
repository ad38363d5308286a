"""Media of a record: opened for their lengths, then read for their pixels."""

from pathlib import Path

import numpy as np

from train.config import DataSection
from train.data.records.sample import Clip, VisualBlock
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import MediaError
from vxl_jax.media import image_size, jitter_indices, load_image, open_video, select_frames
from vxl_jax.media.sampling import FrameTimes


class Preparer:
    """Turns media files into blocks and pixels, for one configuration of data and model."""

    def __init__(self, data: DataSection, model: VideoXLConfig):
        self.data, self.model = data, model
        self.preprocessing = data.preprocessing_for(model.preprocessing)
        self.size = model.tower.image_size

    def image(self, path: Path, several: bool = False) -> "ImageMedium":
        """An image of which only the header is read. Raises: MediaError.

        several: whether it is one of several images of its record.
        """
        return ImageMedium(self, path, several)

    def video(self, path: Path, clip: "Clip", follow_links: bool) -> "VideoMedium":
        """A video file or folder of frames of which no frame is decoded. Raises: MediaError."""
        return VideoMedium(self, path, clip, follow_links)


class ImageMedium:
    """An image, open until its pixels are read."""

    def __init__(self, preparer: Preparer, path: Path, several: bool = False):
        self.preparer, self.path, self.several = preparer, path, several
        cut = preparer.preprocessing.tiles_of(image_size(path), preparer.size, several)
        self.block = VisualBlock(path, cut.tiles, image=cut)

    def read(self, out: np.ndarray, rng: np.random.Generator | None) -> None:
        """Put the tiles into uint8 [F, S, S, 3]. Raises: MediaError."""
        preprocessing = self.preparer.preprocessing
        image = load_image(self.path, preprocessing.options)
        tiles = preprocessing.cut_tiles(image, self.preparer.size, self.several)
        if len(tiles) != len(out):
            raise MediaError(
                f"{self.path}: {len(tiles)} tiles, but its header promised {len(out)}; the file "
                "was changed or is damaged, replace it"
            )
        out[...] = tiles


class VideoMedium:
    """A video, open until its frames are read."""

    def __init__(self, preparer: Preparer, path: Path, clip: Clip, follow_links: bool):
        self.preparer, self.path = preparer, path
        options = preparer.preprocessing.options
        self.video = open_video(path, clip.fps or 1.0, options=options, follow_links=follow_links)
        choice = preparer.preprocessing.choose(clip.start, clip.end)
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
        self.video.read(indices, self.preparer.size, out, self.preparer.preprocessing.resize)

    @property
    def times(self) -> FrameTimes:
        """When the frames are shown."""
        chosen = self.selection
        return FrameTimes(tuple(chosen.seconds.tolist()), chosen.begin, chosen.end)


Medium = ImageMedium | VideoMedium
