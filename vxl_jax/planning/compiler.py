"""The compiler of plans: of the card that is planned for, on a machine that does not have it.

JAX's CUDA plugin compiles ahead of time for a GPU that is described in words: real passes, buffer
assignment and machine code, without a driver (the extra `gpu-compile`, or `cuda12`). Nothing can be
run, and kernels are chosen without timing them. Without the plugin, and for TPUs, XLA's CPU
compiler takes its place: its products are in float32, so its programs are float32 too.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies

from vxl_jax.nn.backend import made_for
from vxl_jax.planning.cards import Card, Gpu

_PLUGINS = "jax_cuda12_plugin", "jax_cuda13_plugin"

# A CPU multiplies bfloat16 matrices in float32. Moved out of the loop over layers, that would be a
# float32 copy of all layers, which no accelerator makes.
_CPU_OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}

# XLA chooses tiles of its matrix products by timing them. Without a device it would take tiles that
# do not fit some shapes; products go to cuBLAS instead.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}

# Shared memory of a multiprocessor and of one block, threads and float32 lanes of a multiprocessor,
# by compute capability: the CUDA C++ Programming Guide, "Technical Specifications".
_MAKES = {
    (8, 0): (167936, 166912, 2048, 64),
    (8, 6): (102400, 101376, 1536, 128),
    (8, 9): (102400, 101376, 1536, 128),
    (9, 0): (233472, 232448, 2048, 128),
    (10, 0): (233472, 232448, 2048, 128),
}

_CUDNN_VERSION = 91000
"""That JAX is told of where it looks for cuDNN, which compiling does not need."""


@dataclass(frozen=True)
class PlanCompiler:
    """Compiles programs for a card. card: None for a CPU."""

    card: Card | None = None

    @property
    def name(self) -> str:
        """What to say that figures come from."""
        if self.card is None:
            return "XLA's CPU compiler, in float32 (an upper bound)"
        return f"XLA's GPU compiler, for an NVIDIA {self.card.kinds[0]}"

    @property
    def is_exact(self) -> bool:
        """Whether programs are compiled in the dtypes that they have."""
        return self.card is not None

    def devices(self, count: int = 1) -> list[Any]:
        """Make devices to put into the shardings and meshes of programs."""
        if self.card is None:
            return jax.devices("cpu")[:count]
        return _devices(self.card, count)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Trace and lower programs inside, as they are on the card."""
        if self.card is None:
            with made_for("gpu"):
                yield
            return
        with made_for("gpu", _gpu(self.card).capability), _without_cudnn():
            yield

    def compile(self, lowered: Any) -> Any:
        """Compile a lowered program (`jax.stages.Lowered`) to a `jax.stages.Compiled`."""
        return lowered.compile(_CPU_OPTIONS if self.card is None else _GPU_OPTIONS)


def compiler_for(card: Card) -> PlanCompiler:
    """Choose the compiler of a card, or the CPU's where JAX's CUDA plugin is not installed, or does
    not work (with a warning).
    """
    if card.gpu is None or not any(map(find_spec, _PLUGINS)):
        return PlanCompiler()
    compiler = PlanCompiler(card)
    try:
        compiler.devices()
    except Exception as error:  # of many kinds, from the plugin's own loading on
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"JAX's CUDA plugin cannot compile for {card.name} ({reason}); the CPU's compiler "
            "takes its place",
            RuntimeWarning,
            stacklevel=2,
        )
        return PlanCompiler()
    return compiler


def _without_cudnn() -> AbstractContextManager[Any]:
    """Let JAX trace cuDNN's attention where cuDNN is not installed: compiling does not need it."""
    name = "check_cudnn_version"
    try:
        from jax._src.cudnn import fused_attention_stablehlo as module
    except ImportError:  # another version of JAX
        return nullcontext()
    if not hasattr(module, name):
        return nullcontext()
    return mock.patch.object(module, name, return_value=_CUDNN_VERSION)


@cache
def _devices(card: Card, count: int) -> list[Any]:
    jax.devices("cpu")  # the plugin registers itself when a first backend starts
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_description(card), topology=f"1x1x{count}"
    )
    return list(topology.devices)


def _gpu(card: Card) -> Gpu:
    assert card.gpu is not None, card.name
    return card.gpu


def _description(card: Card) -> str:
    """XLA's GpuTargetConfigProto as text."""
    gpu = _gpu(card)
    shared, shared_of_block, threads, lanes = _MAKES[gpu.capability]
    major, minor = gpu.capability
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_of_block}
  shared_memory_per_core: {shared}
  threads_per_core_limit: {threads}
  core_count: {gpu.processors}
  fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {card.bandwidth:.0f}
  l2_cache_size: {gpu.l2}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {card.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
  name: "NVIDIA {card.kinds[0]}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "NVIDIA {card.kinds[0]}"
"""
