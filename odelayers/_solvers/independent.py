"""Adaptive steps of its own for every row of a batch: a hard row costs only itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._solvers.base import MarchingSolver, Norm, Path, State, Taken, row_rms
from odelayers._solvers.control import RowClocks, Rows, first_guess, nonfinite_start, second_guess
from odelayers._solvers.rows import (
    Failed,
    Part,
    RowStep,
    RowTrace,
    Try,
    column,
    failed_rows,
    failure,
    host,
    on,
    passed,
    pick,
)
from odelayers._solvers.stages import Stages, stages_like

if TYPE_CHECKING:
    from odelayers._solvers.adaptive import AdaptiveRungeKutta

__all__ = ["Independent"]

DONE = 1 / 4  # from this share of rows at their end on, leaving them out pays for the indexing


@dataclass(frozen=True)
class Independent(MarchingSolver):
    """The march of an embedded pair in which each row has its own time, step, error and end.

    All rows under way try a step at once; it is taken by those whose error allows it. Reading the errors is a step's
    one host read: times and lengths are kept on the host. Rows at their end are left out of the batch when they are a
    quarter of it, rows that fail at once; the error is raised when all the others have come to their end.
    """

    pair: AdaptiveRungeKutta

    def start(self, f: Evaluator, t0: float, z0: Tensor, driver: Driver) -> State:
        return z0, driver.terms(f, z0.new_full((len(z0),), t0), z0)[0]

    def march(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm) -> Iterator[Taken]:
        pair, failures = self.pair, list[Failed]()
        pair.refuse_vmap(z0)
        tolerances, share = pair.tolerances(f, z0), 0 if torch.is_grad_enabled() else DONE
        state = self.start(f, ts[0], z0, driver)
        h = self._first_steps(f, state, ts[0], ts[-1], driver, norm, *tolerances)
        clocks = RowClocks(ts, h, pair.tableau.order, pair.max_steps)
        part, stages = Part(f, driver, clocks.rows, z0), stages_like(pair.tableau, z0)
        while len(clocks.rows):
            h = clocks.lengths()
            grid = self._grid(clocks.t, h, z0)
            attempt = self._attempt(part, state, grid, stages)
            error = self._errors(attempt, state[0], norm, *tolerances)
            verdict = clocks.judge(error)
            if verdict.failed.any():
                failures += failed_rows(state, attempt, error, clocks, verdict)
            keep = verdict.kept(share)
            at = verdict.taken.nonzero()[0]
            if len(at):
                among = None if len(at) == len(clocks.rows) else at
                outputs = passed(pair.tableau, clocks, verdict, f.batch)
                step = RowStep(clocks.tried, clocks.rows[at], among, verdict.begun[at], h[at], keep, outputs)
                after, found = self._take(f, step, state, driver, attempt, verdict.taken)
                yield Taken(step, state, after, found, 0)
                state = after
            else:
                state = pick(state, keep)
            if keep is not None:
                clocks.go_on(keep)
                part, stages = Part(f, driver, clocks.rows, z0), stages_like(pair.tableau, state[0])
        if failures:
            raise failure(pair, f, z0, failures, driver)

    def again(self, f: Evaluator, step: Any, before: State, driver: Driver) -> tuple[State, list[Tensor]]:
        rows = pick(before, step.among)
        grid = self._grid(step.t, step.h, rows[0])
        stages = stages_like(self.pair.tableau, rows[0])
        attempt = self._attempt(Part(f, driver, step.rows, rows[0]), rows, grid, stages)
        after: State = (attempt.z, attempt.k)
        if step.among is not None:
            at = on(after[0], step.among)
            after = tuple(x.index_copy(0, at, y) for x, y in zip(before, after, strict=True))
        outputs = [] if step.outputs is None else [step.outputs.read(rows[0], attempt, step.among)]
        return pick(after, step.keep), outputs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def integrate(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm = row_rms) -> Path:
        return super().integrate(f, z0, ts, driver, norm)

    def trace(self, z0: Tensor) -> RowTrace:
        return RowTrace(z0)

    def spread(self, gradient: Tensor, steps: Sequence[Any]) -> list[list[Tensor]]:
        flat = gradient[1:].flatten(0, 1)
        return [[] if s.outputs is None else [flat.index_select(0, on(flat, s.outputs.places))] for s in steps]

    def _grid(self, t: Rows, h: Rows, like: Tensor) -> Tensor:
        """The times of the stages and the signed lengths, in the state's dtype and on its device."""
        c = np.array(self.pair.tableau.c)
        grid = np.empty((len(c) + 1, len(t)))
        np.multiply.outer(c, h, out=grid[:-1])
        grid[:-1] += t
        grid[-1] = h
        return torch.from_numpy(grid).to(like.device, like.dtype)

    def _attempt(self, part: Part, before: State, grid: Tensor, stages: Stages) -> Try:
        """One step of each row; stages are scaled by the rows' lengths, so they combine as those of one length do."""
        z, k = before
        at = last = z
        *s, h = grid.unbind(0)
        h = column(h, z.ndim)
        stages.begin(z)
        stages.put(0, k * h)
        for i in range(1, len(s)):
            last, at = at, stages.advance(i, 1.0)
            k = part.rate(s[i], at)
            stages.put(i, k * h)
        return Try(at, k, stages, last)

    @torch.no_grad()
    def _errors(self, attempt: Try, z: Tensor, norm: Norm, rtol: float, atol: float) -> Rows:
        """The scaled errors of the rows, on the host."""
        error = attempt.stages.error(1 / rtol)
        error = norm(error.div_(torch.maximum(z.abs(), attempt.z.abs()).add_(atol / rtol)))
        return host(error)

    def _take(
        self, f: Evaluator, step: RowStep, before: State, driver: Driver, attempt: Try, taken: Rows
    ) -> tuple[State, list[Tensor]]:
        """The state after the step and its outputs, from the try of all rows under way."""
        after: State = (attempt.z, attempt.k)
        if step.among is not None:
            if torch.is_grad_enabled():
                # Zero times what is infinite in a rejected try would be NaN in the gradient of every parameter: the
                # rows that take the step take it again by themselves, and the try of all leaves no graph.
                return self.again(f, step, before, driver)
            mask = column(on(before[0], taken), before[0].ndim)
            after = tuple(torch.where(mask, x, y) for x, y in zip(after, before, strict=True))
        outputs = [] if step.outputs is None else [step.outputs.read(before[0], attempt)]
        return pick(after, step.keep), outputs

    @torch.no_grad()
    def _first_steps(
        self,
        f: Evaluator,
        before: State,
        t0: float,
        t1: float,
        driver: Driver,
        norm: Norm,
        rtol: float,
        atol: float,
    ) -> Rows:
        """The given first step, or Hairer's choice for each row; on the host."""
        z, k = before
        guess, span, way = first_guess(z, k, norm, rtol, atol), abs(t1 - t0), math.copysign(1.0, t1 - t0)
        if not bool((guess.h.isfinite() & guess.speed.isfinite()).all()):
            raise nonfinite_start(self.pair, f, z, k, guess, t0, driver)
        if self.pair.first_step is not None:
            return np.full(len(z), min(self.pair.first_step, span))
        h = guess.h.clamp(max=span)
        there = driver.terms(f, t0 + way * h, z + column(way * h, z.ndim) * k)[0]
        fastest = torch.maximum(guess.speed, norm((there - k) / guess.scale) / h)
        first = second_guess(h.cpu().double(), fastest.cpu().double(), self.pair.tableau.order).clamp(max=span)
        return host(first)
