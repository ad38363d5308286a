"""A model is asked with the pixels, token ids and positions that it was trained with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import vxl_jax
import vxl_jax.inference.chat as chat_module
from tests.support.data import section, turns, write_media, write_video
from train.data.records.media import Preparer
from train.data.records.reader import Reader
from train.data.sources import Source
from train.data.tokenizer import FastTokenizer
from vxl_jax.config import VideoXLConfig, with_changes
from vxl_jax.inference.model import Model
from vxl_jax.media.open import Video
from vxl_jax.models.functions import prefill
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import demo
from vxl_jax.stream.batch import StreamShape, batch_streams
from vxl_jax.text.chat import encode_follow_up
from vxl_jax.text.template import IMAGE_TOKEN

QUESTION = "what is the colour"
RATIO = 4
MOST_FRAMES = 24
SHAPE = StreamShape(groups=1, tokens=768, memory=768, labels=1, beacons=1)
"""One shape for all samples: their programs are compiled once."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_media(tmp_path_factory.mktemp("media"))
    write_video(root / "long.mp4", 40, fps=4)
    return root


@pytest.fixture(scope="module")
def network() -> VideoXL:
    return VideoXL(demo(), rngs=nnx.Rngs(3))


def asked(network: VideoXL, tokenizer: Any, config: VideoXLConfig) -> Model:
    """A model with another configuration than its network, whose programs all tests share."""
    model = Model(network, tokenizer)
    model.config = config
    return model


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("image", {"image": "a.png"}, {}),
    ("small image", {"image": "dot.png"}, {"min_tiles": 1}),
    ("long image", {"image": "line.png"}, {"max_tiles": 5}),
    ("exact tiles", {"image": "a.png"}, {"min_tiles": 3, "max_tiles": 3}),
    ("square image", {"image": "a.png"}, {"image_mode": "square"}),
    ("images", {"image": ["a.png", "dot.png"]}, {"min_tiles": 1, "max_tiles": 4}),
    ("capped", {"video": "long.mp4"}, {}),
    ("capped and cut", {"video": "long.mp4"}, {"max_frames": 6}),
    ("capped at another rate", {"video": "long.mp4"}, {"video_fps": 0.5}),
    ("uniform", {"video": "long.mp4"}, {"frame_sampling": "uniform", "max_frames": 7}),
    ("fps", {"video": "long.mp4"}, {"frame_sampling": "fps", "video_fps": 2.0}),
    ("clip", {"video": "long.mp4", "start": 2.5, "end": 7.0}, {}),
    ("folder", {"video": "frames"}, {}),
    ("videos", {"video": ["frames", "a.mp4"]}, {"max_frames": 5}),
    ("time prompt", {"video": "long.mp4"}, {"time_prompt": True}),
    ("time prompt of a clip", {"video": "long.mp4", "start": 2.5}, {"time_prompt": True}),
    ("time prompt of a folder", {"video": "frames", "fps": 2}, {"time_prompt": True}),
    ("no time prompt of videos", {"video": ["frames", "a.mp4"]}, {"time_prompt": True}),
    ("no time prompt of an image", {"image": "a.png"}, {"time_prompt": True}),
    ("decord", {"video": "long.mp4"}, {"decoder": "decord"}),
]


