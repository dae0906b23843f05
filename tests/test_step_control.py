"""The step control against a plain Python one, and the span of a solve, outside which no field is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import RK45
from torch import Tensor

from odelayers import Dopri5, ODEBlock, Tsit5
from problems import name

Rate = Callable[[float, np.ndarray], np.ndarray]


def controlled(f: Rate, z: np.ndarray, t1: float, h: float, tol: float) -> tuple[list[float], int]:
    """The accepted steps and the number of rejected ones of Dormand and Prince's pair, by the book and row by row.

    Hairer, Norsett, Wanner, Solving ODEs I, II.4: an error of root mean square over tol (1 + max(|z|, |z'|)) of at most
    1 in every row accepts; the next step is 0.9 error^(-1/5) times as long, by no more than 10 and no less than 0.2.
    """
    t, lengths, rejected, k = 0.0, [], 0, f(0.0, z)
    while t < t1:
        h = t1 - t if 1.01 * h >= t1 - t else h
        stages = [k]
        for c, a in zip(RK45.C[1:], RK45.A[1:], strict=True):
            stages.append(f(t + c * h, z + h * sum(w * s for w, s in zip(a, stages, strict=False))))
        new = z + h * sum(b * s for b, s in zip(RK45.B, stages, strict=True))
        stages.append(f(t + h, new))
        scaled = h * sum(e * s for e, s in zip(RK45.E, stages, strict=True))
        scaled = scaled / (tol + tol * np.maximum(abs(z), abs(new)))
        error = math.sqrt((scaled**2).mean(axis=1).max())
        if error <= 1:
            t, z, k = (t1 if h == t1 - t else t + h), new, stages[-1]
            lengths.append(h)
        rejected += error > 1
        h *= min(10.0, max(0.2, 0.9 * error ** (-1 / 5)) if error > 1 else 0.9 * error ** (-1 / 5))
    return lengths, rejected


CASES: dict[str, tuple[Callable[[Any, Any, Any], Any], float, float]] = {  # f with its functions, first step, tolerance
    "bursts": (lambda t, z, m: 6 * m.cos(25 * m.sin(3 * t) * t) - z, 0.5, 1e-6),
    "rows of many speeds": (lambda t, z, m: m.cos(5 * t) - z - 9 * z**3, 0.5, 1e-5),
    "a first step far too long": (lambda t, z, m: -20 * z + m.sin(t), 2.0, 1e-7),
    "a first step far too short": (lambda t, z, m: -z + m.cos(t), 1e-5, 1e-4),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_the_book_s(case: str) -> None:
    """Dopri5 accepts the very steps of a plain Python controller on scipy's tableau, and rejects as many."""
    f, first, tol = CASES[case]
    z = torch.tensor([[0.4, -0.9], [1.3, 0.1], [0.0, 0.7]], dtype=torch.float64)
    wanted, rejected = controlled(lambda t, z: f(t, z, np), z.numpy(), 2.0, first, tol)
    block = ODEBlock(lambda t, z: f(t, z, torch), t1=2.0, solver=Dopri5(tol, tol, first_step=first))
    stats = block.solve(z).stats
    assert (stats.accepted, stats.rejected) == (len(wanted), rejected)
    assert rejected > 0 or first < 1e-3  # else the case would try nothing
    ends = np.cumsum(wanted)
    seen = times_of(lambda t, z: f(t, z, torch), z, 0.0, 2.0, Dopri5(tol, tol, first_step=first))
    assert all(min(abs(t - end) for t in seen) < 1e-9 for end in ends)


def times_of(f: Callable[[Tensor, Tensor], Tensor], z: Tensor, t0: float, t1: float, solver: Any) -> list[float]:
    """The times at which a solve evaluates its field."""
    times: list[float] = []

    def recorded(t: Tensor, z: Tensor) -> Tensor:
        times.append(float(t))
        return f(t, z)

    with torch.no_grad():
        ODEBlock(recorded, t0=t0, t1=t1, solver=solver, time=True)(z)
    return times


@pytest.mark.parametrize("first_step", [None, 0.4, 50.0])
@pytest.mark.parametrize("t0, t1", [(0.0, 1e-3), (40.0, 40.001), (-40.0, -41.0), (-1.0, 1.0), (2.0, 2.5), (2.5, -2.5)])
@pytest.mark.parametrize("solver", [Dopri5, Tsit5], ids=name)
def test_the_field_is_never_evaluated_outside_the_span(
    solver: type, t0: float, t1: float, first_step: float | None
) -> None:
    """Not by a first step, given or chosen, of spans shorter than it, around t = 0 and far from it, in both ways."""
    z = torch.tensor([[0.5, 3.0]], dtype=torch.float64)
    low, high = min(t0, t1), max(t0, t1)
    seen = times_of(lambda t, z: 0.1 * torch.sin(z), z, t0, t1, solver(first_step=first_step))
    slack = 1e-12 * max(abs(low), abs(high))
    assert low - slack <= min(seen) and max(seen) <= high + slack
    assert t0 in seen and min(abs(t1 - t) for t in seen) <= slack


def test_a_field_that_ends_with_the_span_is_solved_to_its_end() -> None:
    """z' = -3 sqrt(1 - t) / 2 is no number beyond t = 1: from just before, the first trial too must stay within."""
    z = torch.full((2, 1), 5.0, dtype=torch.float64)
    for t0 in (0.0, 0.9, 0.999):
        end = ODEBlock(lambda t, z: -1.5 * (1 - t).sqrt() * torch.ones_like(z), t0=t0, solver=Dopri5(1e-8, 1e-8))(z)
        torch.testing.assert_close(end, z - (1 - t0) ** 1.5, rtol=0, atol=1e-6)
