"""Theorems on noise as properties of `SDEBlock` and `DropoutSDEBlock`, each with a case that is seen to fail."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import scipy.stats
import torch
from hypothesis import assume, example, given, settings, strategies as st
from torch import Tensor

from odelayers import Dopri5, DropoutSDEBlock, EulerMaruyama, Milstein, ODEBlock, SDEBlock, StratonovichHeun
from strategies import Bounded, bounded_fields, drops, random, seeds, states

F64 = torch.float64
Field = Callable[[Tensor], Tensor]


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


def step_moments(f: Field, z: Tensor, p: float, h: float, layer_time: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of one Euler-Maruyama step, exact since it is affine in its increment of variance h."""
    block = DropoutSDEBlock(f, p, t1=h, layer_time=layer_time, solver=EulerMaruyama(steps=1))
    with torch.no_grad():
        mean, moved = (block.solve(z, noise=torch.full((1, *z.shape), dw, dtype=F64)).final for dw in (0.0, h**0.5))
    return mean, (moved - mean) ** 2


@settings(max_examples=25)
@given(bounded_fields(), seeds, drops, st.floats(0.05, 1.0))
def test_a_step_of_layer_time_has_the_moments_of_a_dropout_layer(case: Bounded, seed: int, p: float, h: float) -> None:
    """Equations 7 and 8 of the paper: with h = layer_time both moments of the dropout ResNet step are matched; with
    another layer_time they are not (control)."""
    z = states(3, case.dim, seed)
    wanted = dropout_moments(case, z, p, h)
    found = step_moments(case.f, z, p, h, h)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, wanted, strict=True))
    _, other = step_moments(case.f, z, p, h, 2 * h)
    assert torch.allclose(other, 2 * wanted[1], rtol=1e-6, atol=1e-12)


def test_a_resnet_s_variance_falls_with_its_depth_as_layer_time_says() -> None:
    """Control, eq. 8 of the paper: N dropout layers on [0, 1] have variance ~ 1/N, as has layer_time = 1/N, not 1."""
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
    """Equation 8 of the paper without noise: p = 0 and evaluation are equal exactly; training with p > 0 is not."""
    z = states(3, case.dim, seed)
    solver = EulerMaruyama(steps=steps)
    silent = DropoutSDEBlock(case.f, 0.0, solver=solver)(z)
    noisy = DropoutSDEBlock(case.f, p, solver=solver)
    assert not torch.equal(noisy(z), silent)
    assert torch.equal(noisy.eval()(z), silent)


@settings(max_examples=15)
@given(st.floats(-1, 1), st.floats(0.2, 1.0), st.sampled_from(["ito", "stratonovich"]), seeds)
def test_geometric_brownian_motion_grows_at_the_rate_of_its_reading(
    rate: float, sigma: float, calculus: str, seed: int
) -> None:
    """Ito 1951: log|z_T| / T = m + sigma W_T / T on every path, m = lambda - sigma^2/2 (Ito) or lambda (Stratonovich),
    so it is normal with variance sigma^2 / T; by the same test z_T is not (control)."""
    n, t1, steps = 4000, 2.0, 400
    solver = Milstein(steps) if calculus == "ito" else StratonovichHeun(steps)
    block = SDEBlock(lambda z: rate * z, lambda z: sigma * z, t1=t1, solver=solver, calculus=calculus, noise="scalar")
    mean, spread = rate - (sigma**2 / 2 if calculus == "ito" else 0.0), sigma / t1**0.5
    dw, one = (t1 / steps) ** 0.5 * random(steps, 100, seed=seed), torch.ones(n, 1, dtype=F64)
    given_path = block.solve(one[:100], noise=dw).final[:, 0].log() / t1 - sigma * dw.sum(dim=0) / t1
    assert abs(given_path.mean().item() - mean) < sigma**2 / 4  # the two readings are sigma^2 / 2 apart
    z = block.solve(one, generator=torch.Generator().manual_seed(seed)).final[:, 0]
    growth = z.log() / t1
    assert growth.std().item() == pytest.approx(spread, rel=5 * (0.5 / n) ** 0.5 + 2 * t1 / steps)
    assert scipy.stats.kstest(((growth - mean) / spread).numpy(), "norm").pvalue > 1e-6
    if sigma > 0.5:
        assert scipy.stats.kstest(((z - z.mean()) / z.std()).numpy(), "norm").pvalue < 1e-6


