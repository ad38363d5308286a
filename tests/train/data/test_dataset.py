"""Opening a data set: its samples, their lengths, and the sources that they are from."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.support.data import (
    ASK,
    GOOD,
    MIXED,
    check,
    load,
    open_files,
    read_from,
    state_of,
    turns,
    write_media,
    write_records,
)
from train.data.lengths import KINDS
from train.data.records.sample import Sample
from train.data.workers import RecordWork, lowest
from train.errors import DataError
from vxl_jax.presets import tiny
from vxl_jax.text.template import IGNORE


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_records(tmp_path / "x.json", MIXED)


# What is measured.


def test_samples_stand_in_order_with_their_lengths(path: Path, media: Path, demo_tokenizer: Any):
    reader = read_from(MIXED, media, demo_tokenizer)
    with open_files(path, media, demo_tokenizer) as dataset:
        assert dataset.record.tolist() == GOOD
        assert dataset.source.tolist() == [0] * 6
        assert len(dataset) == 6
        assert dataset.ranges == [range(6)]
        assert dataset.name(5) == f"{path}[7] last"
        assert [bad.name for bad in dataset.bad] == [f"{path}[2]", f"{path}[5]"]
        assert "gone.png: no such file" in dataset.bad[1].reason
        (counts,) = dataset.counts
        assert (counts.records, counts.selected, counts.good) == (8, 8, 6)
        kinds = [KINDS[kind] for kind in dataset.kind]
        assert kinds == ["text", "image", "images", "video", "videos", "text"]
        lengths = dataset.lengths
        for i, record in enumerate(GOOD):
            sample, _ = reader.open(0, record)
            stream = sample.plan(tiny(), lowest(tiny().ratios))
            assert lengths.text[i] == len(sample.ids) - len(sample.blocks)
            assert lengths.labels[i] == (sample.labels != IGNORE).sum()
            assert lengths.frames[i] == sample.frames
            assert lengths.visual[i] == 4 * sample.frames
            assert lengths.tokens[i] == stream.length
            assert lengths.memory[i] == stream.persistent
        assert lengths.beacons.tolist() == [0, 4, 102, 12, 18, 0]


def test_lengths_of_prompts_and_of_other_ratios(path: Path, media: Path, demo_tokenizer: Any):
    for prompts, ratios in ((True, (8,)), (False, ())):
        with open_files(
            path, media, demo_tokenizer, prompts=prompts, ratios=ratios, max_frames=4
        ) as dataset:
            for i, record in enumerate(GOOD):
                sample = check(MIXED[record], media, demo_tokenizer, prompts, max_frames=4)
                assert isinstance(sample, Sample)
                stream = sample.plan(tiny(), lowest(ratios))
                assert dataset.lengths.tokens[i] == stream.length
                assert dataset.lengths.memory[i] == stream.persistent
            assert dataset.lengths.labels.any() == (not prompts)


def test_workers_measure_the_same(path: Path, media: Path, demo_tokenizer: Any, tmp_path: Path):
    states = []
    for workers in (0, 2):
        with open_files(
            path, media, demo_tokenizer, workers=workers, cache_dir=str(tmp_path / str(workers))
        ) as dataset:
            states.append(state_of(dataset))
    assert states[0] == states[1]


def test_no_record_that_can_be_used_is_an_error(tmp_path: Path, media: Path, demo_tokenizer: Any):
    good = write_records(tmp_path / "good.json", MIXED)
    path = write_records(tmp_path / "x.json", [{"image": "gone.png", "conversations": ASK}, 3])
    with pytest.raises(DataError) as caught:
        open_files([good, path], media, demo_tokenizer)
    message = str(caught.value)
    assert message.startswith(f"{path}: none of its 2 records can be used")
    assert f"{media}/gone.png: no such file" in message


def test_an_unexpected_error_is_not_kept(
    path: Path, media: Path, demo_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object) -> None:
        raise RuntimeError("not this time")

    with monkeypatch.context() as patch:
        patch.setattr(RecordWork, "measure", fails)
        with pytest.raises(RuntimeError, match="not this time"):
            open_files(path, media, demo_tokenizer)
    with open_files(path, media, demo_tokenizer) as dataset:
        assert len(dataset) == 6


# Several sources.


def write_mixture(path: Path, **datasets: Any) -> Path:
    path.write_text(
        yaml.safe_dump({"datasets": [{"json_path": k, **v} for k, v in datasets.items()]})
    )
    return path


def test_each_source_has_its_range(tmp_path: Path, media: Path, demo_tokenizer: Any):
    one = write_records(tmp_path / "one.json", MIXED)
    two = write_records(tmp_path / "two.json", MIXED[::-1])
    with open_files([one, two, one], media, demo_tokenizer) as dataset:
        assert dataset.ranges == [range(0, 6), range(6, 12), range(12, 18)]
        assert dataset.record.tolist() == [*GOOD, *(0, 1, 3, 4, 6, 7), *GOOD]
        assert dataset.source.tolist() == [0] * 6 + [1] * 6 + [2] * 6
        assert len(dataset.bad) == 6
        tokens = dataset.lengths.tokens
        assert tokens[:6].tolist() == tokens[12:].tolist() == tokens[6:12][::-1].tolist()
        assert dataset.name(6) == f"{two}[0] last"


def test_strategies_choose_records(tmp_path: Path, media: Path, demo_tokenizer: Any):
    many = [{"conversations": turns("what " * i, "red")} for i in range(1, 31)]
    write_records(tmp_path / "a.json", many)
    mixture = tmp_path / "mix.yaml"
    listed = [
        {"json_path": "a.json", "sampling_strategy": strategy}
        for strategy in ("first:2", "end:10%", "random:5", "random:5", "all")
    ]
    mixture.write_text(yaml.safe_dump({"datasets": listed}))

    def records(seed: int) -> list[list[int]]:
        with open_files(mixture, media, demo_tokenizer, seed=seed) as dataset:
            assert [counts.selected for counts in dataset.counts] == [2, 3, 5, 5, 30]
            # The lengths are those of the chosen records.
            words = dataset.lengths.text - dataset.lengths.text[-30]
            np.testing.assert_array_equal(words, dataset.record)
            return [dataset.record[r.start : r.stop].tolist() for r in dataset.ranges]

    found = records(seed=0)
    assert [found[0], found[1], found[4]] == [[0, 1], [27, 28, 29], [*range(30)]]
    assert found[2] == found[3] == sorted({*found[2]})
    assert found[2] != [0, 1, 2, 3, 4]
    assert records(seed=0) == found
    assert records(seed=1)[2] != found[2]


def test_roots_of_a_mixture(tmp_path: Path, media: Path, demo_tokenizer: Any):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.png").write_bytes((media / "a.png").read_bytes())
    write_records(tmp_path / "x.json", [{"image": "a.png", "conversations": ASK}])
    write_records(tmp_path / "y.json", [{"image": "b.png", "conversations": ASK}])
    mixture = write_mixture(tmp_path / "m.yaml", **{"x.json": {}, "y.json": {"media_root": "sub"}})
    with open_files(mixture, media, demo_tokenizer) as dataset:
        assert not dataset.bad
        assert [type(b.samples[0]) for b in load(dataset, 1).batches()] == [Sample] * 2
    shutil.rmtree(tmp_path / "sub")
    with pytest.raises(DataError, match=r"media_root .*/sub: there is no such directory"):
        open_files(mixture, media, demo_tokenizer)


# The fingerprint.


def test_the_fingerprint_is_that_of_the_samples(
    path: Path, media: Path, demo_tokenizer: Any, tmp_path: Path
):
    def fingerprint(*paths: Path, **options: Any) -> str:
        with open_files(paths or path, media, demo_tokenizer, **options) as dataset:
            return dataset.fingerprint

    before = fingerprint()
    assert fingerprint() == before
    os.utime(path, ns=(0, 0))
    assert fingerprint() == before
    assert fingerprint(cache_dir=str(tmp_path / "cache"), batch_size=2) == before
    # Wherever it lies; a file that holds the same in other words counts as another.
    (tmp_path / "other").mkdir()
    moved = write_records(tmp_path / "other" / "y.json", MIXED)
    assert fingerprint(moved) == before
    lines = tmp_path / "z.jsonl"
    lines.write_text("\n".join(map(json.dumps, MIXED)))
    assert fingerprint(lines) != before
    plain = write_mixture(tmp_path / "m.yaml", **{"x.json": {}})
    assert fingerprint(plain) == before

    others = [before, fingerprint(path, path), fingerprint(ratios=(8,)), fingerprint(max_tiles=5)]
    for name, records in {
        "longer": [*MIXED[:7], {"conversations": turns("what", "red", "how", "one two")}],
        "one less": MIXED[:7],
        "one more": [*MIXED, MIXED[0]],
        "moved": MIXED[::-1],
        "first bad": [3, *MIXED],
    }.items():
        others.append(fingerprint(write_records(tmp_path / f"{name}.json", records)))
    for settings in ({"weight": 2}, {"repeat": 2}, {"sampling_strategy": "first:7"}):
        others.append(fingerprint(write_mixture(tmp_path / "m.yaml", **{"x.json": settings})))
    assert len({*others}) == len(others)


def test_the_fingerprint_says_what_random_chose(path: Path, media: Path, demo_tokenizer: Any):
    write_mixture(path.parent / "m.yaml", **{"x.json": {"sampling_strategy": "random:5"}})
    found = []
    for seed in (0, 0, 1):
        with open_files(path.parent / "m.yaml", media, demo_tokenizer, seed=seed) as dataset:
            found.append((dataset.record.tolist(), dataset.fingerprint))
    assert found[0] == found[1]
    assert (found[0][0] == found[2][0]) == (found[0][1] == found[2][1])
