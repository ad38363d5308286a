"""Progress bars are shown where their callers want them."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from train.data import index
from train.data.index import open_index
from vxl_jax.progress import progress_bar


@pytest.mark.parametrize(
    ("options", "disabled"),
    [
        ({}, False),
        ({"show": False}, True),
        ({"disable": True}, True),
        ({"disable": False}, False),
        ({"show": False, "disable": False}, True),
        ({"show": True, "disable": True}, True),
    ],
)
def test_either_argument_hides_the_bar(options: dict[str, Any], disabled: bool):
    file = io.StringIO()
    with progress_bar(total=2, desc="it", file=file, **options) as bar:
        bar.update(2)
        assert bar.disable == disabled
    assert ("it" in file.getvalue()) != disabled


@pytest.mark.parametrize(("least", "shown"), [(2**26, False), (10, True)])
def test_only_large_files_get_a_bar_while_they_are_indexed(
    least: int,
    shown: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(index, "BAR_BYTES", least)
    (tmp_path / "x.json").write_text(json.dumps([{"id": 1}]))
    assert len(open_index(tmp_path / "x.json", tmp_path / "cache")) == 1
    assert ("indexing x.json" in capsys.readouterr().err) == shown
