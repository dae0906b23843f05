"""Steps of rows that each have their own time and length: what such a step is, its outputs, and how rows fail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._field import as_rows
from odelayers._solution import SolveError, Status
from odelayers._solvers.base import Solver, State, fail
from odelayers._solvers.control import STABILITY_LIMIT, RowClocks, Verdict
from odelayers._solvers.stages import Stages
from odelayers._solvers.tableau import Tableau

__all__ = ["Failed", "Outputs", "Part", "RowStep", "Try", "column", "failed_rows", "failure", "passed"]


def column(per_row: Tensor, ndim: int) -> Tensor:
    """One number a row `(..., B)`, shaped to broadcast against a state of `ndim` axes."""
    return per_row.reshape(*per_row.shape, *[1] * (ndim - 1))


class Part:
    """Field and driver for some rows of the batch; evaluations count as the whole batch's."""

    def __init__(self, f: Evaluator, driver: Driver, rows: Tensor, device: torch.device) -> None:
        self.whole = self.f = f
        self.driver = driver
        if len(rows) < f.batch:
            self.f, self.driver = f.take(rows.to(device)), driver.take(rows.to(device))

    def rate(self, s: Tensor, z: Tensor) -> Tensor:
        """dz/ds of these rows at their own times s."""
        self.f.nfe = self.whole.nfe
        try:
            k = self.driver.terms(self.f, s, z)[0]
        except RuntimeError as error:
            if self.f is not self.whole:
                error.add_note(self._note(z))
            raise
        if k.shape != z.shape:
            raise ValueError(f"field {self.f.field.name}: got dz/dt of shape {tuple(k.shape)}; {self._note(z)}")
        self.whole.nfe = self.f.nfe
        return k

    def _note(self, z: Tensor) -> str:
        return (
            f"batch='independent': {len(z)} of {self.whole.batch} rows are under way, a state of shape "
            f"{tuple(z.shape)}; pass what the field holds for each row as context=, which is picked with the rows"
        )


class Try(NamedTuple):
    """An attempted step: the result and its slope, the stages times the length, the state of the last but one."""

    z: Tensor
    k: Tensor
    stages: Stages
    last: Tensor


class Outputs(NamedTuple):
    """The outputs of a step: their places among the solve's, first those at its end, then those on the way.

    `ends` and `inner` are the rows of the step that have them, `weights` those of the stages on the way.
    """

    places: Tensor
    ends: Tensor
    inner: Tensor
    weights: Tensor

    def read(self, z: Tensor, attempt: Try, among: Tensor | None = None) -> Tensor:
        """The states there, from the state before and the try; `among` says which of its rows took the step."""
        ends, inner = (self.ends, self.inner) if among is None else (among[self.ends], among[self.inner])
        found = attempt.z[ends]
        if not len(inner):
            return found
        used = range(self.weights.shape[1])
        stages = torch.stack([attempt.stages.get(i) for i in used]).view(-1, *z.shape)[:, inner]
        return torch.cat([found, z[inner] + (column(self.weights.T, z.ndim) * stages).sum(dim=0)])


class RowStep(NamedTuple):
    """A step of some rows, each with its own time and length.

    Attributes:
        tried: steps tried so far by each row under way.
        rows: the rows of the batch that take it, on the host.
        among: their places among the rows of the state before it; None: all of them.
        grid: `(stages + 1, rows)` the times of the stages, in the last line the lengths.
        keep: the places of the rows of the state that go on after it; None: all of them.
        outputs: its outputs, None where it has none.
    """

    tried: int
    rows: Tensor
    among: Tensor | None
    grid: Tensor
    keep: Tensor | None
    outputs: Outputs | None

    def after(self, before: State, found: State) -> State:
        """The state after it: `found` for the rows that took it, of those that go on."""
        if self.among is not None:
            found = tuple(x.index_copy(0, self.among, y) for x, y in zip(before, found, strict=True))
        return found if self.keep is None else tuple(x[self.keep] for x in found)


def passed(
    tableau: Tableau, ts: Sequence[float], batch: int, rows: Tensor, begun: Tensor, ended: Tensor, like: Tensor
) -> Outputs | None:
    """The output times that rows pass on their way from `begun` to `ended`, or end at."""
    times, way = begun.new_tensor(ts[1:]), math.copysign(1.0, ts[-1] - ts[0])
    first, beyond = (torch.searchsorted(times * way, t * way, right=True) for t in (begun, ended))
    count = beyond - first
    if not count.any():
        return None
    who = torch.arange(len(count), device=count.device).repeat_interleave(count)
    which = first[who] + torch.arange(len(who), device=who.device) - (count.cumsum(0) - count)[who]
    on_the_way = times[which] != ended[who]
    order = on_the_way.to(torch.int8).argsort(stable=True)
    who, which, ends = who[order], which[order], len(who) - int(on_the_way.sum())
    inner = who[ends:]
    theta = (times[which[ends:]] - begun[inner]) / (ended - begun)[inner]
    dense = theta.new_tensor(tableau.dense)
    weights = theta.unsqueeze(1).pow(torch.arange(1, dense.shape[1] + 1, device=theta.device)) @ dense.T
    device = like.device
    return Outputs(which * batch + rows[who], who[:ends].to(device), inner.to(device), weights.to(device, like.dtype))


class Failed(NamedTuple):
    """A row that failed: its time, its cause, the steps it tried and the length of the last."""

    row: int
    t: float
    status: int
    tried: int
    h: float


@torch.no_grad()
def failed_rows(before: State, attempt: Try, error: Tensor, clocks: RowClocks, verdict: Verdict) -> list[Failed]:
    """The rows that failed in a try, each with its cause."""
    at = verdict.failed.nonzero().flatten()
    rows, t, h = at.to(before[0].device), clocks.t[at], clocks.h[at]
    change = (attempt.stages.get(-1) - attempt.stages.get(-2)).view(before[0].shape)
    z, k, moved, changed = (as_rows(x)[rows].cpu().double() for x in (*before, attempt.z - attempt.last, change))
    # |h lambda| from two stages at one time (Hairer and Wanner, IV.2); NaN where they are at one state
    reach = verdict.factor[at] * changed.norm(dim=1) / moved.norm(dim=1)
    small = z.norm(dim=1) < 1e-6 * t.abs().clamp(min=1e-6) * k.norm(dim=1)
    runaway = small & ((z * k).sum(dim=1) * clocks.way > 0)
    spent = Status.MAX_STEPS if clocks.tried >= clocks.max_steps else Status.STEP_UNDERFLOW
    status = torch.full_like(at, int(spent))
    status[reach.isfinite() & (reach > STABILITY_LIMIT)] = int(Status.STIFF)
    status[runaway | ~error[at].isfinite()] = int(Status.BLOW_UP)
    lists = [x.tolist() for x in (clocks.rows[at], t, status, h)]
    return [Failed(row, t, status, clocks.tried, h) for row, t, status, h in zip(*lists, strict=True)]


def failure(solver: Solver, f: Evaluator, z0: Tensor, failures: Sequence[Failed], driver: Driver) -> SolveError:
    """The error for the rows that failed for the reason of the first; others fail again when solved without them."""
    first = failures[0]
    alike = [x for x in failures if x.status == first.status]
    s = torch.full((len(z0),), torch.nan, dtype=torch.float64)
    s[[x.row for x in alike]] = torch.tensor([x.t for x in alike], dtype=s.dtype)
    note = f"after {first.tried} steps tried, the last of length {first.h:.3g}"
    return fail(solver, f, s.isfinite(), column(s, z0.ndim).to(z0.device), driver, Status(first.status), note)
