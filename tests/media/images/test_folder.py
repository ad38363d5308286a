"""Folders of frames: which files, in which order; and paths of media."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.media.pictures import base, noise, swapped_profile
from tests.support.data import frame_numbers
from vxl_jax.errors import MediaError
from vxl_jax.media import MediaOptions, heartbeat, resolve_media
from vxl_jax.media.images.folder import PICTURES, FrameFolder
from vxl_jax.media.images.loading import load_image
from vxl_jax.media.paths import check_file, printable


def write_frames(folder: Path, names: list[str]) -> FrameFolder:
    """A folder whose picture i is grey 10 * i."""
    folder.mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", (60, 90), (10 * i,) * 3).save(folder / name)
    return FrameFolder(folder, 2.0)


def write_empty(folder: Path, names: list[str]) -> Path:
    """Files that no picture is read from."""
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


# Order.


@pytest.mark.parametrize(
    "names",
    [
        [f"{i}.png" for i in range(12)],
        [f"{i:05}.jpg" for i in range(12)],
        ["1.png", "2.png", "03.png", "004.png", "10.png"],
        ["f1.png", "f2.jpeg", "f9.PNG", "f10.webp", "f10a.bmp", "f11.Jpg"],
        ["1.png", "1.5.png", "1.10.png", "2.png", "a.png", "b.png", "b2.png"],
        ["scene 2 - 1.png", "scene 2 - 10.png", "scene 10 - 2.png"],
    ],
)
def test_frames_are_in_the_order_of_their_names(names: list[str], tmp_path: Path):
    video = write_frames(tmp_path / "frames", names)
    assert (video.frames, video.fps) == (len(names), 2.0)
    pixels = video.read(range(len(names)), 56)
    assert pixels.shape == (len(names), 56, 56, 3)
    assert pixels.dtype == np.uint8
    assert frame_numbers(pixels) == [*range(len(names))]
    out = np.zeros((3, 56, 56, 3), np.uint8)
    assert video.read([2, 0, 2], 56, out) is out
    assert frame_numbers(out) == [2, 0, 2]


@pytest.mark.parametrize(
    "stems",
    [
        # Decimals, as str(float) writes them, and with a fixed number of digits.
        ["0.0", "0.25", "0.5", "0.75", "1.0"],
        ["1.25", "1.5"],
        ["t0.5s", "t0.75s", "t1.125s", "t9.0s", "t10.5s"],
        ["0.00", "0.50", "1.00", "1.50", "10.00"],
        ["0.033", "0.067", "0.1", "0.133"],
        ["frame_3_1.25", "frame_3_1.5", "frame_12_0.5"],
        ["1", "1.25", "1.5", "2"],
        # Counters behind a dot.
        ["scene1.1", "scene1.2", "scene1.9", "scene1.10", "scene1.11", "scene2.1"],
        ["1.8", "1.9", "1.10", "1.100"],
        # More than one dot: dates, versions, times.
        ["2024.5.9", "2024.5.10", "2024.10.1"],
        ["v1.2.9", "v1.2.10", "v1.10.1"],
        ["10.5.3 - 0.25", "10.5.3 - 0.5", "10.5.20 - 0.125"],
        # Digits of other scripts are numbers too.
        ["f٢", "f١٠"],
    ],
)
def test_numbers_with_dots(stems: list[str], tmp_path: Path):
    names = [f"{stem}.png" for stem in stems]
    folder = write_empty(tmp_path / "frames", names[::-1])
    assert FrameFolder(folder, 1.0)._names == names


def test_names_that_differ_in_zeros_alone_have_an_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The file system may list them in any order."""
    folder = write_empty(tmp_path / "frames", ["1.png", "01.png", "001.png", "1.0.png", "1.00.png"])
    orders = []
    for backwards in (False, True):
        monkeypatch.setattr(os, "scandir", scan_sorted(os.scandir, backwards))
        orders.append(FrameFolder(folder, 1.0)._names)
        monkeypatch.undo()
    assert orders[0] == orders[1]


