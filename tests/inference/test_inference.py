"""Watching once and asking often: each way to the same memory gives the same, and so do answers."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.support.data import write_video
from vxl_jax import (
    Model,
    PartlyWatched,
    Picture,
    Video,
    VisualMemory,
    VisualMemoryError,
    load_memory,
    load_network,
)
from vxl_jax.errors import CheckpointError, MediaError
from vxl_jax.inference import entries as entries_module
from vxl_jax.inference.decode import generate
from vxl_jax.inference.memory import Watched
from vxl_jax.inference.sampling import Sampling
from vxl_jax.interrupts import held_interrupts
from vxl_jax.media.open import open_film
from vxl_jax.models import functions
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import demo
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import plan_stream
from vxl_jax.text.chat import IMAGE_TOKEN, encode_follow_up, encode_prompt

pytestmark = pytest.mark.usefixtures("exact_products")

MICRO = Path(__file__).parents[1] / "golden" / "micro"
WINDOW = 4  # frames


@pytest.fixture(scope="module")
def model(demo_tokenizer: Any) -> Model:
    model = Model(VideoXL(demo(), rngs=nnx.Rngs(3)), demo_tokenizer)
    model.windows_at_once = 2
    return model


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 56, 56, 3), np.uint8)


def entries(memory: VisualMemory) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values in use."""
    return memory.arrays()


def assert_same(one: VisualMemory, other: VisualMemory) -> None:
    assert one.length == other.length
    assert one.ids.tolist() == other.ids.tolist()
    for ours, theirs in zip(entries(one), entries(other), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)


def fresh(
    model: Model, blocks: list[np.ndarray], question: str, ratio: Any, new: int = 8
) -> list[int]:
    """The answer's ids when all is read again, in one go, by the functions below this interface."""
    ids = encode_prompt("<image>" * len(blocks) + question, model.tokenizer)
    tokens = [model.config.layout.count(len(block)) for block in blocks]
    stream = plan_stream(ids, tokens, window=model.config.window, ratio=ratio)
    pixels = np.concatenate(blocks)[None]
    (answer,) = generate(
        model.network,
        batch_streams([stream]),
        pixels,
        max_new_tokens=new,
        stop_ids=tuple(model.stop_ids),
    )
    return answer


def test_ten_questions_of_one_memory_are_ten_fresh_runs(model: Model):
    pixels = frames(11)
    memory = model.watch(pixels, ratio=4)
    before = entries(memory)
    questions = [f"What is number {i}?" for i in range(10)]
    expected = [fresh(model, [pixels], question, 4) for question in questions]
    assert len({tuple(ids) for ids in expected}) > 1
    prompts = [model.first_turn(1, question) for question in questions]
    assert [model.ask_ids(memory, [ids], max_new_tokens=8)[0] for ids in prompts] == expected
    assert model.ask_ids(memory, prompts, max_new_tokens=8) == expected
    assert model.ask(memory, questions, max_new_tokens=8) == [
        model.text_of(ids) for ids in expected
    ]
    for now, then in zip(entries(memory), before, strict=True):
        assert np.array_equal(now, then)


@pytest.mark.parametrize("cuts", [[4], [3, 8, 9], list(range(1, 13))])
@pytest.mark.parametrize("ratio", [4, None, {0: 4, 5: 8, 9: None}])
def test_extended_at_any_point_it_is_the_whole(model: Model, cuts: list[int], ratio: Any):
    pixels = frames(13)
    whole = model.watch(pixels, ratio=ratio)
    first, *rest = np.split(pixels, cuts)
    memory = model.watch(first, ratio=ratio)
    for piece in rest:
        memory.extend(piece, ratio=ratio)
        assert memory.watched[-1].last == memory.watched[-1].frames - 1
    assert_same(memory, whole)
    assert memory.watched[0].frames == 13


def test_frames_one_by_one_are_the_whole(model: Model):
    pixels = frames(19)
    whole = model.watch(pixels, ratio=8)
    memory = model.remember()
    memory.extend((frame for frame in pixels), ratio=8)
    assert_same(memory, whole)


@pytest.mark.parametrize("windows", [1, 2, 3, 64])
def test_the_size_of_chunks_does_not_matter(model: Model, windows: int):
    pixels = frames(23)
    other = Model(model.network, model.tokenizer)
    other.windows_at_once = windows
    ratio = {0: 4, 7: 8}
    assert_same(other.watch(pixels, ratio=ratio), model.watch(pixels, ratio=ratio))


