"""Video-XL-7B on one 80 GB card: beacons and projector with float32 AdamW, the rest frozen.

    python -m train.finetune --config beacon_7b --run-dir runs/beacon_7b

What the published model learned about your videos' domain is kept; what it keeps of a window is
learned again. To be put in place:

- `data/checkpoints/video_xl`: the published checkpoint, with tokenizer files;
- `data/mine/train.json`: your records in LLaVA's format (docs/data.md), `data/mine/media/` their
  images and videos.

`--plan` tells what fits another card, more frames, or a mesh of several cards.
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
        projector_learning_rate=2e-5,
        accumulate=8,
        train=("beacon", "projector"),
    ),
    run=RunSection(run_dir="runs/beacon_7b"),
)
