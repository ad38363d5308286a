"""Batches: what is in them, whoever makes them, and from wherever on."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.data import about, as_bytes, load, open_files, section, write_records
from train.data.dataset import Dataset
from train.data.epochs import Epochs, Share, make_buckets, padded_share
from train.data.lengths import Lengths
from train.data.loader import _OVERHEAD, _Cache, blank
from train.data.records.sample import Sample
from train.data.workers import RecordWork
from vxl_jax.presets import llava_video_7b, tiny
from vxl_jax.stream.plan import BEACON, PAD, TEXT, VISUAL
from vxl_jax.text.template import IGNORE

RATIOS = (2, 4, 8)
TILE = 56 * 56 * 3


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one, two and three tiles of noise, and half of one."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for tiles in (1, 2, 3):
        pixels = rng.integers(1, 256, (56, 56 * tiles, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{tiles}.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def open_pictures(
    images: Sequence[Sequence[str]], media: Path, folder: Path, tokenizer: Any, **data: Any
) -> Dataset:
    """A sample of each list of pictures; all of those with any have one shape."""
    path = write_records(folder / "x.json", [about(files) for files in images])
    options = {"min_tiles": 1, "shapes": 1, **data}
    return open_files(path, media, tokenizer, ratios=RATIOS, **options)


def number_of(sample: Sample | None) -> int:
    """The record that a sample is made of; -1: none."""
    return -1 if sample is None else int(sample.name.rpartition("[")[2].rstrip("]"))


# What is in a batch.


def test_pixels_stand_in_their_places_and_the_rest_is_black(
    media: Path, tmp_path: Path, demo_tokenizer: Any
):
    files = [["1.png"], ["3.png", "2.png"], ["1.png", "1.png"], ["2.png"]]
    with open_pictures(files, media, tmp_path, demo_tokenizer) as dataset:
        (batch,) = load(dataset, 5).batches()
    numbers = [number_of(sample) for sample in batch.samples]
    assert sorted(numbers) == [-1, 0, 1, 2, 3]
    assert batch.pixels is not None
    assert batch.pixels.dtype == np.uint8
    assert batch.pixels.shape == (5, 5, 56, 56, 3)
    for place, number in enumerate(numbers):
        tiles = []
        for name in files[number] if number >= 0 else []:
            picture = np.asarray(Image.open(media / name))
            tiles += np.hsplit(picture, picture.shape[1] // 56)
        if tiles:
            np.testing.assert_array_equal(batch.pixels[place, : len(tiles)], tiles)
        assert not batch.pixels[place, len(tiles) :].any()
    assert batch.frames == 1 + 5 + 2 + 2
    assert not batch.bad


@pytest.mark.parametrize("random", [True, False])
def test_streams_are_those_of_the_samples(
    random: bool, media: Path, tmp_path: Path, demo_tokenizer: Any
):
    with open_pictures([["1.png"], ["2.png"]], media, tmp_path, demo_tokenizer) as dataset:
        (batch,) = load(dataset, 3, random=random).batches()
    kind, source = batch.streams.kind[0], batch.streams.source[0]
    for place, sample in enumerate(batch.samples):
        counts = Counter(kind[place].tolist())
        if sample is None:
            assert {*counts} == {PAD}
            continue
        text = sample.ids[sample.ids >= 0]
        np.testing.assert_array_equal(source[place][kind[place] == TEXT], text)
        assert counts[VISUAL] == 4 * sample.frames
        drawn = RATIOS if random else RATIOS[:1]
        assert counts[BEACON] in {4 * sample.frames // ratio for ratio in drawn}
        learned = sample.labels[1:][sample.labels[1:] != IGNORE]
        found = batch.streams.label[place]
        np.testing.assert_array_equal(found[found != IGNORE], learned)
    assert batch.tokens == (kind != PAD).sum()
    assert batch.token_places == kind.size


def test_ratios_are_drawn_anew_each_epoch(media: Path, tmp_path: Path, demo_tokenizer: Any):
    with open_pictures([["3.png", "1.png"]], media, tmp_path, demo_tokenizer) as dataset:
        every = [*load(dataset, epochs=(40,)).batches()]
        again = [*load(dataset, epochs=(40,)).batches()]
    counts = [int((batch.streams.kind == BEACON).sum()) for batch in every]
    # Of 12 and of 4 tokens, by ratios that divide them.
    assert {*counts} == {6 + 2, 6 + 1, 3 + 2, 3 + 1}
    assert [as_bytes(batch) for batch in every] == [as_bytes(batch) for batch in again]


def test_undecodable_media_leave_an_empty_place(media: Path, tmp_path: Path, demo_tokenizer: Any):
    files = [["1.png"], ["2.png", "cut.png"], ["2.png"]]
    with open_pictures(files, media, tmp_path, demo_tokenizer) as dataset:
        (batch,) = load(dataset, 3).batches()
    (bad,) = batch.bad
    assert bad.name == f"{tmp_path}/x.json[1]"
    assert "cut.png: image cannot be decoded" in bad.reason
    numbers = [number_of(sample) for sample in batch.samples]
    assert sorted(numbers) == [-1, 0, 2]
    place = numbers.index(-1)
    assert batch.pixels is not None
    assert not batch.pixels[place].any()
    assert (batch.streams.kind[:, place] == PAD).all()
    assert (batch.streams.label[place] == IGNORE).all()
    assert batch.frames == 3
    assert batch.tokens == (batch.streams.kind != PAD).sum()


def test_a_batch_may_lose_all_its_samples(media: Path, tmp_path: Path, demo_tokenizer: Any):
    with open_pictures([["cut.png"]] * 2, media, tmp_path, demo_tokenizer) as dataset:
        (batch,) = load(dataset, 2).batches()
    assert sorted(bad.name[-3:] for bad in batch.bad) == ["[0]", "[1]"]
    assert (batch.tokens, batch.frames, batch.samples) == (0, 0, [None, None])
    assert (batch.streams.label == IGNORE).all()
    assert (batch.streams.kind == PAD).all()
    assert batch.pixels is not None
    assert not batch.pixels.any()


def test_a_blank_batch_is_black_and_otherwise_the_same(
    media: Path, tmp_path: Path, demo_tokenizer: Any
):
    with open_pictures([["1.png"], ["2.png"], []], media, tmp_path, demo_tokenizer) as dataset:
        text, batch = sorted(load(dataset, 2).batches(), key=lambda batch: batch.frames)
    dark = blank(batch)
    assert dark.pixels is not None
    assert batch.pixels is not None
    assert batch.pixels.any()
    assert not dark.pixels.any()
    assert dark.pixels.shape == batch.pixels.shape
    assert dark.streams is batch.streams
    assert text.pixels is None
    assert blank(text).pixels is None


def test_batches_have_the_window_of_the_model(media: Path, tmp_path: Path, demo_tokenizer: Any):
    """A model without compression has no beacons."""
    path = write_records(tmp_path / "x.json", [about(["3.png"])])
    model = tiny(ratios=())
    with open_files(path, media, demo_tokenizer, model, min_tiles=1) as dataset:
        (batch,) = load(dataset).batches()
    assert not (batch.streams.kind == BEACON).any()
    assert not batch.streams.has_beacons
    assert batch.streams.memory >= batch.streams.length[0] == batch.tokens


# Kept media.


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records that were decoded."""
    numbers: list[int] = []
    original = RecordWork.load

    def noted(self: RecordWork, source: int, number: int, *rest: Any) -> Any:
        numbers.append(number)
        return original(self, source, number, *rest)

    monkeypatch.setattr(RecordWork, "load", noted)
    return numbers


