"""What the command lines share."""

import sys
from collections.abc import Callable

from vxl_jax.config import ConfigError
from vxl_jax.tensors import CheckpointError


def run(work: Callable[[], None], done: str) -> int:
    """Do the work and say so; returns the exit status: 2 after an error, 130 after Ctrl-C."""
    try:
        work()
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(done)
    return 0
