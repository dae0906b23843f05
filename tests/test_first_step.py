"""The first step that an adaptive method chooses for itself, against scipy's, which follows the same page."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.integrate import RK45
from torch import Tensor

from odelayers import Dopri5, ODEBlock

FIELDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "decay": lambda t, z: -3.0 * z,
    "rotation": lambda t, z: torch.stack([z[:, 1], -25.0 * z[:, 0]], dim=1),
    "slow": lambda t, z: 1e-3 * torch.cos(z),
    "forced": lambda t, z: torch.sin(5.0 * t) - z,
}


def first_steps(field: Callable[[Tensor, Tensor], Tensor], z: Tensor, t1: float, **options: float) -> float:
    """The length of the first step, read off the time of its second stage at t0 + h / 5."""
    times: list[float] = []

    def recorded(t: Tensor, z: Tensor) -> Tensor:
        times.append(float(t))
        return field(t, z)

    with torch.no_grad():
        ODEBlock(recorded, t1=t1, solver=Dopri5(**options), time=True)(z)
    second = 1 if "first_step" in options else 2  # without a choice there is no trial evaluation
    return abs(times[second]) * 5


@pytest.mark.parametrize("t1", [4.0, -4.0, 1e-4])
@pytest.mark.parametrize("case", FIELDS)
def test_the_first_step_is_hairer_s(case: str, t1: float) -> None:
    """Hairer, Norsett, Wanner, II.4, forwards, backwards and over a span shorter than the choice."""
    field, z = FIELDS[case], torch.tensor([[0.7, -1.2]], dtype=torch.float64)

    def flat(t: float, y: list[float]) -> list[float]:
        return field(torch.tensor(t, dtype=torch.float64), torch.tensor(y)[None])[0].tolist()

    theirs = RK45(flat, 0.0, z[0].tolist(), t1, rtol=1e-6, atol=1e-8)
    # A last step within one per cent of the end is stretched to it.
    expected = abs(t1) if theirs.h_abs * 1.01 >= abs(t1) else theirs.h_abs
    assert first_steps(field, z, t1, rtol=1e-6, atol=1e-8) == pytest.approx(expected, rel=1e-9)


def test_the_row_that_needs_the_shortest_first_step_decides() -> None:
    """A batch of a slow and a fast row starts as the fast row alone."""
    z = torch.tensor([[1e-3, 0.0], [0.0, 5.0]], dtype=torch.float64)
    field = FIELDS["rotation"]
    alone = [first_steps(field, row[None], 4.0) for row in z]
    assert first_steps(field, z, 4.0) <= min(alone) * (1 + 1e-9)


@pytest.mark.parametrize(("given", "taken"), [(0.03125, 0.03125), (9.0, 2.0)])
def test_a_given_first_step_is_taken_or_clipped_to_the_span(given: float, taken: float) -> None:
    """`first_step` is the length of the first try; never beyond the end."""
    z = torch.full((1, 2), 0.5, dtype=torch.float64)
    assert first_steps(FIELDS["slow"], z, 2.0, first_step=given) == pytest.approx(taken, rel=1e-12)
