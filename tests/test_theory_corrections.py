"""Statements of the sources that are false as printed: each beside the case that shows it, and its correction."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from odelayers import RK4, ODEBlock, SDEBlock, StratonovichHeun, check_stability, gershgorin, jacobian
from strategies import Bounded, bounded_fields, seeds, states

F64 = torch.float64


@settings(max_examples=10)
@given(bounded_fields(), seeds)
def test_the_adjoint_s_parameter_gradient_has_a_minus_sign(case: Bounded, seed: int) -> None:
    """Pontryagin 1962: dL/dtheta = -int_{t1}^{t0} a df/dtheta dt; the blog prints it without the minus (control)."""
    steps, z = 40, states(4, case.dim, seed).requires_grad_()
    step, path = ODEBlock(case.f, t1=case.time / steps, solver=RK4(steps=1)), [z]
    for _ in range(steps):
        path.append(step(path[-1]))
    parameters = list(case.f.parameters())
    adjoints = torch.autograd.grad(path[-1].square().sum(), path, retain_graph=True)
    wanted = torch.autograd.grad(path[-1].square().sum(), parameters)
    simpson = torch.tensor([1.0, *[4.0, 2.0] * (steps // 2 - 1), 4.0, 1.0], dtype=F64) * case.time / steps / 3
    from_t1_to_t0 = [torch.zeros_like(p) for p in parameters]
    for weight, a, x in zip(simpson, adjoints, path, strict=True):
        for total, part in zip(from_t1_to_t0, torch.autograd.grad(case.f(x.detach()), parameters, a), strict=True):
            total -= weight * part
    size = max(g.abs().max().item() for g in wanted)
    for printed, gradient in zip(from_t1_to_t0, wanted, strict=True):
        assert (-printed - gradient).abs().max() < 1e-4 * size
    assert max((printed - g).abs().max().item() for printed, g in zip(from_t1_to_t0, wanted, strict=True)) > size


@settings(max_examples=10)
@given(st.floats(0.3, 0.7), st.floats(0.3, 0.7), seeds)
def test_geometric_brownian_motion_has_its_sigma_and_its_start(sigma: float, z0: float, seed: int) -> None:
    """Ito 1951: z_0 exp((lambda - sigma^2/2) t + sigma W_t) is where the Ito equation ends; as the paper prints it,
    without sigma before W or without z_0, it is not (control)."""
    rate, steps = 0.5, 400
    dw = steps**-0.5 * states(steps, 50, seed)
    drift, w = rate - sigma**2 / 2, dw.sum(dim=0)
    block = SDEBlock(  # the Ito equation, written in Stratonovich's reading
        lambda z: drift * z,
        lambda z: sigma * z,
        solver=StratonovichHeun(steps),
        calculus="stratonovich",
        noise="scalar",
    )
    found = block.solve(torch.full((50, 1), z0, dtype=F64), noise=dw).final[:, 0]
    assert torch.allclose(found, z0 * torch.exp(drift + sigma * w), rtol=1e-2)
    for printed in (torch.exp(drift + sigma * w), z0 * torch.exp(drift + w), torch.exp(drift + w)):
        assert (printed / found).log().abs().mean() > 0.1


def test_a_constraint_in_expectation_does_not_hold_pointwise() -> None:
    """Control, eq. 4 of the paper: for z' = -z + z^3 the mean of J_ii over nine points 0 and one 1.1 is below 0, and
    at 1.1 the field is unstable: the solution from there doubles, where each from near 0 decays."""
    points = torch.tensor([[0.0]] * 9 + [[1.1]], dtype=F64)
    report = check_stability(lambda z: -z + z**3, points)
    assert report.diagonal.mean().item() == pytest.approx((-9 + 2.63) / 10)
    assert report.verdict == ["contracting"] * 9 + ["unstable"]
    ends = ODEBlock(lambda z: -z + z**3, t1=0.8)(torch.tensor([[0.1], [1.1]], dtype=F64))
    assert ends[0].item() < 0.06 and ends[1].item() > 2.2


@given(bounded_fields(), seeds)
def test_no_field_meets_equation_4_s_second_constraint(case: Bounded, seed: int) -> None:
    """Control, eq. 4 of the paper as printed: ||J_ii|| < 0 holds for no field, not even for f = -z, whose J_ii = -1 < 0
    is what is meant; nor is its Delta a Laplacian, which vanishes for every linear f."""
    z = states(3, case.dim, seed)
    for f in (case.f, lambda z: -z):
        assert (jacobian(f, z).diagonal(dim1=1, dim2=2).abs() >= 0).all()
    assert (check_stability(lambda z: -z, z).diagonal == -1).all()

    def laplacian(x: Tensor) -> Tensor:
        return torch.func.hessian(lambda x: -x)(x).diagonal(dim1=1, dim2=2).sum(1)

    assert (torch.func.vmap(laplacian)(z) == 0).all()


def test_equation_4_s_third_constraint_asks_for_one_point() -> None:
    """Control, eq. 4 of the paper as printed: E[|J_ii| > sum |J_ij|] > 0 holds if one point in ten is dominant, and of
    f = +z too; what is meant, J_ii < -sum |J_ij| at every point, fails for both."""
    rotate = torch.tensor([[0.0, 2.0], [-2.0, 0.0]], dtype=F64)
    points = torch.tensor([[-1.0, 0.0]] + [[1.0, 0.0]] * 9, dtype=F64)

    def one_in_ten(z: Tensor) -> Tensor:
        return torch.where(z[:, :1] < 0, -z, z @ rotate.T + 0.5 * z)

    for f, share in ((one_in_ten, 0.1), (lambda z: z, 1.0)):
        centres, radii = gershgorin(jacobian(f, points))
        dominant = (centres.abs() > radii).all(dim=1)
        assert dominant.double().mean().item() == pytest.approx(share)
        assert not (centres < -radii).all()
        ends = ODEBlock(f, t1=0.5)(points)[1:].norm(dim=1)
        assert (ends > math.exp(0.2)).all()
