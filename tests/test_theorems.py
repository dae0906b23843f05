"""Theorems on flows as properties of `ODEBlock`, each with a case outside its hypotheses that is seen to fail."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from odelayers import (
    RK4,
    Adjoint,
    AugmentedODEBlock,
    Backprop,
    Checkpoint,
    Dopri5,
    Euler,
    GradientError,
    ODEBlock,
    Tsit5,
    jacobian,
    log_norm,
)
from strategies import Bounded, bounded_fields, seeds, states

F64 = torch.float64
TIGHT = Dopri5(rtol=1e-10, atol=1e-10)
few = settings(max_examples=25)


def pairs(seed: int, dim: int) -> tuple[Tensor, Tensor]:
    """Eight pairs of states at distances from 1e-3 to 2."""
    z1 = states(8, dim, seed)
    way = torch.nn.functional.normalize(states(8, dim, seed + 1), dim=1)
    return z1, z1 + way * torch.logspace(-3, math.log10(2.0), 8, dtype=F64)[:, None]


def flow(case: Bounded, z: Tensor, t: float | None = None) -> Tensor:
    """The field's flow over a time, backwards where it is negative."""
    with torch.no_grad():
        return ODEBlock(case.f, t1=case.time if t is None else t, solver=TIGHT)(z)


@few
@given(bounded_fields(), seeds)
def test_solutions_do_not_cross(case: Bounded, seed: int) -> None:
    """Theorem 1 of the paper: |z1(t) - z2(t)| >= e^(-Lt) |z1(0) - z2(0)|, L the Lipschitz constant."""
    z1, z2 = pairs(seed, case.dim)
    before, after = (z1 - z2).norm(dim=1), (flow(case, z1) - flow(case, z2)).norm(dim=1)
    assert (after >= math.exp(-case.lipschitz * case.time) * before * (1 - 1e-6) - 1e-8).all()


@few
@given(bounded_fields(dim=1), seeds)
def test_in_one_dimension_the_order_is_kept(case: Bounded, seed: int) -> None:
    """Theorem 1 of the paper in one dimension: the flow is strictly increasing."""
    z = torch.sort(states(50, 1, seed), dim=0).values
    z = z + 1e-3 * torch.arange(50, dtype=F64)[:, None]
    assert (flow(case, z).diff(dim=0) > 0).all()


def test_euler_with_a_long_step_crosses() -> None:
    """Control, Theorem 1 of the paper: f = -2 z at h = 1 has hL > 1, and two solutions swap sides; not by Dopri5."""
    z = torch.tensor([[-1.0], [1.0]], dtype=F64)
    assert (ODEBlock(lambda z: -2 * z, solver=Euler(steps=1))(z).diff(dim=0) < 0).all()
    assert (ODEBlock(lambda z: -2 * z)(z).diff(dim=0) > 0).all()


@few
@given(bounded_fields(), seeds)
def test_gronwall_bounds_the_distance(case: Bounded, seed: int) -> None:
    """Lemma 1 of the paper (Gronwall 1919): |z1(t) - z2(t)| <= e^(Lt) |z1(0) - z2(0)|."""
    z1, z2 = pairs(seed, case.dim)
    before, after = (z1 - z2).norm(dim=1), (flow(case, z1) - flow(case, z2)).norm(dim=1)
    assert (after <= math.exp(case.lipschitz * case.time) * before * (1 + 1e-6) + 1e-9).all()


@few
@given(st.floats(0.1, 2.0), st.floats(0.1, 2.0), seeds)
def test_gronwall_is_attained_by_a_scalar_multiple(c: float, time: float, seed: int) -> None:
    """Lemma 1 of the paper (Gronwall 1919): f = C z with C > 0 attains e^(Ct)."""
    z1, z2 = pairs(seed, 3)
    block = ODEBlock(lambda z: c * z, t1=time, solver=TIGHT)
    ratio = (block(z1) - block(z2)).norm(dim=1) / (z1 - z2).norm(dim=1)
    assert torch.allclose(ratio, torch.tensor(math.exp(c * time), dtype=F64), rtol=1e-6)


