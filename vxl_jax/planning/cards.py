"""Peak FLOP/s, memory bandwidth, memory size and make of accelerators.

Figures are the vendors': NVIDIA's data sheets, architecture papers (GA102, Ada) and the table of
compute capabilities in the CUDA C++ Programming Guide, and cloud.google.com/tpu/docs. Dense
products of bfloat16 with sums in float32; NVIDIA often prints twice that, "with sparsity".
"""

import os
import sys
import warnings
from dataclasses import dataclass
from functools import cache

from vxl_jax.errors import ConfigError, VxlError

SHARE = 0.95
"""Share of a GPU's memory that programs ask for; the default of JAX is 0.75."""

SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Environment variables that JAX reads the share from; the second is the older name."""


@dataclass(frozen=True)
class Gpu:
    """What NVIDIA's compiler has to know of a GPU.

    capability: compute capability, major and minor. processors: streaming multiprocessors.
    l2: bytes of its second cache. clock: boost clock, in GHz.
    """

    capability: tuple[int, int]
    processors: int
    l2: int
    clock: float


@dataclass(frozen=True)
class Card:
    """Peak figures of one device.

    name: what to call it on a command line. kinds: its `jax.Device.device_kind`, with or without
    "NVIDIA " in front. flops: of dense bfloat16 products, a second. bandwidth: bytes a second to
    and from its memory. memory: bytes as sold, less ECC; the driver and JAX
    leave some per cent less. gpu: None of a TPU.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    bandwidth: float
    memory: int
    gpu: Gpu | None


def _card(
    name: str, tflops: float, gb_per_second: float, gib: float, gpu: Gpu | None, *kinds: str
) -> Card:
    return Card(name, kinds, tflops * 1e12, gb_per_second * 1e9, int(gib * 2**30), gpu)


def _gpu(capability: float, processors: int, l2_mib: float, clock: float) -> Gpu:
    major, tenth = divmod(round(10 * capability), 10)
    return Gpu((major, tenth), processors, int(l2_mib * 2**20), clock)


CARDS = (
    _card("b200", 2250, 8000, 180, _gpu(10.0, 148, 126, 1.965), "B200"),
    _card("h200", 989.5, 4800, 141, _gpu(9.0, 132, 50, 1.98), "H200"),
    _card("h200-nvl", 835.5, 4800, 141, _gpu(9.0, 132, 50, 1.785), "H200 NVL"),
    _card("h100", 989.5, 3350, 80, _gpu(9.0, 132, 50, 1.98), "H100 80GB HBM3"),  # SXM5
    _card("h100-nvl", 835.5, 3900, 94, _gpu(9.0, 132, 50, 1.785), "H100 NVL"),
    _card("h100-pcie", 756.5, 2000, 80, _gpu(9.0, 114, 50, 1.755), "H100 PCIe"),
    _card("a100", 312, 2039, 80, _gpu(8.0, 108, 40, 1.41), "A100-SXM4-80GB"),
    _card("a100-40gb", 312, 1555, 40, _gpu(8.0, 108, 40, 1.41), "A100-SXM4-40GB"),
    _card("a100-pcie", 312, 1935, 80, _gpu(8.0, 108, 40, 1.41), "A100 80GB PCIe"),
    _card("a100-pcie-40gb", 312, 1555, 40, _gpu(8.0, 108, 40, 1.41), "A100-PCIE-40GB"),
    _card("l40s", 362.05, 864, 45, _gpu(8.9, 142, 96, 2.52), "L40S"),
    _card("l4", 121, 300, 22.5, _gpu(8.9, 58, 48, 2.04), "L4"),
    _card("a10g", 70, 600, 22.5, _gpu(8.6, 80, 6, 1.71), "A10G"),
    _card("6000-ada", 364.2, 960, 48, _gpu(8.9, 142, 96, 2.505), "RTX 6000 Ada Generation"),
    _card("4090", 165.2, 1008, 24, _gpu(8.9, 128, 72, 2.52), "GeForce RTX 4090"),
    _card("3090", 71, 936, 24, _gpu(8.6, 82, 6, 1.695), "GeForce RTX 3090"),
    _card("tpu-v4", 275, 1200, 32, None, "TPU v4"),
    _card("tpu-v5e", 197, 819, 16, None, "TPU v5 lite", "TPU v5e"),
    _card("tpu-v5p", 459, 2765, 95, None, "TPU v5", "TPU v5p"),
    _card("tpu-v6e", 918, 1638, 32, None, "TPU v6 lite", "TPU v6e"),
)


def card_of(name: str) -> Card | None:
    """Find the card of a `jax.Device.device_kind` or of a name such as `h100`; None if unknown.

    All of the name has to be right, but for upper and lower case: a part of it would take the
    slower "RTX 4090 Laptop GPU", or a slice of an H100, for the whole card.
    """
    wanted = name.lower().removeprefix("nvidia ")
    for card in CARDS:
        if wanted in (card.name, *(kind.lower() for kind in card.kinds)):
            return card
    return None


def find_card(name: str) -> Card:
    """Find the card that `--card` names.

    Raises:
      ConfigError: the card is unknown.
    """
    card = card_of(name)
    if card is None:
        names = ", ".join(card.name for card in CARDS)
        raise ConfigError(f"--card {name}: unknown card; choose from {names}")
    return card


def claim_memory() -> None:
    """Let JAX use `SHARE` of a GPU's memory, unless the user has set a share in the environment.

    JAX reads the share when it first looks for devices. If it has found a GPU already, this warns
    once and changes nothing. Without a GPU it has no effect.
    """
    if any(os.environ.get(name) for name in SHARE_VARIABLES):
        return
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is None or not bridge.backends_are_initialized():
        os.environ[SHARE_VARIABLES[0]] = str(SHARE)
    elif bridge.default_backend() == "gpu":
        _warn_too_late()


DEVICE_ERRORS = (RuntimeError, ValueError)
"""What a failed program raises: JaxRuntimeError (a RuntimeError), and a plain ValueError where
`jax.block_until_ready` waits for several arrays."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a device error of XLA or CUDA means out of memory.

    False for errors of this library, whose messages already say so.
    """
    names = ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY")
    return not isinstance(error, VxlError) and any(name in str(error) for name in names)


@cache
def _warn_too_late() -> None:
    warnings.warn(
        "JAX has started already and uses 0.75 of the GPU's memory, its default; set "
        f"{SHARE_VARIABLES[0]}={SHARE} in the environment, or call vxl_jax.load before anything "
        "else uses a device",
        RuntimeWarning,
        stacklevel=4,  # who called the function that claims memory
    )
