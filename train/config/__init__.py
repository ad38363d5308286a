"""Training configuration: frozen dataclasses, the command line over them, resume checks.

In import order: `sections`, `resume`, `cli`.
"""

from train.config.sections import (
    DataSection,
    MeshSection,
    ModelSection,
    OptimSection,
    Part,
    RunSection,
    TrainConfig,
    part_of,
)

__all__ = [
    "DataSection",
    "MeshSection",
    "ModelSection",
    "OptimSection",
    "Part",
    "RunSection",
    "TrainConfig",
    "part_of",
]
