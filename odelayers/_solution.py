"""What comes out of a solve: the states, how the solve went, and how it failed."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import Tensor

__all__ = ["GradientError", "Solution", "SolveError", "Stats", "Status"]


class Status(enum.IntEnum):
    """How the solve of one row ended; `Solution.stats.status` holds these as integers.

    Example:
        >>> Status(2).name
        'BLOW_UP'
    """

    OK = 0
    NONFINITE = 1  # the initial state or the field's first value was NaN or inf
    BLOW_UP = 2  # the state or the field left the finite numbers on the way
    MAX_STEPS = 3  # the step budget was spent before the end time
    STIFF = 4  # as MAX_STEPS or STEP_UNDERFLOW, with stability instead of accuracy limiting the step
    STEP_UNDERFLOW = 5  # the step size fell below what the time can resolve
    UNSTABLE = 6  # the two coupled solutions of a reversible method came apart


_CAUSE = {
    Status.NONFINITE: "the initial state or the field's value there is NaN or inf",
    Status.BLOW_UP: "the state or the field became NaN or inf on the way (a finite-time blow-up, or steps too long)",
    Status.MAX_STEPS: "the step budget was spent",
    Status.STIFF: "the field is stiff: stability, not accuracy, limits the step",
    Status.STEP_UNDERFLOW: "the step size fell below the resolution of time",
    Status.UNSTABLE: "the two coupled solutions of the reversible method came apart: the field contracts too much, or "
    "the steps are too long",
}
_REMEDY = {
    Status.NONFINITE: "check these rows of the input and the field's parameters",
    Status.BLOW_UP: "use more steps, shorten the time, or bound the field (tanh, a Lyapunov or kinetic regulariser)",
    Status.MAX_STEPS: "raise max_steps, loosen rtol/atol, or shorten the time",
    Status.STIFF: "use a method for stiff fields (solver=Rodas5P()), shorten the time, or regularise the field; "
    "raising max_steps only takes longer",
    Status.STEP_UNDERFLOW: "the field may be discontinuous or singular there: loosen rtol/atol, or use a fixed grid",
    Status.UNSTABLE: "use gradient=Checkpoint() or Backprop(), which take the solver's own steps; or more steps, a "
    "shorter time, a smaller coupling; max_gap says how far apart they may be",
}


class SolveError(RuntimeError):
    """A solve that failed: which rows, when, why, and what to do.

    Attributes:
        rows: indices of the failed rows in the batch handed to the block.
        t: the times at which they failed, one per row, in the field's time.
        status: why, a `Status`.

    Example:
        >>> import torch, odelayers
        >>> block = odelayers.ODEBlock(lambda z: z**2, t1=2.0)
        >>> try:
        ...     block(torch.ones(1, 1))
        ... except odelayers.SolveError as error:
        ...     print(error.status.name, error.rows, round(error.t[0], 2))
        BLOW_UP (0,) 1.0
    """

    def __init__(self, where: str, rows: tuple[int, ...], t: tuple[float, ...], status: Status, note: str = "") -> None:
        super().__init__(where, rows, t, status, note)
        self.where, self.rows, self.t, self.status, self.note = where, rows, t, status, note

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows[:8])) + (", ..." if len(self.rows) > 8 else "")
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.where}: {len(self.rows)} row(s) failed [{shown}] at t = {min(self.t):.6g}: "
            f"{_CAUSE[self.status]}{note}. To mend it: {_REMEDY[self.status]}; "
            f"on_failure='isolate' solves the other rows without them."
        )


class GradientError(RuntimeError):
    """A gradient that would be wrong, refused: what is lost, and what to use in its place.

    Example:
        >>> import torch, odelayers
        >>> scale = torch.ones(1, requires_grad=True)
        >>> block = odelayers.ODEBlock(lambda z: -scale * z, gradient=odelayers.Checkpoint())
        >>> try:
        ...     block(torch.ones(1, 1))
        ... except odelayers.GradientError as error:
        ...     print("neither a parameter of the field nor its context" in str(error))
        True
    """


@dataclass(frozen=True)
class Stats:
    """How a solve went.

    Attributes:
        nfe: evaluations of the field in the forward solve, each over the batch, or the rows of it that are under way.
        accepted: steps taken.
        rejected: steps tried and thrown away by the step size control.
        status: `(B,)` integers, a `Status` per row (0 is OK).
        failed_at: `(B,)` the time at which a row failed, NaN for a healthy one.
        steps: `(B,)` integers, the steps that each row took, 0 for a failed one: `accepted` where all rows take the
            same steps. Where each has its own, `accepted` and `rejected` are those of the row that tried most.
        settled: `(B,)` bool, which rows came to rest, where t1 is an `Equilibrium`; otherwise None.

    Example:
        >>> import torch, odelayers
        >>> stats = odelayers.ODEBlock(lambda z: -z, solver=odelayers.RK4(steps=5)).solve(torch.ones(2, 1)).stats
        >>> stats.nfe, stats.accepted, stats.rejected, stats.status.tolist()
        (20, 5, 0, [0, 0])
    """

    nfe: int
    accepted: int
    rejected: int
    status: Tensor
    failed_at: Tensor
    steps: Tensor
    settled: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """What came out of `block.solve`.

    Attributes:
        ts: `(T,)` output times, `ts[0]` the start; `(2, B)` where every sample has its own end time, which
            under an `Equilibrium` is the one at which it stopped (NaN if it failed).
        zs: `(T, B, ...)` states at these times.
        stats: evaluations, steps and the status of every row.
        running: one `(B,)` integral over the solve for each running regulariser.

    Example:
        >>> import torch, odelayers
        >>> solution = odelayers.ODEBlock(lambda z: -z).solve(torch.ones(2, 3), ts=[0.0, 0.5, 1.0])
        >>> solution.zs.shape, solution.final.shape
        (torch.Size([3, 2, 3]), torch.Size([2, 3]))
    """

    ts: Tensor
    zs: Tensor
    stats: Stats
    running: tuple[Tensor, ...] = ()

    @property
    def final(self) -> Tensor:
        """The state at the last time, `(B, ...)`."""
        return self.zs[-1]
