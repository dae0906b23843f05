"""Steps of each row by itself: what one step was, and how long the next one is. On the host, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RowControl", "RowStep"]

SAFETY, SHRINK, GROW = 0.9, 0.2, 6.0
RESOLUTION = 4 * torch.finfo(torch.float64).eps


class RowStep(NamedTuple):
    """One step of every row.

    Attributes:
        t: `(B,)` the rows' times before the step.
        h: `(B,)` the rows' lengths, signed; 0 for a row that has arrived or must try again.
        rows: the rows that the step brings to an output time before the last.
        order: at the last step, the place among all outputs found of each output in the order of times and rows.
    """

    t: Tensor
    h: Tensor
    rows: Tensor
    order: Tensor | None


class RowControl:
    """Where each row is on its way through ts, and its next step by Gustafsson's predictive control.

    The control foresees the error's growth from the last two steps, which spares most of the rejections at the sudden
    turns of stiff solutions. Source: Hairer and Wanner, Solving ODEs II, IV.8.
    """

    def __init__(self, ts: Sequence[float], first: Tensor, order: int) -> None:
        self.way, self.ts = math.copysign(1.0, ts[-1] - ts[0]), torch.tensor([*ts, ts[-1]], dtype=torch.float64)
        self.t, self.next, self.power, self.tried = torch.full_like(first, ts[0]), first, 1 / order, 0
        self.position = torch.ones_like(first, dtype=torch.long)  # in ts, of the output that each row makes for
        self.shortest = RESOLUTION * first
        self.finite = torch.ones_like(first, dtype=torch.bool)
        self.refused = ~self.finite
        self.last_h = self.last_error = torch.full_like(first, torch.nan)  # of the step taken last; there is none yet
        self.places: list[Tensor] = []  # of the outputs found, in the order of times and rows

    @property
    def going(self) -> Tensor:
        """Which rows have not arrived at the last time."""
        return self.position < len(self.ts) - 1

    @property
    def stuck(self) -> Tensor:
        """Which rows would step by less than their time can resolve."""
        return self.going & (self.next < torch.maximum(self.shortest, RESOLUTION * self.t.abs()))

    def propose(self) -> Tensor:
        """Each row's next length; one that would leave a sliver before an output time is made to end there."""
        left = (self.ts[self.position] - self.t) * self.way
        self.arriving = self.next * 1.01 >= left
        self.h = torch.where(self.arriving, left, self.next)  # 0 for a row that has arrived
        self.tried += 1
        return self.h * self.way

    def judge(self, errors: Tensor) -> Tensor:
        """Which rows are within their tolerance after the proposed step; `next` is set for all.

        Where a row is not finite no row is: the others try again, lest zeros times infinities enter their gradients.
        """
        self.finite = errors.isfinite()
        if not self.finite.all():
            self.next = torch.where(self.finite, self.next, SHRINK * self.h)
            return torch.zeros_like(self.finite)
        ok, floored = errors <= 1.0, errors.clamp(min=1e-10)
        factor = SAFETY * floored**-self.power
        foreseen = SAFETY * self.h / self.last_h * (self.last_error / floored.square()) ** self.power
        factor = torch.where(ok, torch.fmin(factor, foreseen), factor).clamp(SHRINK, GROW)
        next_h = self.h * torch.where(ok & self.refused, factor.clamp(max=1.0), factor)
        # A step cut short by an output time does not make the next one short.
        self.next = torch.where(ok & self.arriving, torch.maximum(next_h, self.next), next_h)
        self.last_h = torch.where(ok, self.h, self.last_h)
        self.last_error = torch.where(ok, errors.clamp(min=1e-2), self.last_error)
        self.refused = ~ok
        return ok

    def advance(self, ok: Tensor) -> RowStep:
        """Take the proposed step in the rows that are ok."""
        t, h = self.t, torch.where(ok, self.h * self.way, 0.0)
        arrived = ok & self.arriving & self.going
        self.t = torch.where(arrived, self.ts[self.position], t + h)
        rows = (arrived & (self.position < len(self.ts) - 2)).nonzero().flatten()
        self.places.append((self.position[rows] - 1) * len(t) + rows)
        self.position = self.position + arrived
        return RowStep(t, h, rows, None if self.going.any() else torch.cat(self.places).argsort())
