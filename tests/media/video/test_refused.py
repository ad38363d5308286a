"""Files that are refused: the message names the file, says why and what to do, in one line."""

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.media.video_kinds import made
from tests.media.video_makers import cover, film, sound
from tests.media.videos import draw, packets_of, patch
from tests.support.data import ASK, check
from train.data.records.sample import BadSample
from vxl_jax.errors import MediaError
from vxl_jax.media import open_video
from vxl_jax.media.open import Video, open_film

Maker = Callable[[Path], Any]


def text(content: str) -> Maker:
    return lambda path: path.write_text(content, encoding="utf-8")


def binary(content: bytes) -> Maker:
    return lambda path: path.write_bytes(content)


def only(add: Callable[[Any], Callable[[], None]]) -> Maker:
    """A file of one stream."""

    def make(path: Path) -> None:
        with av.open(str(path), "w") as output:
            add(output)()

    return make


def _no_decoder(path: Path) -> None:
    shutil.copy(made("plain.mp4"), path)
    data = path.read_bytes()
    place = data.index(b"avc1", data.rindex(b"stsd"))
    path.write_bytes(data[:place] + b"abcd" + data[place + 4 :])


def _no_decoder_in_matroska(path: Path) -> None:
    shutil.copy(made("plain.mkv"), path)
    patch(path, b"V_MPEG4/ISO/AVC", b"V_UNKNOWN/ISO/X")


