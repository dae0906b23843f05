"""Every legal solver, reading, kind of noise, gradient, dtype and device on the noisy problems, path by path.

What is added to `NOISY` or `SDE_SOLVERS` joins every test; a public solver or method that is missing fails one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchsde
from torch import Tensor, nn

import odelayers
from odelayers import (
    EulerMaruyama,
    Milstein,
    ReversibleHeun,
    SDEBlock,
    StratonovichHeun,
    TorchSDE,
)
from odelayers._solvers import Solver
from odelayers._solvers.reference_sde import _READINGS
from problems import GBM, NOISY, NoisyProblem, name, slope
from test_oracles import DEVICES, F64, GRADIENTS, concrete

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(F64, id="float64")]


class Entry(NamedTuple):
    """A solver by steps; for scalar and for additive noise its strong order and its largest relative error at 40 steps.

    The errors are three to five times the worst that was seen over the problems of a kind. With additive noise both
    are towards the solution's mean given the path at the steps.
    """

    make: Callable[[int], Solver]
    scalar: tuple[float, float]
    additive: tuple[float, float]

    def of(self, problem: NoisyProblem) -> tuple[float, float]:
        return self.additive if problem.additive else self.scalar


SDE_SOLVERS: dict[str, Entry] = {
    "EulerMaruyama": Entry(EulerMaruyama, (0.5, 0.08), (1, 0.15)),
    "Milstein": Entry(Milstein, (1, 0.03), (1, 0.15)),
    "StratonovichHeun": Entry(StratonovichHeun, (1, 0.008), (2, 0.003)),
    "ReversibleHeun": Entry(ReversibleHeun, (1, 0.008), (2, 0.003)),
    "torchsde euler": Entry(lambda n: TorchSDE("euler", n), (0.5, 0.08), (1, 0.15)),
    # Of the path it knows more than its ends, so that their mean lies at the distance of what they leave open.
    "torchsde srk": Entry(lambda n: TorchSDE("srk", n), (1.5, 0.0015), (1, 0.05)),
    "torchsde milstein": Entry(lambda n: TorchSDE("milstein", n), (1, 0.03), (1, 0.15)),
    "torchsde midpoint": Entry(lambda n: TorchSDE("midpoint", n), (1, 0.008), (2, 0.003)),
    "torchsde heun": Entry(lambda n: TorchSDE("heun", n), (1, 0.008), (2, 0.003)),
    "torchsde euler_heun": Entry(lambda n: TorchSDE("euler_heun", n), (1, 0.03), (1, 0.15)),
    "torchsde reversible_heun": Entry(lambda n: TorchSDE("reversible_heun", n), (1, 0.008), (2, 0.003)),
}
READINGS = [(s, calculus) for s in SDE_SOLVERS for calculus in SDE_SOLVERS[s].make(1).calculus]
PAIRS = [(s, c, g) for s, c in READINGS for g in GRADIENTS if g.accepts(SDE_SOLVERS[s].make(1))]
DIAGONAL = [s for s in SDE_SOLVERS if "diagonal" in SDE_SOLVERS[s].make(1).noises]


def label(value: Any) -> str | None:
    """The name of a problem or a gradient; everything else names itself."""
    return value.name if isinstance(value, NoisyProblem) else name(value) if value in GRADIENTS else None


def test_every_public_solver_of_sdes_and_method_of_torchsde_stands_in_the_table() -> None:
    """A solver that is added to the library without a line here is found."""
    made = [entry.make(1) for entry in SDE_SOLVERS.values()]
    assert {name(s) for s in made} == {n for n in concrete(Solver) if getattr(odelayers, n).calculus}
    assert {s.method for s in made if isinstance(s, TorchSDE)} == set(_READINGS)


def noisy(problem: NoisyProblem, solver: Any, calculus: str, gradient: Any = GRADIENTS[0]) -> SDEBlock:
    """A block over states (z, W), so that every solver hands over the path that it drew."""
    f, g = problem.with_path(problem.drift[calculus], 0.0), problem.with_path(problem.g, 1.0)
    return SDEBlock(f, g, solver=solver, calculus=calculus, noise="scalar", gradient=gradient)


def starts(rows: int, dtype: torch.dtype = F64, device: str = "cpu") -> Tensor:
    """States (z, W = 0)."""
    return torch.stack([torch.linspace(0.2, 1.5, rows), torch.zeros(rows)], dim=1).to(device, dtype)


def solved(block: SDEBlock, z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """z(1), and the path at the ends of the steps (float64, on the CPU)."""
    zs = block.solve(z, [i / steps for i in range(steps + 1)]).zs
    return zs[-1, :, 0], zs[:, :, 1].detach().cpu().double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", NOISY, ids=label)
@pytest.mark.parametrize("solver, calculus, gradient", PAIRS, ids=label)
def test_noisy_states_and_derivatives_are_those_of_the_solution(
    solver: str, calculus: str, gradient: Any, problem: NoisyProblem, dtype: torch.dtype, device: str
) -> None:
    """Path by path z(1) is the closed form at the W drawn, and dz(1)/dz(0) its derivative; in either reading."""
    z, steps = starts(200, dtype, device).requires_grad_(), 40
    end, path = solved(noisy(problem, SDE_SOLVERS[solver].make(steps), calculus, gradient), z, steps)
    (found,) = torch.autograd.grad(end.sum(), z)
    start = starts(200)[:, 0].requires_grad_()
    exact = problem.solution(start, path)
    (wanted,) = torch.autograd.grad(exact.sum(), start)
    assert end.dtype == dtype and end.device.type == device
    _, bar = SDE_SOLVERS[solver].of(problem)
    assert (end.detach().cpu() - exact).abs().mean() < bar * exact.abs().mean()
    assert (found[:, 0].cpu() - wanted).abs().mean() < bar * wanted.mean()


@pytest.mark.parametrize("problem", NOISY, ids=label)
@pytest.mark.parametrize("solver, calculus", READINGS)
def test_the_strong_order_of_convergence(solver: str, calculus: str, problem: NoisyProblem) -> None:
    """The mean error over 2,000 paths, each against the closed form at its own W, falls at the order."""
    entry, sizes, errors, z = SDE_SOLVERS[solver], [32, 64, 128, 256], [], starts(2000)
    with torch.no_grad():
        for n in sizes:
            end, path = solved(noisy(problem, entry.make(n), calculus), z, n)
            errors.append((end - problem.solution(z[:, 0], path)).abs().mean().item())
    assert slope([1 / n for n in sizes], errors) == pytest.approx(entry.of(problem)[0], abs=0.1), errors


class Growth(nn.Module):
    """z' = rate z beside a W of its own rate."""

    def __init__(self, rate: float, own: float) -> None:
        super().__init__()
        self.rate, self.own = nn.Parameter(torch.tensor(rate, dtype=F64)), own

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.rate * x[:, 0], torch.full_like(x[:, 1], self.own)], dim=1)


