"""Video-XL in JAX: long videos through a compressed memory.

CONTRIBUTING.md has the layout of the code, and the legend of axis letters that every einsum and
shape comment uses.
"""

from vxl_jax.chat import encode_caption, encode_conversation, encode_prompt
from vxl_jax.checkpoint import load
from vxl_jax.config import ConfigError, LanguageConfig, VideoXLConfig, VisionConfig
from vxl_jax.generate import Sampling
from vxl_jax.memory import Memory, empty_memory
from vxl_jax.model import VideoXL, decode_step, loss_and_metrics, prefill
from vxl_jax.stream import Stream, StreamBatch, StreamShape, batch_streams, draw_ratio, plan_stream

__all__ = [
    "ConfigError",
    "LanguageConfig",
    "Memory",
    "Sampling",
    "Stream",
    "StreamBatch",
    "StreamShape",
    "VideoXL",
    "VideoXLConfig",
    "VisionConfig",
    "batch_streams",
    "decode_step",
    "draw_ratio",
    "empty_memory",
    "encode_caption",
    "encode_conversation",
    "encode_prompt",
    "load",
    "loss_and_metrics",
    "plan_stream",
    "prefill",
]