@pytest.mark.parametrize(
    ("record", "data"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_a_record_is_asked_as_it_is_trained(
    network: VideoXL, demo_tokenizer: Any, root: Path, record: dict[str, Any], data: dict[str, Any]
):
    files = record.get("image", record.get("video"))
    files = files if isinstance(files, list) else [files]
    options = section(root, **data)
    config = with_changes(demo(), preprocessing=options.preprocessing)

    # By the trainer: as a held-out question.
    value = {**record, "conversations": turns("<image>" * len(files) + QUESTION, "red")}
    preparer = Preparer(options, config)
    source = Source(Path("x.json"), root, allow_outside=False)
    reader = Reader([source], [[value]], preparer, FastTokenizer(demo_tokenizer), prompts=True)
    sample, media = reader.open(0, 0)
    trained = np.zeros((sample.frames, 56, 56, 3), np.uint8)
    at = 0
    for medium in media:
        medium.read(trained[at : at + medium.block.frames], None)
        at += medium.block.frames
    streams = batch_streams([sample.plan(config, RATIO)], SHAPE)
    padded = np.zeros((1, MOST_FRAMES, 56, 56, 3), np.uint8)
    padded[0, : len(trained)] = trained
    logits, memory = prefill(*nnx.split(network), streams, padded, SHAPE.memory)
    expected = int(np.argmax(logits))

    # By the model that has the same preprocessing.
    model = asked(network, demo_tokenizer, config)
    paths: list[Any] = [root / file for file in files]
    if "fps" in record:
        paths = [Video(path, fps=record["fps"]) for path in paths]
    clip = {name: record.get(name) for name in ("start", "end") if name in record}
    films = model.open_films(paths, **clip)
    pixels = np.concatenate([pixels for film in films for pixels, _ in film.chunks(99)])
    np.testing.assert_array_equal(pixels, trained)

    watched = model.watch(paths, ratio=RATIO, **clip)
    times = watched.snapshot().video_times()
    turn = model.first_turn(len(watched.watched), QUESTION, times)
    assert [*watched.ids.tolist(), *turn.tolist()] == sample.ids.tolist()
    for ours, theirs in zip(watched.arrays(), (memory.keys, memory.values), strict=True):
        theirs = np.asarray(theirs)[:, 0, :, : watched.length]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)
    assert model.ask_ids(watched, [turn], max_new_tokens=1) == [[expected]]
    assert model.ask(watched, QUESTION, max_new_tokens=1) == model.text_of([expected]).strip()
    if not clip and "fps" not in record:  # media that come with the first question of a chat
        answer = model.chat().ask(QUESTION, paths, ratio=RATIO, max_new_tokens=1)
        assert answer == model.text_of([expected]).strip()


def test_an_extended_memory_tells_the_times_of_all_frames(
    network: VideoXL, demo_tokenizer: Any, root: Path, tmp_path: Path
):
    options = section(root, time_prompt=True)
    config = with_changes(demo(), preprocessing=options.preprocessing)
    model = asked(network, demo_tokenizer, config)
    path = root / "long.mp4"
    whole = model.watch(path, ratio=RATIO)
    memory = model.watch(path, ratio=RATIO, end=4.0)
    memory.extend(path, ratio=RATIO, start=4.0)
    times = whole.snapshot().video_times()
    assert times is not None
    assert len(times.seconds) == 10
    assert memory.snapshot().video_times() == times
    memory.save(tmp_path / "memory")
    again = vxl_jax.load_memory(tmp_path / "memory", model)
    assert again.snapshot().video_times() == times
    assert model.ask(again, QUESTION, max_new_tokens=6) == model.ask(
        whole, QUESTION, max_new_tokens=6
    )


def test_a_memory_without_times_is_saved_as_before(
    network: VideoXL, demo_tokenizer: Any, root: Path, tmp_path: Path
):
    memory = Model(network, demo_tokenizer).watch(root / "frames")
    memory.save(tmp_path / "memory")
    assert b"times" not in (tmp_path / "memory").read_bytes()
    assert vxl_jax.load_memory(tmp_path / "memory").watched == memory.watched


def test_a_video_of_a_later_turn_has_its_times_in_that_turn(
    network: VideoXL, demo_tokenizer: Any, root: Path, monkeypatch: pytest.MonkeyPatch
):
    options = section(root, time_prompt=True)
    config = with_changes(demo(), preprocessing=options.preprocessing)
    record = {"video": "long.mp4", "conversations": turns("how many", "one", "<image>what", "red")}
    preparer = Preparer(options, config)
    source = Source(Path("x.json"), root, allow_outside=False)
    reader = Reader([source], [[record]], preparer, FastTokenizer(demo_tokenizer), prompts=True)
    trained = reader.open(0, 0)[0].ids.tolist()

    model = asked(network, demo_tokenizer, config)
    monkeypatch.setattr(Model, "stop_ids", [])
    chat = model.chat()
    chat.ask("how many", max_new_tokens=1)
    read: list[int] = []
    monkeypatch.setattr(
        *(chat_module, "encode_follow_up"),
        lambda *args, **options: read.extend(ids := encode_follow_up(*args, **options)) or ids,
    )
    chat.ask("<image>what", [root / "long.mp4"], max_new_tokens=1)
    question = read[read.index(IMAGE_TOKEN) :]
    assert trained[-len(question) :] == question
    read.clear()
    chat.ask("what", max_new_tokens=1)
    assert len(read) < len(question)  # told once


def test_a_live_source_cannot_be_told_in_a_chat(network: VideoXL, demo_tokenizer: Any, root: Path):
    options = section(root, time_prompt=True)
    config = with_changes(demo(), preprocessing=options.preprocessing)
    model = asked(network, demo_tokenizer, config)
    frames = iter(np.zeros((3, 56, 56, 3), np.uint8))
    with pytest.raises(vxl_jax.ArgumentError, match="watch it into a memory first"):
        model.chat().ask(QUESTION, frames)
    about_two = model.chat(model.watch(root / "frames"))  # then nothing would be told
    about_two.ask(QUESTION, iter(np.zeros((3, 56, 56, 3), np.uint8)), max_new_tokens=1)
    memory = model.watch(iter(np.zeros((3, 56, 56, 3), np.uint8)))
    times = memory.snapshot().video_times()
    assert times is not None
    assert (times.seconds, times.end) == ((0.0, 1.0, 2.0), 3.0)
