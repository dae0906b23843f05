"""Progress bars with the time left."""

from __future__ import annotations

import sys

from tqdm import tqdm

__all__ = ["bar"]


def bar(total: int, what: str) -> tqdm:
    """A bar that leaves no trace; in a log file it writes a line every half minute instead of every tenth second."""
    return tqdm(total=total, desc=what, leave=False, mininterval=0.1 if sys.stderr.isatty() else 30, dynamic_ncols=True)
