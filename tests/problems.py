"""Problems with known answers, shared by all tests: closed forms, and scipy's DOP853 where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from odelayers import (
    RK4,
    Dopri5,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
    Milstein,
    ReversibleHeun,
    Rodas5P,
    StratonovichHeun,
    Tsit5,
)

FIXED = (Euler, Midpoint, Heun, RK4)
ADAPTIVE = (Dopri5, Tsit5)
CONTROLLED = (*ADAPTIVE, Rodas5P)
ODE_SOLVERS = (
    *(cls(steps=7) for cls in FIXED),
    *(cls(rtol=1e-6, atol=1e-6) for cls in CONTROLLED),
    Dopri5(1e-6, 1e-6, batch="independent"),
)
SDE_SOLVERS = (EulerMaruyama(steps=6), Milstein(steps=6), StratonovichHeun(steps=6), ReversibleHeun(steps=6))


def name(value: object) -> str:
    """A short id for a parametrised test."""
    return value.__name__ if isinstance(value, type) else type(value).__name__


@dataclass(frozen=True)
class Problem:
    """A field, a batch of initial states at t = 0 (float64), and the solution at any time."""

    name: str
    f: Callable[..., Tensor]
    z0: Tensor
    solution: Callable[[float], Tensor]
    timed: bool = False
    invariant: Callable[[Tensor], Tensor] | None = None  # of the state's rows, constant along a solution
    smooth: bool = True  # whether steps of a twentieth lie in the region where the order shows

    def rate(self, t: Tensor, z: Tensor) -> Tensor:
        """The field with its time, whether it asks for one or not."""
        return self.f(t, z) if self.timed else self.f(z)

    def along(self, ts: Sequence[float]) -> Tensor:
        """The solution at these times, `(T, B, ...)`."""
        return torch.stack([self.solution(t) for t in ts])


MATRIX = torch.tensor([[-0.5, 2.0, 0.0], [-2.0, -0.5, 0.3], [0.1, 0.0, -1.0]], dtype=torch.float64)
_START = torch.tensor([[1.0, 0.2, -0.5], [0.3, -1.0, 0.8]], dtype=torch.float64)
_GRID = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).reshape(2, 3, 2)


def _linear(z: Tensor) -> Tensor:
    return z @ MATRIX.to(z).T


def _logistic(z: Tensor) -> Tensor:
    return z * (1 - z)


def _forced(t: Tensor, z: Tensor) -> Tensor:
    return -z + torch.cos(t)


def _bell(t: Tensor, z: Tensor) -> Tensor:
    return -2 * t * z


def _logistic_at(t: float) -> Tensor:
    z0 = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    return z0 / (z0 + (1 - z0) * np.exp(-t))


def _forced_at(t: float) -> Tensor:
    return (_GRID - 0.5) * np.exp(-t) + (np.cos(t) + np.sin(t)) / 2


LINEAR = Problem("linear", _linear, _START, lambda t: _START @ torch.linalg.matrix_exp(t * MATRIX).T)
LOGISTIC = Problem("logistic, 1-d state", _logistic, _logistic_at(0.0), _logistic_at)
FORCED = Problem("forced, time-dependent", _forced, _GRID, _forced_at, timed=True)
BELL = Problem("bell, time-dependent", _bell, _GRID, lambda t: _GRID * np.exp(-(t**2)), timed=True)
PROBLEMS = (LINEAR, LOGISTIC, FORCED, BELL)

_ECCENTRICITY = torch.tensor([0.0, 0.2, 0.4], dtype=torch.float64)
_PREY = torch.tensor([[1.5, 0.6], [0.4, 1.1]], dtype=torch.float64)


def _gravity(z: Tensor) -> Tensor:
    """Newton's law around the origin: (x, y, x', y')."""
    place, speed = z[:, :2], z[:, 2:]
    return torch.cat([speed, -place / place.square().sum(dim=1, keepdim=True) ** 1.5], dim=1)


def _orbit(t: float) -> Tensor:
    """Ellipses of half axis 1 from their perihelion, by Kepler's equation E - e sin E = t."""
    e = _ECCENTRICITY
    angle = torch.full_like(e, t)
    for _ in range(50):
        angle = angle - (angle - e * angle.sin() - t) / (1 - e * angle.cos())
    minor, slowness = (1 - e**2).sqrt(), 1 - e * angle.cos()
    columns = (angle.cos() - e, minor * angle.sin(), -angle.sin() / slowness, minor * angle.cos() / slowness)
    return torch.stack(columns, dim=1)


def _energy(z: Tensor) -> Tensor:
    return z[:, 2:].square().sum(dim=1) / 2 - 1 / z[:, :2].norm(dim=1)


def _lotka_volterra(z: Tensor) -> Tensor:
    prey, hunters = z[:, 0], z[:, 1]
    return torch.stack([prey * (1 - hunters), hunters * (prey - 1)], dim=1)


@lru_cache
def _lotka_volterra_at(t: float) -> Tensor:
    return reference(_lotka_volterra, _PREY, [0.0, t])[-1] if t else _PREY


def _relaxation(t: Tensor, z: Tensor) -> Tensor:
    return -20 * (z - torch.cos(t)) - torch.sin(t)


KEPLER = Problem("Kepler", _gravity, _orbit(0.0), _orbit, invariant=_energy)
LOTKA_VOLTERRA = Problem(
    "Lotka-Volterra", _lotka_volterra, _PREY, _lotka_volterra_at, invariant=lambda z: (z - z.log()).sum(dim=1)
)
RELAXATION = Problem(
    "stiff relaxation",
    _relaxation,
    _GRID,
    lambda t: np.cos(t) + (_GRID - 1) * np.exp(-20 * t),
    timed=True,
    smooth=False,
)
ORACLES = (*PROBLEMS, KEPLER, LOTKA_VOLTERRA, RELAXATION)


