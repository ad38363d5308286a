"""Progress bars that suit a terminal and a log file alike."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(show: bool = True, **options: Any) -> tqdm:
    """A tqdm bar on stderr; if stderr is not a terminal, it is redrawn at most every ten seconds.

    show: False hides the bar. options: of tqdm; `disable=True` hides the bar as well.
    """
    if not show:
        options["disable"] = True
    seconds = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(mininterval=seconds, maxinterval=max(seconds, 10.0), **options)
