"""SDE solvers against closed forms over common paths, moments by theory, and the two reference libraries."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torchsde
from torch import Tensor, nn

from odelayers import (
    RK4,
    Dopri5,
    DropoutSDEBlock,
    Euler,
    EulerMaruyama,
    Milstein,
    ODEBlock,
    ReversibleHeun,
    SDEBlock,
    StratonovichHeun,
    TorchDiffEq,
    TorchSDE,
)
from odelayers._driver import Brownian, Clock, NoisyClock
from problems import SDE_SOLVERS, TanhNet, name, slope

LAMBDA, SIGMA = 0.7, 0.8
F64 = torch.float64


def increments(steps: int, paths: int, t1: float = 1.0) -> Tensor:
    """Brownian increments on a grid, `(steps, paths)`."""
    return (t1 / steps) ** 0.5 * torch.randn(steps, paths, dtype=F64)


def coarser(dw: Tensor, factor: int) -> Tensor:
    """The same paths on a grid `factor` times as coarse."""
    return dw.reshape(-1, factor, *dw.shape[1:]).sum(dim=1)


def gbm_at_one(w: Tensor, calculus: str) -> Tensor:
    """Geometric Brownian motion from 1 at time 1 with W(1) = w."""
    drift = LAMBDA - SIGMA**2 / 2 if calculus == "ito" else LAMBDA
    return torch.exp(drift + SIGMA * w)


@pytest.mark.parametrize(
    "solver, calculus, order",
    [
        (EulerMaruyama, "ito", 0.5),
        (Milstein, "ito", 1.0),
        (Milstein, "stratonovich", 1.0),
        (StratonovichHeun, "stratonovich", 1.0),
        (ReversibleHeun, "stratonovich", 1.0),
    ],
    ids=lambda v: v if isinstance(v, str) else name(v) if isinstance(v, type) else "",
)
def test_strong_orders_over_common_paths(solver: type, calculus: str, order: float) -> None:
    """Kloeden and Platen 1992: the mean error over 4,000 paths of geometric Brownian motion falls at that order."""
    dw, sizes, errors = increments(256, 4000), [], []
    exact = gbm_at_one(dw.sum(dim=0), calculus)
    for factor in (1, 2, 4, 8, 16):
        given = coarser(dw, factor)
        block = SDEBlock(
            lambda z: LAMBDA * z,
            lambda z: SIGMA * z,
            solver=solver(steps=len(given)),
            calculus=calculus,
            noise="scalar",
        )
        zs = block.solve(torch.ones(4000, 1, dtype=F64), noise=given).final[:, 0]
        sizes.append(1 / len(given))
        errors.append((zs - exact).abs().mean().item())
    assert slope(sizes, errors) == pytest.approx(order, abs=0.08)


def test_the_other_reading_is_another_equation() -> None:
    """Control, Stratonovich 1966: Euler-Maruyama does not approach the Stratonovich solution however small the step."""
    dw = increments(512, 2000)
    block = SDEBlock(lambda z: LAMBDA * z, lambda z: SIGMA * z, solver=EulerMaruyama(steps=512), noise="scalar")
    found = block.solve(torch.ones(2000, 1, dtype=F64), noise=dw).final[:, 0].log().mean()
    assert found - gbm_at_one(dw.sum(dim=0), "ito").log().mean() == pytest.approx(0, abs=0.01)
    assert found - gbm_at_one(dw.sum(dim=0), "stratonovich").log().mean() == pytest.approx(-(SIGMA**2) / 2, abs=0.02)


@pytest.mark.parametrize("solver", [StratonovichHeun, Milstein], ids=name)
@pytest.mark.parametrize("layer_time", [1.0, 0.25])
def test_a_noisy_clock_is_the_ode_run_to_a_random_time(solver: type, layer_time: float) -> None:
    """Doss 1977, Sussmann 1978: dz = f o (dt + sigma dW) with one W a row is the flow of f for time T + sigma W(T):
    here for z' = -sin z."""
    dw, z0, errors = increments(1024, 50), torch.linspace(-2, 2, 100, dtype=F64).reshape(50, 2), []
    for factor in (16, 4, 1):
        given = coarser(dw, factor)
        options = {"calculus": "stratonovich", "noise": "scalar", "layer_time": layer_time}
        block = DropoutSDEBlock(lambda z: -z.sin(), 0.2, solver=solver(steps=len(given)), **options)
        assert block.sigma == pytest.approx(math.sqrt(layer_time * 0.25))
        clock = 1.0 + block.sigma * dw.sum(dim=0)[:, None]
        exact = 2 * torch.atan(torch.tan(z0 / 2) * torch.exp(-clock))
        errors.append((block.solve(z0, noise=given).final - exact).abs().mean().item())
    assert errors[2] < errors[1] / 2.5 < errors[0] / 6 and errors[2] < 2e-3, errors


