"""Compiled programs kept from one start to the next, in the user's cache directory."""

import hashlib
import os
import warnings
from pathlib import Path

import jax

MOST_BYTES = 2 * 2**30
"""Size of the cache; the programs that were used least recently leave it first."""


def keep_programs() -> Path | None:
    """Keep compiled programs in the user's cache directory, and use those that are there.

    A program of another version of JAX, another configuration or another kind of device is
    compiled again. Any number of processes may share the directory. `JAX_COMPILATION_CACHE_DIR`, or
    the option of JAX of that name, takes precedence: nothing is changed then.

    Returns:
      The directory that is used; None, with a warning, if it cannot be written.
    """
    chosen: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen is not None:
        return Path(chosen)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = root / "vxl-jax" / "compiled"
    if jax.default_backend() == "cpu":  # programs use the instructions of the machine
        directory /= _cpu()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        warnings.warn(
            f"{directory}: cannot be written ({error.strerror}), so programs are compiled at each "
            "start; set JAX_COMPILATION_CACHE_DIR to another directory",
            stacklevel=2,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


def _cpu() -> str:
    """A name for the instruction set of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return os.uname().machine
    flags = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return f"{os.uname().machine}-{hashlib.sha256(repr(flags).encode()).hexdigest()[:12]}"
