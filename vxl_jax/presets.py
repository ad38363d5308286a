"""Named model configurations."""

from dataclasses import replace
from typing import Any

from vxl_jax.config import (
    Compression,
    LanguageConfig,
    VideoXLConfig,
    VisionConfig,
    siglip_so400m,
    with_changes,
)
from vxl_jax.media.preprocessing import llava_preprocessing


def video_xl_7b(**changes: Any) -> VideoXLConfig:
    """The published Video-XL-7B: CLIP ViT-L/14-336 and Qwen2-7B, windows of 10 frames."""
    return with_changes(VideoXLConfig(), **changes)


def llava_video_7b(**changes: Any) -> VideoXLConfig:
    """The published LLaVA-Video-7B: SigLIP so400m/14-384 and Qwen2-7B, newline grids, no
    beacons.
    """
    base = VideoXLConfig(
        family="llava_video",
        vision=siglip_so400m(),
        compression=None,
        pool_mode="bilinear",
        newline="grid",
        image_tokens="unpad",
        max_image_tiles=9,
        preprocessing=llava_preprocessing(),
    )
    return with_changes(base, **changes)


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


def tiny_llava(**changes: Any) -> VideoXLConfig:
    """`tiny` as a LLaVA-Video: 70 px frames of 5 x 5 patches, 12 tokens a slow frame."""
    base = replace(
        llava_video_7b(),
        vision=replace(siglip_so400m(), image_size=70, width=16, layers=3, heads=2, mlp_width=32),
        language=tiny().language,
        max_image_tiles=2,
        preprocessing=llava_preprocessing(max_frames=8),
    )
    return with_changes(base, **changes)


def demo_llava(**changes: Any) -> VideoXLConfig:
    """The LLaVA-Video of the embedded demo: every second frame of a video is fast."""
    base = replace(
        llava_video_7b(),
        vision=replace(siglip_so400m(), image_size=70, width=64, layers=3, heads=4, mlp_width=256),
        language=demo().language,
        max_image_tiles=3,
        slow_every=2,
    )
    return with_changes(base, **changes)


PRESETS = {
    "video_xl_7b": video_xl_7b,
    "llava_video_7b": llava_video_7b,
    "tiny": tiny,
    "tiny_llava": tiny_llava,
    "demo": demo,
    "demo_llava": demo_llava,
}
