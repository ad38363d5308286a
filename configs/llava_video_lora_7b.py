"""LLaVA-Video-7B on one 80 GB card: LoRA of rank 64 on the language model, and the projector.

    python -m train.finetune --config llava_video_lora_7b --run-dir runs/llava_video_lora_7b

`python -m convert.to_hf runs/llava_video_lora_7b DIR` folds the updates into the kernels. To be put
in place:

- `data/checkpoints/llava_video`: the published checkpoint, with tokenizer files;
- `data/mine/train.json`: your records in LLaVA's format (docs/data.md), `data/mine/media/` their
  images and videos.
"""

from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig
from vxl_jax.config import LoRAConfig

CONFIG = TrainConfig(
    model=ModelSection(
        preset="llava_video_7b",
        checkpoint="data/checkpoints/llava_video",
        param_dtype="bfloat16",
    ),
    data=DataSection(
        train_json=("data/mine/train.json",),
        media_root="data/mine/media",
        image_grids="(1x1),...,(6x6)",
        frame_sampling="forced",
        max_frames=64,
        time_prompt=True,
        workers=8,
    ),
    optim=OptimSection(
        learning_rate=1e-4,
        projector_learning_rate=1e-5,
        accumulate=8,
        train=("lora", "projector"),
    ),
    run=RunSection(run_dir="runs/llava_video_lora_7b"),
    lora=LoRAConfig(rank=64),
)