def test_cached_media_are_not_decoded_again_and_bounded_in_bytes(
    media: Path, tmp_path: Path, demo_tokenizer: Any, decoded: list[int]
):
    files = [["1.png"], ["2.png"], ["3.png"]]
    with open_pictures(files, media, tmp_path, demo_tokenizer) as dataset:
        loader = load(dataset, 1)
        small = _OVERHEAD + 1000
        loader.cache = _Cache(4 * TILE + 2 * small)
        fresh: dict[int, np.ndarray] = {}
        for index in (0, 1, 0, 2, 0, 1):
            # 1 + 2 tiles fit; then 3 push out the 2, which were not used for longer; 1 is kept.
            out = np.zeros((index + 1, 56, 56, 3), np.uint8)
            loader._sample(index, None, out)
            np.testing.assert_array_equal(out, fresh.setdefault(index, out))
            held = sum(pixels.nbytes for _, pixels in loader.cache.held.values())
            assert held <= loader.cache.used <= held + 2 * small <= loader.cache.limit + 2 * small
    assert decoded == [0, 1, 2, 1]


def test_media_larger_than_the_cache_are_not_kept(
    media: Path, tmp_path: Path, demo_tokenizer: Any, decoded: list[int]
):
    with open_pictures([["3.png"], []], media, tmp_path, demo_tokenizer, cache_mb=0) as dataset:
        loader = load(dataset, 1, epochs=(2,))
        assert len([*loader.batches()]) == 4
        assert (len(loader.cache.held), loader.cache.used) == (0, 0)
    assert sorted(decoded) == [0, 0, 1, 1]


def test_what_is_given_up_frees_its_bytes():
    sample = Sample("s", np.zeros(10, np.int32), np.zeros(10, np.int32), (), "", "", "")
    cache = _Cache(10 * (_OVERHEAD + 200))
    rng = np.random.default_rng(0)
    for i in rng.integers(0, 30, 500):
        cache.put(int(i), sample, np.zeros(rng.integers(0, 5000), np.uint8))
        cache.get(int(rng.integers(0, 30)))
        sizes = [pixels.nbytes + 80 + _OVERHEAD for _, pixels in cache.held.values()]
        assert cache.used == sum(sizes) <= cache.limit
    assert len(cache.held) > 2


def test_a_mixture_like_that_of_llava_video_is_padded_little():
    rng = np.random.default_rng(0)
    layout = llava_video_7b().layout
    rules = llava_video_7b().preprocessing

    def image() -> int:
        cut = rules.tiles_of((int(rng.integers(200, 2000)), int(rng.integers(200, 2000))), 384)
        return layout.image(cut.tiles, cut.grid, cut.size).total

    # Shares of the published mixture, roughly: videos, single images, several, and text.
    visual = np.array(
        [layout.video_count(64)] * 2000
        + [image() for _ in range(2000)]
        + [730 * int(rng.integers(2, 9)) for _ in range(300)]
        + [0] * 700,
        np.int32,
    )
    text = np.round(rng.lognormal(5.3, 0.8, len(visual))).astype(np.int32).clip(20, 4000)
    nothing = np.zeros_like(text)
    frames = -(-visual // 729)
    lengths = Lengths(text, np.minimum(text, 200), frames, visual, nothing)
    data = section(".", batch_size=4, max_tokens_per_batch=16384)
    buckets, bucket_of = make_buckets(lengths, data, data.batch_size)
    for i, bucket in enumerate(buckets):
        assert bucket.visual == visual[bucket_of == i].max()
    some = Epochs(buckets, bucket_of, [Share(range(len(text)), len(text))], seed=0)
    assert padded_share(lengths, some) < 0.15
