"""Steps of rows that each have their own time and length: what such a step is, its outputs, and how rows fail."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from odelayers._driver import Driver, against
from odelayers._evaluator import Evaluator, traced
from odelayers._field import as_rows
from odelayers._solution import SolveError, Status
from odelayers._solvers.base import Norm, Solver, State, fail
from odelayers._solvers.control import (
    LATELY,
    STABILITY_LIMIT,
    RowControl,
    Rows,
    Verdict,
    first_guess,
    nonfinite_start,
    second_guess,
)
from odelayers._solvers.stages import Stages

if TYPE_CHECKING:
    from odelayers._solvers.adaptive import Adaptive

__all__ = [
    "Failed",
    "Outputs",
    "Part",
    "RowStep",
    "failed_rows",
    "failure",
    "first_steps",
    "grid",
    "host",
    "on",
    "pass_outputs",
    "pick",
]


def on(like: Tensor, x: Rows) -> Tensor:
    """An array of the host as a tensor on the state's device."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(like.device)


def host(x: Tensor) -> Rows:
    """A tensor's values on the host, in float64; under a transform too, which hides its storage."""
    return np.array(x.tolist()) if traced() else x.cpu().double().numpy()


def pick(state: State, places: Rows | None) -> State:
    """These rows of a state; None: all of them."""
    if places is None:
        return state
    at = on(state[0], places)
    return tuple(x.index_select(0, at) for x in state)


def grid(c: Sequence[float], t: Rows, h: Rows, like: Tensor) -> Tensor:
    """The times of the stages and the signed lengths, in the state's dtype and on its device."""
    found = np.empty((len(c) + 1, len(t)))
    np.multiply.outer(c, h, out=found[:-1])
    found[:-1] += t
    found[-1] = h
    return torch.from_numpy(found).to(like.device, like.dtype)


@torch.no_grad()
def first_steps(
    solver: Adaptive,
    f: Evaluator,
    before: State,
    ts: Sequence[float],
    driver: Driver,
    norm: Norm,
    tolerances: tuple[float, float],
) -> Rows:
    """The given first step, or Hairer's choice for each row, from its state and slope; on the host."""
    z, k = before
    guess, span, way = first_guess(z, k, norm, *tolerances), abs(ts[-1] - ts[0]), math.copysign(1.0, ts[-1] - ts[0])
    if not bool((guess.h.isfinite() & guess.speed.isfinite()).all()):
        raise nonfinite_start(solver, f, z, k, guess, ts[0], driver)
    if solver.first_step is not None:
        return np.full(len(z), min(solver.first_step, span))
    h = guess.h.clamp(max=span)
    there = driver.terms(f, ts[0] + way * h, z + against(way * h, z.ndim) * k)[0]
    fastest = torch.maximum(guess.speed, norm((there - k) / guess.scale) / h)
    return host(second_guess(h.cpu().double(), fastest.cpu().double(), solver.order).clamp(max=span))


class Part:
    """Field and driver for some rows of the batch; evaluations count as the whole batch's.

    `stages` are the buffers, if any, that the tries of these rows share.
    """

    stages: Stages | None = None

    def __init__(self, f: Evaluator, driver: Driver, rows: Rows, like: Tensor) -> None:
        self.whole, self.f, self.driver = f, f, driver
        if len(rows) < f.batch:
            at = on(like, rows)
            self.f, self.driver = f.take(at), driver.take(at)

    @contextmanager
    def evaluating(self, z: Tensor) -> Iterator[tuple[Evaluator, Driver]]:
        """Field and driver for an evaluation at z; what goes wrong for a part of the batch is explained."""
        self.f.nfe = self.whole.nfe
        try:
            yield self.f, self.driver
        except (RuntimeError, ValueError) as error:
            if self.f is not self.whole:
                error.add_note(self._note(z))
            raise
        self.whole.nfe = self.f.nfe

    def rate(self, s: Tensor, z: Tensor) -> Tensor:
        """dz/ds of these rows at their own times s."""
        with self.evaluating(z) as (f, driver):
            k = driver.terms(f, s, z)[0]
        if k.shape != z.shape:
            raise ValueError(f"field {self.f.field.name}: got dz/dt of shape {tuple(k.shape)}; {self._note(z)}")
        return k

    def _note(self, z: Tensor) -> str:
        return (
            f"each steps by itself: {len(z)} of {self.whole.batch} rows are under way, a state of shape "
            f"{tuple(z.shape)}; pass what the field holds for each row as context=, which is picked with the rows"
        )


