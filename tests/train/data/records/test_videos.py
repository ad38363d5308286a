"""Records of videos: clips, which frames are taken, what the model is told of their times."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.data import (
    ASK,
    Record,
    check,
    frame_numbers,
    load,
    open_files,
    read_from,
    turns,
    write_records,
    write_video,
)
from train.data.records.sample import BadSample, Sample
from train.data.workers import LoadedSample, Measured, RecordWork
from vxl_jax.text import chat
from vxl_jax.text.template import IMAGE_MARK


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds of four frames a second, as a file and as a folder of frames; a picture."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "a.mp4", 24, fps=4)
    (folder / "frames").mkdir()
    for i in range(24):
        Image.new("RGB", (56, 56), (10 * i,) * 3).save(folder / "frames" / f"{i}.png")
    Image.new("RGB", (56, 56)).save(folder / "a.png")
    return folder


def taken(
    record: Record, root: Path, tokenizer: Any, seed: tuple[int, ...] | None = None, **data: Any
) -> list[int]:
    """Which frames a record's videos are made of, one video after the other."""
    record = {"conversations": ASK, **record}
    work = RecordWork(read_from([record], root, tokenizer, **data), ())
    (measured,) = work.measure(0, [0])
    assert isinstance(measured, Measured), measured
    out = np.zeros((sum(measured.frames), 56, 56, 3), np.uint8)
    assert isinstance(work.load(0, 0, seed, out), LoadedSample)
    return frame_numbers(out)


# Which frames.


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, [0, 4, 8, 12, 16, 20]),
        ({"video_fps": 2}, [*range(0, 24, 2)]),
        ({"video_fps": 100}, [*range(24)]),
        ({"max_frames": 4}, [0, 7, 15, 23]),
        ({"frame_sampling": "uniform", "max_frames": 4}, [0, 7, 15, 23]),
        ({"frame_sampling": "uniform", "max_frames": 12, "video_fps": 0.1}, None),
        ({"frame_sampling": "uniform", "max_frames": 100}, [*range(24)]),
        ({"frame_sampling": "fps", "max_frames": 6}, [0, 4, 8, 12, 16, 20]),
        ({"frame_sampling": "fps", "video_fps": 0.5}, [0, 8, 16]),
    ],
)
def test_frames_are_sampled(
    data: dict[str, Any], expected: list[int] | None, root: Path, demo_tokenizer: Any
):
    if expected is None:
        expected = np.linspace(0, 23, 12).astype(int).tolist()
    assert taken({"video": "a.mp4"}, root, demo_tokenizer, **data) == expected
    folder = {"video": "frames", "fps": 4}
    assert taken(folder, root, demo_tokenizer, **data) == expected


def test_a_video_with_too_many_frames_a_second_is_bad(root: Path, demo_tokenizer: Any):
    record = {"video": "a.mp4", "conversations": ASK}
    bad = check(record, root, demo_tokenizer, frame_sampling="fps", max_frames=5)
    assert isinstance(bad, BadSample)
    assert bad.reason == (
        f"{root}/a.mp4: 6 frames at 1 a second are over max_frames 5; use a clip of it, or another "
        "sampling"
    )
    clip = {**record, "start": 1}
    assert isinstance(check(clip, root, demo_tokenizer, frame_sampling="fps", max_frames=5), Sample)


def test_a_folder_of_frames_has_one_a_second_unless_it_says_other(root: Path, demo_tokenizer: Any):
    def frames(**record: Any) -> list[int]:
        return taken({"video": "frames", **record}, root, demo_tokenizer)

    assert frames() == frames(fps=1) == frames(fps=None) == [*range(24)]
    assert frames(fps=4) == frames(fps=[4.0]) == [*range(0, 24, 4)]
    assert frames(fps=0.5) == [*range(24)]


