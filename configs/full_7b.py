"""Video-XL-7B on one 80 GB card: everything, with Adafactor layer by layer on bfloat16 weights.

    python -m train.finetune --config full_7b --run-dir runs/full_7b

Two bytes a parameter for weights and two for gradients: bfloat16 is rounded stochastically, so
that steps of 1e-5 count. One batch a step: sums over several are float32, twice the gradients. To
be put in place:

- `data/checkpoints/video_xl`: the published checkpoint, with tokenizer files;
- `data/mine/train.json`: your records in LLaVA's format (docs/data.md), `data/mine/media/` their
  images and videos.
"""

from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig

CONFIG = TrainConfig(
    model=ModelSection(
        checkpoint="data/checkpoints/video_xl", ratios=(2, 4, 8), param_dtype="bfloat16"
    ),
    data=DataSection(
        train_json=("data/mine/train.json",),
        media_root="data/mine/media",
        max_frames=256,
        max_length=65536,
        workers=8,
    ),
    optim=OptimSection(
        learning_rate=1e-5,
        vision_learning_rate=2e-6,
        optimizer="adafactor",
        param_dtype="bfloat16",
    ),
    run=RunSection(run_dir="runs/full_7b"),
)