class Outputs(NamedTuple):
    """The outputs of a step: their places among the solve's, first those at its end, then those on the way.

    `ends` and `inner` are the places, in the state before it, of the rows that have them, `theta` the fractions of
    the step at which those on the way lie.
    """

    places: Rows
    ends: Rows
    inner: Rows
    theta: Rows

    def of(self, among: Rows | None) -> Outputs:
        """The same with places among these rows alone; None: among all."""
        if among is None:
            return self
        return self._replace(ends=among.searchsorted(self.ends), inner=among.searchsorted(self.inner))


class RowStep(NamedTuple):
    """A step of some rows, each with its own time and length.

    Attributes:
        tried: steps tried so far by each row under way.
        rows: the rows of the batch that take it.
        among: the places of those that try it in the state before it; None: all of its rows.
        t, h: the times of these at its start and their signed lengths; one of length 0 stays where it is.
        keep: the places of the rows of the state that go on after it; None: all of them.
        outputs: its outputs, None where it has none.
    """

    tried: int
    rows: Rows
    among: Rows | None
    t: Rows
    h: Rows
    keep: Rows | None
    outputs: Outputs | None


def pass_outputs(control: RowControl, verdict: Verdict, batch: int) -> Outputs | None:
    """Move the rows of a step past the output times that it passes or ends at; gives these outputs, None for none."""
    if not verdict.passed.any():
        return None
    at, ts, way = verdict.passed.nonzero()[0], control.ts, control.way
    first, beyond = control.reached[at], (ts * way).searchsorted(control.t[at] * way, side="right")
    control.reached[at] = beyond
    who, count = at.repeat(beyond - first), beyond - first
    which = first.repeat(count) + np.arange(len(who)) - (count.cumsum() - count).repeat(count)
    inside = ts[which] != control.t[who]
    order = inside.argsort(kind="stable")
    who, which, ends = who[order], which[order], len(who) - np.count_nonzero(inside)
    inner, begun = who[ends:], verdict.begun[who[ends:]]
    theta = (ts[which[ends:]] - begun) / (control.t[inner] - begun)
    return Outputs((which - 1) * batch + control.rows[who], who[:ends], inner, theta)


class Failed(NamedTuple):
    """A row that failed: its time, its cause, the steps it tried and the length of the last."""

    row: int
    t: float
    status: int
    tried: int
    h: float


@torch.no_grad()
def failed_rows(before: State, error: Rows, control: RowControl, at: Rows, reach: Tensor | None = None) -> list[Failed]:
    """The rows `at` that failed in a try from a state and its slope, each with its cause."""
    rows, t, h = on(before[0], at), control.t[at], control.h[at]
    z, k = (as_rows(x)[rows].cpu().double() for x in before)
    small = z.norm(dim=1) < 1e-6 * torch.from_numpy(np.maximum(abs(t), 1e-6)) * k.norm(dim=1)
    runaway = small & ((z * k).sum(dim=1) * control.way > 0)
    spent = Status.MAX_STEPS if control.tried >= control.max_steps else Status.STEP_UNDERFLOW
    status = np.full(len(at), int(spent))
    status[control.tried - control.overflowed[at] < LATELY] = Status.BLOW_UP
    if reach is not None:
        status[(reach.isfinite() & (reach > STABILITY_LIMIT)).numpy()] = Status.STIFF
    status[runaway.numpy() | ~np.isfinite(error[at])] = Status.BLOW_UP
    lists = [x.tolist() for x in (control.rows[at], t, status, h)]
    return [Failed(row, t, status, control.tried, h) for row, t, status, h in zip(*lists, strict=True)]


def failure(solver: Solver, f: Evaluator, z0: Tensor, failures: Sequence[Failed], driver: Driver) -> SolveError:
    """The error for the rows that failed for the reason of the first; others fail again when solved without them."""
    first = failures[0]
    s = np.full(len(z0), np.nan)
    for x in failures:
        if x.status == first.status:
            s[x.row] = x.t
    note = f"after {first.tried} steps tried, the last of length {first.h:.3g}"
    return fail(solver, f, on(z0, np.isfinite(s)), on(z0, s), driver, Status(first.status), note)
