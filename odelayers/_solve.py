"""One solve: the checks before it, the rows that fail in it, and the statistics after it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator, OnCall
from odelayers._field import Field, training_batchnorm, training_dropout
from odelayers._gradients import Adjoint, Backprop, Checkpoint, Gradient, Reversible
from odelayers._solution import SolveError, Stats, Status
from odelayers._solvers import Programs, Solver
from odelayers._solvers.base import fail, nonfinite_rows

__all__ = ["Problem", "check_pair", "solve"]

GRADIENTS = (Backprop(), Checkpoint(), Reversible(), Adjoint())


@dataclass(frozen=True)
class Problem:
    """What is to be solved: a field from z0 through the solver's times ts under a driver."""

    field: Field
    z0: Tensor
    ts: tuple[float, ...]
    driver: Driver
    half: torch.dtype | None = None
    on_call: tuple[OnCall, ...] = ()
    programs: Programs | None = None

    def take(self, rows: Tensor) -> Problem:
        """The same problem for these rows of the batch alone."""
        field = self.field.take(rows, self.z0.shape[0])
        return replace(self, field=field, z0=self.z0[rows], driver=self.driver.take(rows))


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


def solve(problem: Problem, solver: Solver, gradient: Gradient, isolate: bool) -> tuple[Tensor, Stats]:
    """States `(T, B, ...)` and statistics; with `isolate`, failed rows are NaN and the others as if alone."""
    batch, device = problem.z0.shape[0], problem.z0.device
    status = torch.zeros(batch, dtype=torch.long, device=device)
    failed_at = torch.full((batch,), torch.nan, device=device)
    rows = torch.arange(batch, device=device)
    part, nfe = problem, 0
    while True:
        f = Evaluator(part.field, len(rows), part.half, part.on_call, part.programs)
        try:
            path = gradient.solve(solver, f, part.z0, part.ts, part.driver)
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
                return zs, Stats(nfe, 0, 0, status, failed_at)
            part = problem.take(rows)
    zs = path.zs
    if len(rows) < batch:
        # index_copy keeps the healthy rows in the graph and leaves the failed ones NaN without a gradient.
        zs = zs.new_full((len(problem.ts), *problem.z0.shape), torch.nan).index_copy(1, rows, zs)
    return zs, Stats(nfe + f.nfe, path.accepted, path.rejected, status, failed_at)


def _check_range(zs: Tensor, part: Problem, solver: Solver, f: Evaluator) -> None:
    """A half-precision state is solved for in float32; refuse one that does not fit when it goes back."""
    if part.half is None:
        return
    bad = nonfinite_rows(zs.detach().to(part.half).transpose(0, 1))
    if bad.any():
        raise fail(solver, f, bad, part.ts[-1], part.driver, Status.BLOW_UP, f"beyond the range of {part.half}")
