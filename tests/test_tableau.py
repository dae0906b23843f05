"""The Runge-Kutta tableaus against the conditions that every method meets."""

from __future__ import annotations

import pytest

from odelayers import RK4, Dopri5, Euler, Heun, Midpoint, Tsit5
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