def test_without_a_lipschitz_bound_gronwall_s_fails() -> None:
    """Control, Lemma 1 of the paper: y' = y^2 has L = 1.8 at its start, 0.9, yet the distance grows by 50 > e^1.8."""
    z = torch.tensor([[0.9], [0.8]], dtype=F64)
    growth = ODEBlock(torch.square, time=False, solver=TIGHT)(z).diff(dim=0).abs().item() / 0.1
    assert growth == pytest.approx(50, rel=1e-4) and growth > math.exp(1.8)


@settings(max_examples=10)
@given(bounded_fields(), seeds)
def test_the_log_norm_along_the_segment_bounds_more_sharply(case: Bounded, seed: int) -> None:
    """Dahlquist 1958: log of the distance grows by at most the integral of the largest log norm between the two."""
    z1, z2 = pairs(seed, case.dim)
    ts, shares = torch.linspace(0, case.time, 21, dtype=F64), torch.linspace(0, 1, 17, dtype=F64)
    with torch.no_grad():
        a, b = (ODEBlock(case.f, solver=TIGHT).solve(z, ts).zs for z in (z1, z2))
        points = a[..., None, :] + shares[:, None] * (b - a)[..., None, :]
        mu = log_norm(jacobian(case.f, points.reshape(-1, case.dim)), 2).reshape(21, 8, 17).amax(dim=2)
    bound = torch.trapezoid(mu, ts, dim=0)
    growth = ((a[-1] - b[-1]).norm(dim=1) / (z1 - z2).norm(dim=1)).log()
    assert (growth <= bound + 1e-3 * case.lipschitz * case.time + 1e-6).all()
    assert (bound <= case.lipschitz * case.time * (1 + 1e-9)).all()


@few
@given(st.floats(-3.0, 0.8), st.floats(0.1, 3.0))
def test_a_conjugacy_to_the_linear_flow(z0: float, t: float) -> None:
    """z' = -z + z^2 with h = z / (1 - z): h(flow_t z) = e^(-t) h(z) for z < 1 (Theorem 2 of the paper, exact)."""
    z = torch.tensor([[z0]], dtype=F64)
    end = ODEBlock(lambda z: z**2 - z, t1=t, solver=TIGHT)(z)
    assert (end / (1 - end)).item() == pytest.approx(math.exp(-t) * z0 / (1 - z0), abs=1e-7)


@few
@given(bounded_fields(), seeds)
def test_a_flow_is_undone_by_its_reverse_and_composes(case: Bounded, seed: int) -> None:
    """Picard 1890, Lindelof 1894: flow(-T) after flow(T) is the identity; flow(s) after flow(T - s) is flow(T)."""
    z = states(8, case.dim, seed)
    there = flow(case, z)
    slack = 1e-8 * math.exp(case.lipschitz * case.time)
    assert (flow(case, there, -case.time) - z).abs().max() < slack
    assert (flow(case, flow(case, z, 0.3 * case.time), 0.7 * case.time) - there).abs().max() < slack


@settings(max_examples=10)
@given(bounded_fields(), seeds)
def test_liouville_s_formula(case: Bounded, seed: int) -> None:
    """Liouville 1838: log det D(flow) is the integral of tr J along the solution, so orientation is kept."""
    z = states(4, case.dim, seed)
    block = ODEBlock(case.f, t1=case.time, solver=RK4(steps=60))
    derivative = torch.func.vmap(torch.func.jacrev(lambda x: block(x[None])[0]))(z)

    def with_trace(y: Tensor) -> Tensor:
        x = y[:, :-1]
        trace = jacobian(case.f, x).diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True)
        return torch.cat([case.f(x), trace], dim=1)

    with torch.no_grad():
        integral = AugmentedODEBlock(with_trace, 1, t1=case.time, solver=TIGHT)(z)[:, -1]
    sign, log_det = torch.linalg.slogdet(derivative)
    assert (sign == 1).all() and (log_det - integral).abs().max() < 1e-5


def winding(points: Tensor) -> int:
    """How often a closed polygon goes around its image of the centre, the last point."""
    ring = points[:-1] - points[-1]
    angles = torch.atan2(ring[:, 1], ring[:, 0])
    turns = torch.cat([angles, angles[:1]]).diff()
    return round(((turns + math.pi) % (2 * math.pi) - math.pi).sum().item() / (2 * math.pi))


