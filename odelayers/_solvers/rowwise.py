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
        rows: the rows that pass an output time, one entry for each time passed.
        theta: the fraction of its step at which each of these lies.
        order: at the last step, the place among all outputs found of each output in the order of times and rows.
    """

    t: Tensor
    h: Tensor
    rows: Tensor
    theta: Tensor
    order: Tensor | None


class RowControl:
    """Where each row is on its way through ts, and its next step by Gustafsson's predictive control.

    The control foresees the error's growth from the last two steps, which spares most of the rejections at the sudden
    turns of stiff solutions. Source: Hairer and Wanner, Solving ODEs II, IV.8.
    """

    def __init__(self, ts: Sequence[float], first: Tensor, order: int) -> None:
        self.end, self.way = ts[-1], math.copysign(1.0, ts[-1] - ts[0])
        self.outputs = torch.tensor(ts[1:-1], dtype=torch.float64).unsqueeze(1)
        self.t, self.next, self.power, self.tried = torch.full_like(first, ts[0]), first, 1 / order, 0
        self.shortest = RESOLUTION * first
        self.finite = torch.ones_like(first, dtype=torch.bool)
        self.refused = ~self.finite
        self.last_h = self.last_error = torch.full_like(first, torch.nan)  # of the step taken last; there is none yet
        self.places = [torch.empty(0, dtype=torch.long)]  # of the outputs found, in the order of times and rows

    @property
    def left(self) -> Tensor:
        """The time that each row has before it."""
        return (self.end - self.t) * self.way

    @property
    def stuck(self) -> Tensor:
        """Which rows would step by less than their time can resolve."""
        return (self.left > 0) & (self.next < torch.maximum(self.shortest, RESOLUTION * self.t.abs()))

    def propose(self) -> Tensor:
        """Each row's next length; one that would leave a sliver is stretched or clipped to end exactly at the end."""
        self.arriving = self.next * 1.01 >= self.left
        self.h = torch.where(self.arriving, self.left, self.next)  # 0 for a row that has arrived
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
        self.next = self.h * torch.where(ok & self.refused, factor.clamp(max=1.0), factor)
        self.last_h = torch.where(ok, self.h, self.last_h)
        self.last_error = torch.where(ok, errors.clamp(min=1e-2), self.last_error)
        self.refused = ~ok
        return ok

    def advance(self, ok: Tensor) -> RowStep:
        """Take the proposed step in the rows that are ok."""
        t, h = self.t, torch.where(ok, self.h * self.way, 0.0)
        self.t = torch.where(ok & self.arriving, self.end, t + h)
        passed = ((self.outputs - t) * self.way > 0) & ((self.outputs - self.t) * self.way <= 0)
        k, rows = passed.nonzero(as_tuple=True)
        self.places.append(k * len(t) + rows)
        theta = (self.outputs[k, 0] - t[rows]) / (self.t - t)[rows]
        return RowStep(t, h, rows, theta, None if (self.left > 0).any() else torch.cat(self.places).argsort())
