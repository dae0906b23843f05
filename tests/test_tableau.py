"""The Runge-Kutta tableaus against the conditions that every method meets."""

from __future__ import annotations

import pytest
import torch

from odelayers import RK4, Dopri5, Euler, Heun, Midpoint, Tsit5
from odelayers._solvers.stages import Buffered, Recorded, Stages
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


@pytest.mark.parametrize("entries", [1, 6])
@pytest.mark.parametrize("row", [(1.5,), (0.0, 2.0), (0.25, 0.0, -1.0)], ids=str)
def test_both_kinds_of_stages_combine_to_a_flat_state(row: tuple[float, ...], entries: int) -> None:
    """In a list or in a buffer: z + h sum w_i k_i, flat like z, for a state of one entry and of many."""
    z, ks = torch.randn(entries, dtype=torch.float64), torch.randn(3, entries, dtype=torch.float64)
    wanted = z + 0.1 * sum(w * k for w, k in zip(row, ks, strict=False))
    kinds: tuple[Stages, ...] = (Recorded(), Buffered(z, 3))
    for stages in kinds:
        for i, k in enumerate(ks):
            stages.put(i, k)
        found = stages.combine(z, row, 0.1)
        assert found.shape == (entries,)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
        assert torch.equal(stages.get(1), ks[1]) and torch.equal(stages.keep(2), ks[2])
