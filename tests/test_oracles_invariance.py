"""What own solvers must leave alone: the invariants of a motion, and every sample whatever its mates are."""

from __future__ import annotations

import pytest
import torch

from odelayers import RK4, Backprop, Euler, ODEBlock, Reversible
from odelayers._gradients.base import Gradient
from problems import KEPLER, LOTKA_VOLTERRA, ORACLES, RELAXATION, Problem
from test_oracles import F64, GRIDS, SOLVERS, allowed, label, pairs


@pytest.mark.parametrize("problem", [KEPLER, LOTKA_VOLTERRA], ids=label)
@pytest.mark.parametrize("solver", ["RK4", "Dopri5", "Tsit5", "Rodas5P"])
def test_invariants_are_kept_over_many_turns(solver: str, problem: Problem) -> None:
    """Energy and the Lotka-Volterra invariant stay within 1e-5 over t = 20; Euler's drift is plain (control)."""
    assert problem.invariant is not None
    drift = []
    for method in (RK4(2000) if solver == "RK4" else SOLVERS[solver].make(1e-8), Euler(2000)):
        zs = ODEBlock(problem.f, t1=20.0, solver=method)(problem.z0)
        drift.append((problem.invariant(zs) - problem.invariant(problem.z0)).abs().max().item())
    assert drift[0] < 1e-5 and drift[1] > 1e-3, drift


OWN = [
    (s, g, problem)
    for s, g in pairs(SOLVERS)
    for problem in ORACLES
    if g in (Backprop(), Reversible()) and "torch" not in s and (g == Backprop() or problem is not RELAXATION)
]


@pytest.mark.parametrize("solver, gradient, problem", OWN, ids=label)
def test_permuting_splitting_or_padding_the_batch_moves_no_sample(
    solver: str, gradient: Gradient, problem: Problem
) -> None:
    """On a fixed grid a sample's state stays to rounding, under step control within its accuracy (own solvers).

    Reversible solves with a pair of its own.
    """
    tol, bar, _ = allowed(solver, F64)
    block, z = ODEBlock(problem.f, solver=SOLVERS[solver].make(tol), gradient=gradient), problem.z0
    order = torch.arange(len(z)).flip(0)
    whole = block(z)
    found = [block(z[order])[order], torch.cat([block(z[:1]), block(z[1:])]), block(torch.cat([z, z, z[:1]]))[: len(z)]]
    for states in found:
        assert (states - whole).abs().max() < (1e-13 if solver in GRIDS else 1e-7)
        assert (states - problem.solution(1.0)).abs().max() < bar
