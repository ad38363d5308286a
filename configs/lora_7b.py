"""Video-XL-7B on one 80 GB card: LoRA of rank 64 on all linears of the language model.

    python -m train.finetune --config lora_7b --run-dir runs/lora_7b

Beacons and projector are trained as well, each at a separate rate. `python -m convert.to_hf
runs/lora_7b DIR` folds the updates into the kernels. To be put in place:

- `data/checkpoints/video_xl`: the published checkpoint, with tokenizer files;
- `data/mine/train.json`: your records in LLaVA's format (docs/data.md), `data/mine/media/` their
  images and videos.
"""

from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig
from vxl_jax.config import LoRAConfig

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
        learning_rate=1e-4,
        beacon_learning_rate=1e-5,
        projector_learning_rate=1e-5,
        accumulate=8,
        train=("lora", "beacon", "projector"),
    ),
    run=RunSection(run_dir="runs/lora_7b"),
    lora=LoRAConfig(rank=64),
)