@dataclass(frozen=True)
class NoisyProblem:
    """dz = drift dt + g dW with one W, as both readings write it; z(1) from z(0) and the path W(0), W(1/n), ..., W(1).

    With additive noise z(1) is not a function of the path at n times: the solution is then its mean given those.
    """

    name: str
    drift: dict[str, Callable[[Tensor], Tensor]] = field(compare=False)
    g: Callable[[Tensor], Tensor]
    solution: Callable[[Tensor, Tensor], Tensor]
    additive: bool = False

    def with_path(self, f: Callable[[Tensor], Tensor], rate: float) -> Callable[[Tensor], Tensor]:
        """A field on states (z, w), whose w grows at `rate`: with drift 0 and noise 1 it carries W itself."""
        return lambda x: torch.stack([f(x[:, 0]), torch.full_like(x[:, 1], rate)], dim=1)


def _flow_of_sine(z: Tensor, time: Tensor) -> Tensor:
    """The solution of z' = -sin z."""
    return 2 * torch.atan(torch.tan(z / 2) * torch.exp(-time))


def _decayed(z: Tensor, w: Tensor) -> Tensor:
    """z e^-2 + 0.5 times the mean of the integral of e^(-2(1 - s)) dW: step by step its weight's mean times dW."""
    n = len(w) - 1
    ends = torch.arange(1, n + 1, dtype=torch.float64) / n
    weights = torch.exp(-2 * (1 - ends)) * (1 - np.exp(-2 / n)) / (2 / n)
    return z * np.exp(-2) + 0.5 * torch.tensordot(weights, w.diff(dim=0), 1)


GBM = NoisyProblem(
    "geometric Brownian motion",
    {"ito": lambda z: 0.7 * z, "stratonovich": lambda z: (0.7 - 0.5**2 / 2) * z},
    lambda z: 0.5 * z,
    lambda z, w: z * torch.exp((0.7 - 0.5**2 / 2) + 0.5 * w[-1]),
)
RANDOM_TIME = NoisyProblem(  # dz = f o (dt + 0.5 dW); the correction g g' / 2 makes it Ito's
    "scalar-noise Stratonovich",
    {"stratonovich": lambda z: -z.sin(), "ito": lambda z: -z.sin() + 0.5**2 / 2 * z.sin() * z.cos()},
    lambda z: -0.5 * z.sin(),
    lambda z, w: _flow_of_sine(z, 1 + 0.5 * w[-1]),
)
ORNSTEIN_UHLENBECK = NoisyProblem(
    "Ornstein-Uhlenbeck",
    dict.fromkeys(("ito", "stratonovich"), lambda z: -2 * z),
    lambda z: torch.full_like(z, 0.5),
    _decayed,
    additive=True,
)
NOISY = (GBM, RANDOM_TIME, ORNSTEIN_UHLENBECK)


class TanhNet(nn.Module):
    """A smooth field with parameters, `f(t, z)` or, with a context, `f(t, z, context)`."""

    def __init__(self, dim: int = 3, hidden: int = 5, scale: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Linear(dim, hidden, dtype=torch.float64)
        self.second = nn.Linear(hidden, dim, dtype=torch.float64)
        self.scale = scale

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        inside = self.first(z) + torch.sin(t) if context is None else self.first(z) + torch.sin(t) + context
        return self.scale * self.second(torch.tanh(inside))


def reference(f: Callable[..., Tensor], z0: Tensor, ts: Sequence[float], timed: bool = False) -> Tensor:
    """States `(T, B, ...)` by scipy's DOP853 at tolerance 1e-12, in float64."""

    def flat(t: float, y: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(y).reshape(z0.shape)
        with torch.no_grad():
            dz = f(torch.tensor(t, dtype=torch.float64), z) if timed else f(z)
        return np.asarray(dz.reshape(-1))

    out = solve_ivp(flat, (ts[0], ts[-1]), z0.detach().reshape(-1).numpy(), "DOP853", ts, rtol=1e-12, atol=1e-12)
    return torch.from_numpy(out.y.T.copy()).reshape(len(ts), *z0.shape)


@lru_cache
def tangent(problem: Problem, t1: float) -> tuple[Tensor, Tensor]:
    """A direction v and the derivative of the solution at t1 along it, by DOP853 on the equation z, v' = f, J f v."""
    v = torch.randn(problem.z0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def both(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack(torch.func.jvp(lambda z: problem.rate(t, z), (y[0],), (y[1],)))

    return v, reference(both, torch.stack([problem.z0, v]), [0.0, t1], timed=True)[-1, 1]


def slope(sizes: Sequence[float], errors: Sequence[float]) -> float:
    """The exponent of a power law fitted to errors at step sizes."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def slopes(sizes: Sequence[float], errors: Sequence[float]) -> list[float]:
    """The exponents between neighbouring sizes."""
    return [slope(h, e) for h, e in zip(pairwise(sizes), pairwise(errors), strict=True)]


def close(found: Sequence[Any], wanted: Sequence[Any], tolerance: float = 1e-10) -> None:
    """The same tensors have a gradient, and the same one up to the tolerance, relative to its largest entry."""
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of a loss, None where it does not depend on a tensor."""
    return list(torch.autograd.grad(loss, list(tensors), allow_unused=True))


def finite_difference(value: Callable[[float], float], x: float, h: float = 1e-5) -> float:
    """The central difference of a function of one number."""
    return (value(x + h) - value(x - h)) / (2 * h)