def clock_errors(f: Field, z: Tensor, p: float, time: float, dw: Tensor) -> tuple[float, float]:
    """How far each reading of dropout noise, Stratonovich and Ito, ends from the ODE at T + sigma W(T), row by row."""
    errors, steps = [], len(dw)
    for calculus, solver in (("stratonovich", StratonovichHeun(steps)), ("ito", Milstein(steps))):
        layer_time = min(1.0, 0.2 * (1 - p) / p)
        options = {"layer_time": layer_time, "calculus": calculus, "noise": "scalar", "solver": solver}
        block = DropoutSDEBlock(f, p, t1=time, **options)
        with torch.no_grad():
            exact = ODEBlock(f, solver=Dopri5(1e-9, 1e-9))(z, time + block.sigma * dw.sum(dim=0))
            errors.append(((block.solve(z, noise=dw).final - exact).abs().max() / (1 + exact.abs().max())).item())
    return errors[0], errors[1]


@settings(max_examples=10)
@given(bounded_fields(), seeds, drops)
def test_scalar_stratonovich_noise_is_the_ode_at_a_random_time(case: Bounded, seed: int, p: float) -> None:
    """Doss 1977, Sussmann 1978: the noisy clock's block ends where the ODE is at T + sigma W(T), row by row; read as
    Ito it ends many times as far away (control)."""
    z, steps = states(6, case.dim, seed, 0.5), 800
    right, wrong = clock_errors(case.f, z, p, case.time, (case.time / steps) ** 0.5 * states(steps, 6, seed + 1))
    assert right < 1e-3
    assert right < wrong / 10 or wrong < 1e-9  # a field of almost no slope along itself reads the same either way


def test_the_ito_reading_is_not_the_ode_at_a_random_time() -> None:
    """Control, Doss 1977, Sussmann 1978: for z' = -sin z the Ito reading leaves the bound that Stratonovich's keeps."""
    z, steps = torch.linspace(0.5, 2.5, 6, dtype=F64)[:, None], 800
    for seed in range(3):
        right, wrong = clock_errors(lambda z: -torch.sin(z), z, 0.3, 1.0, steps**-0.5 * states(steps, 6, seed))
        assert right < 1e-3 and wrong > 1e-2


def test_a_time_dependent_field_is_no_such_ode() -> None:
    """Control, Doss 1977, Sussmann 1978: for z' = cos(3t) the noisy clock's end depends on the path, not W(T) alone."""
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
    """Kunita 1984: in one dimension solutions on one path do not cross (Milstein, small h); on their own they do."""
    z = torch.linspace(-1, 1, 21, dtype=F64)[:, None]
    block = DropoutSDEBlock(lambda z: torch.sin(2 * z), 0.2, noise="scalar", solver=Milstein(steps=500))
    dw = (1 / 500) ** 0.5 * torch.randn(500, 1, dtype=F64)
    assert (block.solve(z, noise=dw.expand(500, 21)).final.diff(dim=0) > 0).all()
    own = (1 / 500) ** 0.5 * torch.randn(500, 21, dtype=F64)
    assert (block.solve(z, noise=own).final.diff(dim=0) < 0).any()


def log_growth(f: Field, z: Tensor, sigma: float, t1: float, dw: Tensor, calculus: str = "ito") -> Tensor:
    """log(|z_T| / |z_0|) of dz = f dt + sigma z dW, one W a row."""
    solver = Milstein(len(dw)) if calculus == "ito" else StratonovichHeun(len(dw))
    block = SDEBlock(f, lambda z: sigma * z, t1=t1, solver=solver, calculus=calculus, noise="scalar")
    with torch.no_grad():
        return (block.solve(z, noise=dw).final.norm(dim=1) / z.norm(dim=1)).log()


