"""A saved configuration, and what a resumed run may change."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from train.config.sections import TrainConfig

CHANGEABLE = frozenset(
    {
        "data.buffer_mb",
        "data.cache_dir",
        "data.cache_mb",
        "data.eval_json",
        "data.max_bad_share",
        "data.sample_seconds",
        "data.workers",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "run.answers_shown",
        "run.eval_batch_size",
        "run.eval_every",
        "run.eval_ratio",
        "run.keep_best",
        "run.keep_checkpoints",
        "run.keep_every",
        "run.log_every",
        "run.max_new_tokens",
        "run.max_steps",
        "run.moved",
        "run.run_dir",
        "run.save_every",
        "run.skip_steps",
    }
)
"""Fields that a resumed run may change: they do not change what a step does, only how far the run
goes, which steps are left out, and what it shows and keeps."""


MOVABLE = frozenset({"data.media_root", "data.train_json", "model.checkpoint", "model.tokenizer"})
"""Paths that a resumed run may change with `run.moved`: their content is compared by digest, but
for media, of which only the lengths of samples are."""


OF_A_MACHINE = frozenset(
    {"data.buffer_mb", "data.cache_dir", "data.cache_mb", "data.sample_seconds", "data.workers"}
)
"""Fields in which the processes of one run may differ."""


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested dict as it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the configuration as JSON, for `config_changes`."""
    path.write_text(json.dumps(config_to_dict(config), indent=2) + "\n")


def upgrade(saved: dict[str, Any]) -> dict[str, Any]:
    """Migrates a saved configuration: `model.remat` used to be a bool, and decord the decoder."""
    model, data = saved.get("model", {}), saved.get("data", {})
    if isinstance(model.get("remat"), bool):
        saved = {**saved, "model": {**model, "remat": "full" if model["remat"] else "none"}}
    if data:
        saved = {**saved, "data": {"decoder": "decord", **data}}
    return saved


def config_changes(config: TrainConfig, saved: dict[str, Any]) -> list[str]:
    """Differences from a saved configuration that a resumed run must not have, one a line.

    A field that the saved one does not have is new since: the run had what is now the default.
    With `run.moved`, paths in MOVABLE may differ, if both have one.
    """
    new, old = _flat(config_to_dict(config)), {**_defaults(), **_flat(upgrade(saved))}

    def may_differ(name: str) -> bool:
        moved = config.run.moved and name in MOVABLE
        return name in CHANGEABLE or (moved and None not in (new.get(name), old.get(name)))

    return [
        f"{name} is {new.get(name)!r}, it was {old.get(name)!r}"
        for name in sorted(new.keys() | old.keys())
        if not may_differ(name) and new.get(name) != old.get(name)
    ]


def shared_digest(config: TrainConfig) -> str:
    """sha256 of all that the processes of one run have in common."""
    shared = {k: v for k, v in _flat(config_to_dict(config)).items() if k not in OF_A_MACHINE}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in values.items()
    }


def _defaults() -> dict[str, Any]:
    """Fields that have a default, as they come back from JSON."""
    values = {
        f"{section.name}.{field.name}": field.default
        for section in dataclasses.fields(TrainConfig)
        for field in dataclasses.fields(section.type)  # type: ignore[arg-type]
        if field.default is not dataclasses.MISSING
    }
    return json.loads(json.dumps(values))