@pytest.mark.parametrize("size", [24])
def test_the_smallest_videos(size: int, tmp_path: Path, demo_tokenizer: Any):
    """Taken as they are or refused, but not with other pixels."""
    write_video(tmp_path / "a.mp4", 3, size=size)
    work = RecordWork(
        read_from([{"video": "a.mp4", "conversations": ASK}], tmp_path, demo_tokenizer), ()
    )
    out = np.zeros((3, 56, 56, 3), np.uint8)
    if isinstance(work.measure(0, [0])[0], Measured) and isinstance(
        work.load(0, 0, None, out), LoadedSample
    ):
        assert frame_numbers(out) == [0, 1, 2]


# Clips.


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ({"start": 0, "end": 6}, [0, 4, 8, 12, 16, 20]),
        ({"start": 1}, [4, 8, 12, 16, 20]),
        ({"end": 2}, [0, 4]),
        ({"start": 1, "end": 3}, [4, 8]),
        ({"start": 1.5, "end": 3.5}, [6, 10]),
        ({"start": [1], "end": [3]}, [4, 8]),
        ({"start": None, "end": [None]}, [0, 4, 8, 12, 16, 20]),
        ({"start": 4, "end": 100}, [16, 20]),
        ({"start": 5.9}, [23]),
        ({"start": 2, "end": 2.01}, [8]),
    ],
)
def test_clips(clip: Record, expected: list[int], root: Path, demo_tokenizer: Any):
    assert taken({"video": "a.mp4", **clip}, root, demo_tokenizer) == expected
    assert taken({"video": "frames", "fps": 4, **clip}, root, demo_tokenizer) == expected


def test_each_of_several_videos_has_its_clip(root: Path, demo_tokenizer: Any):
    record = {
        "video": ["a.mp4", "frames", "a.mp4"],
        "start": [1, None, 4],
        "end": [3, 5, None],
        "fps": [None, 2, None],
        "conversations": turns("<image><image><image> what", "red"),
    }
    expected = [4, 8, *(0, 2, 4, 6, 8), 16, 20]
    assert taken(record, root, demo_tokenizer) == expected
    # One number is for all.
    everywhere = {**record, "start": 3, "end": 5, "fps": 4}
    assert taken(everywhere, root, demo_tokenizer) == [12, 16] * 3


def test_frames_of_a_clip_are_sampled_from_it_alone(root: Path, demo_tokenizer: Any):
    record = {"video": "a.mp4", "start": 1, "end": 3}
    options = {"frame_sampling": "uniform", "max_frames": 3}
    assert taken(record, root, demo_tokenizer, **options) == [4, 7, 11]
    assert taken(record, root, demo_tokenizer, video_fps=4, max_frames=2) == [4, 11]


NO_FRAMES = "{root}/a.mp4: the clip from %s s to %s s has no frames; fix start and end"
REFUSED: list[tuple[Record, str]] = [
    ({"start": "1"}, "start is '1'; it must be a number, or one for each video"),
    ({"end": True}, "end is True; it must be a number, or one for each video"),
    ({"fps": {}}, "fps is {}; it must be a number, or one for each video"),
    ({"start": [[1]]}, "start is [[1]]; it must be a number, or one for each video"),
    ({"start": -1}, "start is -1; it must be positive, and at most 1e9"),
    ({"end": float("nan")}, "end is nan; it must be positive, and at most 1e9"),
    ({"end": float("inf")}, "end is inf; it must be positive, and at most 1e9"),
    ({"fps": 0}, "fps is 0; it must be positive, and at most 1e9"),
    ({"fps": [-4]}, "fps is [-4]; it must be positive, and at most 1e9"),
    ({"start": [1, 2]}, "2 values of start but 1 media files"),
    ({"end": [1, 2]}, "2 values of end but 1 media files"),
    ({"start": 3, "end": 2}, NO_FRAMES % (3, 2)),
    ({"start": 2, "end": 2}, NO_FRAMES % (2, 2)),
    ({"end": 0}, NO_FRAMES % (0, 0)),
    (
        {"start": 7, "end": 9},
        "{root}/a.mp4: the clip starts at 7 s but the video is 6.00 s long; fix start and end",
    ),
]


