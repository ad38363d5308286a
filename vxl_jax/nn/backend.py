"""Which backend a program is traced for: it decides sizes of tiles and which kernels there are."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import jax

Backend = Literal["cpu", "gpu", "tpu"]

Capability = tuple[int, int]
"""Compute capability of an NVIDIA GPU, major and minor."""


PROGRAMS = 264
"""Programs of a kernel that keep a GPU's memory busy: two for each multiprocessor of an H100."""


class _Target(NamedTuple):
    backend: str
    capability: Capability | None


_target: ContextVar[_Target | None] = ContextVar("target", default=None)


@contextmanager
def made_for(backend: Backend, capability: Capability | None = None) -> Iterator[None]:
    """Trace programs for another backend than that of this process.

    JAX keeps what it has traced by function and shapes alone, so that all of it is forgotten where
    the target changes.

    capability: of the GPU that the program will be compiled for, so that kernels for it are used.
        None: the program has the sizes of the backend and runs anywhere.
    """
    target = _Target(backend, capability)
    changes = target != _target.get()
    token = _target.set(target)
    try:
        if changes:
            jax.clear_caches()
        yield
    finally:
        _target.reset(token)
        if changes:
            jax.clear_caches()


def on_cpu() -> bool:
    """Whether programs are traced for a CPU."""
    target = _target.get()
    return (target.backend if target else jax.default_backend()) == "cpu"


def gpu_capability() -> Capability | None:
    """Compute capability of the NVIDIA GPU whose kernels may be used, or None.

    It is that of the first device, on which programs are taken to run.
    """
    if target := _target.get():
        return target.capability
    if jax.default_backend() != "gpu":
        return None
    found = re.fullmatch(r"(\d+)\.(\d+)", str(jax.devices()[0].compute_capability))
    return (int(found[1]), int(found[2])) if found else None


def row_unit() -> int:
    """Rows of a matrix product go in multiples of this: a CPU's vector, an accelerator's tile."""
    return 8 if on_cpu() else 128
