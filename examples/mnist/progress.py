"""Progress bars with the time left."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm

__all__ = ["bar"]


def bar(total: int, what: str) -> tqdm:
    """A bar that leaves no trace; in a log file it writes a line every half minute instead of every tenth second.

    TQDM_DISABLE is asked now, for tqdm itself reads it once, when it is imported.
    """
    quiet, seconds = bool(os.environ.get("TQDM_DISABLE")), 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=what, leave=False, mininterval=seconds, dynamic_ncols=True, disable=quiet)
