"""The march of rows that each step by themselves: who tries, who takes the step, who leaves the batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from odelayers._driver import Driver, against
from odelayers._evaluator import Evaluator
from odelayers._solvers.base import MarchingSolver, Norm, Path, State, Taken, Trace, row_rms
from odelayers._solvers.control import RowControl, Rows
from odelayers._solvers.rows import (
    Failed,
    Outputs,
    Part,
    RowStep,
    failure,
    first_steps,
    host,
    on,
    pass_outputs,
    pick,
)

if TYPE_CHECKING:
    from odelayers._solvers.adaptive import Adaptive

__all__ = ["RowMarch", "RowTry"]


class RowTry(Protocol):
    """An attempted step of some rows."""

    def after(self) -> State:
        """The state at its end."""

    def error(self, rtol: float, atol: float) -> Tensor:
        """The embedded error over the tolerance of each coordinate."""

    def read(self, outputs: Outputs) -> Tensor:
        """The states at its outputs."""

    def failed(self, error: Rows, control: RowControl, at: Rows) -> list[Failed]:
        """The rows `at` that failed in it, each with its cause."""


class RowTrace(Trace):
    """What such a march leaves behind: outputs come in any order, and each row has its own number of steps."""

    def __init__(self, z0: Tensor) -> None:
        super().__init__(z0)
        self.steps = np.zeros(len(z0), dtype=np.int64)
        self.places: list[Rows] = []

    def add(self, taken: Taken) -> None:
        self.zs.extend(taken.outputs)
        self.steps[taken.step.rows] += 1
        if taken.step.outputs is not None:
            self.places.append(taken.step.outputs.places)
        # Who tries last has tried most.
        self.accepted = int(self.steps[taken.step.rows].max())
        self.rejected = taken.step.tried - self.accepted

    def path(self) -> Path:
        z0, found = self.zs[0], torch.cat(self.zs[1:])
        found = torch.empty_like(found).index_copy(0, on(z0, np.concatenate(self.places)), found)
        zs = torch.cat([z0, found]).view(1 + len(found) // len(z0), *z0.shape)
        return Path(zs, self.accepted, self.rejected, on(z0, self.steps))


class RowMarch(MarchingSolver):
    """A march in which each row has its own time, step, error and end.

    All rows under way try a step at once; it is taken by those whose error allows it. Reading the errors is a step's
    one host read: times and lengths are kept on the host. Rows at their end are left out of the batch, rows that fail
    at once; the error is raised when all the others have come to their end. Without a gradient, rows at their end may
    stand still in the batch until their share of it is `idle`.
    """

    idle: ClassVar[float] = 0.0

    @property
    @abstractmethod
    def told(self) -> Adaptive:
        """What the user has asked for."""

    @abstractmethod
    def refuse(self, f: Evaluator, z0: Tensor) -> None:
        """Raise what stands against such a march."""

    @abstractmethod
    def control(self, ts: Sequence[float], first: Rows) -> RowControl:
        """The control of the steps, from the lengths of the first."""

    @abstractmethod
    def attempt(self, part: Part, t: Rows, h: Rows, before: State) -> RowTry:
        """A step of length h from t of each row, whatever its error; one of length 0 stays where it is."""

    def rate(self, f: Evaluator, t: float, state: State, driver: Driver) -> Tensor:
        return driver.terms(f, state[0].new_full((len(state[0]),), t), state[0])[0]

    def march(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm) -> Iterator[Taken]:
        self.refuse(f, z0)
        told, failures = self.told, list[Failed]()
        tolerances, share = told.tolerances(f, z0), 0.0 if torch.is_grad_enabled() else self.idle
        state = self.start(f, ts[0], z0, driver)
        with torch.no_grad():
            slope = self.rate(f, ts[0], state, driver)
        control = self.control(ts, first_steps(told, f, (z0, slope), ts, driver, norm, tolerances))
        part = Part(f, driver, control.rows, z0)
        while len(control.rows):
            h = control.lengths()
            attempt = self.attempt(part, control.t, h, state)
            with torch.no_grad():
                # 0 times infinity is NaN: a result that overflows would pass, since its tolerance is infinite too.
                error = host(norm(attempt.error(*tolerances).add_(attempt.after()[0], alpha=0)))
            verdict = control.judge(error)
            if verdict.failed.any():
                failures += attempt.failed(error, control, verdict.failed.nonzero()[0])
            keep = verdict.kept(share)
            at = verdict.taken.nonzero()[0]
            if len(at):
                among = None if len(at) == len(control.rows) else at
                outputs = pass_outputs(control, verdict, f.batch)
                step = RowStep(control.tried, control.rows[at], among, verdict.begun[at], h[at], keep, outputs)
                after, found = self._take(f, step, state, driver, attempt, verdict.taken)
                yield Taken(step, state, after, found, 0)
                state = after
            else:
                state = pick(state, keep)
            if keep is not None:
                control.go_on(keep)
                part = Part(f, driver, control.rows, z0)
        if failures:
            raise failure(told, f, z0, failures, driver)

    def _take(
        self, f: Evaluator, step: RowStep, before: State, driver: Driver, attempt: RowTry, taken: Rows
    ) -> tuple[State, list[Tensor]]:
        """The state after the step and its outputs, from the try of all rows under way."""
        after = attempt.after()
        if step.among is not None:
            if torch.is_grad_enabled():
                # Zero times what is infinite in a rejected try would be NaN in the gradient of every parameter: the
                # rows that take the step take it again by themselves, and the try of all leaves no graph.
                return self.again(f, step, before, driver)
            mask = against(on(before[0], taken), before[0].ndim)
            after = tuple(torch.where(mask, x, y) for x, y in zip(after, before, strict=True))
        return pick(after, step.keep), [] if step.outputs is None else [attempt.read(step.outputs)]

    def again(self, f: Evaluator, step: Any, before: State, driver: Driver) -> tuple[State, list[Tensor]]:
        rows = pick(before, step.among)
        attempt = self.attempt(Part(f, driver, step.rows, rows[0]), step.t, step.h, rows)
        after = attempt.after()
        if step.among is not None:
            at = on(after[0], step.among)
            after = tuple(x.index_copy(0, at, y) for x, y in zip(before, after, strict=True))
        return pick(after, step.keep), [] if step.outputs is None else [attempt.read(step.outputs.of(step.among))]

    def trace(self, z0: Tensor) -> RowTrace:
        return RowTrace(z0)

    def spread(self, gradient: Tensor, steps: Sequence[RowStep]) -> list[list[Tensor]]:
        flat = gradient[1:].flatten(0, 1)
        return [[] if s.outputs is None else [flat.index_select(0, on(flat, s.outputs.places))] for s in steps]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def integrate(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm = row_rms) -> Path:
        return super().integrate(f, z0, ts, driver, norm)
