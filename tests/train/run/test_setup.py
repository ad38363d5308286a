"""What a run is made of, before it begins."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from train.run.setup import keep_compiled


@pytest.fixture
def use_cache() -> Iterator[Callable[[str | None], None]]:
    """Sets where JAX keeps compiled programs, all of them; afterwards, it is as before."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}

    def use(directory: str | None, seconds: float = 0.0) -> None:
        for name, value in zip(names, (directory, seconds), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    yield use
    use(*before.values())


@pytest.mark.parametrize(
    ("backend", "before", "now"),
    [("gpu", None, "run/compiled"), ("gpu", "/elsewhere", "/elsewhere"), ("cpu", None, None)],
)
def test_where_compiled_programs_are_kept(
    backend: str,
    before: str | None,
    now: str | None,
    use_cache: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    use_cache(before)
    keep_compiled(tmp_path / "run")
    expected = None if now is None else str(tmp_path / now)
    assert jax.config.jax_compilation_cache_dir == expected


def test_this_backend_keeps_programs_unless_it_is_a_cpu(use_cache: Any, tmp_path: Path):
    use_cache(None)
    keep_compiled(tmp_path / "run")
    kept = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    assert (kept is None) == (jax.default_backend() == "cpu")


def test_a_run_that_starts_again_reads_its_compiled_programs(
    use_cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The backend is called a GPU; the programs are those of this one, which JAX keeps as well."""
    events: list[str] = []

    def listen(event: str, **_: Any) -> None:
        events.append(event.rpartition("/")[-1])

    def begin() -> list[str]:
        """A run as far as its first program; whether that was found or not."""
        use_cache(None)
        jax.clear_caches()
        keep_compiled(tmp_path / "run")
        events.clear()
        jax.jit(lambda x: jnp.sin(x) + 1).lower(jax.ShapeDtypeStruct((7,), "float32")).compile()
        return [event for event in events if event in ("cache_hits", "cache_misses")]

    monitoring.register_event_listener(listen)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "gpu")
            assert begin() == ["cache_misses"]
            assert list((tmp_path / "run/compiled").glob("jit_*"))
            assert begin() == ["cache_hits"]
            patch.setattr(jax, "default_backend", lambda: "cpu")
            assert begin() == []
    finally:
        monitoring.unregister_event_listener(listen)
