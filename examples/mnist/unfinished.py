"""A training on file, epoch by epoch: one that was killed goes on after its last whole epoch, to the same weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["Unfinished"]


class Unfinished:
    """What a training needs to go on: kept in the file `path`, or not at all (None).

    Of several processes that train together one `writes`, and all read. Each has generators of its own there.
    """

    def __init__(self, path: Path | None = None, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def load(self, processes: int = 1) -> dict[str, Any]:
        """What was kept last; empty where there is nothing.

        Raises:
            RuntimeError: the file is none that this wrote, or was written by another number of processes.
        """
        if self.path is None or not self.path.exists():
            return {}
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and torch each have their own
            raise RuntimeError(
                f"{self.path}: expected a training to go on with, got {error}; delete the file to start anew"
            ) from error
        if (begun := len(state["generators"])) != processes:
            raise RuntimeError(
                f"{self.path}: expected a training begun by {processes} processes, got one by {begun}; start as many "
                "again, or delete the file to start anew"
            )
        return state

    def keep(self, **state: Any) -> None:
        """Write the state whole: readers see the former file or the new one."""
        if self.path is not None and self.writes:
            partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
            torch.save(state, partial)
            os.replace(partial, self.path)

    def remove(self) -> None:
        """The training is done, and recorded elsewhere."""
        if self.path is not None and self.writes:
            self.path.unlink(missing_ok=True)