def scan_sorted(scan: Any, backwards: bool) -> Any:
    class Entries(list):
        def __enter__(self) -> "Entries":
            return self

        def __exit__(self, *error: object) -> None:
            pass

    return lambda path: Entries(sorted(scan(path), key=lambda e: e.name, reverse=backwards))


def test_names_that_are_not_utf8(tmp_path: Path):
    folder = os.fsencode(tmp_path / "frames")
    os.mkdir(folder)
    for i, name in enumerate([b"\xff9.png", b"\xff10.png"]):
        Image.new("RGB", (9, 9), (10 * i,) * 3).save(open(os.path.join(folder, name), "wb"), "PNG")  # noqa: SIM115
    video = FrameFolder(tmp_path / "frames", 1.0)
    assert frame_numbers(video.read([0, 1], 9)) == [0, 1]
    with open(os.path.join(folder, b"\xff10.png"), "wb") as file:
        file.write(b"text")
    with pytest.raises(MediaError) as caught:
        video.read([1], 9)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/frames/\\udcff10.png: not a readable image")
    message.encode()  # it can be printed


# Times.


def test_times(tmp_path: Path):
    video = FrameFolder(write_empty(tmp_path / "frames", [f"{i}.png" for i in range(5)]), 2.0)
    assert (video.path, video.frames, video.fps) == (tmp_path / "frames", 5, 2.0)
    assert video.seconds.dtype == np.float64
    assert video.seconds.tolist() == [0, 0.5, 1, 1.5, 2]
    assert (video.duration, video.truncated) == (2.5, None)


# Which files.


def test_only_pictures_are_frames(tmp_path: Path):
    video = write_frames(tmp_path / "frames", ["1.png", "2.png"])
    for name in ("notes.txt", "0", "Thumbs.db", "a.json", ".DS_Store"):
        (video.path / name).write_text("text")
    (video.path / "3.png").mkdir()
    os.mkfifo(video.path / "4.png")
    (video.path / "5.png").symlink_to(video.path / "3.png")  # a folder
    again = FrameFolder(video.path, 1.0)
    assert frame_numbers(again.read(range(again.frames), 56)) == [0, 1]