def test_each_window_has_the_ratio_of_its_first_frame(model: Model):
    """Windows begin at seconds 0, 2, 4 and 6 of frames at 2 a second; 16 tokens each."""
    pixels = Video(frames(16), fps=2.0)
    length = model.remember().length
    assert model.watch(pixels, ratio={0: 4, 2: 8, 4.1: 16}).length == length + 4 + 2 + 2 + 1
    ids = fresh(model, [pixels.source], "Which?", [4, 8, 8, 16])
    memory = model.watch(pixels, ratio={0: 4, 2: 8, 4.1: 16})
    assert model.ask(memory, "Which?", max_new_tokens=8) == model.text_of(ids)


def test_several_videos_and_images_are_blocks_of_one_memory(model: Model):
    """Windows do not go over the end of a block."""
    first, second, picture = frames(5), frames(6, 1), frames(1, 2)[0]
    memory = model.watch([first, Picture(picture), second], ratio=4)
    assert [block.frames for block in memory.watched] == [5, 2, 6]
    assert (memory.ids == IMAGE_TOKEN).sum() == 3
    tiles = next(iter(open_film(Picture(picture), 56).chunks(99)))[0]
    expected = fresh(model, [first, tiles, second], "What differs?", 4)
    assert model.ask(memory, "What differs?", max_new_tokens=8) == model.text_of(expected)


# A memory in a file.


