"""Step size control: the first step's length, and that of every next one where each row has its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np  # which scipy requires, so that it is there
import torch
from numpy.typing import NDArray
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._solution import SolveError, Status
from odelayers._solvers.base import Norm, Solver, fail, nonfinite_rows

__all__ = [
    "GROW",
    "LATELY",
    "SAFETY",
    "SHRINK",
    "STABILITY_LIMIT",
    "FirstGuess",
    "PredictiveRowControl",
    "RowControl",
    "Rows",
    "Verdict",
    "first_guess",
    "nonfinite_start",
    "second_guess",
]

Rows = NDArray[Any]  # one number for each row under way, on the host

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
# Beyond |h lambda| of about 3.3 an explicit method of order five is unstable (Hairer and Wanner, IV.2).
STABILITY_LIMIT = 2.5
LATELY = 10  # tries: a row that fails within so many of one that was not finite fails for that
RESOLUTION = 4 * np.finfo(np.float64).eps  # of a row's time; no step is shorter


class FirstGuess(NamedTuple):
    """A length for a trial step of each row `(B,)`, the rows' speeds `(B,)`, and the scale of their errors."""

    h: Tensor
    speed: Tensor
    scale: Tensor


def first_guess(z: Tensor, k: Tensor, norm: Norm, rtol: float, atol: float) -> FirstGuess:
    """Hairer's h0 for each row from its state and slope (Solving ODEs I, II.4)."""
    scale = z.abs().mul_(rtol).add_(atol)
    size, speed = norm(z / scale), norm(k / scale)
    return FirstGuess(torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed), speed, scale)


def second_guess(h: Tensor, fastest: Tensor, order: float) -> Tensor:
    """Hairer's first step from the trial step h and the larger of speed and bend; h where that is not finite."""
    still = fastest <= 1e-15
    guess = torch.where(still, (h * 1e-3).clamp(min=1e-6), (0.01 / fastest.clamp(min=1e-15)) ** (1 / order))
    return torch.where(fastest.isfinite(), torch.minimum(100 * h, guess), h)


def nonfinite_start(
    solver: Solver, f: Evaluator, z: Tensor, k: Tensor, guess: FirstGuess, t0: float, driver: Driver
) -> SolveError:
    """The error for the rows whose state, slope or their scaled sizes are not finite at the start."""
    bad = nonfinite_rows(z) | nonfinite_rows(k)
    status = Status.NONFINITE if bad.any() else Status.BLOW_UP
    return fail(solver, f, bad | ~guess.speed.isfinite() | ~guess.h.isfinite(), t0, driver, status)


class Verdict(NamedTuple):
    """What a try came to, row by row.

    Attributes:
        taken: whether the step was taken.
        begun: the time it was tried from.
        passed: whether it passes an output time, or ends at one.
        done: whether the row is at its end.
        failed: whether it can go no further.
    """

    taken: Rows
    begun: Rows
    passed: Rows
    done: Rows
    failed: Rows

    def kept(self, share: float) -> Rows | None:
        """The places of the rows that go on, if a row has failed or this share of the rows is done; else None."""
        done = np.count_nonzero(self.done)
        if not self.failed.any() and (not done or done < share * len(self.done)):
            return None
        return (~(self.done | self.failed)).nonzero()[0]


