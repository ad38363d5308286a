"""What the command lines share."""

import sys
from collections.abc import Callable
from functools import wraps
from operator import itemgetter
from typing import Any, Literal, TypeVar

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, PositionalRequiredArgs, arg

from vxl_jax.errors import VxlError

Returned = TypeVar("Returned")

StoredDtype = Literal["bfloat16", "float32"]
"""A dtype that weights are written in."""

DIRECTORY = arg(metavar="DIR")
"""How `--help` shows the value of an option that is a directory."""


def parse_call(
    function: Callable[..., Returned], module: str, about: str | None, arguments: list[str] | None
) -> Returned:
    """Call a function with the arguments of a command line, and return what it returns.

    Parameters without a default are positional, others are options; their help is the function's
    docstring.

    Args:
        function: its annotations say what an argument may be.
        module: that is run, for `--help`.
        about: docstring of that module; its first line is the description.
        arguments: of the command line; None: those of this process.

    Raises: SystemExit(2), after a message on stderr, if an argument is wrong.
    """
    return tyro.cli(
        function,
        prog=f"python -m {module}",
        description=(about or "").partition("\n")[0],
        args=arguments,
        config=(PositionalRequiredArgs, DisallowNone, FlagCreatePairsOff),
    )


def run_command(
    convert: Callable[..., None],
    module: str,
    about: str | None,
    arguments: list[str] | None,
    destination: Callable[[dict[str, Any]], Any] = itemgetter("destination"),
) -> int:
    """Call `convert` as `parse_call` does, and say what was written.

    destination: finds it among the arguments of `convert`. Returns the exit status: 2 after an
    error, 130 after Ctrl-C.
    """

    @wraps(convert)
    def command(**options: Any) -> int:
        try:
            convert(**options)
        except VxlError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted: nothing was written", file=sys.stderr)
            return 130
        print(f"wrote {destination(options)}")
        return 0

    return parse_call(command, module, about, arguments)
