"""What the command lines share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from vxl_jax.config import DTYPES
from vxl_jax.errors import VxlError


def add_destination(parser: argparse.ArgumentParser, dtype_of: str) -> None:
    """Add what all directions have: the directory to make, and what may become of it.

    dtype_of: whose dtype the weights have unless another is given.
    """
    parser.add_argument("destination", type=Path, metavar="DST", help="directory to make")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help=f"of the weights; default: {dtype_of}'s"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at DST")


def run_command(
    convert: Callable[..., None], parser: argparse.ArgumentParser, arguments: list[str] | None
) -> int:
    """Call `convert` with the arguments by name and say what was written.

    Returns the exit status: 2 after an error, 130 after Ctrl-C.
    """
    options = parser.parse_args(arguments)
    try:
        convert(**vars(options))
    except VxlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(f"wrote {options.destination}")
    return 0