def test_hidden_files_are_left_out(tmp_path: Path):
    """macOS writes such a file next to each file that it copies (AppleDouble)."""
    video = write_frames(tmp_path / "frames", ["1.png", "2.png"])
    for name in ("._1.png", "._2.png", ".png", ".hidden.jpg"):
        (video.path / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    again = FrameFolder(video.path, 1.0)
    assert frame_numbers(again.read(range(again.frames), 56)) == [0, 1]


READABLE = {*PICTURES} - {".heic", ".heif"}
"""Suffixes of files that Pillow writes."""


def test_every_suffix_is_a_picture(tmp_path: Path):
    expected = (
        ".avif .bmp .gif .heic .heif .jfif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp"
    )
    assert " ".join(sorted(PICTURES)) == expected
    names = [f"{i}{suffix}" for i, suffix in enumerate(sorted(READABLE))]
    video = write_frames(tmp_path / "frames", names)
    assert video.frames == len(READABLE) == 14
    assert frame_numbers(video.read(range(14), 56)) == [*range(14)]
    (tmp_path / "frames" / "14.HEIC").touch()
    assert FrameFolder(tmp_path / "frames", 1.0).frames == 15


# Links.


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder of links, as the cache of Hugging Face, DVC and git-annex make them."""
    video = write_frames(tmp_path / "blobs", ["b.png", "a.png"])
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "1.png").symlink_to("../blobs/b.png")
    (folder / "2.png").symlink_to(video.path / "a.png")
    return folder


def test_links_are_followed(linked: Path):
    video = FrameFolder(linked, 1.0)
    assert frame_numbers(video.read(range(video.frames), 56)) == [0, 1]


def test_links_are_left_out(linked: Path):
    with pytest.raises(MediaError) as caught:
        FrameFolder(linked, 1.0, follow_links=False)
    assert str(caught.value) == (
        f"{linked}: a folder without pictures; 2 links were left out, set allow_outside_root to "
        "follow them"
    )
    Image.new("RGB", (8, 8), (50, 50, 50)).save(linked / "3.png")
    video = FrameFolder(linked, 1.0, follow_links=False)
    assert frame_numbers(video.read(range(video.frames), 56)) == [5]


def test_broken_links(linked: Path):
    (linked / "2.png").unlink()
    (linked / "2.png").symlink_to("../blobs/gone.png")
    (linked / "notes.txt").symlink_to("gone.txt")  # no picture
    with pytest.raises(MediaError) as caught:
        FrameFolder(linked, 1.0)
    assert str(caught.value) == (
        f"{linked}/2.png: is a broken link to ../blobs/gone.png (No such file or directory); fetch "
        "the file or remove the link"
    )
    (linked / "2.png").unlink()
    (linked / "2.png").symlink_to("2.png")
    with pytest.raises(MediaError, match=r"2\.png: is a broken link to 2\.png \(Too many levels"):
        FrameFolder(linked, 1.0)


# Bad folders and bad frames.


@pytest.mark.parametrize("content", [None, "notes.txt", ".hidden.png"])
def test_a_folder_without_pictures(content: str | None, tmp_path: Path):
    folder = write_empty(tmp_path / "frames", [content] if content else [])
    with pytest.raises(MediaError) as caught:
        FrameFolder(folder, 1.0)
    assert str(caught.value) == (
        f"{folder}: a folder without pictures; put files into it that end in {', '.join(PICTURES)}"
    )


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(MediaError, match=r"gone: cannot be read \(No such file or directory\)"):
        FrameFolder(tmp_path / "gone", 1.0)


def test_a_damaged_frame_is_named(tmp_path: Path):
    video = write_frames(tmp_path / "frames", ["1.png", "2.png", "3.png"])
    (video.path / "2.png").write_text("no picture")
    assert len(video.read([0, 2], 56)) == 2
    with pytest.raises(MediaError, match=r"frames/2\.png: not a readable image"):
        video.read([0, 1, 2], 56)
    (video.path / "3.png").unlink()
    with pytest.raises(MediaError, match=r"frames/3\.png: no such file"):
        video.read([0, 2], 56)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "no frames asked for; give at least one index"),
        ([0, 2], "frames 0..2 asked for, but there are 2 (0..1)"),
        ([-1], "frames -1..-1 asked for, but there are 2 (0..1)"),
    ],
)
def test_indices_must_be_in_the_folder(tmp_path: Path, indices: list[int], message: str):
    video = write_frames(tmp_path / "frames", ["1.png", "2.png"])
    with pytest.raises(MediaError) as caught:
        video.read(indices, 56)
    assert str(caught.value) == f"{video.path}: {message}"


# Pixels.


def test_frames_of_other_sizes_become_squares(tmp_path: Path):
    sizes: list[Any] = [(56, 56), (200, 40), (1, 9)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (10 * i,) * 3).save(tmp_path / f"{i}.png")
    assert frame_numbers(FrameFolder(tmp_path, 1.0).read([0, 1, 2], 56)) == [0, 1, 2]


def test_frames_are_as_a_viewer_shows_them(tmp_path: Path):
    """Upright, on white, and with the options of the folder."""
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = noise(8, 8, 3)
    Image.fromarray(picture[::-1, ::-1].copy()).save(tmp_path / "1.png", exif=exif)
    Image.new("RGBA", (8, 8)).save(tmp_path / "2.png")
    swapped = Image.fromarray(base(8, 8)[..., [1, 0, 2]])
    swapped.save(tmp_path / "3.png", icc_profile=swapped_profile())
    pixels = FrameFolder(tmp_path, 1.0).read([0, 1, 2], 8)
    np.testing.assert_array_equal(pixels[0], picture)
    assert (pixels[1] == 255).all()
    np.testing.assert_array_equal(pixels[2], np.asarray(swapped))
    options = MediaOptions(color_profile=True)
    converted = FrameFolder(tmp_path, 1.0, options=options).read([2], 8)
    np.testing.assert_allclose(converted[0], base(8, 8), atol=2)


def test_each_frame_is_a_sign_of_life(tmp_path: Path):
    video, heard = write_frames(tmp_path / "frames", ["1.png", "2.png"]), []
    heartbeat.set_listener(lambda: heard.append(None))
    try:
        video.read([0, 1, 1], 56)
    finally:
        heartbeat.set_listener(heartbeat._nobody)
    assert len(heard) == 3


# Paths.


def test_resolve_media_stays_in_the_folder(tmp_path: Path):
    root, inside = tmp_path / "root", tmp_path / "root" / "a" / "b.jpg"
    inside.parent.mkdir(parents=True)
    (root / "link").symlink_to(inside.parent)
    (root / "out").symlink_to(tmp_path)
    (root / "circle").symlink_to(root / "circle")
    (tmp_path / "other root").symlink_to(root)

    assert resolve_media(root, "a/b.jpg") == inside.resolve()
    assert resolve_media(str(root), "link/b.jpg") == inside.resolve()
    assert resolve_media(tmp_path / "other root", "a/b.jpg") == inside.resolve()
    refused: dict[Any, str] = {
        "../secret": "leaves the media folder",
        "a/../../secret": "leaves the media folder",
        "/etc/passwd": "leaves the media folder",
        "out/secret": "a link leads out of",
        "": "not a file name",
        "a\0b": "not a file name",
        None: "not a file name",
    }
    for relative, message in refused.items():
        with pytest.raises(MediaError, match=message):
            resolve_media(root, relative)
    with pytest.raises(MediaError):  # refused at once or, from Python 3.13, when it is opened
        load_image(resolve_media(root, "circle"))


def test_files_that_can_be_read(tmp_path: Path):
    names = ["a b", "été 🎬", "50%.png", "%03d", "a\nb", "a'\"b", "?#[]*|", "-i", "10:30:15.mp4"]
    for name in (*names, "a" * 244, b"\xff.png".decode(errors="surrogateescape")):
        (tmp_path / name).write_bytes(b"x")
        check_file(tmp_path / name)
        check_file(str(tmp_path / name))
    (tmp_path / "link").symlink_to("a b")
    check_file(tmp_path / "link")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "gone: no such file; check the sample and the media folder"),
        ("gone/a", "gone/a: no such file; check the sample and the media folder"),
        ("", ": is not a file but a folder; check the sample and the media folder"),
        ("pipe", "pipe: is not a file; check the sample and the media folder"),
        ("empty", "empty: is empty; fetch it again"),
        ("file/a", "file/a: cannot be read (Not a directory)"),
        ("a" * 300, f"{'a' * 300}: cannot be read (File name too long)"),
        (
            "broken",
            "broken: is a broken link, away/gone.jpg does not exist; fetch the file or remove the "
            "link",
        ),
        ("circle", "circle: cannot be read (Too many levels of symbolic links)"),
        ("\ud83d.png", r"\ud83d.png: the name cannot be encoded as a file name; rename the file"),
        ("a\0b", r"a\x00b: the name cannot be encoded as a file name; rename the file"),
        ("gone\n", r"gone\n: no such file; check the sample and the media folder"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, message: str):
    (tmp_path / "empty").touch()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").symlink_to("away/gone.jpg")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / name if name else tmp_path
    with pytest.raises(MediaError) as caught:
        check_file(path)
    assert str(caught.value) == (f"{tmp_path}/{message}" if name else f"{tmp_path}{message}")


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Refused by the file system; root may read everything, so it is feigned."""
    path = tmp_path / "a.jpg"
    path.write_text("x")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(MediaError) as caught:
        check_file(path)
    monkeypatch.undo()
    assert str(caught.value) == (
        f"{path}: cannot be read (Permission denied); change the permissions of the file and its "
        "folders"
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a b/été 🎬.mp4", "a b/été 🎬.mp4"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\udcff\ud83d", r"\udcff\ud83d"),
        (Path("a") / "b", "a/b"),
    ],
)
def test_printable(path: str | Path, expected: str):
    assert printable(path) == expected
    printable(path).encode()
