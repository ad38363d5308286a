"""Video-XL-7B, stage 1: train the projector alone on pictures with captions.

    python -m train.finetune --config pretrain --run-dir runs/pretrain

To be put in place:

- `data/checkpoints/start`: the untrained model, from Qwen2-7B-Instruct and CLIP ViT-L/14-336 by
  `python -m convert.init QWEN_DIR CLIP_DIR data/checkpoints/start`;
- `data/pretrain/captions.json`: about 2 million records of Laion's kind, `"image"` and one pair of
  turns, `<image>` and the caption;
- `data/pretrain/images/`: the pictures.

A picture is one square of 576 unpooled, uncompressed tokens, and there is no chat template.
"""

from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig

CONFIG = TrainConfig(
    model=ModelSection(checkpoint="data/checkpoints/start", ratios=(), pool_stride=1),
    data=DataSection(
        train_json=("data/pretrain/captions.json",),
        media_root="data/pretrain/images",
        template="caption",
        image_mode="square",
        max_frames=4,
        batch_size=8,
        workers=8,
    ),
    optim=OptimSection(learning_rate=5e-4, accumulate=4, train=("projector",)),
    run=RunSection(run_dir="runs/pretrain"),
)
