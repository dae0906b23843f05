"""Adaptive steps of its own for every row of a batch: a hard row costs only itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from odelayers._driver import Driver, against
from odelayers._evaluator import Evaluator
from odelayers._field import as_rows
from odelayers._solvers.base import State
from odelayers._solvers.control import RowControl, Rows
from odelayers._solvers.row_march import RowMarch
from odelayers._solvers.rows import Failed, Outputs, Part, failed_rows, grid, on
from odelayers._solvers.stages import Stages, stages_like
from odelayers._solvers.tableau import Tableau

if TYPE_CHECKING:
    from odelayers._solvers.adaptive import AdaptiveRungeKutta

__all__ = ["Independent"]


class Try(NamedTuple):
    """An attempted step: where from, the result and its slope, the stages times the length, the last state but one."""

    tableau: Tableau
    before: State
    z: Tensor
    k: Tensor
    stages: Stages
    last: Tensor

    def after(self) -> State:
        return self.z, self.k

    def error(self, rtol: float, atol: float) -> Tensor:
        # Both are divided by rtol, which saves an operation.
        scale = torch.maximum(self.before[0].abs(), self.z.abs()).add_(atol / rtol)
        return self.stages.error(1 / rtol).div_(scale)

    def read(self, outputs: Outputs) -> Tensor:
        z, (_, ends, inner, theta) = self.before[0], outputs
        found = self.z.index_select(0, on(z, ends))
        if not len(inner):
            return found
        dense = np.array(self.tableau.dense)
        powers = theta[:, None] ** np.arange(1, dense.shape[1] + 1)
        at, weights = on(z, inner), on(z, dense @ powers.T).to(z.dtype)
        stages = torch.stack([self.stages.keep(i) for i in range(len(weights))])
        change = (against(weights, z.ndim) * stages.index_select(1, at)).sum(dim=0)
        return torch.cat([found, z.index_select(0, at) + change])

    def failed(self, error: Rows, control: RowControl, at: Rows) -> list[Failed]:
        return failed_rows(self.before, error, control, at, self._h_lambda(control, at))

    @torch.no_grad()
    def _h_lambda(self, control: RowControl, at: Rows) -> Tensor:
        """|h lambda| of the next try of the rows `at`, from two stages at one time; NaN where they are at one state.

        Source: Hairer and Wanner, Solving ODEs II, IV.2.
        """
        rows, factor = on(self.z, at), torch.from_numpy(control.next[at] / control.h[at])
        change, moved = self.stages.get(-1) - self.stages.get(-2), self.z - self.last
        changed, moved = (as_rows(x)[rows].cpu().double().norm(dim=1) for x in (change, moved))
        found: Tensor = factor * changed / moved
        return found


@dataclass(frozen=True)
class Independent(RowMarch):
    """The march of an embedded pair in which each row has its own time, step, error and end."""

    pair: AdaptiveRungeKutta

    idle = 1 / 4  # from this share of rows at their end on, leaving them out pays for the indexing

    @property
    def told(self) -> AdaptiveRungeKutta:
        return self.pair

    def refuse(self, f: Evaluator, z0: Tensor) -> None:
        self.pair.refuse_vmap(z0)

    def control(self, ts: Sequence[float], first: Rows) -> RowControl:
        return RowControl(ts, first, self.pair.tableau.order, self.pair.max_steps)

    def start(self, f: Evaluator, t0: float, z0: Tensor, driver: Driver) -> State:
        return z0, super().rate(f, t0, (z0,), driver)

    def rate(self, f: Evaluator, t: float, state: State, driver: Driver) -> Tensor:
        return state[1]

    def attempt(self, part: Part, t: Rows, h: Rows, before: State) -> Try:
        """One step of each row; stages are scaled by the rows' lengths, so they combine as those of one length do."""
        tableau, (z, k) = self.pair.tableau, before
        stages = part.stages = part.stages or stages_like(tableau, z)
        at = last = z
        *s, length = grid(tableau.c, t, h, z).unbind(0)
        length = against(length, z.ndim)
        stages.begin(z)
        stages.put(0, k * length)
        for i in range(1, len(s)):
            last, at = at, stages.advance(i, 1.0)
            k = part.rate(s[i], at)
            stages.put(i, k * length)
        return Try(tableau, before, at, k, stages, last)
