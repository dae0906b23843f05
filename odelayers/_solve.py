"""One solve: the checks before it, the rows that fail in it, and the statistics after it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator, OnCall, ambient, dual, readable
from odelayers._field import Field, training_batchnorm, training_dropout
from odelayers._gradients import Adjoint, Backprop, Checkpoint, Gradient, Implicit, Reversible
from odelayers._solution import SolveError, Stats, Status
from odelayers._solvers import AdaptiveRungeKutta, FixedRungeKutta, Programs, Settling, Solver
from odelayers._solvers.base import fail, nonfinite_rows
from odelayers._times import Equilibrium

__all__ = ["Problem", "Solved", "check_end", "check_layers", "check_pair", "solve"]

GRADIENTS = (Backprop(), Checkpoint(), Reversible(), Adjoint())


@dataclass(frozen=True)
class Problem:
    """What is to be solved: a field from z0 through the solver's times ts, or to an equilibrium, under a driver."""

    field: Field
    z0: Tensor
    ts: tuple[float, ...]
    driver: Driver
    half: torch.dtype | None = None
    on_call: tuple[OnCall, ...] = ()
    programs: Programs | None = None
    equilibrium: Equilibrium | None = None

    def take(self, rows: Tensor) -> Problem:
        """The same problem for these rows of the batch alone."""
        field = self.field.take(rows, self.z0.shape[0])
        return replace(self, field=field, z0=self.z0[rows], driver=self.driver.take(rows))


class Solved(NamedTuple):
    """States `(T, B, ...)`, statistics and, of a solve to an equilibrium, the time `(B,)` at which each row stopped."""

    zs: Tensor
    stats: Stats
    ends: Tensor | None = None


def check_pair(solver: Solver, gradient: Gradient, where: str) -> None:
    """Refuse a gradient that cannot differentiate through the solver, naming those that can."""
    if not isinstance(gradient, Gradient):
        raise TypeError(f"{where}: gradient: expected {_choice(GRADIENTS)}, got {gradient!r}")
    if not gradient.accepts(solver):
        legal = [g for g in GRADIENTS if g.accepts(solver)]
        raise ValueError(
            f"{where}: {type(gradient).__name__}() cannot differentiate through {solver!r}; with this solver use "
            f"gradient={_choice(legal)}"
        )


def _choice(gradients: Sequence[Gradient]) -> str:
    """The calls that make one of these gradients."""
    *most, last = (f"{type(gradient).__name__}()" for gradient in gradients)
    return f"{', '.join(most)} or {last}" if most else last


def check_end(
    end: Any, t0: float, solver: Solver, gradient: Gradient, timed: bool, where: str, compiled: bool = False
) -> None:
    """Refuse an end time that the start, the solver, the gradient or the field does not go with."""
    if not isinstance(end, Equilibrium):
        if isinstance(gradient, Implicit):
            raise ValueError(
                f"{where}: {gradient!r} is the gradient of an equilibrium, got t1={end!r}; "
                f"give t1=Equilibrium(tol, t_max), or use gradient=Backprop()"
            )
        return
    where = f"{where}: t1={end!r}"
    if end.t_max <= t0:
        raise ValueError(f"{where}: expected t_max after t0={t0}: an equilibrium is what the field comes to in time")
    if solver.calculus:
        raise ValueError(f"{where}: noise never comes to rest; use ODEBlock(f, t1=...) for the field without it")
    if not isinstance(solver, FixedRungeKutta | AdaptiveRungeKutta):
        raise ValueError(
            f"{where}: {solver!r} does not stop row by row; use Dopri5(), Tsit5(), Euler, Midpoint, Heun or RK4(steps)"
        )
    if isinstance(solver, AdaptiveRungeKutta) and solver.batch == "independent":
        raise ValueError(
            f"{where}: {solver!r}: rows stop by themselves where they share their steps; leave batch='independent' out"
        )
    if compiled:
        raise ValueError(f"{where}: compile=True compiles solves to a time that is known; leave it out")
    if not isinstance(gradient, Backprop | Checkpoint | Implicit):
        raise ValueError(
            f"{where}: {gradient!r} solves backwards, out of the equilibrium, where the past cannot be recovered; use "
            f"gradient=Backprop() or Checkpoint(), or Implicit() for the derivative of the equilibrium itself"
        )
    if isinstance(gradient, Implicit) and timed:
        raise ValueError(
            f"{where}: {gradient!r} takes f(z) = 0 for granted, and the field takes the time; say time=False if it is "
            f"a context, drop the time from f, or use gradient=Backprop()"
        )


