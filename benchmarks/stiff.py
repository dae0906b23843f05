"""Stiff fields: odelayers' Rodas5P over a batch beside torchdiffeq's scipy_solver, which takes one sample at a time.

Batch 64, float64. Robertson's reactions to t = 1e5, each sample with starts and a first rate constant of its own; van
der Pol's oscillator with mu = 1000 to t = 2000, from starts between 1.5 and 2.5, so that the samples jump at different
times.
Tolerances are chosen for equal errors, ours never the larger. The error is the largest over the samples of the final
state, each component relative to its largest value in the batch, against scipy's Radau with the analytic Jacobian at a
tolerance of 1e-10 (Robertson) and 1e-9. scipy's values carry no gradient, so those rows of ours stand alone; their
error is that of the gradient in the starts, against Rodas5P at a hundredth of the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torchdiffeq
from harness import Row, arguments, interleaved, parser, publish, rows
from peers import evaluations
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from odelayers import Backprop, Checkpoint, ODEBlock, Rodas5P

BATCH, F64 = 64, torch.float64


class Robertson(nn.Module):
    """A -> B, B + B -> B + C, B + C -> A + C; the first rate comes as context, (B,)."""

    @staticmethod
    def rate(y: list[float], k: float) -> list[float]:
        """One sample in plain numbers, for the reference."""
        a, b, c = y
        first, second, third = k * a, 3e7 * b * b, 1e4 * b * c
        return [third - first, first - second - third, second]

    @staticmethod
    def slope(y: list[float], k: float) -> list[list[float]]:
        """Its Jacobian."""
        _, b, c = y
        return [[-k, 1e4 * c, 1e4 * b], [k, -1e4 * c - 6e7 * b, -1e4 * b], [0.0, 6e7 * b, 0.0]]

    def forward(self, t: Tensor, z: Tensor, rate: Tensor) -> Tensor:
        a, b, c = z.unbind(1)
        first, second, third = rate * a, 3e7 * b * b, 1e4 * b * c
        return torch.stack([third - first, first - second - third, second], dim=1)


class VanDerPol(nn.Module):
    """x'' = mu (1 - x^2) x' - x, with mu as context, (B,)."""

    @staticmethod
    def rate(y: list[float], mu: float) -> list[float]:
        """One sample in plain numbers, for the reference."""
        x, v = y
        return [v, mu * (1 - x * x) * v - x]

    @staticmethod
    def slope(y: list[float], mu: float) -> list[list[float]]:
        """Its Jacobian."""
        x, v = y
        return [[0.0, 1.0], [-2 * mu * x * v - 1, mu * (1 - x * x)]]

    def forward(self, t: Tensor, z: Tensor, mu: Tensor) -> Tensor:
        x, v = z.unbind(1)
        return torch.stack([v, mu * (1 - x * x) * v - x], dim=1)


@dataclass(frozen=True)
class Case:
    """A problem, and the tolerances at which the errors are alike; atol is rtol times `floor`."""

    name: str
    f: Robertson | VanDerPol
    z: Tensor
    context: Tensor
    t1: float
    floor: float
    exact: float
    own: float
    peers: dict[str, float]

    def block(self, tol: float, gradient: Backprop | Checkpoint = Backprop()) -> ODEBlock:  # noqa: B008  (frozen)
        return ODEBlock(self.f, t1=self.t1, solver=Rodas5P(tol, tol * self.floor), gradient=gradient)

    def peer(self, method: str) -> Callable[[], Tensor]:
        """torchdiffeq's scipy_solver, sample by sample."""
        tol, times = self.peers[method], torch.tensor([0.0, self.t1], dtype=F64)

        def solve() -> Tensor:
            found = []
            for z, context in zip(self.z.split(1), self.context.split(1), strict=True):
                f = lambda t, y, c=context: self.f(t, y, c)  # noqa: E731
                options = {"method": "scipy_solver", "options": {"solver": method}}
                found.append(torchdiffeq.odeint(f, z, times, rtol=tol, atol=tol * self.floor, **options)[-1])
            return torch.cat(found)

        return solve

    def reference(self) -> Tensor:
        """The final states by scipy's Radau."""
        found = []
        for z, context in zip(self.z.tolist(), self.context.tolist(), strict=True):
            rate = lambda t, y, c=context: self.f.rate(y.tolist(), c)  # noqa: E731
            slope = lambda t, y, c=context: np.array(self.f.slope(y.tolist(), c))  # noqa: E731
            tol = {"rtol": self.exact, "atol": self.exact * self.floor}
            found.append(solve_ivp(rate, (0.0, self.t1), z, "Radau", [self.t1], jac=slope, **tol).y[:, -1])
        return torch.from_numpy(np.stack(found))

    def rows(self, rounds: int) -> list[Row]:
        runs: dict[str, Callable[[], Tensor]] = {
            f"odelayers Rodas5P, {self.own:.0e}": lambda: self.block(self.own)(self.z, context=self.context)
        }
        runs |= {f"torchdiffeq scipy_solver {m}, {tol:.0e}": self.peer(m) for m, tol in self.peers.items()}
        nfe, error = {}, {}
        with torch.no_grad():
            exact = self.reference()
            scale = exact.abs().amax(dim=0)
            for name, run in runs.items():
                nfe[name], final = evaluations(self.f, run)
                error[name] = ((final - exact) / scale).abs().max().item()
            table = rows(f"{self.name}, forward", interleaved(runs, rounds), nfe, error)
        return table + self.training(rounds)

    def training(self, rounds: int) -> list[Row]:
        """Forward and backward, in the starts."""

        def gradient(block: ODEBlock) -> Tensor:
            z = self.z.clone().requires_grad_()
            return torch.autograd.grad(block(z, context=self.context).sum(), z)[0]

        exact = gradient(self.block(self.own / 100, Checkpoint()))
        runs = {
            f"odelayers Rodas5P, {type(g).__name__}": lambda g=g: gradient(self.block(self.own, g))
            for g in (Backprop(), Checkpoint())
        }
        nfe, error = {}, {}
        for name, run in runs.items():
            nfe[name], found = evaluations(self.f, run)
            error[name] = ((found - exact).norm() / exact.norm()).item()
        return rows(f"{self.name}, forward+backward", interleaved(runs, rounds), nfe, error)


def cases() -> list[Case]:
    g = torch.Generator().manual_seed(0)
    starts = torch.rand(BATCH, 3, generator=g, dtype=F64) * torch.tensor([0.5, 0.0, 0.5], dtype=F64)
    starts[:, 0] += 0.5
    rates = 0.04 * 4 ** (torch.rand(BATCH, generator=g, dtype=F64) - 0.5)
    turns = torch.stack([torch.linspace(1.5, 2.5, BATCH, dtype=F64), torch.zeros(BATCH, dtype=F64)], dim=1)
    mu = torch.full((BATCH,), 1e3, dtype=F64)
    return [
        Case("Robertson", Robertson(), starts, rates, 1e5, 1e-4, 1e-10, 1e-5, {"LSODA": 1e-6, "Radau": 1e-4}),
        Case("van der Pol", VanDerPol(), turns, mu, 2e3, 1.0, 1e-9, 3e-6, {"LSODA": 1e-7, "Radau": 1e-4}),
    ]


def main() -> None:
    options = parser(__doc__ or "", rounds=3)
    options.set_defaults(device="cpu")  # scipy's place
    args = arguments(options)
    table = [row for case in cases() for row in case.rows(args.rounds)]
    publish("stiff", f"Stiff solves: Robertson and van der Pol (mu = 1000), batch {BATCH}, float64", table, args)


if __name__ == "__main__":
    main()
