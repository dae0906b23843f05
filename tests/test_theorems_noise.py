"""Theorems on noise as properties of `SDEBlock` and `DropoutSDEBlock`, each with a case that is seen to fail."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from odelayers import Dopri5, DropoutSDEBlock, EulerMaruyama, Milstein, ODEBlock, SDEBlock, StratonovichHeun
from strategies import Bounded, bounded_fields, drops, seeds, states

F64 = torch.float64


def dropout_moments(case: Bounded, z: Tensor, p: float, h: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of z + h f(z) mask / (1 - p), over all masks."""
    with torch.no_grad():
        fz = case.f(z)
    mean, square = torch.zeros_like(z), torch.zeros_like(z)
    for mask in itertools.product((0.0, 1.0), repeat=case.dim):
        weight = math.prod(1 - p if kept else p for kept in mask)
        after = z + h * fz * torch.tensor(mask, dtype=F64) / (1 - p)
        mean, square = mean + weight * after, square + weight * after**2
    return mean, square - mean**2


def step_moments(case: Bounded, z: Tensor, p: float, h: float, layer_time: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of one Euler-Maruyama step, exact since it is affine in its increment of variance h."""
    block = DropoutSDEBlock(case.f, p, t1=h, layer_time=layer_time, solver=EulerMaruyama(steps=1))
    with torch.no_grad():
        mean, moved = (block.solve(z, noise=torch.full((1, *z.shape), dw, dtype=F64)).final for dw in (0.0, h**0.5))
    return mean, (moved - mean) ** 2


@settings(max_examples=25)
@given(bounded_fields(), seeds, drops, st.floats(0.05, 1.0))
def test_a_step_of_layer_time_has_the_moments_of_a_dropout_layer(case: Bounded, seed: int, p: float, h: float) -> None:
    """With h = layer_time both moments of the dropout ResNet step are matched; with another layer_time they are not."""
    z = states(3, case.dim, seed)
    wanted = dropout_moments(case, z, p, h)
    found = step_moments(case, z, p, h, h)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, wanted, strict=True))
    _, other = step_moments(case, z, p, h, 2 * h)
    assert torch.allclose(other, 2 * wanted[1], rtol=1e-6, atol=1e-12)


def test_a_resnet_s_variance_falls_with_its_depth_as_layer_time_says() -> None:
    """N dropout layers on [0, 1] have variance ~ 1/N, as has layer_time = 1/N; the paper's layer_time = 1 has not."""
    p, rows = 0.3, 40_000

    def f(z: Tensor) -> Tensor:
        return torch.cos(z)

    deep = {}
    for n in (8, 32):
        z = torch.zeros(rows, 1, dtype=F64)
        for _ in range(n):
            z = z + f(z) / n * torch.bernoulli(torch.full_like(z, 1 - p)) / (1 - p)
        block = DropoutSDEBlock(f, p, layer_time=1 / n, solver=EulerMaruyama(steps=n))
        found = block(torch.zeros(rows, 1, dtype=F64))
        assert found.mean().item() == pytest.approx(z.mean().item(), abs=0.01)
        assert found.var().item() == pytest.approx(z.var().item(), rel=0.07)
        deep[n] = z.var().item()
    assert deep[8] / deep[32] == pytest.approx(4, rel=0.2)
    paper = DropoutSDEBlock(f, p, solver=EulerMaruyama(steps=32))(torch.zeros(rows, 1, dtype=F64)).var().item()
    assert paper > 10 * deep[32]


@settings(max_examples=15)
@given(bounded_fields(), seeds, drops, st.integers(1, 9))
def test_no_dropout_is_no_noise_bit_for_bit(case: Bounded, seed: int, p: float, steps: int) -> None:
    """p = 0 and evaluation equal each other exactly; training with p > 0 does not."""
    z = states(3, case.dim, seed)
    solver = EulerMaruyama(steps=steps)
    silent = DropoutSDEBlock(case.f, 0.0, solver=solver)(z)
    noisy = DropoutSDEBlock(case.f, p, solver=solver)
    assert not torch.equal(noisy(z), silent)
    assert torch.equal(noisy.eval()(z), silent)


@settings(max_examples=15)
@given(st.floats(-1, 1), st.floats(0.1, 1.0), st.sampled_from(["ito", "stratonovich"]), seeds)
def test_geometric_brownian_motion_grows_at_the_rate_of_its_reading(
    rate: float, sigma: float, calculus: str, seed: int
) -> None:
    """log|z_T| / T has mean lambda - sigma^2/2 (Ito) or lambda (Stratonovich) and variance sigma^2 / T."""
    n, t1, steps = 4000, 2.0, 100
    solver = Milstein(steps) if calculus == "ito" else StratonovichHeun(steps)
    block = SDEBlock(lambda z: rate * z, lambda z: sigma * z, t1=t1, solver=solver, calculus=calculus, noise="scalar")
    z = block.solve(torch.ones(n, 1, dtype=F64), generator=torch.Generator().manual_seed(seed)).final
    growth = z.abs().log() / t1
    mean, spread = rate - (sigma**2 / 2 if calculus == "ito" else 0.0), sigma / t1**0.5
    bias = t1 / steps  # the methods' own error in the mean is of the order of the step
    assert abs(growth.mean().item() - mean) < 5 * spread / n**0.5 + bias
    assert growth.std().item() == pytest.approx(spread, rel=5 * (0.5 / n) ** 0.5 + 2 * bias)


@settings(max_examples=15)
@given(bounded_fields(), seeds, drops)
def test_scalar_stratonovich_noise_is_the_ode_at_a_random_time(case: Bounded, seed: int, p: float) -> None:
    """Doss and Sussmann: the noisy clock's block ends where the ODE is at T + sigma W(T), row by row."""
    z, steps = states(6, case.dim, seed, 0.5), 400
    layer_time = min(1.0, 0.2 * (1 - p) / p)
    block = DropoutSDEBlock(
        case.f,
        p,
        t1=case.time,
        layer_time=layer_time,
        calculus="stratonovich",
        noise="scalar",
        solver=StratonovichHeun(steps),
    )
    dw = (case.time / steps) ** 0.5 * states(steps, 6, seed + 1)
    ends = case.time + block.sigma * dw.sum(dim=0)
    with torch.no_grad():
        exact = ODEBlock(case.f, solver=Dopri5(1e-9, 1e-9))(z, ends)
        found = block.solve(z, noise=dw).final
    assert (found - exact).abs().max() < 0.05 * (1 + exact.abs().max())


def test_a_time_dependent_field_is_no_such_ode() -> None:
    """Control: for z' = cos(3t) the noisy clock's end depends on the path, not on W(T) alone."""
    block = DropoutSDEBlock(
        lambda t, z: torch.cos(3 * t) + 0 * z,
        0.2,
        calculus="stratonovich",
        noise="scalar",
        solver=StratonovichHeun(100),
    )
    dw = 0.1 * states(100, 200, 0)
    dw = dw - dw.mean(dim=0)  # every path ends at W(T) = 0
    ends = block.solve(torch.zeros(200, 1, dtype=F64), noise=dw).final
    assert ends.std() > 0.05


def test_shared_noise_keeps_the_order_and_independent_noise_does_not() -> None:
    """In one dimension solutions on one path do not cross (Milstein, small h); on paths of their own they do."""
    z = torch.linspace(-1, 1, 21, dtype=F64)[:, None]
    block = DropoutSDEBlock(lambda z: torch.sin(2 * z), 0.2, noise="scalar", solver=Milstein(steps=500))
    dw = (1 / 500) ** 0.5 * torch.randn(500, 1, dtype=F64)
    assert (block.solve(z, noise=dw.expand(500, 21)).final.diff(dim=0) > 0).all()
    own = (1 / 500) ** 0.5 * torch.randn(500, 21, dtype=F64)
    assert (block.solve(z, noise=own).final.diff(dim=0) < 0).any()


@settings(max_examples=10)
@given(bounded_fields(), seeds, st.floats(0.2, 2.0))
def test_scalar_noise_bounds_the_growth_path_by_path(case: Bounded, seed: int, sigma: float) -> None:
    """dz = f dt + sigma z dW, f(0) = 0, one W (Ito): |z_T| <= |z_0| exp((L - sigma^2/2) T + sigma W_T)."""
    z, steps = states(5, case.dim, seed), 500

    def f(z: Tensor) -> Tensor:
        return case.f(z) - case.f(torch.zeros_like(z))

    block = SDEBlock(f, lambda z: sigma * z, t1=case.time, solver=Milstein(steps), noise="scalar")
    dw = (case.time / steps) ** 0.5 * states(steps, 5, seed + 1)
    with torch.no_grad():
        growth = (block.solve(z, noise=dw).final.norm(dim=1) / z.norm(dim=1)).log()
    bound = (case.lipschitz - sigma**2 / 2) * case.time + sigma * dw.sum(dim=0)
    assert (growth <= bound + 0.1 * sigma**3 * case.time + 0.01).all()


def test_for_diagonal_noise_that_bound_is_false() -> None:
    """Control: a skew drift, L = 1.5, under independent noise of sigma = 2 grows, though L - sigma^2/2 = -0.5."""
    dim, sigma, t1, steps = 16, 2.0, 40.0, 8000
    a = states(dim, dim, 1)
    a = a - a.T
    a = a * (1.5 / torch.linalg.matrix_norm(a, 2))
    block = SDEBlock(lambda z: z @ a.T, lambda z: sigma * z, t1=t1, solver=EulerMaruyama(steps))
    z = torch.ones(64, dim, dtype=F64)
    with torch.no_grad():
        growth = (block(z).norm(dim=1) / z.norm(dim=1)).log().mean().item() / t1
    assert growth > 0.0