@pytest.mark.parametrize("solver, calculus, gradient", PAIRS, ids=label)
def test_parameters_of_drift_and_diffusion_have_the_derivative_of_the_solution(
    solver: str, calculus: str, gradient: Any
) -> None:
    """z(1) = z exp(a + b W(1)), in Ito's reading exp(a - b^2/2 + b W(1)): its derivatives in a and b, path by path."""
    f, g, steps = Growth(0.3, 0.0), Growth(0.4, 1.0), 200
    block = SDEBlock(f, g, solver=SDE_SOLVERS[solver].make(steps), calculus=calculus, noise="scalar", gradient=gradient)
    end = block(starts(500))
    found = torch.autograd.grad(end[:, 0].mean(), [f.rate, g.rate])
    a, b = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.3, 0.4))
    shift = a - b**2 / 2 if calculus == "ito" else a
    exact = (starts(500)[:, 0] * torch.exp(shift + b * end[:, 1].detach())).mean()
    wanted = torch.autograd.grad(exact, [a, b])
    bar = SDE_SOLVERS[solver].scalar[1] / 2  # at 40 steps; first-order errors are a fifth of that at 200
    assert all(abs(x - y) < bar for x, y in zip(found, wanted, strict=True)), (found, wanted)


class Recorded(torchsde.BrownianInterval):
    """torchsde's path, kept so that a test can ask for it after the solve."""

    last: torchsde.BrownianInterval

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        Recorded.last = self


@pytest.fixture
def path_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, Tensor]]:
    """Solve with a W for every coordinate: the end, and the path's increments over `fine` equal steps."""
    monkeypatch.setattr(torchsde, "BrownianInterval", Recorded)

    def solve(block: SDEBlock, z: Tensor, fine: int) -> tuple[Tensor, Tensor]:
        if isinstance(block.solver, TorchSDE):  # it draws its own
            end = block(z)
            return end, torch.stack([Recorded.last(i / fine, (i + 1) / fine) for i in range(fine)]).double()
        dw = torch.randn(fine, *z.shape, dtype=F64) / fine**0.5
        coarse = dw.unflatten(0, (block.solver.steps, -1)).sum(dim=1)
        return block.solve(z, noise=coarse.to(z)).final, dw

    return solve


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver, calculus, gradient", [p for p in PAIRS if p[0] in DIAGONAL], ids=label)
def test_diagonal_noise_moves_every_coordinate_on_its_own_path(
    solver: str, calculus: str, gradient: Any, dtype: torch.dtype, path_of: Any
) -> None:
    """Geometric Brownian motion in each of three coordinates: states and derivatives are those at their own W(1)."""
    z, (_, bar) = starts(600, dtype)[:, 0].reshape(200, 3).requires_grad_(), SDE_SOLVERS[solver].scalar
    block = SDEBlock(
        GBM.drift[calculus],
        GBM.g,
        solver=SDE_SOLVERS[solver].make(40),
        calculus=calculus,
        noise="diagonal",
        gradient=gradient,
    )
    end, dw = path_of(block, z, 40)
    (found,) = torch.autograd.grad(end.sum(), z)
    factor = GBM.solution(torch.ones(200, 3, dtype=F64), dw.cumsum(dim=0))
    exact = z.detach().double() * factor
    assert end.dtype == dtype
    assert (end.detach() - exact).abs().mean() < bar * exact.mean()
    assert (found - factor).abs().mean() < bar * factor.mean()


