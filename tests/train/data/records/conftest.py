"""Media of records."""

from pathlib import Path

import pytest

from tests.support.data import write_media


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media of all kinds, good and bad."""
    return write_media(tmp_path_factory.mktemp("media"))
