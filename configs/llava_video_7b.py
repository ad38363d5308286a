"""LLaVA-Video-7B as published: everything is trained, on 64 frames of each video.

    python -m train.finetune --config llava_video_7b --run-dir runs/llava_video_7b --mesh.fsdp 8

Learning rates and length are those of the published script. Its 256 samples a step are one on each
of 8 devices (`data.batch_size`), `optim.accumulate` times. On one 80 GB card, train low-rank
updates instead: `--config llava_video_lora_7b`. To be put in place:

- `data/checkpoints/llava_onevision_si`: what it starts from (`llava-onevision-qwen2-7b-ov-si`, or a
  LLaVA-Video to go on from), in the published layout or that of transformers, with tokenizer files;
- `data/llava_video/exp.yaml`: the published mixture of 116 sets, or your own (docs/data.md);
- `data/llava_video/media/`: their images and videos.
"""

from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig

CONFIG = TrainConfig(
    model=ModelSection(
        preset="llava_video_7b",
        checkpoint="data/checkpoints/llava_onevision_si",
        param_dtype="bfloat16",
        newline="grid",
    ),
    data=DataSection(
        train_json=("data/llava_video/exp.yaml",),
        media_root="data/llava_video/media",
        image_grids="(1x1),...,(6x6)",
        frame_sampling="forced",
        max_frames=64,
        time_prompt=True,
        batch_size=8,
        workers=8,
    ),
    optim=OptimSection(
        learning_rate=1e-5,
        vision_learning_rate=2e-6,
        accumulate=32,
        train=("vision", "projector", "language"),
    ),
    run=RunSection(run_dir="runs/llava_video_7b"),
)
