"""Problems with known answers, shared by all tests: closed forms, and scipy's DOP853 where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    StratonovichHeun,
    Tsit5,
)

FIXED = (Euler, Midpoint, Heun, RK4)
ADAPTIVE = (Dopri5, Tsit5)
ODE_SOLVERS = (*(cls(steps=7) for cls in FIXED), *(cls(rtol=1e-6, atol=1e-6) for cls in ADAPTIVE))
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

    def along(self, ts: Sequence[float]) -> Tensor:
        """The solution at these times, `(T, B, ...)`."""
        return torch.stack([self.solution(t) for t in ts])


MATRIX = torch.tensor([[-0.5, 2.0, 0.0], [-2.0, -0.5, 0.3], [0.1, 0.0, -1.0]], dtype=torch.float64)
_START = torch.tensor([[1.0, 0.2, -0.5], [0.3, -1.0, 0.8]], dtype=torch.float64)
_GRID = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).reshape(2, 3, 2)


def _linear(z: Tensor) -> Tensor:
    return z @ MATRIX.T


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
FORCED = Problem("forced, time-dependent", _forced, _GRID, _forced_at)
BELL = Problem("bell, time-dependent", _bell, _GRID, lambda t: _GRID * np.exp(-(t**2)))
PROBLEMS = (LINEAR, LOGISTIC, FORCED, BELL)


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


def slope(sizes: Sequence[float], errors: Sequence[float]) -> float:
    """The exponent of a power law fitted to errors at step sizes."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def slopes(sizes: Sequence[float], errors: Sequence[float]) -> list[float]:
    """The exponents between neighbouring sizes."""
    return [slope(h, e) for h, e in zip(pairwise(sizes), pairwise(errors), strict=True)]


def gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of a loss, None where it does not depend on a tensor."""
    return list(torch.autograd.grad(loss, list(tensors), allow_unused=True))


def finite_difference(value: Callable[[float], float], x: float, h: float = 1e-5) -> float:
    """The central difference of a function of one number."""
    return (value(x + h) - value(x - h)) / (2 * h)