def _cover_and_sound(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as output:
        fill = [sound()(output), cover(output)]
        for add in fill:
            add()


def _no_frames(path: Path) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        output.start_encoding()


def _picture(form: str) -> Maker:
    return lambda path: Image.fromarray(draw(5)).save(path, form)


def _header(name: str) -> Maker:
    """What stands before the first frame."""

    def make(path: Path) -> None:
        path.write_bytes(made(name).read_bytes()[: packets_of(made(name))[0].start])

    return make


REFUSED: dict[str, tuple[Maker, str, str]] = {
    "sound.mp4": (only(sound()), "has no video, only sound", "give another file"),
    "sound.mp3": (only(sound(codec="mp3")), "has no video, only sound", "give another file"),
    "sound.mkv": (only(sound()), "has no video, only sound", "give another file"),
    "cover.mp4": (only(cover), "has no video, only a cover picture", "give another file"),
    "song.m4a": (
        _cover_and_sound,
        "has no video, only sound and a cover picture",
        "give another file",
    ),
    "codec.mp4": (_no_decoder, "no decoder", "encode it again"),
    "codec.mkv": (_no_decoder_in_matroska, "no decoder", "encode it again"),
    "no_frames.mp4": (_no_frames, "has no video", "give another file"),
    "text.mp4": (text("so it goes, and goes on\n" * 9), "is not a video", "fetch it again"),
    "notes.nfo": (text("so it goes, and goes on\n" * 9), "is not a video", "fetch it again"),
    "flash.swf": (film("flv", muxer="swf"), "is not a video in a container known here", "again"),
    "page.mp4": (
        text("<!DOCTYPE html>\n<html><title>404</title></html>"),
        "is text, such as an error page",
        "fetch it again",
    ),
    "page2.mp4": (text("\n\n <HTML><body>no</body>"), "is text, such as", "fetch it again"),
    "error.mp4": (text('{"error": "not found"}'), "is text, such as", "fetch it again"),
    "xml.mp4": (
        text('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
        "is text, such as",
        "fetch it again",
    ),
    "lfs.mp4": (
        text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
        "begins with the text 'version https://'",
        "fetch it again",
    ),
    "list.m3u8": (text("#EXTM3U\n#EXTINF:2,\nplain.mp4\n"), "is a playlist", "give those files"),
    "list.mp4": (
        text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nplain.mp4\n#EXT-X-ENDLIST\n"),
        "is a playlist",
        "give those files",
    ),
    "list_bom.m3u8": (text("\ufeff#EXTM3U\nplain.mp4\n"), "is a playlist", "give those files"),
    "concat.txt": (
        text("ffconcat version 1.0\nfile plain.mp4\n"),
        "is a playlist",
        "give those files",
    ),
    "concat.ts": (text("file 'plain.mp4'\nfile 'plain.mp4'\n"), "is not a video", "fetch"),
    "stream.mpd": (
        text('<?xml version="1.0"?>\n<MPD type="static"><BaseURL>plain.mp4</BaseURL></MPD>'),
        "is a playlist",
        "give those files",
    ),
    "stream.sdp": (text("v=0\no=- 0 0 IN IP4 127.0.0.1\n"), "is a playlist", "give those"),
    "list.pls": (text("[playlist]\nFile1=plain.mp4\n"), "is a playlist", "give those files"),
    "picture.jpg": (_picture("JPEG"), "is a picture (JPEG)", "give it as an image"),
    "picture.mp4": (_picture("PNG"), "is a picture (PNG)", "give it as an image"),
    "picture.webp": (_picture("WEBP"), "is a picture (WEBP)", "give it as an image"),
    "empty.mp4": (binary(b""), "is empty", "fetch it again"),
    "zeros.mp4": (binary(bytes(5000)), "is not a video", "again"),
    "noise.mp4": (
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
        "is not a video",
        "again",
    ),
    "one_byte.ts": (binary(b"G"), "is not a video", "again"),
    "header.mp4": (_header("plain.mp4"), "has no index", "fetch it again"),
    "header.mkv": (_header("plain.mkv"), "without frames", "fetch or encode it again"),
    "header.avi": (_header("mpeg4.avi"), "without frames", "fetch or encode it again"),
    "header.flv": (_header("plain.flv"), "without frames", "fetch or encode it again"),
    "header.wmv": (_header("wmv2.wmv"), "without frames", "fetch or encode it again"),
    "header.ts": (_header("plain.ts"), "without frames", "fetch or encode it again"),
    "header.ogv": (_header("vp8.ogv"), "cut off at its beginning", "fetch it again"),
    "folder.mp4": (Path.mkdir, "a folder without pictures", "put files into it"),
    "missing.mp4": (lambda path: None, "no such file", "check the sample and the media folder"),
    "broken_link.mp4": (
        lambda path: path.symlink_to("gone.mp4"),
        "is a broken link",
        "fetch the file or remove the link",
    ),
    "circle.mp4": (lambda path: path.symlink_to("circle.mp4"), "cannot be read", ""),
    "pipe.mp4": (os.mkfifo, "is not a file", "check the sample and the media folder"),
}
"""Makers, why they are refused, and what to do."""

OF_FFMPEG = ("Invalid data", "avcodec", "avformat", "moov atom", "Errno", "0x", "av.error", "file:")


def check_message(message: str, path: Path, why: str, what_to_do: str) -> None:
    assert message.startswith(f"{path}: ")
    assert message.count(path.name) == 1
    assert "\n" not in message
    reason = message.removeprefix(f"{path}: ")
    assert len(reason) > 10
    assert why in reason
    assert what_to_do in reason
    assert not [words for words in OF_FFMPEG if words in reason]


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_says_why_and_what_to_do(tmp_path: Path, name: str):
    make, why, what_to_do = REFUSED[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(MediaError) as caught:
        open_video(path)
    check_message(str(caught.value), path, why, what_to_do)


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_is_the_same_in_a_film(tmp_path: Path, name: str):
    make, why, what_to_do = REFUSED[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(MediaError) as caught:
        open_film(Video(path), 56)
    check_message(str(caught.value), path, why, what_to_do)


@pytest.mark.parametrize("name", ["sound.mp4", "codec.mp4", "text.mp4", "list.m3u8", "empty.mp4"])
def test_refused_file_is_a_bad_sample(tmp_path: Path, demo_tokenizer: Any, name: str):
    make, why, _ = REFUSED[name]
    make(tmp_path / name)
    sample = check({"video": name, "conversations": ASK}, tmp_path, demo_tokenizer)
    assert isinstance(sample, BadSample)
    assert why in sample.reason
    assert "\n" not in sample.reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_refused(tmp_path: Path):
    path = tmp_path / "secret.mp4"
    shutil.copy(made("plain.mp4"), path)
    path.chmod(0)
    with pytest.raises(MediaError) as caught:
        open_video(path)
    check_message(str(caught.value), path, "cannot be read (Permission denied)", "permissions")


def test_forbidden_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "secret.mp4"
    path.write_bytes(b"secret")

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(MediaError) as caught:
        open_video(path)
    monkeypatch.undo()
    check_message(str(caught.value), path, "cannot be read (Permission denied)", "permissions")


@pytest.mark.parametrize("name", ["a\nb.mp4", os.fsdecode(b"caf\xe9.mp4")], ids=ascii)
@pytest.mark.parametrize("kind", ["sound.mp4", "codec.mp4", "text.mp4", "empty.mp4", "list.m3u8"])
def test_refusal_of_an_odd_name_can_be_printed(tmp_path: Path, name: str, kind: str):
    REFUSED[kind][0](tmp_path / kind)
    (tmp_path / kind).rename(tmp_path / name)
    with pytest.raises(MediaError) as caught:
        open_video(tmp_path / name)
    message = str(caught.value)
    assert "\n" not in message
    message.encode()


def test_folder_without_frames_is_refused(tmp_path: Path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "notes.txt").write_text("so it goes")
    with pytest.raises(MediaError) as caught:
        open_video(tmp_path / "frames")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'frames'}: a folder without pictures; put files")
    assert "\n" not in message


# Files that name others.


@pytest.fixture
def listener() -> Iterator[tuple[int, list[Any]]]:
    """A port, and who has connected to it."""
    callers: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, caller = server.accept()
                except OSError:
                    return
                callers.append(caller)
                connection.close()

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield server.getsockname()[1], callers
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


PLAYLISTS = {
    "plain": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n",
    "space before": "\n\n   #EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "concat with comment": "# list\nffconcat version 1.0\nfile '{}'\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation '
    'id="0" bandwidth="1"><BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "smil": '<smil><body><video src="{}"/></body></smil>',
    "asx": '<asx version="3.0"><entry><ref href="{}"/></entry></asx>',
    "redirect": "[Reference]\nRef1={}\n",
    "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nu={}\nm=video 9 RTP/AVP 96\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", [".m3u8", ".mp4", ".ts", ".mpd", ".txt"])
def test_playlist_opens_no_other_file(
    tmp_path: Path, listener: tuple[int, list[Any]], kind: str, suffix: str
):
    port, callers = listener
    shutil.copy(made("plain.mp4"), tmp_path / "other.mp4")
    names = (tmp_path / "other.mp4", "other.mp4", f"http://127.0.0.1:{port}/other.mp4")
    for place, other in enumerate(names):
        path = tmp_path / f"list{place}{suffix}"
        path.write_text(PLAYLISTS[kind].format(other))
        with pytest.raises(MediaError) as caught:
            open_video(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).count("\n") == 0
    assert callers == []
