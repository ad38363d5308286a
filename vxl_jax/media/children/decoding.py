"""Decode media files in a child process with a time limit, for inference.

The child keeps its last file open, so that a video continues where the last request stopped.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vxl_jax.errors import MediaError
from vxl_jax.media.frames import Resize
from vxl_jax.media.images.animation import is_animation
from vxl_jax.media.images.loading import image_size, load_image
from vxl_jax.media.options import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.media.paths import printable
from vxl_jax.media.preprocessing import DEFAULT_PREPROCESSING, ImageTiles, Preprocessing
from vxl_jax.media.reader import FrameChoice, Selection, VideoReader, open_video, select_frames

SECONDS = 60.0
"""CPU seconds without another packet or frame after which a decoder is ended; see
`process.MediaProcess.ask`."""


@dataclass(frozen=True)
class VideoRequest:
    """A video file or folder of frames, and which of its frames are wanted."""

    path: str
    choice: FrameChoice
    fps: float = 1.0
    num_threads: int = 1
    options: MediaOptions = DEFAULT_OPTIONS
    resize: Resize = "crop"


@dataclass(frozen=True)
class ImageRequest:
    """An image that is cut into tiles of `size` x `size` pixels."""

    path: str
    size: int
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING
    several: bool = False


class DecodeHandler:
    """Request handler of the child: open a file, or decode frames or tiles."""

    def __init__(self) -> None:
        self._key: Any = None  # of the video that is open
        self._video: VideoReader | None = None

    def __call__(self, request: tuple[Any, list[int] | None], out: np.ndarray | None) -> Any:
        """Answers a request (what, frame numbers).

        what: a `VideoRequest` or `ImageRequest`; with None for the frame numbers, the answer is a
        `Selection` or `ImageTiles`, otherwise pixels go to `out`, and the answer tells how
        many there are and why not all. A path: whether it is an animation. None: close the video.
        """
        what, indices = request
        if what is None or isinstance(what, str):
            self._key = self._video = None
            return what is not None and is_animation(what)
        if isinstance(what, ImageRequest):
            return _tiles(what, out)
        key = what, _state(what.path)
        if self._video is None or indices is None or self._key != key:
            self._key = self._video = None
            self._video = open_video(what.path, what.fps, what.num_threads, what.options)
            self._key = key
        if indices is None or out is None:
            return select_frames(self._video, what.choice)
        return _read(self._video, indices, what.resize, out)


def _state(path: str) -> Any:
    """Return a value that changes when a file or folder is replaced or written to."""
    if os.path.isdir(path):
        return sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(path))
    with suppress(OSError):
        state = os.stat(path)
        return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
    return None


def _tiles(request: ImageRequest, out: np.ndarray | None) -> ImageTiles | int:
    preprocessing = request.preprocessing
    if out is None:
        return preprocessing.tiles_of(image_size(request.path), request.size, request.several)
    image = load_image(request.path, preprocessing.options)
    out[...] = preprocessing.cut_tiles(image, request.size, request.several)
    return len(out)


def _read(
    video: VideoReader, indices: list[int], resize: Resize, out: np.ndarray
) -> tuple[int, str | None]:
    size = out.shape[1]
    try:
        video.read(indices, size, out, resize)
    except MediaError:  # again, one by one: those before the damage count
        for i, index in enumerate(indices):
            try:
                video.read([index], size, out[i : i + 1], resize)
            except MediaError as error:
                return i, str(error)
    return len(indices), None


class Decoder:
    """A child process that decodes media for one owner; see `borrowed_decoder`."""

    def __init__(self) -> None:
        import pickle

        from vxl_jax.media.children.process import MediaProcess

        self.process = MediaProcess(pickle.dumps(DecodeHandler()), "decoding process")
        self.owner = os.getpid()

    def open_video(self, request: VideoRequest) -> Selection:
        """Open a video and choose its frames. Raises: MediaError."""
        return self._ask(request)

    def tiles_of(self, request: ImageRequest) -> ImageTiles:
        """Tell how an image is cut. Raises: MediaError."""
        return self._ask(request)

    def read_tiles(self, request: ImageRequest, count: int) -> np.ndarray:
        """Decode the tiles of an image, uint8 [count, S, S, 3]. Raises: MediaError."""
        out = np.empty((count, request.size, request.size, 3), np.uint8)
        self._ask(request, [], out)
        return out

    def read_frames(
        self, request: VideoRequest, indices: list[int], size: int, stopped: Callable[[], bool]
    ) -> tuple[np.ndarray, MediaError | None]:
        """Decode frames, uint8 [F, size, size, 3], and return why some are missing.

        stopped: polled; if it returns true, the child is killed and no frames are returned.
        """
        out = np.empty((len(indices), size, size, 3), np.uint8)
        try:
            count, reason = self._ask(request, indices, out, stopped)
        except MediaError as error:
            return out[:0], error
        return out[:count], None if reason is None else MediaError(reason)

    def is_animation(self, path: str) -> bool:
        """Return whether an image is animated. Raises: MediaError: its decoder crashed or hung."""
        return self._ask(path)

    def forget(self) -> None:
        """Close the open video."""
        if self.process.process is not None:
            with suppress(MediaError):
                self._ask(None)

    def _ask(
        self,
        what: VideoRequest | ImageRequest | str | None,
        indices: list[int] | None = None,
        out: np.ndarray | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Any:
        from vxl_jax.media.children.process import HandlerError, Hung, ProcessDied, ProcessError

        path = printable(what if isinstance(what, str) else "" if what is None else what.path)
        try:
            try:
                return self.process.ask((what, indices), SECONDS, out, stopped)
            except ProcessDied:  # which may not have been the file's fault
                return self.process.ask((what, indices), SECONDS, out, stopped)
        except HandlerError as error:
            if isinstance(error.original, MediaError):
                raise error.original from None
            if error.kind == "MemoryError":
                raise MediaError(f"{path}: needs more memory than a decoder may have") from None
            raise RuntimeError(f"{path}: a fault of this program, not the file: {error}") from error
        except Hung as error:
            raise MediaError(
                f"{path}: its decoder {error} and was ended; it may loop on this file, encode it "
                "again (ffmpeg -i IN -c:v libx264 OUT.mp4)"
            ) from error
        except ProcessDied as error:
            if "SIGKILL" in str(error):
                raise MediaError(
                    f"{path}: its decoder was ended by the system, perhaps for lack of memory"
                ) from error
            raise MediaError(
                f"{path}: its decoder crashed ({error}); the file is damaged, fetch it again"
            ) from error
        except ProcessError as error:
            raise MediaError(f"{path}: cannot be decoded, {error}") from error


_idle: list[Decoder] = []
_lock = threading.Lock()


@contextmanager
def borrowed_decoder() -> Iterator[Decoder]:
    """A decoder for the block alone. One is kept for the next: it starts in a quarter second."""
    with _lock:
        decoder = _idle.pop() if _idle else None
    if decoder is None or decoder.owner != os.getpid():  # another process's, after a fork
        decoder = Decoder()
    try:
        yield decoder
    finally:
        with _lock:
            is_kept = not _idle
            if is_kept:
                _idle.append(decoder)
        if not is_kept:
            decoder.process.end()


def absolute(path: str | Path) -> str:
    """Return an absolute path, which does not depend on the child's working directory."""
    return os.path.abspath(path)
