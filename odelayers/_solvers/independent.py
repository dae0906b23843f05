"""Adaptive steps of its own for every row of a batch: a hard row costs only itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from odelayers._driver import Driver, against
from odelayers._evaluator import Evaluator
from odelayers._solvers.base import Norm, Path, State, Taken, row_rms
from odelayers._solvers.control import RowControl, Rows
from odelayers._solvers.rows import (
    Failed,
    Part,
    RowMarch,
    RowStep,
    RowTry,
    failed_rows,
    failure,
    first_steps,
    grid,
    h_lambda,
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
class Independent(RowMarch):
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
        first = first_steps(pair, f, state, ts, driver, norm, tolerances)
        control = RowControl(ts, first, pair.tableau.order, pair.max_steps)
        part, stages = Part(f, driver, control.rows, z0), stages_like(pair.tableau, z0)
        while len(control.rows):
            h = control.lengths()
            attempt = self._attempt(part, state, grid(pair.tableau.c, control.t, h, z0), stages)
            error = self._errors(attempt, state[0], norm, *tolerances)
            verdict = control.judge(error)
            if verdict.failed.any():
                at = verdict.failed.nonzero()[0]
                failures += failed_rows(state, error, control, at, h_lambda(attempt, control, at))
            keep = verdict.kept(share)
            at = verdict.taken.nonzero()[0]
            if len(at):
                among = None if len(at) == len(control.rows) else at
                outputs = passed(control, verdict, f.batch)
                step = RowStep(control.tried, control.rows[at], among, verdict.begun[at], h[at], keep, outputs)
                after, found = self._take(f, step, state, driver, attempt, verdict.taken)
                yield Taken(step, state, after, found, 0)
                state = after
            else:
                state = pick(state, keep)
            if keep is not None:
                control.go_on(keep)
                part, stages = Part(f, driver, control.rows, z0), stages_like(pair.tableau, state[0])
        if failures:
            raise failure(pair, f, z0, failures, driver)

    def again(self, f: Evaluator, step: Any, before: State, driver: Driver) -> tuple[State, list[Tensor]]:
        rows = pick(before, step.among)
        tableau, part = self.pair.tableau, Part(f, driver, step.rows, rows[0])
        attempt = self._attempt(part, rows, grid(tableau.c, step.t, step.h, rows[0]), stages_like(tableau, rows[0]))
        after: State = (attempt.z, attempt.k)
        if step.among is not None:
            at = on(after[0], step.among)
            after = tuple(x.index_copy(0, at, y) for x, y in zip(before, after, strict=True))
        outputs = [] if step.outputs is None else [step.outputs.read(rows[0], attempt, tableau, step.among)]
        return pick(after, step.keep), outputs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def integrate(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm = row_rms) -> Path:
        return super().integrate(f, z0, ts, driver, norm)

    def _attempt(self, part: Part, before: State, times: Tensor, stages: Stages) -> RowTry:
        """One step of each row; stages are scaled by the rows' lengths, so they combine as those of one length do."""
        z, k = before
        at = last = z
        *s, h = times.unbind(0)
        h = against(h, z.ndim)
        stages.begin(z)
        stages.put(0, k * h)
        for i in range(1, len(s)):
            last, at = at, stages.advance(i, 1.0)
            k = part.rate(s[i], at)
            stages.put(i, k * h)
        return RowTry(at, k, stages, last)

    @torch.no_grad()
    def _errors(self, attempt: RowTry, z: Tensor, norm: Norm, rtol: float, atol: float) -> Rows:
        """The scaled errors of the rows, on the host."""
        error = attempt.stages.error(1 / rtol)
        error = norm(error.div_(torch.maximum(z.abs(), attempt.z.abs()).add_(atol / rtol)))
        return host(error)

    def _take(
        self, f: Evaluator, step: RowStep, before: State, driver: Driver, attempt: RowTry, taken: Rows
    ) -> tuple[State, list[Tensor]]:
        """The state after the step and its outputs, from the try of all rows under way."""
        after: State = (attempt.z, attempt.k)
        if step.among is not None:
            if torch.is_grad_enabled():
                # Zero times what is infinite in a rejected try would be NaN in the gradient of every parameter: the
                # rows that take the step take it again by themselves, and the try of all leaves no graph.
                return self.again(f, step, before, driver)
            mask = against(on(before[0], taken), before[0].ndim)
            after = tuple(torch.where(mask, x, y) for x, y in zip(after, before, strict=True))
        outputs = [] if step.outputs is None else [step.outputs.read(before[0], attempt, self.pair.tableau)]
        return pick(after, step.keep), outputs
