"""The notebook runs from top to bottom, and was saved with what it shows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_it_runs_from_top_to_bottom(tmp_path: Path):
    code = "\n\n".join("".join(cell["source"]) for cell in code_cells())
    (tmp_path / "quickstart.py").write_text(code)
    environment = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "quickstart.py"],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0.png: before" in done.stdout
    assert "after 'orange'" in done.stdout


def test_it_was_saved_with_its_output():
    cells = code_cells()
    counts = [cell["execution_count"] for cell in cells]
    assert counts == sorted(counts)
    assert None not in counts
    kinds = {kind for cell in cells for out in cell["outputs"] for kind in out.get("data", {})}
    assert "image/png" in kinds
    assert not any(out["output_type"] == "error" for cell in cells for out in cell["outputs"])
