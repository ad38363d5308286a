"""Fixtures of images."""

from pathlib import Path

import pytest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a test writes its image; the name says nothing about its kind."""
    return tmp_path / "image.bin"
