"""Progress bars that suit a terminal and a log file alike."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(show: bool = True, **options: Any) -> tqdm:
    """A tqdm bar on stderr; where that is no terminal, a new state at most every ten seconds."""
    options["disable"] = not show
    seconds = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(mininterval=seconds, maxinterval=max(seconds, 10.0), **options)