@pytest.mark.parametrize("solver", DIAGONAL)
def test_noise_that_does_not_commute_has_order_one_half_with_its_constant(solver: str, path_of: Any) -> None:
    """dz = (dW1, z1 dW2): no method of increments sees Levy's area, of variance h^2/4 a step (with Ito's sum h^2/2).

    So the root mean square error against the integral over 256 steps is (c (h - 1/256))^(1/2), c = 1/4 (Ito: 1/2), here
    over 2,000 paths, which say it to 2 %: the order is 1/2 even of the methods whose order for scalar noise is 1.
    """
    make, fine, rows, sizes, errors = SDE_SOLVERS[solver].make, 256, 2000, [4, 8, 16, 32], []
    ito = "ito" in make(1).calculus
    for n in sizes:
        block = SDEBlock(
            lambda z: 0 * z,
            lambda z: torch.stack([torch.ones_like(z[:, 0]), z[:, 0]], dim=1),
            solver=make(n),
            calculus="ito" if ito else "stratonovich",
            noise="diagonal",
        )
        with torch.no_grad():
            end, dw = path_of(block, torch.zeros(rows, 2, dtype=F64), fine)
        before, middle = dw[..., 0].cumsum(dim=0) - dw[..., 0], dw[..., 0].cumsum(dim=0) - dw[..., 0] / 2
        area = ((before if ito else middle) * dw[..., 1]).sum(dim=0)
        errors.append((end[:, 1] - area).square().mean().sqrt().item())
    wanted = [((0.5 if ito else 0.25) * (1 / n - 1 / fine)) ** 0.5 for n in sizes]
    assert errors == pytest.approx(wanted, rel=0.08)


@pytest.mark.parametrize(
    "solver, calculus, noise", [(*r, n) for r in READINGS for n in SDE_SOLVERS[r[0]].make(1).noises]
)
def test_ornstein_uhlenbeck_has_its_mean_and_variance(solver: str, calculus: str, noise: str) -> None:
    """dz = -2 z dt + 0.5 dW from 1: mean e^-2, variance (1 - e^-4) / 16, over 20,000 rows and within five errors."""
    method, rows = SDE_SOLVERS[solver].make(60), 20_000
    block = SDEBlock(lambda z: -2 * z, lambda z: torch.full_like(z, 0.5), solver=method, calculus=calculus, noise=noise)
    with torch.no_grad():
        end = block(torch.ones(rows, 1, dtype=F64))
    mean, variance = np.exp(-2.0), (1 - np.exp(-4.0)) / 16
    bias = 2 / 60  # of a first-order method, relative
    assert abs(end.mean().item() - mean) < 5 * (variance / rows) ** 0.5 + 2 * bias * mean
    assert abs(end.var().item() - variance) < (5 * (2 / rows) ** 0.5 + 2 * bias) * variance


OWN = [(s, c, n) for s, c in READINGS if "torchsde" not in s for n in SDE_SOLVERS[s].make(1).noises]


@pytest.mark.parametrize("solver, calculus, noise", OWN)
def test_permuting_splitting_or_padding_a_noisy_batch_moves_no_sample(solver: str, calculus: str, noise: str) -> None:
    """With its increments a sample's path is its own, to rounding; the next sample's increments move it (control)."""
    z, matrix = torch.randn(5, 3, dtype=F64), torch.randn(3, 3, dtype=F64)
    dw = torch.randn(8, *(z.shape if noise == "diagonal" else z.shape[:1]), dtype=F64) / 8**0.5
    block = SDEBlock(
        lambda z: torch.tanh(z @ matrix.T),
        lambda z: 0.4 * torch.cos(z),
        solver=SDE_SOLVERS[solver].make(8),
        calculus=calculus,
        noise=noise,
    )

    def solve(rows: list[int], of: list[int] | None = None) -> Tensor:
        return block.solve(z[rows], noise=dw[:, rows if of is None else of]).final

    everyone = [0, 1, 2, 3, 4]
    whole = solve(everyone)
    for rows in ([4, 2, 0, 1, 3], [2], [0, 1], [*everyone, *everyone, 3]):
        assert (solve(rows) - whole[rows]).abs().max() < 1e-13
    assert (solve(everyone, [1, 2, 3, 4, 0]) - whole).abs().amax(dim=1).min() > 1e-3
