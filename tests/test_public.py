"""What `import vxl_jax` gives: names, types, and nothing heavy; docs/api.md describes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vxl_jax
from tests.api_page import API_PAGE, describe_api

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_listed_and_imports():
    assert dir(vxl_jax) == sorted(vxl_jax.__all__)
    assert len(set(vxl_jax.__all__)) == len(vxl_jax.__all__) > 40
    for name in vxl_jax.__all__:
        assert getattr(vxl_jax, name) is not None, name
    assert {"load", "Model", "Video", "Preprocessing", "window_attention"} <= {*vxl_jax.__all__}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        vxl_jax.no_such_name  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, vxl_jax; dir(vxl_jax); vxl_jax.__version__; vxl_jax.VideoXLConfig;"
        "print([m for m in ('jax', 'flax', 'transformers', 'torch', 'tyro') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert vxl_jax.__version__ == version("vxl-jax")


def test_type_checkers_of_other_projects_see_the_types(tmp_path: Path):
    (tmp_path / "other.py").write_text(
        "import vxl_jax\n"
        "reveal_type(vxl_jax.load('a'))\n"
        "reveal_type(vxl_jax.VideoXLConfig().layout.count(3))\n"
        "vxl_jax.Video('a', frames='none')\n"
        "vxl_jax.no_such_name\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "other.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}  # an editable install is not searched
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert 'Revealed type is "vxl_jax.inference.model.Model"' in lines[0], done.stdout
    assert 'Revealed type is "int"' in lines[1].replace("builtins.", "")
    assert "incompatible type \"Literal['none']" in lines[2].replace('"str"', "\"Literal['none']")
    assert 'Module has no attribute "no_such_name"' in lines[3]


def test_the_page_of_the_api_is_that_of_the_code():
    """If this fails: python -m tests.api_page."""
    assert API_PAGE.read_text() == describe_api()