@settings(max_examples=10)
@given(bounded_fields(), seeds, st.floats(0.5, 2.0))
def test_scalar_noise_bounds_the_growth_path_by_path(case: Bounded, seed: int, sigma: float) -> None:
    """Theorem 6 of the paper, corrected: dz = f dt + sigma z dW, f(0) = 0, one W (Ito) has
    |z_T| <= |z_0| exp((L - sigma^2/2) T + sigma W_T), which f = L z attains; read as Stratonovich f = L z leaves it
    (control)."""
    z, steps, L, T = states(5, case.dim, seed), 500, case.lipschitz, case.time
    dw = (T / steps) ** 0.5 * states(steps, 5, seed + 1)
    bound = (L - sigma**2 / 2) * T + sigma * dw.sum(dim=0)
    attained = (log_growth(lambda z: L * z, z, sigma, T, dw) - bound).abs().max().item()
    assert attained < sigma**2 * T / 4  # the solver's error: at most half of what parts the two readings
    assert (log_growth(lambda z: L * z, z, sigma, T, dw, "stratonovich") - bound > sigma**2 * T / 4).all()
    field = log_growth(lambda z: case.f(z) - case.f(torch.zeros_like(z)), z, sigma, T, dw)
    assert (field <= bound + attained).all()


def test_a_field_that_is_not_0_at_0_leaves_that_bound() -> None:
    """Control, Theorem 6 of the paper: f = 1 has L = 0 and f(0) != 0; from 1e-3 every path is driven far beyond it."""
    dw = 0.05 * states(400, 50, 0)
    growth = log_growth(lambda z: torch.ones_like(z), torch.full((50, 1), 1e-3, dtype=F64), 1.0, 1.0, dw)
    assert (growth > -0.5 + dw.sum(dim=0) + 1).all()


def test_for_diagonal_noise_that_bound_is_false() -> None:
    """Control, Theorem 6 of the paper as printed: a skew drift, L = 1.5, under independent noise of sigma = 2 grows at
    about 0.125 up to T = 40 (1,500 paths: 0.125 +- 0.004), though L - sigma^2/2 = -0.5."""
    dim, sigma, t1, steps, rows = 16, 2.0, 40.0, 8000, 200
    a = states(dim, dim, 1)
    a = a - a.T
    a = a * (1.5 / torch.linalg.matrix_norm(a, 2))
    block = SDEBlock(lambda z: z @ a.T, lambda z: sigma * z, t1=t1, solver=EulerMaruyama(steps))
    z = torch.ones(rows, dim, dtype=F64)
    with torch.no_grad():
        growth = (block(z).norm(dim=1) / z.norm(dim=1)).log() / t1
    assert growth.std().item() / rows**0.5 < 0.0125
    assert growth.mean().item() == pytest.approx(0.125, abs=0.05)  # four standard errors


@settings(max_examples=20)
@given(st.floats(-8.0, -0.5), st.floats(0.02, 0.4), st.floats(0.1, 1.5))
@example(-6.0, 0.1, 0.3)  # between the two bounds
def test_euler_maruyama_bears_steps_below_two_over_the_rate_less_the_variance(rate: float, p: float, h: float) -> None:
    """Higham 2000: on z' = rate z with dropout noise the mean square of a step's factor is below 1 just where
    h < 2/|rate| - sigma^2; Euler's own bound, 2/|rate|, is not enough (control)."""
    bound = 2 / -rate - p / (1 - p)
    assume(abs(h - bound) > 1e-6)
    mean, variance = (x.item() for x in step_moments(lambda z: rate * z, torch.ones(1, 1, dtype=F64), p, h, 1.0))
    square = mean**2 + variance
    assert square == pytest.approx(1 + 2 * rate * h + rate**2 * h * (h + p / (1 - p)), rel=1e-9)
    assert (square < 1) == (h < bound)
    if bound < h < 2 / -rate:
        assert abs(mean) < 1 < square
