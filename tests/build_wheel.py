"""Build a wheel, install it into an empty directory, and use it without the checkout.

python -m tests.build_wheel
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

USE = """
import os
import vxl_jax
assert vxl_jax.__file__.startswith(os.environ["PYTHONPATH"]), vxl_jax.__file__
for name in dir(vxl_jax):
    getattr(vxl_jax, name)
print("vxl_jax", vxl_jax.__version__, "with", len(dir(vxl_jax)), "names")
"""

COMMANDS = ("vxl_jax.generate", "train.finetune", "train.inspect_data", "convert.from_hf")
"""Modules of the wheel whose `--help` is asked for."""


def main() -> int:
    """Returns the exit status: 0 if the wheel works."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
        pip = [sys.executable, "-m", "pip", "--quiet"]
        subprocess.run([*pip, "wheel", "--no-deps", "-w", name, str(source)], check=True)
        (wheel,) = folder.glob("*.whl")
        held = zipfile.ZipFile(wheel).namelist()
        for needed in ("vxl_jax/py.typed", "vxl_jax/__init__.pyi", "configs/demo.py"):
            if needed not in held:
                print(f"{wheel.name}: lacks {needed}", file=sys.stderr)
                return 1
        tops = {path.split("/")[0] for path in held if ".dist-info/" not in path}
        if strays := sorted(tops - {"vxl_jax", "train", "convert", "configs"}):
            print(f"{wheel.name}: has {', '.join(strays)}", file=sys.stderr)
            return 1
        site = folder / "site"
        subprocess.run(
            [*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True
        )
        environment = {**os.environ, "PYTHONPATH": str(site)}
        run = [sys.executable, "-P"]
        subprocess.run([*run, "-c", USE], cwd=folder, env=environment, check=True)
        for module in COMMANDS:
            command = [*run, "-m", module, "--help"]
            subprocess.run(
                command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL
            )
        print(f"{wheel.name}: {len(held)} files, installed and used")
    return 0


if __name__ == "__main__":
    sys.exit(main())
