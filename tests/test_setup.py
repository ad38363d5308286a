"""What a run is made of, before it begins."""

from pathlib import Path

import jax
import pytest

from train.setup import keep_compiled


@pytest.mark.parametrize(
    ("backend", "before", "now"),
    [("gpu", None, "run/compiled"), ("gpu", "/elsewhere", "/elsewhere"), ("cpu", None, None)],
)
def test_where_compiled_programs_are_kept(
    backend: str,
    before: str | None,
    now: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    own = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", before)
        keep_compiled(tmp_path / "run")
        expected = None if now is None else str(tmp_path / now)
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", own)
