"""Step size control: the first step's length, and that of every next one where each row has its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np  # scipy's, a dependency of its own right here too
import torch
from numpy.typing import NDArray
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._solution import SolveError, Status
from odelayers._solvers.base import Norm, Solver, fail, nonfinite_rows

__all__ = [
    "GROW",
    "SAFETY",
    "SHRINK",
    "STABILITY_LIMIT",
    "FirstGuess",
    "RowClocks",
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


def second_guess(h: Tensor, fastest: Tensor, order: int) -> Tensor:
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
        factor: how the step's length changes.
    """

    taken: Rows
    begun: Rows
    passed: Rows
    done: Rows
    failed: Rows
    factor: Rows

    def kept(self, share: float) -> Rows | None:
        """The places of the rows that go on, if a row has failed or this share of the rows is done; else None."""
        done = np.count_nonzero(self.done)
        if not self.failed.any() and (not done or done < share * len(self.done)):
            return None
        return (~(self.done | self.failed)).nonzero()[0]


class RowClocks:
    """The rows under way with a time and a step length each, on the host in float64.

    In numpy, whose small arrays cost a third of torch's. All rows try a step at once, so they have tried equally many.
    `h` is a length, `way` its sign; `reached` counts the output times `ts` that a row has behind it.
    """

    def __init__(self, ts: Sequence[float], h: Rows, order: int, max_steps: int) -> None:
        self.ts, self.t1, self.way = np.array(ts), ts[-1], math.copysign(1.0, ts[-1] - ts[0])
        self.order, self.max_steps, self.tried = order, max_steps, 0
        self.rows, self.h, self.t = np.arange(len(h)), h, np.full_like(h, ts[0])
        self.reached = np.ones(len(h), dtype=np.int64)
        self.shortest = 4 * np.finfo(np.float64).eps * abs(ts[-1] - ts[0])

    def lengths(self) -> Rows:
        """The signed lengths of the next try; the last step ends exactly at t1, rows there stand still."""
        left = (self.t1 - self.t) * self.way
        self.h = np.where(self.h * 1.01 >= left, left, self.h)
        return self.h * self.way

    def judge(self, error: Rows) -> Verdict:
        """Take the steps whose error is at most 1, and choose the lengths of the next."""
        self.tried += 1
        begun, left = self.t, (self.t1 - self.t) * self.way
        taken = (error <= 1.0) & (left > 0)
        end = np.where(self.h == left, self.t1, begun + self.h * self.way)
        self.t = np.where(taken, end, begun)
        done = self.t == self.t1
        passed = taken & ((self.ts[np.where(done, -1, self.reached)] - self.t) * self.way <= 0)
        # fmax and fmin shrink where the error is NaN
        factor = np.fmin(np.fmax(SAFETY * np.maximum(error, 1e-30) ** (-1 / self.order), SHRINK), GROW)
        self.h = self.h * factor
        if self.tried >= self.max_steps:
            failed = ~done
        else:
            failed = ((self.h < self.shortest) | (self.t + self.h * self.way == self.t)) & ~done
        return Verdict(taken, begun, passed, done, failed, factor)

    def go_on(self, keep: Rows) -> None:
        """Leave out all rows but those at the places `keep`."""
        self.rows, self.t, self.h, self.reached = (x[keep] for x in (self.rows, self.t, self.h, self.reached))
