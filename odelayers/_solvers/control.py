"""Step size control: the first step's length, and that of every next one where each row has its own."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
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
    "Verdict",
    "first_guess",
    "nonfinite_start",
    "second_guess",
]

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
    """What a try came to, row by row: taken or not, from when; at its end, failed; how the length changes."""

    taken: Tensor
    begun: Tensor
    done: Tensor
    failed: Tensor
    factor: Tensor

    def kept(self, share: float) -> Tensor | None:
        """The places of the rows that go on, if a row has failed or this share of the rows is done; else None."""
        gone = self.done | self.failed
        if not self.failed.any() and int(gone.sum()) < share * len(gone):
            return None
        return (~gone).nonzero().flatten()


class RowClocks:
    """The rows under way with a time and a step length each, on the host in float64.

    All of them try a step at once, so they have tried equally many. `h` is a length: `way` is its sign.
    """

    def __init__(self, t0: float, t1: float, h: Tensor, order: int, max_steps: int) -> None:
        self.t1, self.way, self.order, self.max_steps = t1, math.copysign(1.0, t1 - t0), order, max_steps
        self.rows, self.h, self.t = torch.arange(len(h), device=h.device), h, torch.full_like(h, t0)
        self.shortest = 4 * torch.finfo(h.dtype).eps * abs(t1 - t0)
        self.tried = 0

    def lengths(self) -> Tensor:
        """The signed lengths of the next try; the last step ends exactly at t1, rows there stand still."""
        left = (self.t1 - self.t) * self.way
        self.h = torch.where(self.h * 1.01 >= left, left, self.h)
        return self.h * self.way

    def judge(self, error: Tensor) -> Verdict:
        """Take the steps whose error is at most 1, and choose the lengths of the next."""
        self.tried += 1
        begun, left = self.t, (self.t1 - self.t) * self.way
        taken = (error <= 1.0) & (left > 0)
        end = torch.where(self.h == left, self.t1, begun + self.h * self.way)
        factor = (SAFETY * error.pow(-1 / self.order)).nan_to_num(nan=SHRINK).clamp(SHRINK, GROW)
        self.t, self.h = torch.where(taken, end, begun), self.h * factor
        done = self.t == self.t1
        spent = (self.h < self.shortest) | (self.t + self.h * self.way == self.t)
        failed = ~done if self.tried >= self.max_steps else spent & ~done
        return Verdict(taken, begun, done, failed, factor)

    def go_on(self, keep: Tensor) -> None:
        """Leave out all rows but those at the places `keep`."""
        self.rows, self.t, self.h = self.rows[keep], self.t[keep], self.h[keep]