def test_dropout_moments_by_enumeration() -> None:
    """Equations 7 and 8 of the paper: One Euler-Maruyama step of h = layer_time has the mean and variance of the
    dropout step over all masks."""
    p, layer_time, dim = 0.3, 0.25, 3
    f, z = TanhNet(dim), torch.randn(1, dim, dtype=F64)
    fz = f(torch.zeros((), dtype=F64), z).detach()
    mean, square = torch.zeros_like(z), torch.zeros_like(z)
    for mask in itertools.product((0.0, 1.0), repeat=dim):
        kept = torch.tensor(mask, dtype=F64)
        weight = math.prod(1 - p if m else p for m in mask)
        after = z + layer_time * fz * kept / (1 - p)
        mean, square = mean + weight * after, square + weight * after**2
    block = DropoutSDEBlock(f, p, t1=layer_time, layer_time=layer_time, solver=EulerMaruyama(steps=1))
    unit = torch.zeros(1, 1, dim, dtype=F64)
    assert torch.allclose(block.solve(z, noise=unit).final, mean, atol=1e-14)
    spread = block.solve(z, noise=unit + layer_time**0.5).final - mean  # one standard deviation of dW
    assert torch.allclose(spread**2, square - mean**2, atol=1e-14)


@pytest.mark.parametrize("pair", [(EulerMaruyama(9), Euler(9)), (StratonovichHeun(9), None)], ids=["Euler", "Heun"])
def test_without_noise_the_block_is_its_ode_method_bit_for_bit(pair: tuple[Any, Any]) -> None:
    """Equation 8 of the paper: p = 0 in training and any p in evaluation equal the deterministic solve exactly."""
    sde, ode = pair
    f, z = TanhNet(3), torch.randn(4, 3, dtype=F64)
    calculus = sde.calculus[0]
    silent = DropoutSDEBlock(f, 0.0, solver=sde, calculus=calculus)(z)
    evaluated = DropoutSDEBlock(f, 0.4, solver=sde, calculus=calculus).eval()(z)
    assert torch.equal(silent, evaluated)
    if ode is not None:
        assert torch.equal(silent, ODEBlock(f, solver=ode)(z))
    noisy = DropoutSDEBlock(f, 0.4, solver=sde, calculus=calculus, noise_in_eval=True).eval()
    assert not torch.equal(noisy(z), silent)


@pytest.mark.parametrize("solver", [*SDE_SOLVERS, TorchSDE("euler", 6), TorchSDE("srk", 6)], ids=name)
def test_the_path_comes_from_torch_s_generator_alone(solver: Any) -> None:
    """The same torch seed gives the same path, another seed another, numpy's seed is of no consequence."""
    block = SDEBlock(torch.sin, torch.cos, solver=solver, calculus=solver.calculus[0], noise="scalar", time=False)
    z, found = torch.randn(3, 2, dtype=F64), []
    for torch_seed, numpy_seed in ((1, 1), (1, 2), (2, 1)):
        torch.manual_seed(torch_seed)
        np.random.seed(numpy_seed)
        found.append(block(z))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    a, b = (block.solve(z, generator=torch.Generator().manual_seed(9)).final for _ in range(2))
    assert torch.equal(a, b)
    before = torch.get_rng_state()
    block.solve(z, generator=torch.Generator().manual_seed(9))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["diagonal", "scalar"])
