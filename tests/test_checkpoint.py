"""Checkpoint(segments=): what is kept, what it costs, and that the gradient does not depend on it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from odelayers import RK4, Backprop, Checkpoint, Dopri5, DropoutSDEBlock, EulerMaruyama, ODEBlock, count_nfe
from problems import TanhNet, gradients, name

F64 = torch.float64
SOLVERS = (RK4(40), Dopri5(1e-9, 1e-9), EulerMaruyama(40))


def block(net: TanhNet, solver: Any, gradient: Any) -> Any:
    """A block of the kind that the solver is for."""
    if solver.calculus:
        return DropoutSDEBlock(net, 0.2, solver=solver, gradient=gradient)
    return ODEBlock(net, t1=3.0, solver=solver, gradient=gradient)


@pytest.mark.parametrize("segments", [None, 1, 2, 7, 16, 1000])
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_the_gradient_does_not_depend_on_what_is_kept(solver: Any, segments: int | None) -> None:
    """Backprop's to rounding, over output times and for every parameter."""
    net, found = TanhNet(), []
    for gradient in (Checkpoint(segments), Backprop()):
        z = torch.ones(4, 3, dtype=F64, requires_grad=True)
        g = torch.Generator().manual_seed(2)
        zs = block(net, solver, gradient).solve(z, [0.0, 0.7, 1.3, 3.0], generator=g).zs
        found.append(gradients(zs.square().sum(), [z, *net.parameters()]))
    assert all((a - b).abs().max() <= 1e-12 * max(1.0, b.abs().max().item()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("segments", [1, 2, 5, 8, 39, 40, 1000])
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_states_kept_are_even_and_at_most_so_many(solver: Any, segments: int) -> None:
    """Between half the number asked for and all of it, evenly spaced from the first; each where they are enough."""
    solution = block(TanhNet(), solver, Checkpoint(segments)).solve(torch.ones(4, 3, dtype=F64))
    kept, steps = list(solution.zs.grad_fn.solve.kept), solution.stats.accepted
    assert steps > 20 and kept[0] == 0 and len({b - a for a, b in pairwise(kept)}) <= 1
    assert min(segments, steps) / 2 <= len(kept) <= segments
    assert segments < steps or len(kept) == steps


@pytest.mark.parametrize(("segments", "again"), [(1000, 40), (10, 40 + 30), (1, 40 + 39), (None, 40 + 30)])
def test_steps_that_are_not_kept_cost_once_more(segments: int | None, again: int) -> None:
    """Each of 40 steps is taken again with its graph, and those whose state is dropped once more before that."""
    made = block(TanhNet(), RK4(40), Checkpoint(segments))
    with count_nfe(made) as count:
        out = made(torch.ones(4, 3, dtype=F64))
        assert count.nfe == 160
        out.sum().backward()
    assert count.nfe - 160 == 4 * again
