"""Start, end and output times: what the user says of them, and the clock and times that a solver sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from odelayers._checks import finite_number, positive_number
from odelayers._driver import Clock
from odelayers._evaluator import dual, readable, transformed

__all__ = ["Equilibrium", "Times", "end_times", "output_times"]


@dataclass(frozen=True)
class Equilibrium:
    """An end time for every sample of its own: the end of the first step at which |f| <= tol, or t_max.

    |f| is Euclidean over the coordinates of a row, as in `check_stability` and `SteadyStateRegularizer`. It is read
    where steps end, so a row stops no later than a step after it came within tol. `Solution.ts` `(2, B)` has the
    times at which rows stopped, `stats.settled` `(B,)` which of them are at rest; the others end at t_max, which is
    no failure. A field that takes the time counts as at rest where |f(t, z)| <= tol at the time t reached, though it
    may move again later. tol should not be smaller than what the solver's tolerances resolve of f.

    Stopping times are constants to the gradient; what that leaves out is of the size of tol. `Implicit` is the
    gradient of the equilibrium itself.

    Args:
        tol: |f| at which a row is at rest.
        t_max: end time of the rows that do not come to rest.

    Raises:
        TypeError, ValueError: if tol is not a number > 0 or t_max not a finite number; from a block or a call, with a
            start at or after t_max, with output times, or with a solver or gradient that cannot stop row by row.

    Example:
        >>> import torch, odelayers
        >>> block = odelayers.ODEBlock(lambda z: -z, t1=Equilibrium(tol=1e-2, t_max=100.0))
        >>> solution = block.solve(torch.tensor([[0.001], [1.0]]))
        >>> solution.stats.settled.tolist(), solution.final.abs().le(1e-2).all().item()
        ([True, True], True)
    """

    tol: float
    t_max: float

    def __post_init__(self) -> None:
        positive_number(self.tol, "Equilibrium: tol")
        finite_number(self.t_max, "Equilibrium: t_max")


class Times(NamedTuple):
    """Output times as reported, the times the solver runs through, and the clock between the two.

    With an equilibrium the rows stop on the way, and what is reported is known after the solve only.
    """

    reported: Tensor
    solver: tuple[float, ...]
    clock: Clock
    equilibrium: Equilibrium | None = None

    @property
    def still(self) -> bool:
        """Whether no time passes."""
        return self.solver[0] == self.solver[-1]


def output_times(ts: Tensor | Sequence[float], like: Tensor, where: str) -> Times:
    """Given output times `(T,)`, strictly increasing or decreasing."""
    if not isinstance(ts, Tensor | Sequence) or isinstance(ts, str):
        raise TypeError(f"{where}: ts: expected a Tensor (T,) or a list of times, got {type(ts).__name__}")
    given = [ts] if isinstance(ts, Tensor) else ts
    if any(isinstance(t, Tensor) and t.requires_grad for t in given):
        raise ValueError(f"{where}: ts: output times carry no gradient; pass the end time as t1=tensor for one")
    try:
        values = ts if isinstance(ts, Tensor) else torch.as_tensor(ts, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{where}: ts: expected a list of numbers, got {ts!r}") from error
    if values.is_complex():
        raise TypeError(f"{where}: ts: expected real times, got {values.dtype}")
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{where}: ts: expected output times of shape (T,), T >= 1, got {tuple(values.shape)}")
    times = [float(t) for t in values.tolist()]
    if not all(map(math.isfinite, times)):
        raise ValueError(f"{where}: ts: expected finite times, got {times}")
    steps = [b - a for a, b in pairwise(times)]
    if not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
        raise ValueError(f"{where}: ts: expected strictly increasing or strictly decreasing times, got {times}")
    return Times(values.to(device=like.device, dtype=like.dtype), tuple(times), Clock(ndim=like.ndim))


def end_times(t0: float, t1: float | Tensor | Equilibrium, like: Tensor, where: str) -> Times:
    """From t0 to an end time: a float, a 0-d tensor, one for each sample `(B,)`, or an equilibrium."""
    batch = like.shape[0]
    if isinstance(t1, Equilibrium):
        reported = like.new_tensor([t0, t1.t_max]).unsqueeze(1).expand(2, batch)
        return Times(reported, (t0, float(t1.t_max)), Clock(), t1)
    if not isinstance(t1, Tensor):
        last = finite_number(t1, f"{where}: t1")
        # Filled on the device: a copy from the host would wait, and cannot be part of a CUDA graph.
        reported = torch.stack([torch.full((), t, dtype=like.dtype, device=like.device) for t in (t0, last)])
        return Times(reported, (t0, last), Clock(ndim=like.ndim))
    if not t1.is_floating_point():
        raise TypeError(f"{where}: t1: expected a floating-point tensor, got {t1.dtype}; pass t1.float()")
    if t1.ndim > 1 or (t1.ndim == 1 and t1.shape[0] != batch):
        raise ValueError(
            f"{where}: t1: expected a float, a 0-d tensor or one end time per sample ({batch},), got {tuple(t1.shape)}"
        )
    if readable(t1) and not bool(t1.isfinite().all()):
        raise ValueError(f"{where}: t1: expected finite end times, got {t1.tolist()}")
    if t1.ndim == 0 and not (t1.requires_grad or transformed() or dual()):
        return end_times(t0, float(t1), like, where)
    end = t1.to(device=like.device, dtype=like.dtype)
    reported = torch.stack([torch.full_like(end, t0), end]).detach()
    return Times(reported, (0.0, 1.0), Clock(t0, end - t0, like.ndim))
