"""What watching and asking refuse, and what remains after a failure."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.data import write_video
from tests.support.networks import assert_same, frames
from vxl_jax import Model, PartlyWatched, Video, VisualMemoryError
from vxl_jax.errors import MediaError
from vxl_jax.inference import entries as entries_module
from vxl_jax.inference.memory import Watched
from vxl_jax.interrupts import held_interrupts
from vxl_jax.models import functions

pytestmark = pytest.mark.usefixtures("exact_products")


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
    for answer in (
        model.ask(memory, "What?", max_new_tokens=2),
        chat.ask("What?", max_new_tokens=2),
    ):
        assert isinstance(answer, str)  # both programs of a question are compiled now
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
