"""Steps of rows that each have their own time and length: what such a step is, its outputs, and how rows fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator, traced
from odelayers._field import as_rows
from odelayers._solution import SolveError, Status
from odelayers._solvers.base import Path, Solver, State, Taken, Trace, fail
from odelayers._solvers.control import STABILITY_LIMIT, RowClocks, Rows, Verdict
from odelayers._solvers.stages import Stages
from odelayers._solvers.tableau import Tableau

__all__ = ["Failed", "Outputs", "Part", "RowStep", "Try", "column", "failed_rows", "failure", "passed"]


def column(per_row: Tensor, ndim: int) -> Tensor:
    """One number a row `(..., B)`, shaped to broadcast against a state of `ndim` axes."""
    return per_row.reshape(*per_row.shape, *[1] * (ndim - 1))


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


class Part:
    """Field and driver for some rows of the batch; evaluations count as the whole batch's."""

    def __init__(self, f: Evaluator, driver: Driver, rows: Rows, like: Tensor) -> None:
        self.whole, self.f, self.driver = f, f, driver
        if len(rows) < f.batch:
            at = on(like, rows)
            self.f, self.driver = f.take(at), driver.take(at)

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

    `ends` and `inner` are the places, in the state before it, of the rows that have them, `weights` those of the
    stages on the way.
    """

    places: Rows
    ends: Rows
    inner: Rows
    weights: Rows

    def read(self, z: Tensor, attempt: Try, among: Rows | None = None) -> Tensor:
        """The states there, from the state before and the try; `among`: the try was of these rows alone."""
        ends, inner = (x if among is None else among.searchsorted(x) for x in (self.ends, self.inner))
        found = attempt.z.index_select(0, on(z, ends))
        if not len(inner):
            return found
        at, weights = on(z, inner), on(z, self.weights.T).to(z.dtype)
        stages = torch.stack([attempt.stages.keep(i) for i in range(len(weights))])
        change = (column(weights, z.ndim) * stages.index_select(1, at)).sum(dim=0)
        return torch.cat([found, z.index_select(0, at) + change])


class RowStep(NamedTuple):
    """A step of some rows, each with its own time and length.

    Attributes:
        tried: steps tried so far by each row under way.
        rows: the rows of the batch that take it.
        among: their places in the state before it; None: they are all of its rows.
        t, h: their times at its start and the signed lengths.
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


def passed(tableau: Tableau, clocks: RowClocks, verdict: Verdict, batch: int) -> Outputs | None:
    """The output times that the rows of a step pass on its way or end it at; the clocks are moved past them."""
    if not verdict.passed.any():
        return None
    at, ts, way = verdict.passed.nonzero()[0], clocks.ts, clocks.way
    first, beyond = clocks.reached[at], (ts * way).searchsorted(clocks.t[at] * way, side="right")
    clocks.reached[at] = beyond
    who, count = at.repeat(beyond - first), beyond - first
    which = first.repeat(count) + np.arange(len(who)) - (count.cumsum() - count).repeat(count)
    inside = ts[which] != clocks.t[who]
    order = inside.argsort(kind="stable")
    who, which, ends = who[order], which[order], len(who) - np.count_nonzero(inside)
    inner, begun = who[ends:], verdict.begun[who[ends:]]
    theta = (ts[which[ends:]] - begun) / (clocks.t[inner] - begun)
    dense = np.array(tableau.dense)
    weights = theta[:, None] ** np.arange(1, dense.shape[1] + 1) @ dense.T
    return Outputs((which - 1) * batch + clocks.rows[who], who[:ends], inner, weights)


class Failed(NamedTuple):
    """A row that failed: its time, its cause, the steps it tried and the length of the last."""

    row: int
    t: float
    status: int
    tried: int
    h: float


@torch.no_grad()
def failed_rows(before: State, attempt: Try, error: Rows, clocks: RowClocks, verdict: Verdict) -> list[Failed]:
    """The rows that failed in a try, each with its cause."""
    at = verdict.failed.nonzero()[0]
    rows, t, h = on(before[0], at), clocks.t[at], clocks.h[at]
    change = attempt.stages.get(-1) - attempt.stages.get(-2)
    z, k, moved, changed = (as_rows(x)[rows].cpu().double() for x in (*before, attempt.z - attempt.last, change))
    # |h lambda| from two stages at one time (Hairer and Wanner, IV.2); NaN where they are at one state
    reach = torch.from_numpy(verdict.factor[at]) * changed.norm(dim=1) / moved.norm(dim=1)
    small = z.norm(dim=1) < 1e-6 * torch.from_numpy(np.maximum(abs(t), 1e-6)) * k.norm(dim=1)
    runaway = small & ((z * k).sum(dim=1) * clocks.way > 0)
    spent = Status.MAX_STEPS if clocks.tried >= clocks.max_steps else Status.STEP_UNDERFLOW
    status = np.full(len(at), int(spent))
    status[(reach.isfinite() & (reach > STABILITY_LIMIT)).numpy()] = Status.STIFF
    status[runaway.numpy() | ~np.isfinite(error[at])] = Status.BLOW_UP
    lists = [x.tolist() for x in (clocks.rows[at], t, status, h)]
    return [Failed(row, t, status, clocks.tried, h) for row, t, status, h in zip(*lists, strict=True)]


def failure(solver: Solver, f: Evaluator, z0: Tensor, failures: Sequence[Failed], driver: Driver) -> SolveError:
    """The error for the rows that failed for the reason of the first; others fail again when solved without them."""
    first = failures[0]
    s = np.full(len(z0), np.nan)
    for x in failures:
        if x.status == first.status:
            s[x.row] = x.t
    note = f"after {first.tried} steps tried, the last of length {first.h:.3g}"
    return fail(solver, f, on(z0, np.isfinite(s)), on(z0, s), driver, Status(first.status), note)
