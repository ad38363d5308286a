"""The embedded demo: a small Video-XL that learns to read pictures and videos on two CPU cores.

    python -m train.finetune --config demo --run-dir runs/demo

The first start makes the data (`train/demo/data.py`) in the run's directory: pictures and videos of
coloured shapes with questions. A first lesson on single tiles comes before the mix of everything.
"""

from pathlib import Path

from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig
from train.demo.data import make_demo_data

CONFIG = TrainConfig(
    model=ModelSection(
        preset="demo",
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
        min_tiles=1,
        max_frames=8,
        max_length=512,
        batch_size=32,
        cache_mb=256,
    ),
    optim=OptimSection(learning_rate=2e-3, weight_decay=0.01, b2=0.98),
    run=RunSection(run_dir="runs/demo", eval_batch_size=40, max_new_tokens=4),
)


def prepare(config: TrainConfig) -> None:
    """Make the data set on first use."""
    make_demo_data(Path(config.run.run_dir) / "data", config.run.seed)
