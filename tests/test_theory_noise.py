"""Theorems on noise where the averages and the paths say different things."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from odelayers import DropoutSDEBlock, EulerMaruyama, Milstein, SDEBlock
from strategies import Bounded, bounded_fields, seeds, states

F64 = torch.float64


@settings(max_examples=10)
@given(st.floats(0.0, 0.5), st.floats(1.2, 1.6), seeds)
def test_the_mean_of_the_states_is_not_the_growth_of_the_paths(rate: float, sigma: float, seed: int) -> None:
    """Control, Ito 1951: of geometric Brownian motion (Ito) E z grows at lambda >= 0 and log|z| at lambda - sigma^2/2 <
    0."""
    n, steps = 20_000, 50
    block = SDEBlock(lambda z: rate * z, lambda z: sigma * z, solver=Milstein(steps), noise="scalar")
    z = block.solve(torch.ones(n, 1, dtype=F64), generator=torch.Generator().manual_seed(seed)).final
    of_mean, of_paths = z.mean().log().item(), z.abs().log().mean().item()
    relative = (math.exp(sigma**2) - 1) ** 0.5 / n**0.5
    assert of_mean == pytest.approx(rate, abs=6 * relative + 1 / steps)
    assert of_paths == pytest.approx(rate - sigma**2 / 2, abs=5 * sigma / n**0.5 + sigma**3 / steps)
    assert of_paths < -0.2


@settings(max_examples=10)
@given(bounded_fields(dim=1), seeds, st.floats(0.02, 0.2))
def test_one_path_keeps_the_order(case: Bounded, seed: int, p: float) -> None:
    """Kunita 1984: dz = f dt + sigma f dW in one dimension, one W, Milstein, small h: order is kept."""
    steps = 400
    z = torch.sort(states(21, 1, seed), dim=0).values + 1e-3 * torch.arange(21, dtype=F64)[:, None]
    block = DropoutSDEBlock(case.f, p, t1=case.time, noise="scalar", solver=Milstein(steps))
    dw = (case.time / steps) ** 0.5 * states(steps, 1, seed + 1)
    with torch.no_grad():
        assert (block.solve(z, noise=dw.expand(steps, 21)).final.diff(dim=0) > 0).all()


@settings(max_examples=15)
@given(bounded_fields(dim=1), seeds)
def test_paths_of_their_own_cross(case: Bounded, seed: int) -> None:
    """Control, Kunita 1984: with a path for each of them, neighbours at 1e-3 swap sides: dz = f dt + dW."""
    steps = 50
    z = 1e-3 * torch.arange(21, dtype=F64)[:, None]
    block = SDEBlock(case.f, lambda z: torch.ones_like(z), t1=case.time, solver=EulerMaruyama(steps))
    dw = (case.time / steps) ** 0.5 * states(steps * 21, 1, seed).reshape(steps, 21, 1)
    with torch.no_grad():
        assert (block.solve(z, noise=dw).final.diff(dim=0) < 0).any()
