"""Video-XL in JAX: long videos through a compressed memory.

Axis legend, used by every einsum and shape comment:

    B batch    F frames or tiles   P patches      G groups of windows   W windows
    T tokens   Q queries (places in a window)     S keys                V visual tokens, vocabulary
    M memory   N heads             K KV heads     H head size           D width
    L layers
"""

from vxl_jax.chat import encode_caption, encode_conversation, encode_prompt
from vxl_jax.config import ConfigError, LanguageConfig, VideoXLConfig, VisionConfig
from vxl_jax.generate import Sampling, generate, stream_tokens
from vxl_jax.memory import Memory, empty_memory
from vxl_jax.model import VideoXL, decode_step, loss_and_metrics, prefill
from vxl_jax.stream import Stream, StreamBatch, batch_streams, draw_ratio, plan_stream

__all__ = [
    "ConfigError",
    "LanguageConfig",
    "Memory",
    "Sampling",
    "Stream",
    "StreamBatch",
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
    "generate",
    "loss_and_metrics",
    "plan_stream",
    "prefill",
    "stream_tokens",
]
