"""The public names of `vxl_jax`: read by type checkers, and by Python when one is used."""

from .checkpoints.load import load_network as load_network
from .config import (
    Compression as Compression,
    LanguageConfig as LanguageConfig,
    LoRAConfig as LoRAConfig,
    VideoXLConfig as VideoXLConfig,
    VisionConfig as VisionConfig,
)
from .errors import (
    ArgumentError as ArgumentError,
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    ConversationError as ConversationError,
    MediaError as MediaError,
    PartlyWatched as PartlyWatched,
    VisualMemoryError as VisualMemoryError,
    VxlError as VxlError,
)
from .inference.chat import Chat as Chat
from .inference.decode import ScoredAnswer as ScoredAnswer
from .inference.memory import (
    VisualMemory as VisualMemory,
    load_memory as load_memory,
)
from .inference.model import (
    Model as Model,
    load as load,
)
from .inference.sampling import Sampling as Sampling
from .media import MediaOptions as MediaOptions
from .media.open import (
    Picture as Picture,
    Video as Video,
)
from .media.preprocessing import Preprocessing as Preprocessing
from .models.functions import (
    decode_step as decode_step,
    prefill as prefill,
)
from .models.int8 import quantize as quantize
from .models.lora import (
    add_lora as add_lora,
    merge_lora as merge_lora,
)
from .models.loss import loss_and_metrics as loss_and_metrics
from .models.video_xl import VideoXL as VideoXL, VisionEncoder as VisionEncoder
from .nn.attention import window_attention as window_attention
from .nn.attention.key_values import KeyValues as KeyValues
from .nn.collect import Collect as Collect, Collected as Collected
from .nn.memory import (
    Memory as Memory,
    empty_memory as empty_memory,
)
from .nn.sharding import (
    make_mesh as make_mesh,
    param_placement as param_placement,
)
from .stream.batch import (
    StreamBatch as StreamBatch,
    StreamShape as StreamShape,
    batch_streams as batch_streams,
)
from .stream.plan import (
    Stream as Stream,
    draw_ratio as draw_ratio,
    plan_stream as plan_stream,
)
from .stream.visual import (
    VisualInput as VisualInput,
    batch_visual as batch_visual,
)
from .text.chat import (
    encode_caption as encode_caption,
    encode_conversation as encode_conversation,
    encode_prompt as encode_prompt,
)
from .version import __version__ as __version__
