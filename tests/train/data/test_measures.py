"""What is measured is kept, and measured again when, and only when, it may have changed."""

import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.data import (
    ASK,
    GOOD,
    MIXED,
    TALK,
    load,
    open_files,
    state_of,
    turns,
    write_media,
    write_records,
    write_video,
)
from train.data import measures
from train.data.workers import RecordWork, lowest
from train.demo.tokenizer import save_tokenizer
from vxl_jax.presets import tiny


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_records(tmp_path / "x.json", MIXED)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records that were measured, by their numbers; those that were bad and are not new, too."""
    numbers: list[int] = []
    measure = RecordWork.measure

    def noted(self: RecordWork, source: int, records: Sequence[int]) -> Any:
        numbers.extend(records)
        return measure(self, source, records)

    monkeypatch.setattr(RecordWork, "measure", noted)
    return numbers


# What is kept.


def test_the_second_opening_measures_what_was_bad_alone(
    path: Path, media: Path, demo_tokenizer: Any, measured: list[int]
):
    with open_files(path, media, demo_tokenizer) as dataset:
        first = state_of(dataset)
    assert {*measured} == {*range(8)}
    for _ in range(2):
        measured.clear()
        with open_files(path, media, demo_tokenizer) as dataset:
            assert state_of(dataset) == first
        assert measured == [2, 5]


@pytest.mark.parametrize(
    "change",
    [
        {"template": "caption"},
        {"image_mode": "square"},
        {"min_tiles": 1},
        {"max_tiles": 5},
        {"max_frames": 3},
        {"frame_sampling": "uniform"},
        {"video_fps": 0.5},
        {"time_prompt": True},
        {"max_length": 300},
        {"allow_outside_root": True},
        {"prompts": True},
        {"model": tiny(pool_stride=4)},
        {"model": tiny(vision=tiny(pool_stride=1).vision.__class__(image_size=28, patch_size=14))},
    ],
    ids=str,
)
def test_another_setting_measures_anew_and_the_old_one_does_not(
    change: dict[str, Any], path: Path, media: Path, demo_tokenizer: Any, measured: list[int]
):
    open_files(path, media, demo_tokenizer).pool.close()
    measured.clear()
    open_files(path, media, demo_tokenizer, **change).pool.close()
    assert {*measured} == {*range(8)}
    measured.clear()
    open_files(path, media, demo_tokenizer).pool.close()
    assert measured == [2, 5]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 4, "shapes": 2, "max_tokens_per_batch": 500, "epochs": (3,)},
        {"frame_jitter": 0.5, "cache_mb": 3, "buffer_mb": 3, "sample_seconds": 3.0},
        {"ratios": (8,)},
        {"model": tiny(window=8)},
        {"seed": 5},
    ],
    ids=str,
)
def test_other_settings_measure_nothing(
    change: dict[str, Any], path: Path, media: Path, demo_tokenizer: Any, measured: list[int]
):
    open_files(path, media, demo_tokenizer).pool.close()
    measured.clear()
    with open_files(path, media, demo_tokenizer, **change) as dataset:
        model, ratios = dataset.model, dataset.pool.work.ratios
        sample, _ = dataset.reader.open(0, 3)
        assert dataset.lengths.tokens[2] == sample.plan(model, lowest(ratios)).length
    assert measured == [2, 5]


def test_another_tokenizer_measures_anew(
    path: Path, media: Path, demo_tokenizer: Any, measured: list[int], tmp_path: Path
):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path / "tokenizer", ["red", "what"])
    with open_files(path, media, demo_tokenizer) as dataset:
        before = dataset.lengths.text
    measured.clear()
    with open_files(path, media, AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) as dataset:
        assert (dataset.lengths.text > before).any()
    assert {*measured} == {*range(8)}


def test_a_changed_data_file_is_measured_anew(
    path: Path, media: Path, demo_tokenizer: Any, measured: list[int]
):
    with open_files(path, media, demo_tokenizer) as dataset:
        before = state_of(dataset)
    changed = [*MIXED]
    changed[0] = {"conversations": turns("how many red", "one")}
    write_records(path, changed)
    measured.clear()
    with open_files(path, media, demo_tokenizer) as dataset:
        after = state_of(dataset)
    assert {*measured} == {*range(8)}
    assert [a != b for a, b in zip(after["text"], before["text"], strict=True)] == [True] + 5 * [
        False
    ]


def test_a_start_that_is_killed_keeps_what_it_measured(
    path: Path,
    media: Path,
    demo_tokenizer: Any,
    measured: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(measures, "PART", 3)
    monkeypatch.setattr(measures, "TOGETHER", 2)
    measure = RecordWork.measure

    def killed(self: RecordWork, source: int, records: Sequence[int]) -> Any:
        if 6 in records:
            raise KeyboardInterrupt
        return measure(self, source, records)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWork, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            open_files(path, media, demo_tokenizer)
    measured.clear()
    with open_files(path, media, demo_tokenizer) as dataset:
        assert dataset.record.tolist() == GOOD
        assert len(dataset.bad) == 2
    assert [*dict.fromkeys(measured)] == [2, 5, 6, 7]
    assert not [*path.parent.rglob("*.tmp")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_record_that_was_mended_is_taken(
    workers: int, path: Path, media: Path, demo_tokenizer: Any, tmp_path: Path
):
    folder = shutil.copytree(media, tmp_path / "media")
    with open_files(path, folder, demo_tokenizer, workers=workers) as dataset:
        assert dataset.record.tolist() == GOOD
        before = dataset.fingerprint
    Image.new("RGB", (56, 56)).save(folder / "gone.png")
    for _ in range(2):
        with open_files(path, folder, demo_tokenizer, workers=workers) as dataset:
            assert dataset.record.tolist() == [0, 1, 3, 4, 5, 6, 7]
            assert [bad.name for bad in dataset.bad] == [f"{path}[2]"]
            assert dataset.fingerprint != before
            loaded = [sample for batch in load(dataset).batches() for sample in batch.samples]
            assert len(loaded) == 7


def open_at_once(paths: Path, media: Path, tokenizer: Any, count: int = 4) -> set[str]:
    """The fingerprints that several runs find that are started together."""
    barrier = threading.Barrier(count)

    def fingerprint(_: int) -> str:
        barrier.wait()
        with open_files(paths, media, tokenizer) as dataset:
            return dataset.fingerprint

    with ThreadPoolExecutor(count) as threads:
        return {*threads.map(fingerprint, range(count))}


def write_many(path: Path) -> list[str]:
    """Records of which every fifth is bad for now; returns the names of the missing files."""
    names = [f"gone{i}.png" if i % 5 == 0 else "a.png" for i in range(40)]
    write_records(path, [{"image": name, "conversations": ASK} for name in names])
    return [name for name in names if name != "a.png"]


def test_several_runs_may_measure_at_once(
    media: Path, demo_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measures, "PART", 3)
    write_many(tmp_path / "x.json")
    assert len(open_at_once(tmp_path / "x.json", media, demo_tokenizer)) == 1


def test_several_runs_may_find_mended_records_at_once(
    media: Path, demo_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measures, "PART", 3)
    folder = shutil.copytree(media, tmp_path / "media")
    missing = write_many(tmp_path / "x.json")
    open_files(tmp_path / "x.json", folder, demo_tokenizer).pool.close()
    for name in missing:
        shutil.copy(folder / "a.png", folder / name)
    assert len(open_at_once(tmp_path / "x.json", folder, demo_tokenizer)) == 1


def test_media_that_went_since_are_bad_when_they_are_read(
    path: Path, media: Path, demo_tokenizer: Any, tmp_path: Path
):
    folder = shutil.copytree(media, tmp_path / "media")
    open_files(path, folder, demo_tokenizer).pool.close()
    (folder / "line.png").unlink()
    with open_files(path, folder, demo_tokenizer) as dataset:
        assert dataset.record.tolist() == GOOD
        (bad,) = [bad for batch in load(dataset).batches() for bad in batch.bad]
        assert bad.name == f"{path}[3]"
        assert "line.png: no such file" in bad.reason


def test_media_that_changed_since_are_usable_after_a_new_start(
    demo_tokenizer: Any,
    tmp_path: Path,
    measured: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    """As the message about them says; nothing is measured again but what is kept with them."""
    monkeypatch.setattr(measures, "PART", 2)
    some: list[Any] = [{"conversations": TALK}] * 8
    some[5] = {"video": "v.mp4", "conversations": ASK}
    path = write_records(tmp_path / "x.json", some)
    write_video(tmp_path / "v.mp4", 4)
    open_files(path, tmp_path, demo_tokenizer).pool.close()
    write_video(tmp_path / "v.mp4", 7)
    for expected in (1, 0):
        measured.clear()
        with open_files(path, tmp_path, demo_tokenizer) as dataset:
            bad = [bad for batch in load(dataset).batches() for bad in batch.bad]
        assert [one.name for one in bad] == [f"{path}[5]"] * expected
        assert measured == ([] if expected else [4, 5])
    assert dataset.lengths.frames[5] == 7


def test_media_whose_text_became_longer_cost_their_own_sample(demo_tokenizer: Any, tmp_path: Path):
    """As many frames as before, but other times in the prompt."""
    path = write_records(tmp_path / "x.json", [{"video": "v.mp4", "conversations": ASK}])
    options: dict[str, Any] = {"time_prompt": True, "frame_sampling": "uniform", "max_frames": 8}
    write_video(tmp_path / "v.mp4", 9)
    open_files(path, tmp_path, demo_tokenizer, **options).pool.close()
    write_video(tmp_path / "v.mp4", 2000, size=32)
    with open_files(path, tmp_path, demo_tokenizer, **options) as dataset:
        (batch,) = load(dataset).batches()
        assert len(batch.bad) == 1
