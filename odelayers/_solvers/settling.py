"""Solving until the field is at rest: a row that has settled is let go, and the others march on without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator, vmapped
from odelayers._solution import SolveError, Status
from odelayers._solvers.adaptive import AdaptiveRungeKutta
from odelayers._solvers.base import MarchingSolver, Norm, State, Step, Taken, fail, nonfinite_rows
from odelayers._solvers.fixed import FixedRungeKutta

__all__ = ["Settling"]


class Parting(NamedTuple):
    """Which rows took a step, and by their place among these, who stops after it and who goes on (None: all do)."""

    rows: Tensor
    stop: Tensor | None = None
    stay: Tensor | None = None


class Settling(MarchingSolver):
    """A solver for one solve, up to |f| <= tol in every row or to the end of its time; and the record of that solve.

    Its steps are the inner solver's for the rows that are left: a row that has stopped is not evaluated again and has
    no say in the step size. Its state is the whole batch's, with the stopped rows in place, followed by the inner
    solver's for the rows that are left. It adds one host read a step and, on a fixed grid, one evaluation at the end.

    After the march, `settled` `(B,)` says which rows came to rest, `ends` `(B,)` when each row stopped, and `steps`
    `(B,)` after how many steps.
    """

    settled: Tensor
    ends: Tensor
    steps: Tensor

    def __init__(self, solver: FixedRungeKutta | AdaptiveRungeKutta, tol: float) -> None:
        self.solver, self.tol = solver, tol
        self._partings: list[Parting] = []  # at the start, and after every step

    def start(self, f: Evaluator, t0: float, z0: Tensor, driver: Driver) -> State:
        return _after(z0, self.solver.start(f, t0, z0, driver), self._partings[0])

    def again(self, f: Evaluator, step: Step, before: State, driver: Driver) -> tuple[State, list[Tensor]]:
        now = self._partings[step.number]
        after, _ = self.solver.again(_Part(f, now.rows), step, before[1:], driver.take(now.rows))
        after = _after(before[0], after, now)
        return after, [after[0]] if step.outputs else []

    def march(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm) -> Iterator[Taken]:
        if vmapped(z0):
            raise RuntimeError(
                "Equilibrium under torch.func.vmap: whether a row is at rest is read on the host, which vmap forbids; "
                "hand the rows over as one batch, or give a number as t1"
            )
        t, solver = ts[0], self.solver
        self._grid = solver.grid(ts) if isinstance(solver, FixedRungeKutta) else []
        part = _Part(f, torch.arange(len(z0), device=z0.device))
        self.settled, self.ends = torch.zeros_like(part.rows, dtype=torch.bool), z0.new_full((len(z0),), ts[-1])
        self.steps = torch.zeros_like(part.rows)
        state = solver.start(part, t, z0, driver)
        now = self._parting(part, t, state[0], solver.rate(part, t, state, driver), driver)
        whole, *left = _after(z0, state, now)
        while len(left[0]):
            part, clock = part.without(now, left[0]), driver.take(part.rows)
            for taken in self._steps(solver, part, tuple(left), (t, ts[-1]), clock, norm):
                last = bool(taken.step.outputs)
                t = ts[-1] if last else taken.step.t + taken.step.h
                rate = solver.rate(part, t, taken.after, clock)
                now = self._parting(part, t, taken.after[0], rate, clock, last)
                before, (whole, *left) = (whole, *taken.before), _after(whole, taken.after, now)
                done = not len(left[0])
                step = taken.step._replace(number=len(self._partings) - 1, outputs=(1.0,) if done else ())
                yield Taken(step, before, (whole, *left), [whole] if done else [], taken.rejected)
                if now.stay is not None:
                    solver = solver.resumed(taken) if isinstance(solver, AdaptiveRungeKutta) else solver
                    break

    def _steps(
        self,
        solver: FixedRungeKutta | AdaptiveRungeKutta,
        part: _Part,
        before: State,
        ts: Sequence[float],
        driver: Driver,
        norm: Norm,
    ) -> Iterator[Taken]:
        """The steps that are left, for a part of the batch; rows that fail in it are named as those of the whole."""
        if isinstance(solver, FixedRungeKutta):
            for step in self._grid[len(self._partings) - 1 :]:
                after, outputs = solver.again(part, step, before, driver)
                yield Taken(step, before, after, outputs, 0)
                before = after
            return
        try:
            yield from solver.march(part, before[0], ts, driver, norm)
        except SolveError as error:
            rows = tuple(part.rows[list(error.rows)].tolist())
            note = f"{error.note}, counted since rows last came to rest" if solver is not self.solver else error.note
            where = f"{part.field.name} solved by {self.solver!r}"
            raise SolveError(where, rows, error.t, error.status, note) from error

    @torch.no_grad()
    def _parting(self, part: _Part, t: float, z: Tensor, rate: Tensor, driver: Driver, last: bool = False) -> Parting:
        """Note who is at rest after a step, or at the start, and let them go; at the end of the time, let all go."""
        part.known = z, rate
        now, start = Parting(part.rows), not self._partings
        speed = part.field.speed(rate)
        if start or last or not bool((speed > self.tol).all()):  # one host read a step; NaN is looked at too
            lost = nonfinite_rows(z) | nonfinite_rows(rate) if start else nonfinite_rows(z)
            if lost.any():
                whole = torch.zeros_like(self.settled).index_copy(0, part.rows, lost)
                raise fail(self.solver, part, whole, t, driver, Status.NONFINITE if start else Status.BLOW_UP)
            rest = speed <= self.tol
            stops = torch.ones_like(rest) if last else rest
            stop = stops.nonzero().flatten()
            if len(stop):
                now = Parting(part.rows, stop, (~stops).nonzero().flatten())
                self.settled[part.rows] = rest
                self.ends[part.rows[stop]] = t
                self.steps[part.rows[stop]] = len(self._partings)
        self._partings.append(now)
        return now


class _Part(Evaluator):
    """The field for these rows of the batch alone, counted as the whole's; a value known already is not found again."""

    def __init__(self, whole: Evaluator, rows: Tensor) -> None:
        field = whole.field if len(rows) == whole.batch else whole.field.take(rows, whole.batch)
        super().__init__(field, len(rows), whole.half, whole.on_call)
        self.whole, self.rows, self.inspect = whole, rows, whole.inspect
        self.known: tuple[Tensor, Tensor] | None = None

    def without(self, now: Parting, z: Tensor) -> _Part:
        """The part that is left after a parting, whose states are z."""
        if now.stay is None or self.known is None:
            return self
        part = _Part(self.whole, self.rows[now.stay])
        part.known = z, self.known[1][now.stay]
        return part

    def __call__(self, t: Tensor | float, z: Tensor) -> Tensor:
        # The time is not compared: `known` is noted at the end of a step, and only the step from there starts at its z.
        if self.known is not None and z is self.known[0]:
            return self.known[1]
        self.nfe = self.whole.nfe
        value = super().__call__(t, z)
        self.whole.nfe = self.nfe
        return value


def _after(whole: Tensor, left: State, now: Parting) -> State:
    """The state after a parting: those who stop are put into the whole batch, the solver keeps those who stay."""
    if now.stop is None or now.stay is None:
        return whole, *left
    whole = whole.index_copy(0, now.rows[now.stop], left[0][now.stop])
    # What a solver carries has the rows as its first axis, or is flat, row after row.
    n = len(now.rows)
    return whole, *(torch.unflatten(x, 0, (n, -1))[now.stay].flatten(0, 1) for x in left)
