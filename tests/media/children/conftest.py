"""A child process."""

from collections.abc import Iterator

import pytest

from tests.media.children.test_process import HANDLER
from vxl_jax.media.children.process import MediaProcess


@pytest.fixture
def child() -> Iterator[MediaProcess]:
    """A process that is ended."""
    made = MediaProcess(HANDLER, "test process")
    yield made
    made.kill()
    made.end()