class RowControl:
    """The rows under way with a time and a step length each, on the host in float64, under an elementary control.

    In numpy, whose small arrays cost a third of torch's. All rows try a step at once, so they have tried equally many.
    `h` is the length of the last try and `next` that of the next, `way` their sign; `reached` counts the output times
    `ts` that a row has behind it, `overflowed` is the number of its last try that was not finite.
    """

    grow: ClassVar[float] = GROW
    per_row: ClassVar[tuple[str, ...]] = ("rows", "t", "next", "reached", "shortest", "overflowed")

    def __init__(self, ts: Sequence[float], first: Rows, order: float, max_steps: int) -> None:
        self.ts, self.t1, self.way = np.array(ts), ts[-1], math.copysign(1.0, ts[-1] - ts[0])
        self.power, self.max_steps, self.tried = 1 / order, max_steps, 0
        self.rows, self.t, self.next = np.arange(len(first)), np.full_like(first, ts[0]), first
        self.reached, self.shortest = np.ones(len(first), dtype=np.int64), RESOLUTION * first
        self.overflowed = np.full_like(self.reached, -LATELY)

    @property
    def goal(self) -> Rows | float:
        """The times that no step may pass."""
        return self.t1

    def lengths(self) -> Rows:
        """The signed lengths of the next try; the last step ends exactly at the goal, rows at their end stand still."""
        left = (self.goal - self.t) * self.way
        self.arriving = self.next * 1.01 >= left  # a step that would leave a sliver is stretched
        self.h = np.where(self.arriving, left, self.next)
        return self.h * self.way

    def judge(self, error: Rows) -> Verdict:
        """Take the steps whose error is at most 1, and choose the lengths of the next."""
        self.tried += 1
        self.overflowed = np.where(np.isfinite(error), self.overflowed, self.tried)
        begun, taken = self.t, self._choose(error)
        end = np.where(self.arriving, self.goal, begun + self.h * self.way)
        self.t = np.where(taken, end, begun)
        done = self.t == self.t1
        passed = taken & ((self.ts[np.where(done, -1, self.reached)] - self.t) * self.way <= 0)
        stuck = self.next < np.maximum(self.shortest, RESOLUTION * abs(self.t))
        return Verdict(taken, begun, passed, done, (stuck | (self.tried >= self.max_steps)) & ~done)

    def _choose(self, error: Rows) -> Rows:
        """Set the length of every row's next try; gives the rows that take the step."""
        # fmax and fmin shrink where the error is NaN
        factor = np.fmin(np.fmax(SAFETY * np.maximum(error, 1e-30) ** -self.power, SHRINK), self.grow)
        self.next = self.h * factor
        return (error <= 1.0) & (self.h > 0)

    def go_on(self, keep: Rows) -> None:
        """Leave out all rows but those at the places `keep`."""
        for name in self.per_row:
            setattr(self, name, getattr(self, name)[keep])


class PredictiveRowControl(RowControl):
    """Gustafsson's predictive control of steps that end at every output time.

    It foresees the error's growth from the last two steps, which spares most of the rejections at the sudden turns of
    stiff solutions. Source: Hairer and Wanner, Solving ODEs II, IV.8.
    """

    grow = 6.0
    per_row = (*RowControl.per_row, "refused", "last_h", "last_error")

    def __init__(self, ts: Sequence[float], first: Rows, order: float, max_steps: int) -> None:
        super().__init__(ts, first, order, max_steps)
        self.refused = np.zeros(len(first), dtype=bool)
        self.last_h = self.last_error = np.full_like(first, np.nan)  # of the step taken last; there is none yet

    @property
    def goal(self) -> Rows:
        return self.ts[np.minimum(self.reached, len(self.ts) - 1)]

    def _choose(self, error: Rows) -> Rows:
        taken, floored = (error <= 1.0) & (self.h > 0), np.maximum(error, 1e-10)
        factor = SAFETY * floored**-self.power
        foreseen = SAFETY * self.h / self.last_h * (self.last_error / floored / floored) ** self.power
        # fmax and fmin shrink where the error is NaN
        factor = np.fmin(np.fmax(np.where(taken, np.fmin(factor, foreseen), factor), SHRINK), self.grow)
        following = self.h * np.where(taken & self.refused, np.minimum(factor, 1.0), factor)
        # A step cut short by an output time does not make the next one short.
        self.next = np.where(taken & self.arriving, np.maximum(following, self.next), following)
        self.last_h = np.where(taken, self.h, self.last_h)
        self.last_error = np.where(taken, np.maximum(error, 1e-2), self.last_error)
        self.refused = ~taken
        return taken
