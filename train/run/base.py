"""What a run began with: base checkpoint, tokenizer, versions of the code."""

import hashlib
import json
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from train.config import TrainConfig
from train.run.distributed import is_first
from vxl_jax.checkpoints.digest import weights_digest
from vxl_jax.checkpoints.hf_config import PARAMS, read_config
from vxl_jax.checkpoints.json_files import read_json
from vxl_jax.errors import ConfigError
from vxl_jax.progress import progress_bar
from vxl_jax.version import __version__

PACKAGES = ("vxl-jax", "jax", "flax", "optax", "orbax-checkpoint")


BASE = "base.json"
"""In a run's directory: what its base checkpoint was, and how its files looked on the disk then."""


def describe_base(checkpoint: Path | None, tokenizer: Path, note: Path | None) -> dict[str, Any]:
    """Digests and sizes of the base checkpoint and the tokenizer of a run, and where they are.

    `weights` is the digest of all weights, `model` has the sizes that config.json gives. The
    weights are read only if the files have changed since `note` was written.

    note: file of an earlier description; written again if it is not up to date. None: no file.

    Raises: CheckpointError if the base checkpoint is not whole; OSError if a file cannot be read.
    """
    found: dict[str, Any] = {
        "tokenizer": _tokenizer_digest(tokenizer),
        "tokenizer_directory": str(tokenizer.absolute()),
    }
    if checkpoint is None:
        return found
    config = read_config(checkpoint)
    parts = {"vision": asdict(config.tower), "language": asdict(config.language)}
    sizes = {f"{part}.{name}": value for part in parts for name, value in parts[part].items()}
    if config.tower.kind == "clip":  # as noted by runs of older versions
        del sizes["vision.kind"]
    sizes |= {name: getattr(config, name) for name in ("pool_stride", "window", "ratios")}
    if config.family != "video_xl":
        layout = asdict(config.layout)
        sizes |= {f"layout.{name}": value for name, value in layout.items()}
    found["model"] = json.loads(json.dumps(sizes))
    found["directory"] = str(checkpoint.absolute())
    before = _read_note(note)
    stamp, size = _stamp(checkpoint)
    if before.get("stamp") == stamp and "weights" in before:
        return found | {"weights": before["weights"]}
    with progress_bar(
        is_first(), desc="digest of the base checkpoint", total=size, unit="B", unit_scale=True
    ) as bar:
        found["weights"] = weights_digest(checkpoint, bar.update)
    if note is not None and is_first():
        with suppress(OSError):  # a run that may only be read: its weights are read next time too
            part = note.with_name(f"{note.name}.{os.getpid()}.part")
            part.write_text(json.dumps({**found, "stamp": stamp}, indent=2) + "\n")
            part.replace(note)
    return found


def _read_note(note: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(note.read_text()) if note is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stamp(checkpoint: Path) -> tuple[str, int]:
    """A digest of names, sizes, times and inodes of the files that hold weights, and their bytes.

    The time of change (ctime) cannot be set, so that a copy with an old date is seen as well.
    """
    converted = (checkpoint / PARAMS).is_dir()
    files = (checkpoint / PARAMS).rglob("*") if converted else checkpoint.glob("*.safetensors")
    lines, size = [str(checkpoint.absolute())], 0
    for path in sorted(files):
        stat = path.stat()
        if path.is_file():
            seen = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            lines.append(f"{path.relative_to(checkpoint)} {seen}")
            size += stat.st_size
    return hashlib.sha256("\n".join(lines).encode()).hexdigest(), size


def _tokenizer_digest(directory: Path) -> str | None:
    """Digest of a tokenizer's vocabulary; None if the directory has none of the files."""
    digest, seen = hashlib.sha256(), False
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"):
        path = directory / name
        if not path.is_file():
            continue
        seen, content = True, path.read_bytes()
        if name == "tokenizer.json":  # its other parts are written differently from time to time
            values = read_json(path)
            kept = [values.get("model", {}).get("vocab"), values.get("added_tokens")]
            content = json.dumps(kept, sort_keys=True).encode()
        digest.update(f"{name} {len(content)}\n".encode() + content)
        if name == "tokenizer.json":
            break
    return digest.hexdigest() if seen else None


def compare_base(noted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """List what differs from the note: weights, fields of config.json, the tokenizer.

    A digest or field that one of the two lacks is not compared: the note is of an older version.
    """
    old, new = noted.get("model", {}), found.get("model", {})
    changed = [
        f"{name} was {old[name]!r} and is {new[name]!r}"
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
    ]
    weights = [x.get("weights") for x in (noted, found)]
    if None not in weights and weights[0] != weights[1]:
        changed.insert(0, "its weights are others")
    where = f"model.checkpoint {found.get('directory')} is not what it was"
    problems = [f"{where} ({'; '.join(changed)})"] if changed else []
    tokenizers = [x.get("tokenizer") for x in (noted, found)]
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        problems.append(
            f"the tokenizer {found.get('tokenizer_directory')} has another vocabulary than it had"
        )
    return problems


def read_about(checkpoints: Path, step: int) -> dict[str, Any]:
    """What a saved step says of its run; empty if the file is missing.

    Raises: CheckpointError if the file cannot be read.
    """
    path = checkpoints / str(step) / "about" / "metadata"
    return read_json(path) if path.is_file() else {}


def check_own_base(run_dir: Path, config: TrainConfig) -> dict[str, Any]:
    """The description of a run's base, compared with that of its last step.

    A run without a step begins: the first process describes the base.

    Raises: ConfigError if they differ, or if a directory has moved and nothing was noted.
    """
    folder = run_dir / "checkpoints"
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    about = read_about(folder, max(steps)) if steps else {}
    noted = about.get("base") or {}
    model = config.model
    checkpoint = Path(model.checkpoint) if model.checkpoint else None
    tokenizer = Path(model.tokenizer or model.checkpoint or "")
    if not is_first() and not noted:
        return {}
    before = _read_note(run_dir / "config.json").get("model", {}) if steps else {}
    for key, digest in (("checkpoint", "weights"), ("tokenizer", "tokenizer")):
        old, new = (before.get(key) or "").replace("{run_dir}", str(run_dir)), getattr(model, key)
        if config.run.moved and old and new and old != new and noted.get(digest) is None:
            raise ConfigError(
                f"{run_dir}: noted no digest of model.{key} {old}, so it cannot be told whether "
                f"{new} is the same; restore the old path (a link will do)"
            )
    found = describe_base(checkpoint, tokenizer, run_dir / BASE)
    if changed := compare_base(noted, found):
        raise ConfigError(
            f"{run_dir} holds a run that began with other files: {' and '.join(changed)}; restore "
            "what it began with, or use another --run-dir"
        )
    return found


def versions() -> dict[str, str | None]:
    """Versions of the packages that make the numbers, and the commit of a checkout.

    None for a package without metadata; a checkout that is not installed has its project's version.
    """
    root = Path(__file__).parents[2]
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = __version__ if name == PACKAGES[0] else None
    if not (root / ".git").exists() or shutil.which("git") is None:
        return found | {"commit": None}
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    return found | {"commit": git.stdout.strip() or None}
