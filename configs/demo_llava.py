"""The embedded demo of LLaVA-Video: newline grids, SlowFast and unpadded tiles, on two CPU cores.

    python -m train.finetune --config demo_llava --run-dir runs/demo_llava

Data and lessons are those of the demo of Video-XL (`configs/demo.py`). Every second frame of a
video is fast, images are tiles of 5 x 5 patches after one of the whole picture, and three of them
in a question are one tile each.
"""

from pathlib import Path

from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig
from train.demo.data import make_demo_data

CONFIG = TrainConfig(
    model=ModelSection(
        preset="demo_llava",
        tokenizer="{run_dir}/data/tokenizer",
        dtype="float32",
        remat="none",
    ),
    data=DataSection(
        train_json=("{run_dir}/data/frames.json", "{run_dir}/data/train.json"),
        epochs=(20, 14),
        sequential=True,
        eval_json=("{run_dir}/data/heldout.json",),
        media_root="{run_dir}/data/media",
        image_grids="(1x1),...,(2x2)",
        frame_sampling="strided",
        max_frames=8,
        max_length=512,
        batch_size=32,
        cache_mb=256,
    ),
    optim=OptimSection(
        learning_rate=2e-3,
        weight_decay=0.01,
        b2=0.98,
        train=("vision", "projector", "language"),
    ),
    run=RunSection(run_dir="runs/demo_llava", eval_batch_size=40, max_new_tokens=4),
)


def prepare(config: TrainConfig) -> None:
    """Make the data set on first use."""
    make_demo_data(Path(config.run.run_dir) / "data", config.run.seed)
