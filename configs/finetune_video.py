"""Video-XL-7B, stage 3: train all parts on images, image sets and videos of up to 128 frames.

    python -m train.finetune --config finetune_video --run-dir runs/finetune_video

To be put in place:

- `data/checkpoints/finetune_image`: the result of stage 2 in the published layout, with tokenizer
  files;
- `data/finetune/bunny_695k.json`, `video.json`, `multi_image.json`, `vico.json`: single images,
  videos, sets of images, and Visual Clue Order, in LLaVA's format;
- `data/finetune/media/`: their images and videos.
"""

from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig

CONFIG = TrainConfig(
    model=ModelSection(checkpoint="data/checkpoints/finetune_image", ratios=(2, 4, 8)),
    data=DataSection(
        train_json=(
            "data/finetune/bunny_695k.json",
            "data/finetune/video.json",
            "data/finetune/multi_image.json",
            "data/finetune/vico.json",
        ),
        epochs=(3,),
        media_root="data/finetune/media",
        max_frames=128,
        workers=8,
    ),
    optim=OptimSection(learning_rate=1e-5, accumulate=8),
    run=RunSection(run_dir="runs/finetune_video"),
)