def test_a_saved_memory_gives_the_same_answers_and_goes_on(model: Model, tmp_path: Path):
    pixels = frames(14)
    memory = model.watch(pixels[:9], ratio=np.int64(4))
    memory.save(tmp_path / "film.safetensors")
    for loaded in (
        load_memory(tmp_path / "film.safetensors", model),
        load_memory(tmp_path / "film.safetensors"),
    ):
        assert loaded.length == memory.length
        assert loaded.watched == memory.watched
        answer = model.ask(loaded, "What happens?", max_new_tokens=8)
        assert answer == model.ask(memory, "What happens?", max_new_tokens=8)
        assert_same(loaded, memory)
        loaded.extend(pixels[9:], ratio=4)
        assert_same(loaded, model.watch(pixels, ratio=4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.safetensors"]


def test_a_file_is_not_replaced_unless_told(model: Model, tmp_path: Path):
    memory = model.watch(frames(2))
    memory.save(tmp_path / "film")
    with pytest.raises(VisualMemoryError, match="film: exists already"):
        memory.save(tmp_path / "film")
    memory.save(tmp_path / "film", overwrite=True)
    with pytest.raises(VisualMemoryError, match="is a name for pickles"):
        memory.save(tmp_path / "film.pt")
    with pytest.raises(VisualMemoryError, match="the parent directory does not exist"):
        memory.save(tmp_path / "none" / "film")


@pytest.mark.parametrize("change", ["seed", "dtype", "window"])
def test_a_memory_of_another_model_is_refused(model: Model, tmp_path: Path, change: str):
    memory = model.watch(frames(4), ratio=4)
    memory.save(tmp_path / "film")
    config = {"dtype": demo(dtype="bfloat16"), "window": demo(window=32)}.get(change, demo())
    seed = 4 if change == "seed" else 3
    other = Model(VideoXL(config, rngs=nnx.Rngs(seed)), model.tokenizer)
    for load in (lambda: load_memory(tmp_path / "film", other), lambda: other.ask(memory, "Who?")):
        with pytest.raises(VisualMemoryError, match="was made by another model"):
            load()
    same = Model(VideoXL(demo(), rngs=nnx.Rngs(3)), model.tokenizer)
    assert same.fingerprint == model.fingerprint
    assert same.ask(memory, "Who?") == model.ask(memory, "Who?")


def test_a_damaged_file_is_one_error(model: Model, tmp_path: Path):
    model.watch(frames(4)).save(tmp_path / "film")
    data = (tmp_path / "film").read_bytes()
    (tmp_path / "short").write_bytes(data[:-5])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "lacks").write_bytes(data.replace(b'\\"length\\"', b'\\"langth\\"'))
    save_file({"keys": np.zeros(3, np.float32)}, tmp_path / "other")
    for name, reason in (
        ("short", "cannot be read as safetensors"),
        ("empty", "cannot be read as safetensors"),
        ("none", "cannot be read as safetensors"),
        ("lacks", "is damaged"),
        ("other", "is not a saved memory"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: {reason}"):
            load_memory(tmp_path / name, model)


def test_a_memory_without_its_model_cannot_be_extended(model: Model, tmp_path: Path):
    model.watch(frames(4)).save(tmp_path / "film")
    with pytest.raises(VisualMemoryError, match="has no model yet"):
        load_memory(tmp_path / "film").extend(frames(1))


# Conversations.


def test_a_conversation_is_that_of_a_fresh_run_and_leaves_the_memory(model: Model):
    """Answers of one token, of several, and such that end by themselves or at their limit."""
    pixels = frames(7)
    memory = model.watch(pixels, ratio=4)
    before = entries(memory)
    chat, other = model.chat(memory), model.chat(memory)
    ids = encode_prompt("<image>Question 0?", model.tokenizer).tolist()
    for i, new in enumerate((5, 1, 40, 6)):
        stream = plan_stream(ids, [28], window=16, ratio=4)
        (expected,) = generate(
            model.network,
            batch_streams([stream]),
            pixels[None],
            max_new_tokens=new,
            stop_ids=tuple(model.stop_ids),
        )
        assert chat.ask(f"Question {i}?", max_new_tokens=new) == model.text_of(expected)
        other.ask(f"Something else {i}?", max_new_tokens=4)
        ids += [*expected, *encode_follow_up(f"Question {i + 1}?", model.tokenizer)]
    assert len(chat.turns) == 8
    for now, then in zip(entries(memory), before, strict=True):
        assert np.array_equal(now, then)


def test_a_follow_up_has_the_ids_of_all_turns_together(model: Model):
    tokenizer = model.tokenizer
    turns = [
        {"from": "human", "value": "<image>What is red?"},
        {"from": "gpt", "value": "the square"},
        {"from": "human", "value": "And where is <image>?"},
    ]
    answer = tokenizer.encode(turns[1]["value"], add_special_tokens=False)
    first = encode_prompt(turns[:1], tokenizer)
    follow_up = encode_follow_up(turns[2]["value"], tokenizer)
    assert [*first, *answer, *follow_up] == encode_prompt(turns, tokenizer).tolist()


def test_media_may_come_with_any_question(model: Model):
    first, second, picture = frames(6), frames(9, 1), frames(1, 2)[0]
    tiles = next(iter(open_film(Picture(picture), 56).chunks(99)))[0]
    for memory in (model.watch(first, ratio=4), None):
        chat = model.chat(memory)
        blocks = [first] if memory else []
        answer = chat.ask("What is new?", [Picture(picture)], ratio=4, max_new_tokens=6)
        blocks.append(tiles)
        assert answer == model.text_of(fresh(model, blocks, "What is new?", 4, new=6))
        ids = encode_prompt("<image>" * len(blocks) + "What is new?", model.tokenizer).tolist()
        ids += fresh(model, blocks, "What is new?", 4, new=6)
        ids += encode_follow_up("Is <image> it?", model.tokenizer).tolist()
        blocks.append(second)
        tokens = [len(block) * 4 for block in blocks]
        streams = batch_streams([plan_stream(ids, tokens, window=16, ratio=4)])
        pixels = np.concatenate(blocks)[None]
        stop = tuple(model.stop_ids)
        (last,) = generate(model.network, streams, pixels, max_new_tokens=6, stop_ids=stop)
        assert chat.ask("Is <image> it?", [second], ratio=4, max_new_tokens=6) == model.text_of(
            last
        )


def test_what_is_watched_later_is_not_seen_by_a_conversation(model: Model):
    pixels = frames(30)
    memory, early = model.watch(pixels[:6], ratio=4), model.watch(pixels[:6], ratio=4)
    chat = model.chat(memory)
    memory.extend(pixels[6:], ratio=4)
    assert chat.ask("What?", max_new_tokens=8) == model.ask(early, "What?", max_new_tokens=8)
    whole = model.watch(pixels, ratio=4)
    assert model.ask(memory, "What?", max_new_tokens=8) == model.ask(
        whole, "What?", max_new_tokens=8
    )


def test_an_answer_comes_in_pieces(model: Model):
    memory = model.watch(frames(5), ratio=4)
    expected = model.ask(memory, "What?", max_new_tokens=12)
    pieces = list(model.stream(memory, "What?", max_new_tokens=12))
    assert "".join(pieces).strip() == expected
    assert len(pieces) > 1


def test_an_answer_that_is_not_read_to_its_end_stands_as_far_as_it_was(model: Model):
    memory = model.watch(frames(5), ratio=4)
    chat, other = model.chat(memory), model.chat(memory)
    pieces = chat.stream("What?", max_new_tokens=12)
    begun = next(pieces)
    pieces.close()
    assert chat.turns[-1]["value"] == begun.strip()
    other.ask("What?", max_new_tokens=len(other.model.tokenizer.encode(begun)))
    assert chat.turns == other.turns
    assert chat.ask("And?", max_new_tokens=8) == other.ask("And?", max_new_tokens=8)


def test_draws_differ_by_seed_alone(model: Model):
    memory = model.watch(frames(5), ratio=4)

    def ask(seed: int) -> str:
        drawn = Sampling(temperature=1.5, seed=seed)
        return model.ask(memory, "What?", max_new_tokens=8, sampling=drawn)

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


# The numbers of the published implementation.


def test_golden_ids_through_this_interface(demo_tokenizer: Any):
    meta = json.loads((MICRO / "golden.json").read_text())
    tensors = load_file(MICRO / "golden.safetensors")
    model = Model(load_network(MICRO / "hf"), demo_tokenizer)
    model.__dict__["stop_ids"] = []
    compared = 0
    for case in meta["cases"]:
        if f"{case['name']}/generated" not in tensors:
            continue
        expected = tensors[f"{case['name']}/generated"]
        memory = VisualMemory(np.array(meta["prefix"], np.int32))
        memory.attach(model)
        pixels = tensors[f"input/{case['frames']}"].transpose(0, 2, 3, 1)
        memory.extend(pixels, ratio=case["ratio"])
        (ids,) = model.ask_ids(memory, [meta["suffix"]], max_new_tokens=len(expected))
        assert ids == expected.tolist()
        compared += 1
    assert compared == 1


# Refusals, and what remains then.


def test_a_question_needs_text(model: Model):
    memory = model.watch(frames(2))
    for question in ("", "  \n", "<image>"):
        with pytest.raises(ValueError, match="no text"):
            model.ask(memory, question)
    with pytest.raises(ValueError, match="1 <image> marks in the question for 0"):
        model.chat(memory).ask("What is <image>?")
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        model.ask(memory, "What?", max_new_tokens=0)


@pytest.mark.parametrize("ratio", [0, 17, 2.0, {}, {3: 4}, {0: 99}, "4"])
def test_ratios_that_no_window_can_have(model: Model, ratio: Any):
    with pytest.raises(ValueError, match="ratio"):
        model.watch(frames(2), ratio=ratio)


def test_the_context_is_checked_before_anything_is_watched(model: Model):
    short = Model(model.network, model.tokenizer, max_context=30)
    with pytest.raises(VisualMemoryError, match=r"makes 54 positions .* has learned 30"):
        short.watch(frames(40), ratio=4)
    memory = short.watch(frames(12), ratio=4)
    with pytest.raises(VisualMemoryError, match=r"the question: makes \d+ positions"):
        short.ask(memory, "What?")
    length = memory.length
    with pytest.raises(VisualMemoryError, match=r"12 frames: makes"):
        memory.extend(frames(12), ratio=4)
    assert memory.length == length
    live = (frame for frame in frames(64))
    with pytest.raises(VisualMemoryError, match=r"frames: makes"):
        short.remember().extend(live, ratio=4)


def test_a_conversation_that_fails_is_as_it_was(model: Model):
    memory = model.watch(frames(5), ratio=4)
    chat, other = model.chat(memory), model.chat(memory)
    for some in (chat, other):
        some.ask("What?", max_new_tokens=3)
    with pytest.raises(MediaError, match=r"none\.mp4: no such file"):
        chat.ask("And these?", [frames(3), "none.mp4"])
    assert len(chat.turns) == 2
    assert chat.ask("Well?", max_new_tokens=8) == other.ask("Well?", max_new_tokens=8)


@pytest.mark.parametrize(
    ("media", "reason"),
    [
        (np.zeros((3, 8, 8), np.uint8), "videos \\[F, H, W, 3\\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "videos \\[F, H, W, 3\\]"),
        (np.zeros((2, 8, 8, 3), np.int32), "must be uint8"),
        (np.zeros((2, 8, 8, 3), np.float32), "must be 56 x 56"),
        ("none.mp4", "no such file"),
        ("none.png", "no such file"),
        (7, "neither a path nor pictures"),
        (Video("none.mp4", fps=0.0), "fps must be more than 0"),
    ],
)
def test_what_cannot_be_watched(model: Model, media: Any, reason: str):
    memory = model.watch(frames(3), ratio=4)
    length, blocks = memory.length, list(memory.watched)
    with pytest.raises(MediaError, match=reason):
        memory.extend(media, ratio=4)
    assert (memory.length, memory.watched) == (length, blocks)


def test_all_media_are_opened_and_measured_before_any_is_watched(model: Model, tmp_path: Path):
    seen = []
    watched = Model(model.network, model.tokenizer, max_context=60)
    watched.remember = lambda system: seen.append(system)  # type: ignore[method-assign]
    with pytest.raises(MediaError, match=r"none\.mp4: no such file"):
        watched.watch([frames(4), "none.mp4"])
    assert not seen
    short = Model(model.network, model.tokenizer, max_context=60)
    with pytest.raises(VisualMemoryError, match=r"24 frames: makes \d+ positions"):
        short.watch([frames(24), frames(24)], ratio=4)


def test_a_film_that_breaks_off_leaves_those_before_it(model: Model, tmp_path: Path):
    whole = write_video(tmp_path / "whole.mp4", 60, fps=10).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(PartlyWatched, match=r"cut\.mp4 \d+ frames, up to second \d") as broken:
        model.watch([frames(5), tmp_path / "cut.mp4", frames(3)], ratio=4)
    memory = broken.value.memory
    assert [block.frames for block in memory.watched[:1]] == [5]
    assert 5 < memory.watched[1].frames < 60
    assert model.ask(memory, "What?", max_new_tokens=4)


def test_what_a_camera_gave_before_it_failed_is_watched(model: Model):
    pixels = frames(11)

    def camera() -> Iterator[np.ndarray]:
        yield from pixels
        raise OSError("unplugged")

    memory = model.remember()
    with pytest.raises(OSError, match="unplugged"):
        memory.extend(camera(), ratio=4)
    assert_same(memory, model.watch(pixels, ratio=4))


def test_a_file_goes_on_where_it_was_left(model: Model, tmp_path: Path):
    path = write_video(tmp_path / "film.mp4", 40, fps=10)
    memory = model.watch(path, frames=None, end=1.5, ratio={0: 4, 2: 8})
    memory.extend(path, frames=None, start=1.5, ratio={0: 4, 2: 8})
    assert memory.watched == [Watched(str(path), True, 40, 0.0, 3.9)]
    assert_same(memory, model.watch(path, frames=None, ratio={0: 4, 2: 8}))
    other = write_video(tmp_path / "other.mp4", 5, fps=10)
    memory.extend(other, ratio=4)
    assert [block.frames for block in memory.watched] == [40, 5]
    memory.extend(path, ratio=4, frames=3, new_block=False)
    assert [block.frames for block in memory.watched] == [40, 8]
    memory.extend(frames(2), new_block=True)
    assert [block.frames for block in memory.watched] == [40, 8, 2]


@pytest.mark.usefixtures("heard_interrupts")
@pytest.mark.parametrize("name", ["read", "decode_step"])
def test_ctrl_c_between_a_step_and_its_result(
    model: Model, name: str, monkeypatch: pytest.MonkeyPatch
):
    """The memory that a step was given is gone when it returns."""
    memory = model.watch(frames(9), ratio=4)
    chat, other = model.chat(memory), model.chat(memory)
    pixels = frames(30)
    step = getattr(entries_module, name)

    def interrupted(*arguments: Any) -> Any:
        result = step(*arguments)
        signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(entries_module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("What?", max_new_tokens=6)
        if name == "read":
            with pytest.raises(KeyboardInterrupt):
                memory.extend(pixels, ratio=4)
    count = memory.watched[0].frames
    assert count == (9 if name == "decode_step" else 17)
    assert_same(memory, model.watch(np.concatenate([frames(9), pixels])[:count], ratio=4))
    if chat.turns:
        other.ask("What?", max_new_tokens=1)
    assert len(chat.turns) == len(other.turns)
    assert chat.ask("And?", max_new_tokens=6) == other.ask("And?", max_new_tokens=6)


def test_the_memory_may_grow_while_it_is_asked(model: Model):
    memory, early = model.watch(frames(6), ratio=4), model.watch(frames(6), ratio=4)
    pieces = []
    for piece in model.stream(memory, "What?", max_new_tokens=8):
        pieces.append(piece)
        memory.extend(frames(9, len(pieces)), ratio=4)
    assert "".join(pieces).strip() == model.ask(early, "What?", max_new_tokens=8)


def test_the_next_question_ends_an_answer(model: Model):
    memory = model.watch(frames(5), ratio=4)
    chat, other = model.chat(memory), model.chat(memory)
    left, pieces = chat.stream("What?", max_new_tokens=12), other.stream("What?", max_new_tokens=12)
    next(left), next(pieces)
    pieces.close()
    assert chat.ask("And?", max_new_tokens=8) == other.ask("And?", max_new_tokens=8)
    assert list(left) == []
    assert chat.turns == other.turns
    assert [turn["value"] for turn in chat.turns][::2] == ["What?", "And?"]


def test_questions_of_other_lengths_compile_nothing(model: Model):
    memory = model.watch(frames(5), ratio=4)
    chat = model.chat(memory)
    chat.ask("What?", max_new_tokens=2)
    programs = [step._cache_size() for step in (functions.read, functions.decode_step)]
    for words in (2, 9, 16):
        model.ask(memory, "what is red " * words, max_new_tokens=words)
        chat.ask("what is blue " * words, max_new_tokens=words)
    assert programs == [step._cache_size() for step in (functions.read, functions.decode_step)]


def test_what_gives_no_frame_is_refused(model: Model):
    with pytest.raises(MediaError, match="frames: gave no frame"):
        model.watch(iter([]))
    chat = model.chat()
    with pytest.raises(MediaError, match="frames: gave no frame"):
        chat.ask("What?", iter([]))
    assert chat.turns == []
    memory = model.watch(frames(2), ratio=4)
    memory.extend(iter([]))
    assert memory.watched[0].frames == 2


def test_a_step_for_which_there_is_no_room(model: Model, monkeypatch: pytest.MonkeyPatch):
    """What was watched before stays, and is watched on when there is."""
    pixels = frames(24)
    memory = model.watch(pixels[:5], ratio=4)
    before = memory.length

    def full(self: Any, slots: int) -> None:
        raise VisualMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(entries_module.Entries, "reserve", full)
        with pytest.raises(VisualMemoryError, match="no room"):
            memory.extend(iter(pixels[5:]), ratio=4)
    assert (memory.length, memory.watched[0].frames) == (before, 5)
    memory.extend(pixels[5:], ratio=4)
    assert_same(memory, model.watch(pixels, ratio=4))


@pytest.mark.usefixtures("heard_interrupts")
def test_ctrl_c_is_heard_after_another_error():
    def fails() -> None:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            raise ValueError

    with pytest.raises(KeyboardInterrupt):
        fails()


@pytest.mark.usefixtures("heard_interrupts")
def test_ctrl_c_waits_once():
    with held_interrupts() as let_go:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        let_go()  # it was heard
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            let_go()


def test_a_camera_compiles_for_few_sizes(model: Model):
    """One frame after another: a program for each room that is made, and not for each frame."""
    memory = model.watch(frames(1), ratio=4)
    before = functions.read._cache_size()
    for frame in frames(60):
        memory.extend(frame[None], ratio=4)
    assert memory.length > 60
    assert functions.read._cache_size() - before <= 4


def test_questions_and_ratios_that_cannot_be(model: Model):
    memory = model.watch(frames(5), ratio=np.int64(4))
    assert model.ask(memory, []) == []
    with pytest.raises(ValueError, match="belong to a `chat`"):
        model.ask(memory, "Is <image> it?")
    chat = model.chat(memory)
    for ratio in (0, "4", {5: 4}, 999):
        with pytest.raises(ValueError, match="ratio"):
            chat.ask("What?", frames(2), ratio=ratio)  # type: ignore[arg-type]
    assert chat.turns == []
    # Fewer tokens than the ratio leave nothing.
    empty = Model(model.network, model.tokenizer).chat()
    assert isinstance(empty.ask("What?", [frames(2)], ratio=16, max_new_tokens=2), str)
