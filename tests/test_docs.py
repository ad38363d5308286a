"""Pages of the documentation: their links, commands and citation."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import vxl_jax

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PAGES_TEXT = "\n".join(page.read_text() for page in PAGES)
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
COMMAND = re.compile(r"python -m ((?:vxl_jax|train|convert|benchmarks|tests)[\w.]*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    targets = [match[1] for match in LINK.finditer(page.read_text())]
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_modules(page: Path):
    modules = {match[1].rstrip(".") for match in COMMAND.finditer(page.read_text())}
    assert [name for name in sorted(modules) if importlib.util.find_spec(name) is None] == []


def test_readme_has_links_and_commands():
    """The patterns of the tests above find something."""
    text = (ROOT / "README.md").read_text()
    assert "docs/api.md" in {match[1] for match in LINK.finditer(text)}
    assert "train.finetune" in {match[1] for match in COMMAND.finditer(text)}


def test_readme_names_make_targets():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake (finetune|test|quick|format|lint)\b", PAGES_TEXT))
    assert {"finetune", "test"} <= named <= targets


def test_citation_names_the_software_and_both_articles():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == vxl_jax.__version__
    assert [author["name"] for author in citation["authors"]] == ["The vxl-jax authors"]
    urls = [reference["url"] for reference in citation["references"]]
    assert urls == ["https://arxiv.org/abs/2409.14485", "https://arxiv.org/abs/2410.02713"]


def test_changelog_has_the_version():
    assert vxl_jax.__version__ in (ROOT / "CHANGELOG.md").read_text()
