"""Theorems on what a field can be: any Jacobians at points (Lemma 2), no free contraction on a ball, no wide angles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from odelayers import jacobian, simplex_head
from strategies import Bounded, bounded_fields, seeds, states

F64 = torch.float64


def bumped(points: Tensor, matrices: Tensor, radius: float, z: Tensor) -> Tensor:
    """sum phi_i(z) A_i (z - z_i) with phi_i = (1 - |z - z_i|^2 / radius^2)_+^2, compact and C^1."""
    apart = z[:, None] - points
    bumps = (1 - apart.square().sum(2, keepdim=True) / radius**2).clamp(min=0) ** 2
    return (bumps * torch.einsum("kij,bkj->bki", matrices, apart)).sum(1)


@settings(max_examples=40)
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_bumps_make_equilibria_with_any_jacobians(seed: int, count: int, dim: int) -> None:
    """Lemma 2: f = sum phi_i(z) A_i (z - z_i) with disjoint C^1 bumps has f(z_i) = 0 and Jacobian A_i there."""
    points, matrices = states(count, dim, seed), states(count * dim, dim, seed + 1).reshape(count, dim, dim)
    apart = (points[:, None] - points).norm(dim=2) + torch.eye(count, dtype=F64) * 1e9
    radius = 0.99 * min(1.0, apart.min().item())
    assert (bumped(points, matrices, radius, points) == 0).all()
    torch.testing.assert_close(
        jacobian(lambda z: bumped(points, matrices, radius, z), points), matrices, rtol=0, atol=1e-9
    )
    rim = points[:1] + radius * torch.nn.functional.normalize(states(1, dim, seed + 2), dim=1)
    inner, outer = (  # C^1: the derivative is continuous across the rim of a bump, where it is that of nothing
        jacobian(lambda z: bumped(points[:1], matrices[:1], radius, z), points[:1] + (rim - points[:1]) * share)
        for share in (1 - 1e-7, 1 + 1e-7)
    )
    assert (outer == 0).all() and inner.abs().max() < 1e-5 * (1 + matrices.abs().max()) * dim


@settings(max_examples=15)
@given(seeds, st.integers(1, 4))
def test_bumps_that_overlap_do_not(seed: int, dim: int) -> None:
    """Control for Lemma 2: bumps that reach the neighbour's centre leave f(z_i) != 0 there."""
    points = states(2, dim, seed)
    matrices = torch.eye(dim, dtype=F64).expand(2, dim, dim)
    radius = 2 * (points[0] - points[1]).norm().item()
    assert (bumped(points, matrices, radius, points).norm(dim=1) > 0.1 * radius).all()


def ball(dim: int) -> tuple[Tensor, Tensor]:
    """Points and weights (sum 1) of a quadrature of the unit ball of 1, 2 or 3 dimensions, spectrally accurate."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    if dim == 1:
        return torch.from_numpy(nodes)[:, None], torch.from_numpy(weights / 2)
    r, w = (nodes + 1) / 2, weights / 2 * ((nodes + 1) / 2) ** (dim - 1)
    angle = np.arange(40) * (2 * math.pi / 40)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    sphere, share = ring, np.ones(40)
    if dim == 3:
        flat = np.sqrt(1 - nodes**2)[:, None, None] * ring
        sphere = np.concatenate([flat, np.broadcast_to(nodes[:, None, None], (20, 40, 1))], 2).reshape(-1, 3)
        share = np.repeat(weights, 40)
    measure = (w[:, None] * share).reshape(-1)
    points = (r[:, None, None] * sphere).reshape(-1, dim)
    return torch.from_numpy(points), torch.from_numpy(measure / measure.sum())


@settings(max_examples=30)
@given(st.integers(1, 3).flatmap(lambda d: bounded_fields(dim=d)), seeds, st.floats(0.1, 1.0))
def test_the_mean_trace_over_a_ball_is_bounded_by_the_field(case: Bounded, seed: int, radius: float) -> None:
    """Gauss 1813: the mean of tr J over a ball of radius r is >= -(d/r) sup|f|; -(z - c) attains it."""
    points, measure = ball(case.dim)
    centre = states(1, case.dim, seed)
    inside = centre + radius * points
    rim = centre + radius * torch.nn.functional.normalize(points[points.norm(dim=1) > 0], dim=1)
    for f, sharp in ((case.f, False), (lambda z: centre - z, True)):
        trace = (jacobian(f, inside).diagonal(dim1=1, dim2=2).sum(1) * measure).sum().item()
        bound = -case.dim / radius * f(torch.cat([rim, inside])).norm(dim=1).max().item()
        assert trace >= bound - 1e-6 * case.lipschitz / radius
        assert not sharp or trace == pytest.approx(bound)


def test_the_trace_at_one_point_is_not_so_bounded() -> None:
    """Control, Gauss 1813: f = -e sin(z/e) has |f| <= e and tr J = -1 at 0 for every e, while -(d/r) sup|f|
    tends to 0."""
    for e in (1e-1, 1e-3, 1e-6):
        f = lambda z, e=e: -e * torch.sin(z / e)  # noqa: E731
        assert jacobian(f, torch.zeros(1, 1, dtype=F64)).item() == pytest.approx(-1.0)
        assert f(torch.linspace(-1, 1, 101, dtype=F64)[:, None]).abs().max() <= e


@pytest.mark.parametrize("classes", [3, 5, 10])
def test_the_simplex_needs_its_dimension(classes: int) -> None:
    """Control, Rankin 1955: -1/(k-1) is attained in k - 1 dimensions; in k - 2 no frame of 2,000 does, and the head
    refuses."""
    V = simplex_head(classes, classes - 1).weight.double()
    cosine = (V @ V.T - 2 * torch.eye(classes, dtype=F64)).max().item()
    assert cosine == pytest.approx(-1 / (classes - 1), abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(2000, classes, classes - 2, generator=generator, dtype=F64)
    frames = torch.nn.functional.normalize(frames, dim=2)
    widest = (frames @ frames.mT - 2 * torch.eye(classes, dtype=F64)).amax((1, 2)).min().item()
    assert widest > -1 / (classes - 1) + 1e-3
    with pytest.raises(ValueError, match=f"dim >= classes - 1 = {classes - 1}"):
        simplex_head(classes, classes - 2)
