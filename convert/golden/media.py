"""Pixels, tiles, frames, ids and labels of LLaVA-Video against golden ones, from files on disk.

Records go through the reader of training, images and videos through what `Model.watch` opens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from convert.golden.compare import Comparison, GoldenSet, compare_tensor
from train.config import DataSection
from train.data.records.media import Preparer
from train.data.records.reader import Reader
from train.data.sources import Source
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import VxlError
from vxl_jax.media.frames import normalize
from vxl_jax.media.open import Picture, Video, open_film
from vxl_jax.media.preprocessing import ImageMode
from vxl_jax.media.sampling import Timeline, choose_frames
from vxl_jax.presets import llava_video_7b
from vxl_jax.text.chat import encode_prompt
from vxl_jax.text.template import IMAGE_TOKEN
from vxl_jax.text.time_prompt import time_prompt

PINPOINTS = "(1x1),...,(6x6)"


def check_preprocessing(golden: GoldenSet, media: Path, tokenizer: Any) -> Iterator[Comparison]:
    """Compare all parts of the set, a row at a time.

    Args:
      golden: the set.
      media: directory of its files.
      tokenizer: of Qwen2, from transformers.
    """
    config = llava_video_7b()
    for case in golden.field(golden.meta, "videos", list):
        yield from _check_video(golden, case, media, config)
    for case in golden.field(golden.meta, "images", list):
        yield from _check_image(golden, case, media, config)
    for case in golden.field(golden.meta, "sizes", list):
        yield _check_size(case, config)
    for case in golden.field(golden.meta, "sampling", list):
        yield _check_sampling(case)
    for case in golden.field(golden.meta, "conversations", list):
        yield from _check_record(case, media, tokenizer, config)
    for case in golden.field(golden.meta, "prompts", list):
        roles = ("human", "gpt")
        turns = [{"from": roles[i % 2], "value": text} for i, text in enumerate(case["turns"])]
        ids = encode_prompt(turns, tokenizer, family="llava_video").tolist()
        yield _equal(f"prompt {case['turns'][0][:30]!r}", ids, case["input_ids"])
    yield from golden.unknown()


def _equal(name: str, ours: Any, golden: Any) -> Comparison:
    agrees = ours == golden
    return Comparison(name, 0.0, "" if agrees else f"{ours!r:.60}, golden {golden!r:.60}", agrees)


def _normalized(pixels: np.ndarray, config: VideoXLConfig) -> np.ndarray:
    """uint8 frames as the tower sees them, channels first."""
    values = normalize(pixels, config.tower.image_mean, config.tower.image_std)
    return rearrange(values, "F h w C -> F C h w")


def _check_video(
    golden: GoldenSet, case: dict[str, Any], media: Path, config: VideoXLConfig
) -> Iterator[Comparison]:
    name, most = f"{case['file']}, {case['frames_upbound']} frames", case["frames_upbound"]
    preprocessing = replace(
        config.preprocessing,
        frame_sampling=_sampling(case["force_sample"], most),
        max_frames=most,
        video_fps=case["video_fps"],
    )
    film = open_film(Video(media / case["file"]), config.tower.image_size, preprocessing)
    pixels = np.concatenate([some for some, _ in film.chunks(64)])
    times = film.times
    assert times is not None
    text = time_prompt(times, "llava_video")
    told = (
        f"lasts for {case['video_time']} seconds, and {len(case['indices'])} frames",
        f"located at {case['frame_time']}.Please",
    )
    yield _equal(f"{name}: times", all(part in text for part in told), True)
    values = _normalized(pixels, config)
    thinned = values[case["tensor_frames"], :, ::12, ::12]
    expected = golden.take(case["tensor"])
    if expected is not None:
        yield compare_tensor(case["tensor"], thinned, expected)
    for statistic in ("mean", "std"):
        ours = float(getattr(values.astype(np.float64), statistic)())
        yield compare_tensor(f"{name}: {statistic}", ours, case[statistic])


def _check_image(
    golden: GoldenSet, case: dict[str, Any], media: Path, config: VideoXLConfig
) -> Iterator[Comparison]:
    file, side = case["file"], config.tower.image_size
    modes: tuple[tuple[ImageMode, str], ...] = (("anyres", "image"), ("pad", "pad"))
    for mode, start in modes:
        preprocessing = replace(config.preprocessing, image_mode=mode)
        film = open_film(Picture(media / file), side, preprocessing)
        values = _normalized(np.concatenate([some for some, _ in film.chunks(64)]), config)
        if (expected := golden.take(f"{start}/{file}")) is not None:
            thinned = values[:, :, ::24, ::24]
            yield compare_tensor(
                f"{start}/{file}", thinned if mode == "anyres" else thinned[0], expected
            )
        mean = case["mean" if mode == "anyres" else "pad_mean"]
        yield compare_tensor(f"{start}/{file}: mean", float(values.astype(np.float64).mean()), mean)
    yield _check_size(case, config)


def _check_size(case: dict[str, Any], config: VideoXLConfig) -> Comparison:
    size = tuple(case["size"])
    cut = config.preprocessing.tiles_of(size, config.tower.image_size)
    tokens = config.layout.image(cut.tiles, cut.grid, size).total
    ours = list(cut.grid or ()), tokens
    return _equal(f"tiles of {size}", ours, (case["grid"], case["tokens"]))


def _sampling(forced: bool, most: int) -> Any:
    return "forced" if forced and most else "strided"


def _check_sampling(case: dict[str, Any]) -> Comparison:
    """Which frames are taken. Where the published code fails, some are."""
    timeline = Timeline.of_rate(case["num_frames"], case["avg_fps"])
    most = case["frames_upbound"]
    sampling = _sampling(case["force_sample"], most)
    name = f"{case['num_frames']} frames at {case['avg_fps']:.4g}, {case['video_fps']} a second"
    try:
        ours = choose_frames(timeline, sampling, most or len(timeline.seconds), case["video_fps"])
    except VxlError as error:
        return Comparison(name, np.inf, str(error))
    if "error" in case:
        return Comparison(name, 0.0, "the published code fails", agrees=bool(ours))
    return _equal(name, ours, case["indices"])


def _check_record(
    case: dict[str, Any], media: Path, tokenizer: Any, config: VideoXLConfig
) -> Iterator[Comparison]:
    sample, options = case["sample"], case["options"]
    most = options.get("frames_upbound", 8)
    data = DataSection(
        ("golden.json",),
        str(media),
        image_grids=PINPOINTS,
        frame_sampling=_sampling(options.get("force_sample", True), most),
        max_frames=most,
        time_prompt=options.get("add_time_instruction", True),
    )
    source = Source(Path("golden.json"), media)
    sources: Sequence[Source] = [source]
    reader = Reader(sources, [[sample]], Preparer(data, config), tokenizer)  # type: ignore[list-item]
    name = f"record {sample['id']}"
    try:
        ours, opened = reader.open(0, 0)
    except VxlError as error:
        yield Comparison(name, np.inf, str(error))
        return
    yield _equal(f"{name}: ids", ours.ids.tolist(), case["input_ids"])
    # Marks have no label; the published ones are not used.
    pairs = zip(case["input_ids"], case["labels"], strict=True)
    labels = [-100 if number == IMAGE_TOKEN else label for number, label in pairs]
    yield _equal(f"{name}: labels", ours.labels.tolist(), labels)
    shapes = [v["shape"] for v in case["visuals"] if v["kind"] != "text"]
    frames = [shape[0] if len(shape) == 4 else 1 for shape in shapes]
    yield _equal(f"{name}: frames", [medium.block.frames for medium in opened], frames)
