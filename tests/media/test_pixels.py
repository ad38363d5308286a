"""Pixels, tiles and frame choice: literal cases, the published code's numbers, bad files."""

import json
import subprocess
import sys
from pathlib import Path

import av
import decord
import numpy as np
import pytest
from PIL import Image

from vxl_jax import media
from vxl_jax.errors import MediaError

VIDEO_FRAMES = 20


def write_video(path: Path, frames: int = VIDEO_FRAMES, fps: int = 10) -> Path:
    """Writes a 64 x 48 video whose frame i is grey 10 * i, its index in front of its data."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            grey = np.full((48, 64, 3), 10 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "grey.mp4")


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


# --- Tiles -----------------------------------------------------------------------------------


def test_grid_pinpoints_are_ordered_by_width_then_height():
    expected = ((2, 4), (2, 6), (2, 8), (4, 2), (4, 4), (6, 2), (8, 2))
    assert media.grid_pinpoints(2, 4) == expected


def test_grid_pinpoints_as_published_reach_49_tiles():
    pinpoints = media.grid_pinpoints(336)
    assert len(pinpoints) == len(set(pinpoints)) == 200
    assert (336, 336) not in pinpoints
    assert {(336, 49 * 336), (49 * 336, 336), (7 * 336, 7 * 336)} <= set(pinpoints)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((10, 10), (10, 20)),  # nothing to gain: the smallest, and the first of two
        ((40, 10), (40, 10)),
        ((11, 10), (20, 10)),
        ((25, 25), (20, 20)),
        ((90, 30), (30, 10)),
        ((100, 1), (40, 10)),
        ((1, 100), (10, 40)),
    ],
)
def test_best_resolution(size, expected):
    assert media.best_resolution(size, media.grid_pinpoints(10, 4)) == expected


def test_tiles_of_a_small_image_are_centred_on_black():
    white = Image.new("RGB", (2, 2), (255, 255, 255))
    tiles = media.tile_image(white, media.grid_pinpoints(2, 4), 2)
    assert tiles.dtype == np.uint8
    assert tiles.shape == (2, 2, 2, 3)
    expected = [[[0, 0], [255, 255]], [[255, 255], [0, 0]]]
    np.testing.assert_array_equal(tiles, np.repeat(np.array(expected)[..., None], 3, axis=-1))


def test_tiles_are_row_major():
    pixels = np.arange(3 * 2 * 16 * 3, dtype=np.uint8).reshape(3 * 4, 2 * 4, 3)
    tiles = media.tile_image(Image.fromarray(pixels), media.grid_pinpoints(4, 6), 4)
    assert media.tile_grid((8, 12), media.grid_pinpoints(4, 6), 4) == (2, 3)
    for i, tile in enumerate(tiles):
        row, column = 4 * (i // 2), 4 * (i % 2)
        np.testing.assert_array_equal(tile, pixels[row : row + 4, column : column + 4])


@pytest.mark.parametrize("size", [(1, 1), (10000, 10), (10, 10000), (20000, 1), (1, 20000)])
def test_tiles_of_extreme_sizes(size):
    pinpoints = media.grid_pinpoints(14)
    tiles = media.tile_image(Image.new("RGB", size, (255, 255, 255)), pinpoints, 14)
    columns, rows = media.tile_grid(size, pinpoints, 14)
    assert tiles.shape == (columns * rows, 14, 14, 3)
    assert tiles.max() == 255


def test_tiles_of_any_mode_are_rgb():
    tiles = media.tile_image(Image.new("L", (4, 2), 7), media.grid_pinpoints(2, 4), 2)
    assert tiles.shape == (2, 2, 2, 3)
    assert (tiles == 7).all()


def test_tiling_refuses_nonsense():
    with pytest.raises(ValueError, match="size must be positive, got 0 x 5"):
        media.best_resolution((0, 5), [(10, 20)])
    with pytest.raises(ValueError, match="10 x 20 is not a multiple of the tile, 7 px"):
        media.tile_grid((5, 5), [(10, 20)], 7)


# --- Resize, crop, normalise -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(4, 4, 0, 0), (4, 7, 0, 1), (4, 8, 0, 2), (9, 4, 2, 0)]
)
def test_crop_is_centred(height, width, top, left):
    pixels = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    cropped = media.resize_and_crop(pixels, 4)
    assert cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, pixels[top : top + 4, left : left + 4])


def test_long_side_is_truncated():
    image = random_image(5, 3)
    resized = np.asarray(image.resize((6, 4), Image.Resampling.BICUBIC))  # 4 * 5 / 3 = 6.67
    np.testing.assert_array_equal(media.resize_and_crop(image, 4), resized[:, 1:5])


@pytest.mark.parametrize("size", [(1, 1), (30000, 1), (3, 50000)])
def test_extreme_aspect_ratios_are_resized_in_little_memory(size):
    cropped = media.resize_and_crop(Image.new("RGB", size, (9, 8, 7)), 336)
    assert cropped.shape == (336, 336, 3)
    assert (cropped == [9, 8, 7]).all()


def test_resize_and_crop_equals_transformers():
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    size = 56
    processor = clip.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    sizes = np.random.default_rng(1).integers(10, 200, (100, 2))
    for seed, (width, height) in enumerate(sizes):
        image = random_image(int(width), int(height), seed)
        theirs = processor(image, return_tensors="np")["pixel_values"][0]
        ours = media.normalize(media.resize_and_crop(image, size))
        np.testing.assert_allclose(ours.transpose(2, 0, 1), theirs, atol=1e-6)


def test_normalize():
    pixels = np.array([[[0, 51, 255]]], np.uint8)
    normalized = media.normalize(pixels, mean=(0.5, 0.1, 0.25), std=(0.5, 0.2, 0.125))
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, [[[-1.0, 0.5, 6.0]]], rtol=1e-6)


# --- Frame choice ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(1, 1, [0]), (10, 1, [0]), (10, 4, [0, 3, 6, 9]), (11, 4, [0, 3, 6, 10]), (2, 3, [0, 0, 1])],
)
def test_uniform_indices(total, count, expected):
    assert media.uniform_indices(total, count) == expected


@pytest.mark.parametrize(
    ("total", "average_fps", "max_frames", "fps", "expected"),
    [
        (30, 10.0, 8, 1.0, [0, 10, 20]),
        (39, 10.0, 8, 1.0, [0, 10, 20]),  # the last, incomplete second gives no frame
        (60, 29.97, 8, 1.0, [0, 30]),
        (20, 10.0, 8, 2.0, [0, 5, 10, 15]),
        (7, 10.0, 8, 1.0, [0]),  # shorter than a second
        (3, 1.0, 8, 4.0, [0, 1, 2]),  # more wanted than there are
        (90, 10.0, 9, 1.0, list(range(0, 90, 10))),
        (100, 10.0, 9, 1.0, [0, 12, 24, 37, 49, 61, 74, 86, 99]),  # uniform
    ],
)
def test_frame_indices(total, average_fps, max_frames, fps, expected):
    assert media.frame_indices(total, average_fps, max_frames, fps) == expected


def test_frame_choice_refuses_nonsense():
    with pytest.raises(ValueError, match="cannot choose 0 of 5 frames"):
        media.uniform_indices(5, 0)
    with pytest.raises(ValueError, match=r"cannot sample 5 frames at 0\.0 fps"):
        media.frame_indices(5, 0.0, 8)
    with pytest.raises(ValueError, match="cannot sample 5 frames at nan fps"):
        media.frame_indices(5, float("nan"), 8)


# --- Videos ----------------------------------------------------------------------------------


def test_probe_video(video):
    assert media.probe_video(video) == media.VideoInfo(
        frames=VIDEO_FRAMES, fps=10.0, width=64, height=48
    )


@pytest.mark.parametrize("indices", [[0], [19], [3, 4, 12], [12, 3, 3, 0], list(range(20))])
def test_load_video_frames_gives_those_asked_for(video, indices):
    frames = media.load_video_frames(video, indices, 32)
    assert frames.dtype == np.uint8
    assert frames.shape == (len(indices), 32, 32, 3)
    # The codec is lossy; neighbouring frames are 10 apart.
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), 10 * np.array(indices), atol=3)


def test_load_video_frames_equals_loading_then_cropping(video):
    indices = [*range(VIDEO_FRAMES), 5, 0]  # more than are decoded at once
    reader = decord.VideoReader(str(video))
    frames = media.load_video_frames(video, indices, 32)
    expected = np.stack([media.resize_and_crop(reader[i].asnumpy(), 32) for i in indices])
    np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "no frames asked for"),
        ([0, 20], r"frames 0\.\.20 asked for, but the video has 20 \(0\.\.19\)"),
        ([-1], r"frames -1\.\.-1 asked for"),
    ],
)
def test_indices_must_be_in_the_video(video, indices, message):
    with pytest.raises(MediaError, match=message) as caught:
        media.load_video_frames(video, indices, 32)
    assert str(video) in str(caught.value)


def no_frames(path: Path, video: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path, video: None, "no such file"),
        (lambda path, video: path.mkdir(), "a folder without pictures"),
        (lambda path, video: path.write_bytes(b""), "is empty; fetch it again"),
        (lambda path, video: path.write_bytes(b"text" * 99), "begins with the text 'texttext"),
        (lambda path, video: path.write_bytes(video.read_bytes()[:500]), r"no index \(moov box\)"),
        (
            lambda path, video: path.write_bytes(video.read_bytes()[:-300]),
            r"ends early, 1\d of its",
        ),
        (no_frames, "has no video, and nothing else"),
    ],
    ids=["missing", "folder", "empty", "text", "header cut", "end cut", "no frames"],
)
def test_bad_videos(tmp_path, video, write, message):
    path = tmp_path / "bad.mp4"
    write(path, video)
    with pytest.raises(MediaError, match=message) as caught:
        media.load_video_frames(path, [0, VIDEO_FRAMES - 1], 32)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- Imports --------------------------------------------------------------------------------


def test_data_workers_import_neither_torch_nor_transformers():
    script = (
        "import sys, vxl_jax.media\n"
        "sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.stderr.strip() == ""


# --- The published code's numbers ------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(shared):
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = shared / "golden" / "preprocess"
    tensors = safetensors.load_file(folder / "golden.safetensors")
    return json.loads((folder / "golden.json").read_text()), tensors


def test_golden_resolutions(golden):
    facts, _ = golden
    pinpoints = media.grid_pinpoints(336, 49)
    assert [list(pinpoint) for pinpoint in pinpoints] == facts["image_grid_pinpoints"]
    for case in facts["best_resolution"]:
        assert list(media.best_resolution(case["size"], pinpoints)) == case["best"], case


def test_golden_frame_indices(golden, shared):
    for case in golden[0]["videos"]:
        info = media.probe_video(shared / "media" / case["file"])
        assert (info.frames, info.fps) == (case["num_frames"], case["avg_fps"])
        assert [info.height, info.width, 3] == case["shape"]
        assert media.uniform_indices(info.frames, case["n"]) == case["uniform_idx"]
        assert media.frame_indices(info.frames, info.fps, 128) == case["one_fps_idx"]


def test_golden_video_pixels(golden, shared):
    facts, tensors = golden
    for case in facts["videos"]:
        path = shared / "media" / case["file"]
        pixels = media.normalize(media.load_video_frames(path, case["uniform_idx"], 336))
        sampled = pixels.transpose(0, 3, 1, 2)[:, :, ::8, ::8]
        np.testing.assert_allclose(sampled, tensors[f"video/{case['file']}"], atol=1e-4)
        # Over all pixels, not only the sampled ones.
        np.testing.assert_allclose(
            [pixels.mean(), pixels.std()], [case["mean"], case["std"]], atol=1e-4
        )


def test_golden_image_tiles(golden, shared):
    facts, tensors = golden
    pinpoints = media.grid_pinpoints(336, 49)
    for case in facts["images"]:
        path = shared / "media" / case["file"]
        assert list(media.image_size(path)) == case["size"]
        assert list(media.tile_grid(case["size"], pinpoints, 336)) == case["grid"]
        pixels = media.normalize(media.tile_image(media.load_image(path), pinpoints, 336))
        assert len(pixels) == case["patches"]
        sampled = pixels.transpose(0, 3, 1, 2)[:, :, ::24, ::24]
        # The first golden row is the squashed whole image, which the model does not use.
        np.testing.assert_allclose(sampled, tensors[f"image/{case['file']}"][1:], atol=1e-4)
