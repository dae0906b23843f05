"""The stages of a Runge-Kutta step and their linear combinations, one kernel each."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from odelayers._evaluator import traced

__all__ = ["Recorded", "Stages", "stages_like"]

Row = tuple[float, ...]


class Stages(Protocol):
    """The stages of one step, flat: written in order, combined with rows of a tableau."""

    def put(self, i: int, k: Tensor) -> None: ...
    def get(self, i: int) -> Tensor: ...
    def combine(self, z: Tensor, row: Row, h: float) -> Tensor: ...
    def keep(self, i: int) -> Tensor: ...


@lru_cache(maxsize=256)
def _used(row: Row, dtype: torch.dtype, device: torch.device) -> tuple[tuple[int, ...], Tensor]:
    """Which stages carry weight, and their weights as a row vector."""
    used = tuple(i for i, weight in enumerate(row) if weight)
    return used, torch.tensor([[row[i] for i in used]], dtype=dtype, device=device)


@lru_cache(maxsize=256)
def _dense(row: Row, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(row, dtype=dtype, device=device)


class Recorded:
    """Stages in a list, so that every combination is a node of the graph."""

    def __init__(self) -> None:
        self._stages: list[Tensor] = []

    def put(self, i: int, k: Tensor) -> None:
        """Append stage i; stages come in order."""
        self._stages[i:] = [k]

    def get(self, i: int) -> Tensor:
        """Stage i, flat."""
        return self._stages[i]

    def keep(self, i: int) -> Tensor:
        """Stage i for use after this step."""
        return self._stages[i]

    def combine(self, z: Tensor, row: Row, h: float) -> Tensor:
        """The flat state z plus h times the weighted sum of the stages."""
        used, weights = _used(row, z.dtype, z.device)
        if len(used) == 1:
            return torch.add(z, self._stages[used[0]], alpha=h * row[used[0]])
        # addmm, not addmv: its backward pass writes the stages' gradients as contiguous rows.
        stack = torch.stack([self._stages[i] for i in used])
        return torch.addmm(z.unsqueeze(0), weights * h, stack).squeeze(0)


class Buffered:
    """Stages in one buffer written in place: for solves that record nothing. Reused from step to step."""

    def __init__(self, like: Tensor, stages: int) -> None:
        buffer = like.new_empty(stages, like.numel())
        self._rows = buffer.unbind(0)
        self._first = [buffer[:i].T for i in range(stages + 1)]

    def put(self, i: int, k: Tensor) -> None:
        """Write stage i."""
        self._rows[i].copy_(k)

    def get(self, i: int) -> Tensor:
        """Stage i, flat."""
        return self._rows[i]

    def keep(self, i: int) -> Tensor:
        """Stage i for use after this step: a copy, since the buffer is written again."""
        return self._rows[i].clone()

    def combine(self, z: Tensor, row: Row, h: float) -> Tensor:
        """The flat state z plus h times the weighted sum of the stages."""
        return torch.addmv(z, self._first[len(row)], _dense(row, z.dtype, z.device), alpha=h)


def stages_like(z: Tensor, stages: int) -> Stages:
    """A buffer where nothing is recorded; a list under autograd, a transform or a compiler."""
    return Recorded() if torch.is_grad_enabled() or traced() else Buffered(z, stages)