@pytest.mark.parametrize(("clip", "reason"), REFUSED)
def test_unusable_clips(clip: Record, reason: str, root: Path, demo_tokenizer: Any):
    bad = check({"video": "a.mp4", "conversations": ASK, **clip}, root, demo_tokenizer)
    assert isinstance(bad, BadSample)
    assert bad.reason == reason.replace("{root}", str(root))


@pytest.mark.parametrize("clip", [{"start": 10**400}, {"end": 10**400}, {"fps": 1e-310}])
def test_absurd_numbers_of_clips(clip: Record, root: Path, demo_tokenizer: Any):
    """As large as JSON can spell: taken or refused, but no other error."""
    for video in ("a.mp4", "frames"):
        record = {"video": video, "conversations": ASK, **clip}
        (found,) = RecordWork(read_from([record], root, demo_tokenizer), ()).measure(0, [0])
        assert isinstance(found, Measured | BadSample)
        if isinstance(found, BadSample):
            assert len(found.reason) < 300


@pytest.mark.parametrize("media", [{"image": "a.png"}, {}])
def test_only_videos_have_clips(media: Record, root: Path, demo_tokenizer: Any):
    conversation = ASK if media else turns("what", "red")
    for clip in ({"start": 1}, {"end": [1] * max(1, len(media))}):
        bad = check({**media, **clip, "conversations": conversation}, root, demo_tokenizer)
        assert isinstance(bad, BadSample)
        assert bad.reason == "start and end are of a video; the record has none"
    for nothing in (None, []):
        null = {**media, "start": nothing, "end": nothing, "conversations": conversation}
        assert isinstance(check(null, root, demo_tokenizer), Sample)


# Frames that are moved in time.


def test_moved_frames_stay_in_order_and_in_the_clip(root: Path, demo_tokenizer: Any):
    record = {"video": "a.mp4", "start": 1, "end": 5}
    still = taken(record, root, demo_tokenizer)
    assert still == [4, 8, 12, 16]
    assert taken(record, root, demo_tokenizer, seed=(0, 0, 0)) == still  # data.frame_jitter is 0
    moved = [taken(record, root, demo_tokenizer, (0, i), frame_jitter=1) for i in range(20)]
    for frames in moved:
        assert all(i <= j < i + 4 for i, j in zip(still, frames, strict=True))
    assert len({*map(tuple, moved)}) > 15
    again = [taken(record, root, demo_tokenizer, (0, i), frame_jitter=1) for i in range(3)]
    assert again == moved[:3]
    assert taken(record, root, demo_tokenizer, None, frame_jitter=1) == still
    little = [taken(record, root, demo_tokenizer, (0, i), frame_jitter=0.5) for i in range(20)]
    assert {j - i for frames in little for i, j in zip(still, frames, strict=True)} == {0, 1}


def test_moved_frames_do_not_leave_a_short_clip(root: Path, demo_tokenizer: Any):
    record = {"video": "frames", "fps": 4, "start": 2, "end": 3}
    options: dict[str, Any] = {"frame_jitter": 1.0, "frame_sampling": "uniform"}
    for most, expected in ((1, {(8,), (9,), (10,), (11,)}), (2, {(8, 11), (9, 11), (10, 11)})):
        moved = [
            taken(record, root, demo_tokenizer, (0, i), max_frames=most, **options)
            for i in range(30)
        ]
        assert {*map(tuple, moved)} == expected


def test_frames_move_anew_each_epoch_of_training_and_not_in_evaluation(
    root: Path, tmp_path: Path, demo_tokenizer: Any
):
    path = write_records(tmp_path / "x.json", [{"video": "frames", "fps": 4, "conversations": ASK}])
    # A cache would keep the frames of the first epoch.
    with open_files(path, root, demo_tokenizer, frame_jitter=1.0, cache_mb=1) as dataset:

        def epochs(random: bool) -> list[list[int]]:
            loader = load(dataset, epochs=(6,), random=random)
            pixels = [batch.pixels for batch in loader.batches()]
            return [frame_numbers(p[0]) for p in pixels if p is not None]

        moved = epochs(random=True)
        assert len(moved) == 6
        assert len({*map(tuple, moved)}) == 6
        assert {*map(len, moved)} == {6}
        assert epochs(random=True) == moved
        assert epochs(random=False) == [[0, 4, 8, 12, 16, 20]] * 6


