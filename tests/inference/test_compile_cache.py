"""Compiled programs are kept in the user's cache directory, and used by the next start."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

PROGRAM = """
import json, sys, warnings
import jax, jax.numpy as jnp
from vxl_jax.inference import compile_cache
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
before = jax.config.jax_compilation_cache_max_size
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    used = compile_cache.keep_programs()
jax.jit(lambda x: x * 3 + 1)(jnp.arange(7.0)).block_until_ready()
names = [name.rsplit("/")[-1] for name in hits]
print(json.dumps({
    "used": None if used is None else str(used),
    "hits": names.count("cache_hits"), "misses": names.count("cache_misses"),
    "warnings": [str(w.message) for w in caught if "cannot be written" in str(w.message)],
    "bounded": jax.config.jax_compilation_cache_max_size == compile_cache.MOST_BYTES,
    "untouched": jax.config.jax_compilation_cache_max_size == before,
}))
"""


def start(cache: Path, **environment: str) -> dict:
    """What one start does; it has to end well."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**inherited, "XDG_CACHE_HOME": str(cache), **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_second_start_compiles_nothing(tmp_path: Path):
    first, second = start(tmp_path), start(tmp_path)
    assert Path(first["used"]).is_relative_to(tmp_path / "vxl-jax" / "compiled")
    assert first["misses"] > 0
    assert first["bounded"]
    assert (second["misses"], second["hits"]) == (0, first["misses"] + first["hits"])


def test_several_starts_share_it(tmp_path: Path):
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(start, [tmp_path] * 3))
    assert len({one["used"] for one in together}) == 1
    assert start(tmp_path)["misses"] == 0


def test_the_users_choice_is_kept(tmp_path: Path):
    chosen = start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert chosen["used"] == str(tmp_path / "mine")
    assert chosen["untouched"]
    assert not (tmp_path / "vxl-jax").exists()


@pytest.mark.parametrize("kind", ["file", "null"])
def test_a_place_that_cannot_be_written_is_one_warning(tmp_path: Path, kind: str):
    place = tmp_path / "file" if kind == "file" else Path("/proc/nowhere")
    if kind == "file":
        place.write_text("")
    found = start(place)
    assert found["used"] is None
    assert found["untouched"]
    assert len(found["warnings"]) == 1