def test_given_noise_of_the_drawn_law(kind: str) -> None:
    """Drawn increments have mean 0 and variance dt, independent over steps and rows, one per coordinate or per row."""
    block = SDEBlock(lambda z: 0 * z, torch.ones_like, t1=2.0, solver=EulerMaruyama(4), noise=kind, time=False)
    zs = block.solve(torch.zeros(20_000, 3, dtype=F64), [0.0, 0.5, 1.0, 1.5, 2.0]).zs
    dw = zs.diff(dim=0)
    assert dw.mean().abs() < 0.02
    assert dw.var(dim=1) == pytest.approx(torch.full((4, 3), 0.5, dtype=F64).numpy(), abs=0.03)
    assert (dw[0] * dw[1]).mean().abs() < 0.02
    assert torch.equal(dw[..., 0], dw[..., 1]) == (kind == "scalar")


def test_given_noise_must_have_the_solve_s_shape() -> None:
    """(steps, B, ...) or, for scalar noise, (steps, B); an output between grid points asks for one more step."""
    block = SDEBlock(torch.sin, torch.cos, solver=EulerMaruyama(4), time=False)
    z = torch.randn(3, 2, dtype=F64)
    block.solve(z, noise=torch.zeros(4, 3, 2))
    block.solve(z, [0.0, 0.3, 1.0], noise=torch.zeros(5, 3, 2))
    for shape in ((5, 3, 2), (4, 3, 1), (4, 2, 3), (4,)):
        with pytest.raises(ValueError, match=r"noise: expected increments of shape \(4, 3, 2\) .*got"):
            block.solve(z, noise=torch.zeros(shape))
    with pytest.raises(ValueError, match="draws its own path"):
        SDEBlock(torch.sin, torch.cos, solver=TorchSDE("euler", 4), time=False).solve(z, noise=torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match="an ODE takes no increments"):
        ODEBlock(torch.sin, time=False).solve(z, noise=torch.zeros(4, 3, 2))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"solver": EulerMaruyama(5), "calculus": "stratonovich"}, "converges to the ito solution.*StratonovichHeun"),
        ({"solver": StratonovichHeun(5)}, "converges to the stratonovich solution.*EulerMaruyama"),
        ({"solver": TorchSDE("srk", 5), "noise": "diagonal"}, "right for scalar noise only.*EulerMaruyama"),
        ({"solver": TorchSDE("milstein", 5), "noise": "diagonal"}, "right for scalar noise only"),
        ({"solver": Milstein(5)}, "right for scalar noise only.*silently wrong"),
        ({"solver": TorchSDE("heun", 5)}, "converges to the stratonovich solution"),
        ({"solver": RK4(5)}, "solves ODEs only; for calculus='ito' use EulerMaruyama"),
        ({"calculus": "backward"}, "calculus: expected one of 'ito', 'stratonovich', got 'backward'"),
        ({"noise": "general"}, "noise: expected one of 'diagonal', 'scalar', got 'general'"),
    ],
)
def test_wrong_mathematics_is_refused_at_construction(options: dict[str, Any], words: str) -> None:
    """A solver that would converge to another equation is refused by both SDE blocks, with those that would not."""
    for build in (
        lambda **o: SDEBlock(torch.sin, torch.cos, time=False, **o),
        lambda **o: DropoutSDEBlock(TanhNet(), **o),
    ):
        with pytest.raises(ValueError, match=words):
            build(**options)


@pytest.mark.parametrize("solver", [Dopri5(), TorchDiffEq("dopri5")], ids=name)
def test_a_solver_for_odes_alone_asks_for_no_noise(solver: Any) -> None:
    """A solver says how many increments a solve over ts draws: a method without a reading of noise, none."""
    assert solver.calculus == () and solver.noise_steps([0.0, 0.5, 1.0]) == 0
    assert EulerMaruyama(5).noise_steps([0.0, 0.5, 1.0]) == 6


