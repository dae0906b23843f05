"""Steps of each row by itself: what one step was, and how long the next one is. On the host, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RowControl", "RowStep"]

SAFETY, SHRINK, GROW = 0.9, 0.2, 6.0


class RowStep(NamedTuple):
    """One step of every row: `(B,)` starts and lengths; 0 is the length of a row that rests or tries again.

    Attributes:
        t: the rows' times before the step.
        h: the rows' lengths, signed.
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
    """Each row's next step by Gustafsson's predictive control (Hairer and Wanner, Solving ODEs II, IV.8).

    It foresees the error's growth from the last two steps, which spares most of the rejections at the sudden turns of
    stiff solutions.
    """

    def __init__(self, h: Tensor, order: int) -> None:
        self.next, self.power = h, 1 / order
        self.refused = torch.zeros_like(h, dtype=torch.bool)
        self.last_h = self.last_error = torch.full_like(h, torch.nan)  # of the step taken last; there is none yet

    def judge(self, h: Tensor, errors: Tensor) -> Tensor:
        """Which rows are within their tolerance after steps of length h; `next` is set for all.

        Where a row is not finite no row is: the others try again, lest zeros times infinities enter their gradients.
        """
        finite = errors.isfinite()
        if not finite.all():
            self.next = torch.where(finite, self.next, SHRINK * h)
            return torch.zeros_like(finite)
        ok, floored = errors <= 1.0, errors.clamp(min=1e-10)
        factor = SAFETY * floored**-self.power
        foreseen = SAFETY * h / self.last_h * (self.last_error / floored.square()) ** self.power
        factor = torch.where(ok, torch.fmin(factor, foreseen), factor).clamp(SHRINK, GROW)
        self.next = h * torch.where(ok & self.refused, factor.clamp(max=1.0), factor)
        self.last_h = torch.where(ok, h, self.last_h)
        self.last_error = torch.where(ok, errors.clamp(min=1e-2), self.last_error)
        self.refused = ~ok
        return ok