def check_layers(field: Field, gradient: Gradient, where: str) -> None:
    """Refuse layers that make f change from one evaluation to the next, warn where that is merely unwise."""
    dropout = training_dropout(field.f)
    if dropout is not None:
        raise ValueError(
            f"{where}: the field holds {dropout} in training mode: every evaluation would draw another mask and the "
            f"solver would integrate a different field each time. Use DropoutSDEBlock(f, p=...) for dropout noise "
            f"along the solve, put the dropout before or after the block, or call field.eval()"
        )
    norm = training_batchnorm(field.f)
    if norm is None:
        return
    trouble = (
        f"{where}: the field holds {norm} using batch statistics: samples interact, and running statistics move at "
        f"every evaluation of the solve. Use GroupNorm, or call field.eval()"
    )
    if gradient.evaluates_again:
        raise ValueError(f"{trouble}; {type(gradient).__name__}() evaluates the field again and is refused")
    warnings.warn(trouble, UserWarning, stacklevel=5)


def solve(problem: Problem, solver: Solver, gradient: Gradient, isolate: bool) -> Solved:
    """Solve; with `isolate`, failed rows are NaN and the others as if alone."""
    if gradient.evaluates_again and dual() and torch.is_grad_enabled():
        raise RuntimeError(
            f"field {problem.field.name}: {gradient!r} evaluates the field again and knows no forward mode: tangents "
            f"of torch.autograd.forward_ad would be lost; use gradient=Backprop()"
        )
    batch, device = problem.z0.shape[0], problem.z0.device
    status = torch.zeros(batch, dtype=torch.long, device=device)
    failed_at = torch.full((batch,), torch.nan, device=device)
    rows = torch.arange(batch, device=device)
    part, nfe = problem, 0
    # The fields alone run under autocast, the user's or that of a half-precision state: sums of stages do not.
    outer = ambient(device)
    half = problem.half or outer
    while True:
        f = Evaluator(part.field, len(rows), half, part.on_call, part.programs)
        way = _way(solver, part.equilibrium)
        try:
            with torch.autocast(device.type, enabled=False) if outer else nullcontext():
                path = gradient.solve(way, f, part.z0, part.ts, part.driver)
            _check_range(path.zs, part, solver, f)
            break
        except SolveError as error:
            if not isolate or not error.rows:
                raise
            nfe += f.nfe
            failed = rows[list(error.rows)]
            status[failed] = int(error.status)
            failed_at[failed] = torch.tensor(error.t, device=device, dtype=failed_at.dtype)
            rows = (status == 0).nonzero().flatten()
            if not len(rows):
                zs = problem.z0.new_full((len(problem.ts), *problem.z0.shape), torch.nan)
                settled, ends = _settled(problem, rows, way)
                return Solved(zs, Stats(nfe, 0, 0, status, failed_at, torch.zeros_like(status), settled), ends)
            part = problem.take(rows)
    zs = path.zs
    if len(zs) < len(problem.ts):  # rows at rest to begin with take no step
        zs = zs.expand(len(problem.ts), *part.z0.shape)
    steps = way.steps if isinstance(way, Settling) else path.steps
    steps = torch.full_like(rows, path.accepted) if steps is None else steps
    if len(rows) < batch:
        # index_copy keeps the healthy rows in the graph and leaves the failed ones NaN without a gradient.
        zs = zs.new_full((len(problem.ts), *problem.z0.shape), torch.nan).index_copy(1, rows, zs)
        steps = torch.zeros_like(status).index_copy(0, rows, steps)
    settled, ends = _settled(problem, rows, way)
    stats = Stats(nfe + f.nfe, path.accepted, path.rejected, status, failed_at, steps, settled)
    return Solved(zs, stats, ends)


def _way(solver: Solver, equilibrium: Equilibrium | None) -> Solver:
    """The solver, or one that stops each row where it comes to rest."""
    if equilibrium is None or not isinstance(solver, FixedRungeKutta | AdaptiveRungeKutta):
        return solver
    return Settling(solver, equilibrium.tol)


def _settled(problem: Problem, rows: Tensor, way: Solver) -> tuple[Tensor | None, Tensor | None]:
    """Which rows of the batch came to rest and when each stopped, from the record of the rows that were solved."""
    if not isinstance(way, Settling):
        return None, None
    ends = problem.z0.new_full((len(problem.z0),), torch.nan)
    settled = torch.zeros_like(ends, dtype=torch.bool)
    if len(rows):
        ends[rows], settled[rows] = way.ends, way.settled
    return settled, ends


def _check_range(zs: Tensor, part: Problem, solver: Solver, f: Evaluator) -> None:
    """A half-precision state is solved for in float32; refuse one that does not fit when it goes back."""
    if part.half is None or not readable(zs):
        return
    bad = nonfinite_rows(zs.detach().to(part.half).transpose(0, 1))
    if bad.any():
        raise fail(solver, f, bad, part.ts[-1], part.driver, Status.BLOW_UP, f"beyond the range of {part.half}")
