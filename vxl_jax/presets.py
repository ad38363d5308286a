"""Named model configurations."""

from typing import Any

from vxl_jax.config import (
    Compression,
    LanguageConfig,
    VideoXLConfig,
    VisionConfig,
    with_changes,
)


def video_xl_7b(**changes: Any) -> VideoXLConfig:
    """The published Video-XL-7B: CLIP ViT-L/14-336 and Qwen2-7B, windows of 10 frames."""
    return with_changes(VideoXLConfig(), **changes)


def tiny(**changes: Any) -> VideoXLConfig:
    """Some ten thousand parameters for tests: 56 px frames of 4 tokens, windows of 4 frames."""
    base = VideoXLConfig(
        vision=VisionConfig(
            image_size=56, patch_size=14, width=16, layers=3, heads=2, mlp_width=32
        ),
        language=LanguageConfig(
            vocab_size=96, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48, rope_theta=1e4
        ),
        compression=Compression(window=16, ratios=(2, 4, 8)),
    )
    return with_changes(base, **changes)


def demo(**changes: Any) -> VideoXLConfig:
    """The model of the embedded demo: learns to read coloured shapes in minutes on two cores."""
    base = VideoXLConfig(
        vision=VisionConfig(
            image_size=56, patch_size=14, width=64, layers=3, heads=4, mlp_width=256
        ),
        language=LanguageConfig(
            vocab_size=512, width=64, layers=4, heads=4, kv_heads=2, mlp_width=160, rope_theta=1e4
        ),
        compression=Compression(window=16, ratios=(4, 8)),
    )
    return with_changes(base, **changes)


PRESETS = {"video_xl_7b": video_xl_7b, "tiny": tiny, "demo": demo}