@few
@given(bounded_fields(dim=2), seeds)
def test_the_image_of_a_circle_winds_once_around_the_image_of_its_centre(case: Bounded, seed: int) -> None:
    """Brouwer 1912: a planar flow, of degree 1, keeps inside what is inside and does not turn the circle over."""
    angle = torch.linspace(0, 2 * math.pi, 401, dtype=F64)[:-1]
    circle = torch.cat([torch.stack([angle.cos(), angle.sin()], dim=1), torch.zeros(1, 2, dtype=F64)])
    assert winding(flow(case, circle + states(1, 2, seed))) == 1


def test_a_map_that_is_no_flow_winds_otherwise() -> None:
    """Control, Brouwer 1912: one Euler step, h = 1, f = z^2 - z, complex, is z^2: the circle winds twice."""
    angle = torch.linspace(0, 2 * math.pi, 401, dtype=F64)[:-1]
    circle = torch.cat([torch.stack([angle.cos(), angle.sin()], dim=1), torch.zeros(1, 2, dtype=F64)])

    def f(z: Tensor) -> Tensor:
        x, y = z.unbind(1)
        return torch.stack([x**2 - y**2, 2 * x * y], dim=1) - z

    assert winding(ODEBlock(f, solver=Euler(steps=1))(circle)) == 2


@few
@given(bounded_fields(dim=1), seeds, st.floats(-3, 3), st.floats(-3, 3))
def test_a_one_dimensional_flow_with_an_affine_map_cannot_label_minus_plus_minus(
    case: Bounded, seed: int, slope: float, shift: float
) -> None:
    """Section 5 of the paper: scores of three ordered points are monotone, the middle one between the others."""
    z = torch.sort(states(3, 1, seed), dim=0).values
    a, b, c = (slope * flow(case, z) + shift).flatten().tolist()
    assert min(a, c) - 1e-9 <= b <= max(a, c) + 1e-9


def test_an_added_dimension_or_a_crossing_step_can() -> None:
    """Control, section 5 of the paper: a' = |z|^2 separates -/+/-, as does one Euler step of z' = z^2 - z, z -> z^2."""
    z = torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64)

    def lifted(y: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(y[:, 0]), y[:, 0] ** 2], dim=1)

    for score in (
        AugmentedODEBlock(lifted, 1)(z)[:, 1],
        ODEBlock(lambda z: z**2 - z, solver=Euler(steps=1))(z)[:, 0],
    ):
        assert ((0.5 - score).sign() == torch.tensor([-1.0, 1.0, -1.0], dtype=F64)).all()


@settings(max_examples=15)
@given(bounded_fields(), seeds, st.sampled_from([Dopri5(), Tsit5(), RK4(steps=9), Euler(steps=9)]))
def test_checkpointing_is_backpropagation_on_any_field(case: Bounded, seed: int, solver: object) -> None:
    """Griewank 1992: checkpointing gives the same gradients to rounding, for the state and every parameter."""
    found = []
    for gradient in (Checkpoint(), Backprop()):
        z = states(4, case.dim, seed).requires_grad_()
        loss = ODEBlock(case.f, t1=case.time, solver=solver, gradient=gradient)(z).square().sum()
        found.append(torch.autograd.grad(loss, [z, *case.f.parameters()]))
    assert all((a - b).abs().max() <= 1e-12 * max(1.0, b.abs().max().item()) for a, b in zip(*found, strict=True))


@settings(max_examples=15)
@given(bounded_fields(), seeds)
def test_the_adjoint_is_backpropagation_to_its_tolerance(case: Bounded, seed: int) -> None:
    """Pontryagin 1962: with L T <= 4, at 1e-10, the adjoint agrees to 1e-5; where it cannot, it says so (control)."""
    found = []
    for gradient in (Adjoint(), Backprop()):
        z = states(4, case.dim, seed).requires_grad_()
        loss = ODEBlock(case.f, t1=case.time, solver=TIGHT, gradient=gradient)(z).square().sum()
        found.append(torch.autograd.grad(loss, [z, *case.f.parameters()]))
    assert all((a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item()) for a, b in zip(*found, strict=True))
    z = states(4, case.dim, seed).requires_grad_()
    with pytest.raises(GradientError, match="Checkpoint"):
        ODEBlock(lambda z: -10 * z, t1=5.0, gradient=Adjoint())(z).sum().backward()