# What the model is told.


def time_prompt(seconds: str, times: Sequence[str]) -> str:
    """The words of LLaVA-Video."""
    return (
        f"The video lasts for {seconds} seconds, and {len(times)} frames are uniformly sampled "
        f"from it. These frames are located at {','.join(times)}. "
        "Please answer the following questions related to this video."
    )


@pytest.mark.parametrize(
    ("record", "data", "prompt"),
    [
        ({}, {}, time_prompt("6.00", [f"{i}.00s" for i in range(6)])),
        ({"start": 1.5, "end": 3.5}, {}, time_prompt("2.00", ["0.00s", "1.00s"])),
        ({"end": 2.5}, {"video_fps": 2}, time_prompt("2.50", [f"{i / 2:.2f}s" for i in range(5)])),
        ({"start": 2.5}, {}, time_prompt("3.50", ["0.00s", "1.00s", "2.00s"])),
        ({}, {"max_frames": 3}, time_prompt("6.00", ["0.00s", "2.75s", "5.75s"])),
        ({"start": 4, "end": 100}, {}, time_prompt("2.00", ["0.00s", "1.00s"])),
        ({"start": 5.9}, {}, time_prompt("0.10", ["0.00s"])),
        ({"start": 2, "end": 2.01}, {}, time_prompt("0.01", ["0.00s"])),
    ],
)
@pytest.mark.parametrize("video", ["a.mp4", "frames"])
def test_the_model_is_told_when_the_frames_were(
    video: str,
    record: Record,
    data: dict[str, Any],
    prompt: str,
    root: Path,
    demo_tokenizer: Any,
):
    record = {"video": video, "fps": 4, "conversations": ASK, **record}
    sample = check(record, root, demo_tokenizer, time_prompt=True, **data)
    assert isinstance(sample, Sample)
    told = turns(f"{IMAGE_MARK}\n{prompt}\nwhat is the colour", "red")
    np.testing.assert_array_equal(
        sample.ids, chat.encode_conversation(told, demo_tokenizer).ids, prompt
    )
    untold = check(record, root, demo_tokenizer, **data)
    assert isinstance(untold, Sample)
    assert len(untold.ids) < len(sample.ids)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("what <image> is", "red"), ("<image>\n{prompt}\nwhat  is", "red")),
        (("<image>", "red", "so", "one"), ("<image>\n{prompt}", "red", "so", "one")),
        (
            ("what", "red", "and here\n<image>", "one"),
            ("what", "red", "<image>\n{prompt}\nand here", "one"),
        ),
    ],
)
def test_times_stand_after_the_mark(
    given: tuple[str, ...], told: tuple[str, ...], root: Path, demo_tokenizer: Any
):
    prompt = time_prompt("6.00", [f"{i}.00s" for i in range(6)])
    expected = turns(*(text.replace("{prompt}", prompt) for text in told))
    record = {"video": "a.mp4", "conversations": turns(*given)}
    for prompts in (False, True):
        sample = check(record, root, demo_tokenizer, prompts, time_prompt=True)
        assert isinstance(sample, Sample)
        ids = (
            chat.encode_prompt(expected[:-1], demo_tokenizer)
            if prompts
            else chat.encode_conversation(expected, demo_tokenizer).ids
        )
        np.testing.assert_array_equal(sample.ids, ids)


def test_other_records_are_told_no_times(root: Path, demo_tokenizer: Any):
    both = turns("<image><image> what", "red")
    records = [
        {"image": "a.png", "conversations": ASK},
        {"video": ["a.mp4", "frames"], "conversations": both},
        {"conversations": turns("what", "red")},
    ]
    for record in records:
        sample = check(record, root, demo_tokenizer, time_prompt=True)
        assert isinstance(sample, Sample)
        expected = chat.encode_conversation(record["conversations"], demo_tokenizer).ids
        np.testing.assert_array_equal(sample.ids, expected)
