"""LLaVA-OneVision of transformers, in PyTorch, with random weights, against ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from convert.from_hf import convert_from_hf
from vxl_jax.checkpoints.load import load_network
from vxl_jax.inference.decode import generate
from vxl_jax.media.tiles import tile_grid
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import plan_stream
from vxl_jax.stream.visual import batch_visual
from vxl_jax.text.template import IMAGE_TOKEN

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("exact_products")

SIDE, IMAGE_ID, VIDEO_ID, NEW = 42, 90, 91, 8
BEFORE, AFTER = [5, 17, 3], [44, 2, 9, 61]


@dataclass(frozen=True)
class Oracle:
    """transformers' model, and the directory that it was saved in."""

    theirs: Any
    directory: Path


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    torch.manual_seed(3)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=14,
        ),
        text_config=Qwen2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
        ),
        image_grid_pinpoints=[[SIDE * h, SIDE * w] for h in range(1, 7) for w in range(1, 7)],
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
    )
    theirs = LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():  # of a size that tells one token from another
        for weight in theirs.parameters():
            weight.normal_(0, 0.3) if weight.ndim > 1 else weight.add_(
                0.1 * torch.randn_like(weight)
            )
    directory = tmp_path_factory.mktemp("onevision")
    theirs.save_pretrained(directory)
    return Oracle(theirs, directory)


@pytest.fixture(scope="module", params=["as saved", "converted"])
def ours(request: pytest.FixtureRequest, oracle: Oracle, tmp_path_factory: Any) -> VideoXL:
    if request.param == "as saved":
        return load_network(oracle.directory)
    converted = tmp_path_factory.mktemp("converted") / "model"
    convert_from_hf(oracle.directory, converted)
    return load_network(converted)


def answer_of_theirs(oracle: Oracle, ids: list[int], **inputs: Any) -> tuple[np.ndarray, list[int]]:
    """Logits of all text after the visual tokens, and greedy ids."""
    tensor = torch.tensor([ids])
    with torch.no_grad():
        logits = oracle.theirs(input_ids=tensor, **inputs).logits[0, -len(AFTER) :]
        new = oracle.theirs.generate(
            input_ids=tensor, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **inputs
        )[0, len(ids) :]
    return logits.numpy(), new.tolist()


def answer_of_ours(model: VideoXL, pixels: np.ndarray, blocks: list[Any]) -> tuple[Any, list[int]]:
    """The same. blocks: visual tokens of each block."""
    layout = model.config.layout
    visual = batch_visual(layout, pixels[None], [layout.join_blocks(blocks)])
    marks = [IMAGE_TOKEN] * len(blocks)
    counts = [len(tokens) for tokens, _ in blocks]
    ids = [*BEFORE, *marks, *AFTER]
    stream = plan_stream(ids, counts, window=model.config.window, ratio=None)
    streams = batch_streams([stream])
    logits = nnx.jit(lambda m, s, v: m.logits(m(s, m.encode(v))))(model, streams, visual)
    new = generate(model, streams, visual, max_new_tokens=NEW)[0]
    return np.asarray(logits)[0, -len(AFTER) :], new


def draw(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).normal(size=(frames, 3, SIDE, SIDE)).astype(np.float32)


def check(theirs: tuple[np.ndarray, list[int]], ours: tuple[Any, list[int]]) -> None:
    assert ours[1] == theirs[1]
    error = np.linalg.norm(ours[0] - theirs[0]) / np.linalg.norm(theirs[0])
    assert error < 1e-5


SIZES = [(60, 50), (130, 44), (44, 130), (200, 70), (250, 250), (90, 250)]
"""Width and height: one tile, unpadded rows, unpadded columns, two of downscaled grids."""


@pytest.mark.parametrize("size", SIZES)
def test_an_image_gives_the_logits_and_ids_of_transformers(
    oracle: Oracle, ours: VideoXL, size: tuple[int, int]
):
    columns, rows = tile_grid(size, [(SIDE * w, SIDE * h) for w, h in GRIDS(ours)], SIDE)
    frames = 1 + columns * rows
    tokens = ours.config.layout.image(frames, (columns, rows), size).tokens()
    pixels = draw(frames)
    theirs = answer_of_theirs(
        oracle,
        [*BEFORE, *[IMAGE_ID] * len(tokens), *AFTER],
        pixel_values=torch.tensor(pixels)[None],
        image_sizes=torch.tensor([[size[1], size[0]]]),
    )
    check(theirs, answer_of_ours(ours, pixels.transpose(0, 2, 3, 1), [(tokens, frames)]))


def GRIDS(model: VideoXL) -> Any:
    return model.config.preprocessing.grids


@pytest.mark.parametrize("frames", [1, 3, 8])
def test_a_video_gives_the_logits_and_ids_of_transformers(
    oracle: Oracle, ours: VideoXL, frames: int
):
    tokens, pixels = ours.config.layout.video_tokens(frames), draw(frames)
    theirs = answer_of_theirs(
        oracle,
        [*BEFORE, *[VIDEO_ID] * len(tokens), *AFTER],
        pixel_values_videos=torch.tensor(pixels)[None],
    )
    check(theirs, answer_of_ours(ours, pixels.transpose(0, 2, 3, 1), [(tokens, frames)]))


def test_several_images_are_one_tile_each(oracle: Oracle, ours: VideoXL):
    tokens, pixels = ours.config.layout.image(1).tokens(), draw(2)
    theirs = answer_of_theirs(
        oracle,
        [*BEFORE, *[IMAGE_ID] * (2 * len(tokens)), *AFTER],
        pixel_values=torch.tensor(pixels)[:, None],
        image_sizes=torch.tensor([[60, 50], [70, 90]]),
        batch_num_images=torch.tensor([2]),
    )
    check(theirs, answer_of_ours(ours, pixels.transpose(0, 2, 3, 1), [(tokens, 1), (tokens, 1)]))


def test_the_downscaled_sizes_are_downscaled(ours: VideoXL):
    shapes = []
    for size in SIZES:
        columns, rows = tile_grid(size, [(SIDE * w, SIDE * h) for w, h in GRIDS(ours)], SIDE)
        shapes.append(ours.config.layout.image(1 + columns * rows, (columns, rows), size))
    taps = [jax.tree.leaves(image.tokens().patch)[0].shape[1] for image in shapes]
    assert taps == [1, 1, 1, 1, 4, 4]
