"""The command line: python -m vxl_jax.generate."""

import io
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.data import write_video
from vxl_jax import Picture, Video, load, load_memory
from vxl_jax.inference import memory_file, watching
from vxl_jax.inference.cli import main
from vxl_jax.inference.options import read_generate_options, read_media_options, read_ratios
from vxl_jax.inference.watching import Watcher
from vxl_jax.media import MediaOptions
from vxl_jax.media.children.decoding import Decoder

OPTIONS = """
    model video image frames ratio sample-fps start end decoder square-pixels tone-map color-profile
    memory save-memory overwrite prompt interactive max-new-tokens temperature top-p top-k seed
    weights vision max-context plan card memory-gb
"""

MICRO = Path(__file__).parents[1] / "golden" / "micro"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    """A checkpoint with a tokenizer, and media."""
    path = tmp_path_factory.mktemp("generate")
    shutil.copytree(MICRO / "hf", path / "hf")
    shutil.copytree(MICRO / "clip-vision", path / "clip-vision")
    shutil.copytree(demo_data / "tokenizer", path / "hf", dirs_exist_ok=True)
    (path / "run" / "checkpoints").mkdir(parents=True)
    (path / "run" / "config.json").write_text("{}")
    write_video(path / "film.mp4", 60, fps=10)
    whole = (path / "film.mp4").read_bytes()
    (path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    Image.fromarray(noise).save(path / "image.png")
    return path


def run(folder: Path, *options: str) -> int:
    return main(["--model", str(folder / "hf"), "--max-new-tokens", "6", *options])


def test_prompts_are_answered_one_by_one(folder: Path, capsys: pytest.CaptureFixture):
    film, image = str(folder / "film.mp4"), str(folder / "image.png")
    media = ["--video", film, "--image", image, "--frames", "25", "--ratio", "0:4,1:8"]
    prompts = ["--prompt", "What is red?", "--prompt", "What is blue?"]
    assert run(folder, *media, *prompts) == 0
    printed = capsys.readouterr()
    model = load(folder / "hf")
    memory = model.watch([Video(film, 25), Picture(image)], ratio={0: 4, 1: 8})
    expected = [
        "".join(model.stream(memory, question, max_new_tokens=6))
        for question in ("What is red?", "What is blue?")
    ]
    assert printed.out == "".join(answer + "\n" for answer in expected)
    assert expected[0] != expected[1]
    assert "watching" in printed.err
    assert "25/25" in printed.err


def test_a_saved_memory_answers_alike(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    saved, prompt = str(tmp_path / "film.memory"), ["--prompt", "What is red?"]
    media = ["--video", str(folder / "film.mp4"), "--frames", "25"]
    assert run(folder, *media, *prompt, "--save-memory", saved) == 0
    first = capsys.readouterr()
    assert f"saved {saved}: VisualMemory({folder}/film.mp4 (25 frames); " in first.err
    assert run(folder, "--memory", saved, *prompt) == 0
    assert capsys.readouterr().out == first.out
    # More is watched into it.
    more = ["--image", str(folder / "image.png"), "--save-memory", str(tmp_path / "more")]
    assert run(folder, "--memory", saved, *more) == 0
    memory = load_memory(tmp_path / "more")
    assert [block.is_video for block in memory.watched] == [True, False]


def test_a_conversation_line_by_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    media = ["--video", str(folder / "film.mp4"), "--frames", "12"]
    monkeypatch.setattr("sys.stdin", io.StringIO("What is red?\n\nAnd <image>?\nAnd then?\n"))
    assert run(folder, *media, "--interactive") == 0
    printed = capsys.readouterr()
    model = load(folder / "hf")
    chat = model.chat(model.watch(folder / "film.mp4", frames=12))
    expected = ["".join(chat.stream(q, max_new_tokens=6)) for q in ("What is red?", "And then?")]
    assert printed.out == "".join(answer + "\n" for answer in expected)
    assert "error: 1 <image> marks in the question for 0 videos and images" in printed.err


def test_a_damaged_film_is_answered_as_far_as_it_goes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    saved = str(tmp_path / "memory")
    media = ["--video", str(folder / "cut.mp4"), "--frames", "60"]
    assert run(folder, *media, "--prompt", "What?", "--save-memory", saved) == 3
    printed = capsys.readouterr()
    memory = load_memory(saved)
    watched = memory.watched[0]
    assert 5 < watched.frames < 60
    assert watched.last == pytest.approx((watched.frames - 1) / 10)
    assert "cut.mp4: ends early, " in printed.err
    assert f"{watched.frames} frames, up to second {watched.last:.1f}" in printed.err
    model = load(folder / "hf")
    whole = model.watch(Video(folder / "film.mp4", 60, end=watched.last + 0.1))
    assert whole.length == memory.length
    answer = "".join(model.stream(whole, "What?", max_new_tokens=6))
    assert printed.out == answer + "\n"


@pytest.mark.usefixtures("heard_interrupts")
def test_what_was_watched_before_ctrl_c_is_saved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    read, see, calls, seen = Decoder.read_frames, Watcher.see, [], threading.Event()

    def watched_one(self: Any, *arguments: Any) -> None:
        see(self, *arguments)
        seen.set()

    def interrupted(self: Any, request: Any, indices: list[int], *rest: Any) -> Any:
        calls.append(len(indices))
        if len(calls) == 2:
            seen.wait(60)
            signal.raise_signal(signal.SIGINT)  # heard by the main thread
        return read(self, request, indices, *rest)

    monkeypatch.setattr(watching, "AT_ONCE", 16)
    monkeypatch.setattr(Watcher, "see", watched_one)
    monkeypatch.setattr(Decoder, "read_frames", interrupted)
    saved = str(tmp_path / "memory")
    media = ["--video", str(folder / "film.mp4"), "--frames", "60"]
    assert run(folder, *media, "--prompt", "What?", "--save-memory", saved) == 130
    assert "interrupted" in capsys.readouterr().err
    memory, model = load_memory(saved), load(folder / "hf")
    frames = memory.watched[0].frames
    assert calls[0] <= frames < 60
    assert memory.length == model.watch(Video(folder / "film.mp4", frames)).length


def test_a_memory_that_cannot_be_saved_is_answered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory_file, "write_tensors", full)
    media = ["--video", str(folder / "film.mp4"), "--frames", "5"]
    saved = str(tmp_path / "memory")
    assert run(folder, *media, "--prompt", "What?", "--save-memory", saved) == 2
    printed = capsys.readouterr()
    assert "memory: cannot be saved ([Errno 28] No space left on device)" in printed.err
    assert printed.out.strip()
    assert list(tmp_path.iterdir()) == []


def test_a_bad_film_is_found_before_a_good_one_is_watched(
    folder: Path, capsys: pytest.CaptureFixture
):
    media = ["--video", str(folder / "film.mp4"), "--video", "none.mp4", "--prompt", "What?"]
    assert run(folder, *media) == 2
    error = capsys.readouterr().err
    assert "none.mp4: no such file" in error
    assert "watching" not in error


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "none", "--video", "x.mp4", "--prompt", "a"], "none/config.json: cannot be"),
        (["--model", "run", "--video", "x.mp4", "--prompt", "a"], "run: is a training run; pyth"),
        (["--video", "none.mp4", "--prompt", "a"], "none.mp4: no such file"),
        (["--video", "image.png", "--prompt", "a"], "image.png: is a picture (PNG), not a video"),
        (["--image", "film.mp4", "--prompt", "a"], "film.mp4: not a readable image"),
        (["--video", "film.mp4", "--prompt", " "], "the question has no text"),
        (["--video", "film.mp4", "--prompt", "a", "--ratio", "0"], "ratio 0: it must be a whole"),
        (["--video", "film.mp4", "--prompt", "a", "--ratio", "5:4"], "which one holds from second"),
        (["--video", "film.mp4", "--prompt", "a", "--frames", "0"], "0 frames asked for"),
        (["--video", "film.mp4", "--prompt", "a", "--start", "9"], "the clip starts at 9 s but"),
        (["--video", "film.mp4", "--prompt", "a", "--max-context", "9"], "has learned 9"),
        (["--video", "film.mp4", "--prompt", "a", "--max-context", "99"], "the question: makes"),
        (["--video", "film.mp4", "--prompt", "<image>a"], "more media belong to a `chat`"),
        (["--video", "film.mp4", "--prompt", "a", "--max-new-tokens", "0"], "give at least one"),
        (["--video", "film.mp4", "--prompt", "a\udc80"], "is not valid Unicode"),
        (["--video", "film.mp4", "--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--memory", "none", "--prompt", "a"], "none: cannot be read as safetensors"),
        (["--memory", "film.mp4", "--prompt", "a"], "film.mp4: cannot be read as safetensors"),
        (["--video", "film.mp4", "--save-memory", "film.mp4"], "film.mp4: exists already"),
        (["--video", "film.mp4", "--save-memory", "no/memory"], "the parent directory does not"),
    ],
)
def test_one_error_for_what_cannot_be(
    options: list[str],
    reason: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(folder)
    assert main(["--model", "hf", *options]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ")
    assert reason in error


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--video", "film.mp4"], "nothing is asked"),
        (["--prompt", "a"], "nothing is watched"),
        (["--memory", "m", "--prompt", "a", "--ratio", "4"], "--ratio: the memory has been made"),
        (["--memory", "m", "--prompt", "a", "--frames", "4"], "--frames: the memory has been made"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], reason: str, capsys: pytest.CaptureFixture
):
    assert main(["--model", "hf", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {reason}")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--ratio", "four"], "--ratio: 'four' is not a ratio"),
        (["--frames", "None"], "--frames"),
        (["--decoder", "ffmpeg"], "--decoder"),
        (["--in-order", "a"], "--in-order"),
        (["--model"], "--model"),
    ],
)
def test_an_option_that_cannot_be_read(
    options: list[str], reason: str, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as ended:
        main(["--model", "hf", "--video", "film.mp4", "--prompt", "a", *options])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_videos_and_images_stay_in_their_order():
    given = ["--image=a", "--video", "b", "--prompt", "video", "--video=c=d", "--prompt=--image"]
    options = read_generate_options(["--model", "hf", *given, "--image", "image"])
    expected = (("image", "a"), ("video", "b"), ("video", "c=d"), ("image", "image"))
    assert options.media.in_order == expected
    assert options.question.prompt == ("video", "--image")


def test_help_lists_every_option(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name in OPTIONS.split():
        assert f" --{name} " in printed, name
    assert "in-order" not in printed


def test_ratios_on_the_command_line():
    assert read_ratios("16") == 16
    assert read_ratios("none") is None
    assert read_ratios("0:16,60.5:4,90:none") == {0.0: 16, 60.5: 4, 90.0: None}


def test_pixels_are_decoded_as_asked(folder: Path):
    media = ["--video", str(folder / "film.mp4"), "--prompt", "What?"]
    for given, expected in (
        ([], MediaOptions()),
        (["--decoder", "decord", "--color-profile"], MediaOptions("decord", color_profile=True)),
        (["--square-pixels", "--tone-map"], MediaOptions("pyav", True, True, False)),
    ):
        options = read_generate_options(["--model", "hf", *media, *given])
        assert read_media_options(options, MediaOptions()) == expected
    trained = MediaOptions("decord", color_profile=True)
    options = read_generate_options(["--model", "hf", *media])
    assert read_media_options(options, trained) == trained
    options = read_generate_options(["--model", "hf", *media, "--decoder", "pyav", "--tone-map"])
    assert read_media_options(options, trained) == MediaOptions("pyav", False, True, True)


def test_a_plan(folder: Path, capsys: pytest.CaptureFixture):
    options = ["--plan", "--frames", "100", "--memory-gb", "0.5", "--weights", "int8"]
    assert run(folder, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "compiled by XLA's CPU compiler, in float32 (an upper bound)"
    # 3 layers, 2 KV heads of 16, bfloat16, keys and values.
    assert lines[2] == "an entry of the memory: 384 bytes"
    ratios = load(folder / "hf").config.ratios
    assert len([line for line in lines if line.startswith("most frames at ratio")]) == len(ratios)
    assert main(["--model", "hf", "--plan", "--card", "none"]) == 2
    assert "--card none: unknown card" in capsys.readouterr().err
