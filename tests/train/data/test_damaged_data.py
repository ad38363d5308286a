"""Hundreds of damaged files, made by seed: each costs its own sample at most, and none is lost.

What a damaged file becomes is not fixed (some still decode); that it is accounted for once, that
its neighbours are untouched, and that nothing stops, hangs or fills the memory, is.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.damage import (
    ASK,
    GONE,
    MEMORY_LIMIT,
    MemoryWatch,
    account,
    damaged_media,
    data_section,
    record,
    sound_files,
)
from tests.train.data.test_damaged_annotations import SOUND, TALK
from train.data.dataset import open_dataset
from vxl_jax.media import VideoFile, grid_pinpoints, load_image, tile_image
from vxl_jax.presets import tiny

# A run over them.


def expected_pixels(path: Path) -> np.ndarray:
    """What a good file is to become."""
    size = tiny().vision.image_size
    if path.suffix == ".mp4":
        return VideoFile(path).read(range(4), size)
    return tile_image(load_image(path), grid_pinpoints(size, 4, 2), size)


def test_damaged_media_cost_their_own_samples_alone(tmp_path: Path, demo_tokenizer: Any):
    media = tmp_path / "media"
    media.mkdir()
    sound = sound_files(tmp_path, np.random.default_rng(0))
    damaged = damaged_media(sound, seed=0)
    assert len(damaged) >= 500
    names: list[str] = []
    good: dict[int, Path] = {}
    for i, (name, content) in enumerate(damaged.items()):
        if i % 6 == 0:  # good ones in between
            kind = list(sound)[i // 6 % len(sound)]
            good[len(names)] = media / f"good-{i}.{kind}"
            good[len(names)].write_bytes(sound[kind])
            names.append(f"good-{i}.{kind}")
        if i % 40 == 0 and not name.endswith(".mp4"):  # a folder of frames
            folder = media / f"folder-{i}"
            folder.mkdir()
            for frame in ("1.png", name, "z.png"):
                (folder / frame).write_bytes(content if frame == name else sound["png"])
            names.append(folder.name)
        (media / name).write_bytes(content)
        names.append(name)
    path = tmp_path / "all.json"
    path.write_text(json.dumps([record(name, i) for i, name in enumerate(names)]))
    data = data_section(media)
    with (
        MemoryWatch() as memory,
        open_dataset((str(path),), data, tiny(), demo_tokenizer) as dataset,
    ):
        delivered, bad = account(dataset, data)
    left_out = [number for number, _ in bad]
    assert sorted([*delivered, *left_out]) == list(range(len(names)))  # once, and not both
    for number, reason in bad:
        assert names[number] in reason or GONE.search(reason), (names[number], reason)
    for number, file in good.items():
        np.testing.assert_array_equal(delivered[number], expected_pixels(file), err_msg=str(file))
    assert len(left_out) > len(damaged) / 2  # or nothing was damaged
    assert 0 < memory.most < MEMORY_LIMIT


# Annotation files.

for _record in SOUND[1::2]:
    _record["conversations"] = [{**TALK[0], "value": ASK["image"]}, TALK[1]]