def test_an_sde_runs_forwards() -> None:
    """Against time, in one row or in all, it is refused; an ODE solver is named where an SDE solver is out of place."""
    block, z = SDEBlock(torch.sin, torch.cos, time=False), torch.zeros(2, 1)
    for times in ({"t1": -1.0}, {"ts": [1.0, 0.0]}, {"t1": torch.tensor([1.0, -1.0])}):
        with pytest.raises(ValueError, match="an SDE runs forwards in time"):
            block.solve(z, **times)
    with pytest.raises(ValueError, match=r"is a solver for SDEs; for an ODE use Dopri5"):
        ODEBlock(torch.sin, solver=EulerMaruyama(3), time=False)


def test_torchsde_as_a_solver_is_torchsde() -> None:
    """The same path handed to torchsde itself gives the same states."""
    torch.manual_seed(4)
    z = torch.randn(3, 2, dtype=F64)
    found = SDEBlock(torch.sin, torch.cos, solver=TorchSDE("euler", 10), time=False)(z)
    torch.manual_seed(4)
    torch.randn(3, 2, dtype=F64)
    entropy = int(torch.randint(2**63 - 1, (1,)))
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(3, 2), dtype=F64, entropy=entropy, dt=0.1)
    sde = type("S", (), {"f": lambda s, t, y: y.sin(), "g": lambda s, t, y: y.cos()})()
    sde.noise_type, sde.sde_type = "diagonal", "ito"
    wanted = torchsde.sdeint(sde, z, torch.tensor([0.0, 1.0]), bm=bm, method="euler", dt=0.1)[-1]
    assert torch.allclose(found, wanted, atol=1e-12)


def test_reversible_heun_is_unstable_where_stratonovich_heun_is_not() -> None:
    """z' = -5 z over T = 20 with many steps: reversible Heun grows, StratonovichHeun decays (the docs' warning)."""
    z = torch.ones(1, 1, dtype=F64)
    ends = [
        DropoutSDEBlock(lambda z: -5 * z, 0.0, t1=20.0, solver=solver(steps=400), calculus="stratonovich")(z)
        .abs()
        .item()
        for solver in (ReversibleHeun, StratonovichHeun)
    ]
    assert ends[0] > 1e3 and ends[1] < 1e-8


def test_the_factor_of_a_step_in_one_pass_is_that_of_its_increment() -> None:
    """`dt + sigma dW`, drawn at its mean and size, is what the increment of the same step makes of it, row by row."""
    noise = Brownian("diagonal", (4, 3), F64, torch.device("cpu"), seeds=(3, 5))
    for driver in (NoisyClock(Clock(), noise, SIGMA), NoisyClock(Clock(), noise, SIGMA).take(torch.tensor([2, 0]))):
        for step, h in ((0, 0.25), (1, 0.01)):
            (drawn,), (made,) = driver.step_factors(step, h), driver.factors(h, driver.increment(step, h))
            torch.testing.assert_close(drawn, made, rtol=1e-14, atol=1e-15)


class Recorded(nn.Module):
    """A field of a context, linear, that notes the dtype it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dtypes = nn.Linear(2, 2), set()

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        found = self.linear(c)
        self.dtypes.add(found.dtype)
        return found - z


def test_drift_and_diffusion_run_under_the_caller_s_autocast() -> None:
    """What made the context in bfloat16 made it for both fields; the state stays in float32."""
    f, g, encoder = Recorded(), Recorded(), nn.Linear(2, 2)
    block = SDEBlock(f, g, solver=EulerMaruyama(5), time=False)
    with torch.autocast("cpu", torch.bfloat16):
        end = block(torch.ones(3, 2), context=encoder(torch.ones(3, 2)))
    assert f.dtypes == g.dtypes == {torch.bfloat16}
    assert end.dtype == torch.float32
