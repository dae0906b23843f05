"""Conventions of the Jacobian: time 0 by default, options by keyword, graphs where they reach something, batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import LyaNetRegularizer, LyapunovRegularizer, jacobian, spectral_abscissa, spectrum
from odelayers._jacobian import jvp, value_and_jacobian

Z = torch.tensor([[0.3, -0.7, 1.1], [2.0, 0.1, -0.4]], dtype=torch.float64)


def timed(t: Tensor, z: Tensor) -> Tensor:
    return (1.0 + t) * torch.sin(z) + t


@pytest.mark.parametrize(
    "of",
    [
        jacobian,
        spectrum,
        lambda f, z, *t: jvp(f, z, z, *t),
        lambda f, z, *t: torch.cat(value_and_jacobian(f, z, *t)[1:]),
    ],
)
def test_the_time_is_zero_by_default(of: Callable[..., Tensor]) -> None:
    """A field that takes the time is differentiated at t = 0 when none is given, and elsewhere it is another."""
    torch.testing.assert_close(of(timed, Z), of(timed, Z, 0.0))
    assert not torch.allclose(of(timed, Z), of(timed, Z, 1.0))


def test_the_time_of_a_regulariser_is_zero_by_default() -> None:
    """As for the Jacobian: the penalty without a time is that at t = 0, and at t = 1 it is another."""
    y, lyapunov, lyanet = torch.tensor([0, 2]), LyapunovRegularizer(), LyaNetRegularizer(kappa=2.0)
    for penalty in (partial(lyapunov, timed, Z), lambda **t: lyapunov.terms(timed, Z, **t).diagonal):
        assert penalty() == penalty(t=0.0) != penalty(t=1.0)
    penalty = partial(lyanet, timed, Z, y, lambda z: z)
    assert penalty() == penalty(t=0.0) != penalty(t=1.0)


@pytest.mark.parametrize("of", [jacobian, value_and_jacobian])
def test_options_of_the_jacobian_go_by_keyword(of: Callable[..., Any]) -> None:
    """A third positional argument is the time, and there is no fourth; f, z and t may be named."""
    with pytest.raises(TypeError, match="positional"):
        of(timed, Z, 0.0, 2)
    of(f=timed, z=Z, t=0.0, chunk_size=2)


@pytest.mark.parametrize(("parameters", "state", "grad"), [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_value_and_jacobian_carry_a_graph_where_there_is_something_to_reach(
    parameters: bool, state: bool, grad: bool
) -> None:
    """In grad mode both reach the parameters and a state that require gradients; else neither has a graph."""
    field = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double().requires_grad_(bool(parameters))
    z = Z.clone().requires_grad_(bool(state))
    with torch.set_grad_enabled(bool(grad)):
        value, J = value_and_jacobian(field, z)
    expected = bool(grad and (parameters or state))
    assert (value.requires_grad, J.requires_grad) == (expected, expected)
    torch.testing.assert_close(value, field(z))


def test_any_callable_may_say_its_jacobian() -> None:
    """A plain object with `linearize` is asked like a module: its J = diag(s) W is used, and verify checks it."""

    class Tanh:
        slip = 1.0

        def __call__(self, z: Tensor) -> Tensor:
            return torch.tanh(z @ W.T)

        def linearize(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.slip * (1 - torch.tanh(z @ W.T) ** 2), W

    W, f = torch.randn(3, 3, dtype=torch.float64), Tanh()
    torch.testing.assert_close(jacobian(f, Z, verify=True), jacobian(lambda z: f(z), Z))
    f.slip = 2.0
    torch.testing.assert_close(jacobian(f, Z), 2 * jacobian(lambda z: f(z), Z))
    with pytest.raises(ValueError, match="linearize is not the derivative"):
        jacobian(f, Z, verify=True)


def test_squaring_takes_a_batch_as_it_takes_each_matrix() -> None:
    """A batch (2, 5) of 3 x 3 matrices of many sizes gives each one's bound, at or above its abscissa."""
    size = torch.logspace(-6, 6, 10, dtype=torch.float64).reshape(2, 5, 1, 1)
    J = torch.randn(2, 5, 3, 3, dtype=torch.float64) * size
    found = spectral_abscissa(J, method="squaring")
    alone = torch.stack([spectral_abscissa(M, method="squaring") for M in J.reshape(-1, 3, 3)]).reshape(2, 5)
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=0.0)
    excess = (found - torch.linalg.eigvals(J).real.amax(-1)) / size[..., 0, 0]
    assert excess.min() > -1e-12 and excess.max() < 1e-5
