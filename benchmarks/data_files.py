"""Files for the benchmark of data."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from train.config import DataSection
from train.data.dataset import Dataset
from train.data.epochs import Epochs, plan_run
from vxl_jax.presets import video_xl_7b

MODEL = video_xl_7b(ratios=(2, 4, 8))


FPS = 25


WORDS = ("the", "a", "of", "picture", "video", "shows", "man", "red", "car", "near", "what", "is")


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    videos: int
    seconds: tuple[int, ...]
    images: int
    records: tuple[int, ...]
    samples: int
    rounds: int
    minutes: int


FULL = Sizes(24, (20, 30, 40, 60), 400, (10**4, 10**5, 10**6), 20_000, 3, 60)


QUICK = Sizes(4, (4, 6), 24, (10**3, 10**4), 2_000, 2, 1)


def make_videos(folder: Path, sizes: Sizes) -> list[Path]:
    """H.264 files of 640 x 360 with a moving picture; copies count as separate files."""
    import av

    rng = np.random.default_rng(0)
    made: list[Path] = []
    for i in range(sizes.videos):
        path = folder / f"{i}.mp4"
        if i >= len(sizes.seconds):
            made.append(Path(shutil.copy(made[i % len(sizes.seconds)], path)))
            continue
        wide = rng.integers(0, 256, (36, 192, 3), np.uint8).repeat(10, 0).repeat(10, 1)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            for frame in range(FPS * sizes.seconds[i]):
                start = (3 * frame) % (wide.shape[1] - 640)
                pixels = np.ascontiguousarray(wide[:, start : start + 640])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        made.append(path)
    return made


def make_images(folder: Path, count: int) -> list[Path]:
    """JPEG files of about 800 x 600."""
    from PIL import Image

    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        width, height = (int(side) for side in rng.integers((700, 500), (900, 700)))
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        made.append(folder / f"{i}.jpg")
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(made[-1], quality=90)
    return made


def write_media_records(path: Path, files: Sequence[Path]) -> None:
    """One record for each file."""
    records = []
    for file in files:
        kind = "video" if file.suffix == ".mp4" else "image"
        turns = [
            {"from": "human", "value": "<image>\nwhat is the picture"},
            {"from": "gpt", "value": "the man is near the red car"},
        ]
        records.append({"id": file.stem, kind: file.name, "conversations": turns})
    path.write_text(json.dumps(records))


def write_text_records(path: Path, count: int) -> None:
    """Records of about 400 bytes, as LLaVA's."""
    rng = random.Random(0)

    def turns() -> str:
        question = " ".join(rng.choices(WORDS, k=12))
        answer = " ".join(rng.choices(WORDS, k=rng.randrange(30, 60)))
        values = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return json.dumps(values)

    some = [turns() for _ in range(1000)]
    with path.open("w") as file:
        for i in range(count):
            start = "," if i else "["
            file.write(f'{start}\n{{"id": "{i:012}", "conversations": {rng.choice(some)}}}')
        file.write("\n]\n")


def words_tokenizer(directory: Path) -> Any:
    """Of a directory, as `open_dataset` takes it; transformers is not needed for that."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return SimpleNamespace(backend_tokenizer=backend)


def make_epochs(dataset: Dataset, data: DataSection) -> Epochs:
    """One epoch over all samples."""
    return plan_run(dataset, data, 0)
