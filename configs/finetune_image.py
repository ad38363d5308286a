"""Video-XL-7B, stage 2: train all parts on single images, compressed at random ratios up to 16.

    python -m train.finetune --config finetune_image --run-dir runs/finetune_image

To be put in place:

- `data/checkpoints/pretrain`: the result of stage 1 in the published layout, with tokenizer files;
- `data/finetune/bunny_695k.json`: Bunny-695k in LLaVA's format;
- `data/finetune/media/`: its images.
"""

from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig

CONFIG = TrainConfig(
    model=ModelSection(checkpoint="data/checkpoints/pretrain", ratios=(2, 4, 8, 12, 16)),
    data=DataSection(
        train_json=("data/finetune/bunny_695k.json",),
        media_root="data/finetune/media",
        workers=8,
    ),
    optim=OptimSection(learning_rate=1e-5, accumulate=8),
    run=RunSection(run_dir="runs/finetune_image"),
)
