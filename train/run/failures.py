"""Errors of a run as one line: no device memory, numbers that are not finite."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.errors import TrainingError
from train.rows import write_text
from vxl_jax.errors import VxlError
from vxl_jax.planning.cards import DEVICE_ERRORS, is_out_of_memory

IN_TRAINING = (
    "lower data.max_frames, data.batch_size or data.max_tokens_per_batch, set model.remat to full, "
    "or cut the model over more devices (mesh.fsdp, mesh.tensor); --plan shows what fits. This run "
    "can go on from its last checkpoint with another mesh; other values of data and model need a "
    "new --run-dir"
)


IN_EVALUATION = (
    "lower run.eval_batch_size, or cut the model over more devices (mesh.fsdp, mesh.tensor); the "
    "same command with that goes on from the last checkpoint"
)


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Turn an error of a device that is out of memory into one line; others stay what they are.

    Raises: TrainingError.
    """
    try:
        yield
    except VxlError:  # a ValueError too; one of evaluation has its own advice
        raise
    except DEVICE_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(f"out of device memory in {what} ({reason}): {advice}") from error


def not_finite_error(
    own_dir: Path, step: int, values: dict[str, float], samples: list[str]
) -> TrainingError:
    """The error of a step whose loss or gradient is NaN or infinite; its samples are written down.

    The step has changed nothing: the checkpoint before it is that of the run so far.
    """
    path = own_dir / "not_finite.json"
    write_text(path, json.dumps({"step": step, **values, "samples": samples}, indent=2) + "\n")
    names = ", ".join(samples[:4]) + (f" and {len(samples) - 4} more" if samples[4:] else "")
    return TrainingError(
        f"step {step}: loss {values['loss']:g}, gradient_norm {values['gradient_norm']:g}: the "
        f"update was not made, and step {step - 1} is saved. Its samples: {names} ({path} lists "
        f"them). Look at these, or lower optim.learning_rate in a new run; --run.skip-steps {step} "
        "goes on without them"
    )
