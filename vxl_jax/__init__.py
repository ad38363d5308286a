"""Video-XL in JAX: long videos through a compressed memory.

docs/architecture.md has the layout of the code, CONTRIBUTING.md the legend of axis letters that
every einsum and shape comment uses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vxl_jax.checkpoints.load import load_network
    from vxl_jax.config import LanguageConfig, LoRAConfig, VideoXLConfig, VisionConfig
    from vxl_jax.errors import (
        ArgumentError,
        CheckpointError,
        ConfigError,
        ConversationError,
        MediaError,
        PartlyWatched,
        VisualMemoryError,
        VxlError,
    )
    from vxl_jax.inference.chat import Chat
    from vxl_jax.inference.memory import VisualMemory, load_memory
    from vxl_jax.inference.model import Model, load
    from vxl_jax.inference.sampling import Sampling
    from vxl_jax.media import MediaOptions
    from vxl_jax.media.open import Picture, Video
    from vxl_jax.models.functions import decode_step, prefill
    from vxl_jax.models.lora import add_lora, merge_lora
    from vxl_jax.models.loss import loss_and_metrics
    from vxl_jax.models.video_xl import VideoXL
    from vxl_jax.nn.memory import Memory, empty_memory
    from vxl_jax.stream.batch import StreamBatch, StreamShape, batch_streams
    from vxl_jax.stream.plan import Stream, draw_ratio, plan_stream
    from vxl_jax.text.chat import encode_caption, encode_conversation, encode_prompt

__all__ = [
    "ArgumentError",
    "Chat",
    "CheckpointError",
    "ConfigError",
    "ConversationError",
    "LanguageConfig",
    "LoRAConfig",
    "MediaError",
    "MediaOptions",
    "Memory",
    "Model",
    "PartlyWatched",
    "Picture",
    "Sampling",
    "Stream",
    "StreamBatch",
    "StreamShape",
    "Video",
    "VideoXL",
    "VideoXLConfig",
    "VisionConfig",
    "VisualMemory",
    "VisualMemoryError",
    "VxlError",
    "add_lora",
    "batch_streams",
    "decode_step",
    "draw_ratio",
    "empty_memory",
    "encode_caption",
    "encode_conversation",
    "encode_prompt",
    "load",
    "load_memory",
    "load_network",
    "loss_and_metrics",
    "merge_lora",
    "plan_stream",
    "prefill",
]

_MODULES = {
    "ArgumentError": "vxl_jax.errors",
    "Chat": "vxl_jax.inference.chat",
    "CheckpointError": "vxl_jax.errors",
    "ConfigError": "vxl_jax.errors",
    "ConversationError": "vxl_jax.errors",
    "LanguageConfig": "vxl_jax.config",
    "LoRAConfig": "vxl_jax.config",
    "MediaError": "vxl_jax.errors",
    "MediaOptions": "vxl_jax.media",
    "Memory": "vxl_jax.nn.memory",
    "Model": "vxl_jax.inference.model",
    "PartlyWatched": "vxl_jax.errors",
    "Picture": "vxl_jax.media.open",
    "Sampling": "vxl_jax.inference.sampling",
    "Stream": "vxl_jax.stream.plan",
    "StreamBatch": "vxl_jax.stream.batch",
    "StreamShape": "vxl_jax.stream.batch",
    "Video": "vxl_jax.media.open",
    "VideoXL": "vxl_jax.models.video_xl",
    "VideoXLConfig": "vxl_jax.config",
    "VisionConfig": "vxl_jax.config",
    "VisualMemory": "vxl_jax.inference.memory",
    "VisualMemoryError": "vxl_jax.errors",
    "VxlError": "vxl_jax.errors",
    "add_lora": "vxl_jax.models.lora",
    "batch_streams": "vxl_jax.stream.batch",
    "decode_step": "vxl_jax.models.functions",
    "draw_ratio": "vxl_jax.stream.plan",
    "empty_memory": "vxl_jax.nn.memory",
    "encode_caption": "vxl_jax.text.chat",
    "encode_conversation": "vxl_jax.text.chat",
    "encode_prompt": "vxl_jax.text.chat",
    "load": "vxl_jax.inference.model",
    "load_memory": "vxl_jax.inference.memory",
    "load_network": "vxl_jax.checkpoints.load",
    "loss_and_metrics": "vxl_jax.models.loss",
    "merge_lora": "vxl_jax.models.lora",
    "plan_stream": "vxl_jax.stream.plan",
    "prefill": "vxl_jax.models.functions",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: data workers use this package without importing JAX."""
    if name not in _MODULES:
        raise AttributeError(f"module 'vxl_jax' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
