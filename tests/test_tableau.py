"""The Runge-Kutta tableaus against the conditions that every method meets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from odelayers import RK4, Dopri5, Euler, Heun, Midpoint, Tsit5
from odelayers._solvers.rosenbrock_tableau import RODAS5P
from odelayers._solvers.stages import Buffered, Chained, Compiled, Recorded
from odelayers._solvers.tableau import Tableau
from problems import name

SOLVERS = (Euler(1), Midpoint(1), Heun(1), RK4(1), Dopri5(), Tsit5())


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_each_stage_lies_at_the_time_its_weights_add_up_to(solver: object) -> None:
    """c_i = sum_j a_ij: else z' = f(t, z) sees other times. The weights add to 1."""
    tableau: Tableau = solver.tableau  # type: ignore[attr-defined]
    assert tableau.c == pytest.approx([0.0, *map(sum, tableau.a)], abs=1e-12)
    assert sum(tableau.b) == pytest.approx(1.0, abs=1e-12)
    assert sum(tableau.error) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("shape", [(1,), (2, 3)], ids=str)
@pytest.mark.parametrize("solver", [RK4(1), Dopri5(), Tsit5()], ids=name)
def test_every_kind_of_stages_keeps_one_protocol(solver: object, shape: tuple[int, ...]) -> None:
    """In a list, in a buffer, under autograd or from a program: the same states, sums, errors and stages."""
    tableau: Tableau = solver.tableau  # type: ignore[attr-defined]
    z, ks = torch.randn(shape, dtype=torch.float64), torch.randn(len(tableau.c), *shape, dtype=torch.float64)
    row = tuple(0.1 * i for i in range(len(tableau.c)))

    def wanted(weights: tuple[float, ...], start: Tensor = z) -> Tensor:
        return start + 0.3 * sum(w * k for w, k in zip(weights, ks, strict=False))

    nothing = torch.zeros_like(z)
    kinds = [Recorded(tableau), Buffered(tableau, z), Chained(tableau, z)]
    for stages in kinds:
        stages.begin(z)
        for i, k in enumerate(ks):
            stages.put(i, k)
            if i < len(tableau.rows):
                torch.testing.assert_close(stages.advance(i + 1, 0.3), wanted(tableau.rows[i]), rtol=0, atol=1e-14)
    for stages in (*kinds, Compiled(tableau, z, list(ks))):
        torch.testing.assert_close(stages.combine(row, 0.3), wanted(row), rtol=0, atol=1e-14)
        assert torch.equal(stages.get(1), ks[1]) and torch.equal(stages.keep(2), ks[2])
        if tableau.error:
            torch.testing.assert_close(stages.error(0.3), wanted(tableau.error, nothing), rtol=0, atol=1e-14)


class Rodas5PAsStages:
    """The tableau in the usual variables: k = f at stages weighted by alpha, J times stages weighted by gamma."""

    def __init__(self) -> None:
        s = len(RODAS5P.c)
        u, e = torch.zeros(2, s, s, dtype=torch.float64)
        for i in range(1, s):
            u[i, :i], e[i, :i] = (torch.tensor(rows[i - 1], dtype=torch.float64) for rows in (RODAS5P.a, RODAS5P.e))
        self.gamma = torch.linalg.inv(torch.eye(s, dtype=torch.float64) / RODAS5P.gamma - e)
        self.alpha = u @ self.gamma
        self.b = torch.tensor(RODAS5P.b, dtype=torch.float64) @ self.gamma
        self.embedded = torch.tensor([*RODAS5P.b[:-1], 0.0], dtype=torch.float64) @ self.gamma


# The rooted trees of up to five nodes, each the tuple of the trees at its root.
LEAF: tuple = ()
PAIR = (LEAF,)
THREE = [(LEAF, LEAF), (PAIR,)]
FOUR = [(LEAF, LEAF, LEAF), (LEAF, PAIR), *((tree,) for tree in THREE)]
FIVE = [
    (LEAF, LEAF, LEAF, LEAF),
    (LEAF, LEAF, PAIR),
    (PAIR, PAIR),
    *((LEAF, tree) for tree in THREE),
    *((tree,) for tree in FOUR),
]
TREES = [LEAF, PAIR, *THREE, *FOUR, *FIVE]


def nodes(tree: tuple) -> int:
    return 1 + sum(map(nodes, tree))


def density(tree: tuple) -> int:
    product = nodes(tree)
    for branch in tree:
        product *= density(branch)
    return product


def weight(tree: tuple, method: Rodas5PAsStages) -> Tensor:
    """The stages' elementary weights: a single branch passes through alpha + gamma, several through alpha alone."""
    found = torch.ones(len(RODAS5P.c), dtype=torch.float64)
    matrix = method.alpha + method.gamma if len(tree) == 1 else method.alpha
    for branch in tree:
        found = found * (matrix @ weight(branch, method))
    return found


def test_the_rosenbrock_coefficients_satisfy_the_order_conditions() -> None:
    """Hairer and Wanner II, IV.7: all 17 trees for the step, 8 for the embedded method, which misses order 5."""
    method = Rodas5PAsStages()
    assert [nodes(tree) for tree in TREES] == [1, 2, 3, 3, 4, 4, 4, 4, *[5] * 9]
    residual = {
        kind: [abs((b @ weight(tree, method)).item() - 1 / density(tree)) for tree in TREES]
        for kind, b in (("step", method.b), ("embedded", method.embedded))
    }
    assert max(residual["step"]) < 1e-12
    assert max(residual["embedded"][:8]) < 1e-12 and max(residual["embedded"][8:]) > 1e-4


def test_the_rosenbrock_coefficients_belong_together() -> None:
    """Times and weights of df/dt are row sums, the diagonal is gamma, the last stage is the step: R(infinity) = 0."""
    method = Rodas5PAsStages()
    ones = torch.ones(len(RODAS5P.c), dtype=torch.float64)
    assert (method.alpha @ ones).tolist() == pytest.approx(list(RODAS5P.c), abs=1e-12)
    assert (method.gamma @ ones).tolist() == pytest.approx(list(RODAS5P.d), abs=1e-12)
    assert method.gamma.diagonal().tolist() == pytest.approx([RODAS5P.gamma] * len(ones), abs=1e-12)
    assert (method.alpha + method.gamma)[-1].tolist() == pytest.approx(method.b.tolist(), abs=1e-12)
    limit = 1 - method.b @ torch.linalg.solve(method.alpha + method.gamma, ones)
    assert abs(limit.item()) < 1e-11
