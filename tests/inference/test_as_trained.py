"""A model is asked with the pixels, token ids and positions that it was trained with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import vxl_jax
import vxl_jax.inference.chat as chat_module
from tests.support.data import section, turns, write_media, write_video
from train.config import DataSection
from train.data.records.media import Preparer
from train.data.records.reader import Reader
from train.data.sources import Source
from train.data.tokenizer import FastTokenizer
from vxl_jax.config import Compression, VideoXLConfig, with_changes
from vxl_jax.inference.model import Model
from vxl_jax.media.open import Video
from vxl_jax.models.functions import prefill
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import demo, demo_llava
from vxl_jax.stream.batch import StreamShape, batch_streams
from vxl_jax.stream.visual import batch_visual
from vxl_jax.text.chat import encode_follow_up, with_marks
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
    options = section(root, **data)
    config = with_changes(demo(), preprocessing=options.preprocessing)
    check_as_trained(asked(network, demo_tokenizer, config), options, record, RATIO, SHAPE)


def check_as_trained(
    model: Model, options: DataSection, record: dict[str, Any], ratio: Any, shape: StreamShape
) -> None:
    """Compare what the trainer makes of a record with what the model makes of its media."""
    config, tokenizer, root = model.config, model.tokenizer, Path(options.media_root)
    files = record.get("image", record.get("video"))
    files = files if isinstance(files, list) else [files]
    side = config.tower.image_size

    # By the trainer: as a held-out question.
    value = {
        **record,
        "conversations": turns(with_marks(len(files), QUESTION, config.family), "red"),
    }
    preparer = Preparer(options, config)
    source = Source(Path("x.json"), root, allow_outside=False)
    reader = Reader([source], [[value]], preparer, FastTokenizer(tokenizer), prompts=True)
    sample, media = reader.open(0, 0)
    trained = np.zeros((sample.frames, side, side, 3), np.uint8)
    at = 0
    for medium in media:
        medium.read(trained[at : at + medium.block.frames], None)
        at += medium.block.frames
    streams = batch_streams([sample.plan(config, ratio)], shape)
    padded = np.zeros((1, MOST_FRAMES, side, side, 3), np.uint8)
    padded[0, : len(trained)] = trained
    visual: Any = padded
    if not config.layout.is_uniform:
        visual = batch_visual(config.layout, padded, [sample.tokens(config)], VISUAL_TOKENS)
    logits, memory = prefill(*nnx.split(model.network), streams, visual, shape.memory)
    expected = int(np.argmax(logits))

    # By the model that has the same preprocessing.
    paths: list[Any] = [root / file for file in files]
    if "fps" in record:
        paths = [Video(path, fps=record["fps"]) for path in paths]
    clip = {name: record.get(name) for name in ("start", "end") if name in record}
    films = model.open_films(paths, **clip)
    pixels = np.concatenate([pixels for film in films for pixels, _ in film.chunks(99)])
    np.testing.assert_array_equal(pixels, trained)

    watched = model.watch(paths, ratio=ratio, **clip)
    times = watched.snapshot().video_times()
    turn = model.first_turn(len(watched.watched), QUESTION, times)
    assert [*watched.ids.tolist(), *turn.tolist()] == sample.ids.tolist()
    for ours, theirs in zip(watched.arrays(), (memory.keys, memory.values), strict=True):
        theirs = np.asarray(theirs)[:, 0, :, : watched.length]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=ENTRY_ERROR)
    assert model.ask_ids(watched, [turn], max_new_tokens=1) == [[expected]]
    assert model.ask(watched, QUESTION, max_new_tokens=1) == model.text_of([expected]).strip()
    if not clip and "fps" not in record:  # media that come with the first question of a chat
        answer = model.chat().ask(QUESTION, paths, ratio=ratio, max_new_tokens=1)
        assert answer == model.text_of([expected]).strip()


ENTRY_ERROR = 1e-5
"""Of keys and values of order 1, in float32."""

VISUAL_TOKENS = 512
LLAVA_SHAPE = StreamShape(groups=1, tokens=1024, memory=1024, labels=1, beacons=0)
LLAVA_DATA = {"image_grids": "(1x1),...,(3x3)", "frame_sampling": "forced", "max_frames": 6}
FLAT = {"image_tokens": "flat", "newline": "none"}
LLAVA_CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("image", {"image": "a.png"}, {}, {}),
    ("downscaled image", {"image": "line.png"}, {}, {"max_image_tiles": 1}),
    ("one tile", {"image": "a.png"}, {"image_mode": "pad"}, {}),
    ("images", {"image": ["a.png", "dot.png"]}, {}, {}),
    ("forced", {"video": "long.mp4"}, {"time_prompt": True}, {}),
    ("forced and short", {"video": "a.mp4"}, {"max_frames": 13}, {}),
    ("strided clip", {"video": "long.mp4", "end": 7.0}, {"frame_sampling": "strided"}, {}),
    ("one frame", {"video": "frames"}, {"max_frames": 1, "time_prompt": True}, {}),
    ("mean", {"video": "frames"}, {}, {"pool_mode": "average", "newline": "frame"}),
    ("largest", {"video": "frames"}, {}, {"pool_mode": "max", "newline": "none"}),
    ("end", {"video": ["frames", "a.mp4"]}, {}, {"newline": "one_token", "slow_every": 1}),
    ("faster", {"video": "frames"}, {}, {"slow_every": 3, "faster_token": True}),
    (
        "CLIP",
        {"image": "a.png"},
        {},
        {"vision": demo().tower, "image_tokens": "flat", "newline": "none"},
    ),
    ("beacons", {"video": "long.mp4"}, {}, {"compression": Compression(32, (2, 4))}),
]


@pytest.mark.parametrize(
    ("record", "data", "model"), [case[1:] for case in LLAVA_CASES], ids=[c[0] for c in LLAVA_CASES]
)
def test_a_record_of_llava_video_is_asked_as_it_is_trained(
    demo_tokenizer: Any,
    root: Path,
    record: dict[str, Any],
    data: dict[str, Any],
    model: dict[str, Any],
):
    options = section(root, **(LLAVA_DATA | data))
    config = demo_llava(**model)
    preprocessing = options.preprocessing_for(config.preprocessing)
    config = with_changes(config, preprocessing=preprocessing)
    asked = Model(VideoXL(config, rngs=nnx.Rngs(3)), demo_tokenizer)
    ratio = None if config.compression is None else RATIO
    shape = replace(LLAVA_SHAPE, beacons=int(ratio is not None))
    check_as_trained(asked, options, record, ratio, shape)


@pytest.mark.parametrize("newline", ["grid", "one_token"])
@pytest.mark.parametrize("compression", [None, Compression(32, (2, 4))], ids=["plain", "beacons"])
def test_a_llava_video_that_goes_on_is_that_of_the_whole(
    demo_tokenizer: Any, newline: Any, compression: Any, tmp_path: Path
):
    config = demo_llava(newline=newline, compression=compression)
    model = Model(VideoXL(config, rngs=nnx.Rngs(3)), demo_tokenizer)
    frames = np.random.default_rng(0).integers(0, 256, (11, 70, 70, 3), np.uint8)
    whole = model.watch(frames, slow_every=3)
    memory = model.watch(frames[:1], slow_every=3)
    before = model.ask(memory, QUESTION, max_new_tokens=3)
    assert before == model.ask(model.watch(frames[:1]), QUESTION, max_new_tokens=3)
    memory.extend(frames[1:6])
    memory.save(tmp_path / "memory")
    for each in (memory, vxl_jax.load_memory(tmp_path / "memory", model)):
        each.extend(frames[6:])
        assert each.length == whole.length
        for ours, theirs in zip(each.arrays(), whole.arrays(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=ENTRY_ERROR)
    with pytest.raises(vxl_jax.ArgumentError, match=r"slow_every is 2, but .* begun with 3"):
        memory.extend(frames[:1], slow_every=2)
    with pytest.raises(vxl_jax.MediaError, match="slow_every is 0"):
        model.watch(frames, slow_every=0)


def test_video_xl_has_no_fast_frames(network: VideoXL, demo_tokenizer: Any):
    frames = np.zeros((2, 56, 56, 3), np.uint8)
    with pytest.raises(vxl_jax.ArgumentError, match="pools all frames alike"):
        Model(network, demo_tokenizer).watch(frames, slow_every=2)


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
