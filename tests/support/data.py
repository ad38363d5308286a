"""Small data sets for tests: records, the files that they name, and what is made of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from train.config import DataSection
from train.data.dataset import Dataset, open_dataset
from train.data.epochs import Epochs, make_buckets, shares
from train.data.loader import Batch, Loader, Shards
from train.data.records.media import Preparer
from train.data.records.reader import Reader
from train.data.records.sample import BAD, BadSample, Sample
from train.data.sources import Source
from train.data.tokenizer import FastTokenizer
from train.data.workers import LoadedSample, Measured, RecordWork
from train.demo.drawing import TILE, write_mp4
from vxl_jax.config import VideoXLConfig
from vxl_jax.presets import tiny

Record = dict[str, Any]


def turns(*values: str) -> list[dict[str, str]]:
    """A conversation, from human and gpt by turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


ASK = turns("<image>\nwhat is the colour", "red")
TALK = turns("what is the colour", "red")


def about(files: Sequence[str]) -> Record:
    """A question about pictures."""
    marks = "<image>" * len(files)
    return {"image": [*files], "conversations": turns(f"{marks}\nhow many shapes", "one")}


MIXED: list[Any] = [
    {"conversations": TALK},
    {"image": "a.png", "conversations": ASK},
    "no record",
    {"image": ["line.png", "a.png"], "conversations": turns("<image><image> what", "red circle")},
    {"video": "a.mp4", "conversations": ASK},
    {"image": "gone.png", "conversations": ASK},
    {"video": ["frames", "a.mp4"], "conversations": turns("what <image> <image> now", "red")},
    {"id": "last", "conversations": turns("what", "red", "how many", "one two three")},
]
"""Records of all kinds, about what `write_media` writes."""
GOOD = [0, 1, 3, 4, 6, 7]
"""Those that can be used."""


def write_video(path: Path, frames: int, fps: int = 1, size: int = 64) -> Path:
    """A video whose frame i is grey 10 * i."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            grey = np.full((size, size, 3), 10 * i % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_media(folder: Path) -> Path:
    """Media of all kinds, good and bad."""
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (70, 30), "dot.png": (1, 1), "line.png": (10_000, 10)}.items():
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    frames = [rng.integers(0, 256, (TILE, TILE, 3), np.uint8) for _ in range(6)]
    write_mp4(folder / "a.mp4", frames)
    whole = (folder / "a.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video")
    _write_video_without_frames(folder / "none.mp4")
    (folder / "folder.png").mkdir()
    (folder / "frames").mkdir()
    for i, frame in enumerate(frames[:3]):
        Image.fromarray(frame).save(folder / "frames" / f"{i}.png")
    (folder.parent / "outside.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    return folder


def _write_video_without_frames(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.height = stream.width = TILE
        container.start_encoding()


def frame_numbers(pixels: np.ndarray) -> list[int]:
    """Which frames of `write_video` these are."""
    return np.round(pixels.mean((1, 2, 3)) / 10).astype(int).tolist()


def section(media_root: Path | str, **data: Any) -> DataSection:
    """A data section without workers, unless told."""
    values = {"train_json": ("x",), "media_root": str(media_root), "workers": 0, **data}
    return DataSection(**values)


def read_from(
    records: Any, root: Path, tokenizer: Any, prompts: bool = False, **data: Any
) -> Reader:
    """A reader of records that stand in no file."""
    options = section(root, **data)
    source = Source(Path("x.json"), root, allow_outside=options.allow_outside_root)
    preparer = Preparer(options, tiny())
    return Reader([source], [records], preparer, FastTokenizer(tokenizer), prompts)


def check(
    record: Any, root: Path, tokenizer: Any, prompts: bool = False, **data: Any
) -> Sample | BadSample:
    """What becomes of one record."""
    reader = read_from([record], root, tokenizer, prompts, **data)
    try:
        return reader.open(0, 0)[0]
    except BAD as error:
        return BadSample(reader.name(0, 0), str(error))


def work_on(record: Any, root: Path, tokenizer: Any, **data: Any) -> RecordWork:
    """What data workers do, with one record."""
    return RecordWork(read_from([record], root, tokenizer, **data), (2, 4))


def pixels_of(record: Any, root: Path, tokenizer: Any, **data: Any) -> np.ndarray | BadSample:
    """Pixels of all blocks of a record that passes the checks."""
    doer = work_on(record, root, tokenizer, **data)
    (measured,) = doer.measure(0, [0])
    assert isinstance(measured, Measured), measured
    out = np.zeros((sum(measured.frames), 56, 56, 3), np.uint8)
    loaded = doer.load(0, 0, None, out)
    return out if isinstance(loaded, LoadedSample) else loaded


def write_records(path: Path, records: Sequence[Any]) -> Path:
    """A data file."""
    path.write_text(json.dumps(records))
    return path


def open_files(
    paths: Sequence[Path] | Path,
    media_root: Path,
    tokenizer: Any,
    model: VideoXLConfig | None = None,
    seed: int = 0,
    prompts: bool = False,
    ratios: Sequence[int] | None = None,
    **data: Any,
) -> Dataset:
    """The samples of data files."""
    names = [str(path) for path in ([paths] if isinstance(paths, Path) else paths)]
    options = section(media_root, **data)
    return open_dataset(names, options, model or tiny(), tokenizer, seed, prompts, ratios)


def load(
    dataset: Dataset,
    batch_size: int | None = None,
    epochs: Sequence[int] = (1,),
    random: bool = True,
    shards: Shards | None = None,
) -> Loader:
    """A loader of all samples, as training has it."""
    data = dataset.reader.preparer.data
    buckets, bucket_of = make_buckets(dataset.lengths, data, batch_size or data.batch_size)
    plans = Epochs(buckets, bucket_of, shares(dataset, epochs), 0, data.sequential)
    return Loader(plans, dataset, random, shards)


def as_bytes(batch: Batch) -> tuple[Any, ...]:
    """All that is in a batch, to be compared."""
    streams = {
        k: v.tobytes() if hasattr(v, "tobytes") else v for k, v in vars(batch.streams).items()
    }
    samples = [s and (s.name, s.ids.tobytes(), s.labels.tobytes(), s.blocks) for s in batch.samples]
    pixels = None if batch.pixels is None else (batch.pixels.shape, batch.pixels.tobytes())
    counts = (batch.frames, batch.tokens, batch.token_places)
    return streams, samples, pixels, counts, batch.bad


def state_of(dataset: Dataset) -> dict[str, Any]:
    """All that a data set says of its samples."""
    lengths = {name: column.tolist() for name, column in vars(dataset.lengths).items()}
    columns = {name: getattr(dataset, name).tolist() for name in ("source", "record", "kind")}
    return {
        **lengths,
        **columns,
        "ranges": dataset.ranges,
        "bad": [(bad.name, bad.reason) for bad in dataset.bad],
        "fingerprint": dataset.fingerprint,
    }


def assert_png(path: Path, width: tuple[int, int], height: tuple[int, int]) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert width[0] <= image.width <= width[1]
        assert height[0] <= image.height <= height[1]
        # Not blank.
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


INDEXED: list[dict[str, Any]] = [
    {"id": "0", "conversations": [{"from": "human", "value": 'say "]" and \\ {'}], "n": 1.5},
    {"id": "1", "image": ["a.png", "b.png"], "conversations": []},
    {"id": "é中😀", "video": "x.mp4", "line": "one\ntwo\u2028three"},
]


def write_indexed(path: Path, records: list[Any]) -> Path:
    """A file of records, of the format that its suffix says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".jsonl":
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n\n".join(lines) + "\r\n \n", newline="")
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
    return path
