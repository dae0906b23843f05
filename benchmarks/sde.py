"""SDEs on a fixed grid, odelayers beside torchsde: Euler-Maruyama forward, reversible Heun forward+backward.

A 64-dimensional sine field f, batch 128, t in [0, 5], float32, dz = f dt + sigma f dW with sigma = 1/3, the dropout
noise of p = 0.1. Both libraries evaluate f once a step (torchsde by its `f_and_g`); `SDEBlock(f, g)` evaluates a g of
its own too. What is timed draws its own noise; what is checked runs on one given path in both. The error is relative:

- Euler-Maruyama (Ito, a Wiener process per coordinate): of the final state, against Euler-Maruyama in float64 on the
  same path at 64 times as many steps as the finer grid. It is the strong error of the method, alike in both.
- Reversible Heun (Stratonovich, one Wiener process a row): the gradient with respect to parameters and initial state,
  against the exact one. Such an equation is the ODE z' = f(z) run to the random time T + sigma W_T of each row.

torchsde's path is told the step size: without it some of its queries do not end. The floor is the eager field alone,
evaluated as often as the first row does in one chain; it draws nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchdiffeq
import torchsde
from forward_backward import Sine
from harness import Row, Run, arguments, compare, parser, publish
from peers import bare, forward, gradients, training
from torch import Tensor, nn

from odelayers import Backprop, Checkpoint, DropoutSDEBlock, EulerMaruyama, Reversible, ReversibleHeun, SDEBlock

DIM, BATCH, T1, P, FINER = 64, 128, 5.0, 0.1, 64
SIGMA = (P / (1 - P)) ** 0.5
Noisy = Callable[[Tensor, Tensor | None], Tensor]  # the initial state and the path, or None for one that is drawn


class GivenPath(torchsde.BaseBrownian):
    """The increments of one path over equal steps, as torchsde asks for them."""

    def __init__(self, increments: Tensor) -> None:
        self.increments, self.h = increments, T1 / len(increments)

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Tensor:
        first, last = (round(float(t) / self.h) for t in (ta, tb))
        return self.increments[first:last].sum(0)

    def __repr__(self) -> str:
        return f"GivenPath({len(self.increments)} steps)"

    dtype = property(lambda self: self.increments.dtype)
    device = property(lambda self: self.increments.device)
    shape = property(lambda self: self.increments.shape[1:])
    levy_area_approximation = "none"


class TorchsdeField(nn.Module):
    """dz = f dt + sigma f dW for torchsde, one evaluation for both."""

    def __init__(self, f: nn.Module, sde_type: str, noise_type: str) -> None:
        super().__init__()
        self.field, self.sde_type, self.noise_type = f, sde_type, noise_type

    def f_and_g(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        f = self.field(t, y)
        return f, SIGMA * f if self.noise_type == "diagonal" else (SIGMA * f).unsqueeze(-1)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.field(t, y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.f_and_g(t, y)[1]


def torchsde_solve(f: nn.Module, steps: int, method: str, sde_type: str, noise: str, adjoint: bool = False) -> Noisy:
    """torchsde at a fixed step."""
    sde, more = TorchsdeField(f, sde_type, noise), {}
    if adjoint:
        more = {"adjoint_method": "adjoint_reversible_heun", "adjoint_params": tuple(f.parameters())}
    solve = torchsde.sdeint_adjoint if adjoint else torchsde.sdeint

    def run(z: Tensor, path: Tensor | None) -> Tensor:
        size = z.shape if noise == "diagonal" else (len(z), 1)
        bm = torchsde.BrownianInterval(0.0, T1, size, z.dtype, z.device, dt=T1 / steps) if path is None else None
        ts = torch.tensor([0.0, T1], dtype=z.dtype, device=z.device)
        return solve(sde, z, ts, bm=bm or GivenPath(path), method=method, dt=T1 / steps, **more)[-1]

    return run


def own(block: SDEBlock | DropoutSDEBlock) -> Noisy:
    """A block, its noise drawn or given."""
    return lambda z, path: block.solve(z, noise=path).final


def run(f: nn.Module, solve: Noisy, go: Callable[[Callable[[Tensor], Tensor]], Tensor], path: Tensor) -> Run:
    """Timed on paths that are drawn, checked on the given one; every evaluation of f is counted."""

    def check() -> tuple[int, Tensor]:
        calls: list[None] = []
        hook = f.register_forward_pre_hook(lambda *_: calls.append(None))
        found = go(lambda z: solve(z, path))
        hook.remove()
        return len(calls), found

    return Run(lambda: go(lambda z: solve(z, None)), check)


@torch.no_grad()
def finer(f: nn.Module, z: Tensor, grids: tuple[int, ...], steps: int) -> tuple[dict[int, Tensor], Tensor]:
    """The increments of one path on each of the coarser grids, and the state that `steps` steps along it lead to."""
    h, t, y = T1 / steps, z.new_zeros(()), z
    paths = {grid: z.new_zeros(grid, *z.shape) for grid in grids}
    for i in range(steps):
        dw = torch.randn_like(z) * h**0.5
        for grid, path in paths.items():
            path[i * grid // steps] += dw
        slope = f(t, y)
        y = y + slope * (h + SIGMA * dw)
    return paths, y


def euler_maruyama(f: Sine, z: Tensor, rounds: int) -> list[Row]:
    """Forward, over 20 and 90 steps."""
    grids = (20, 90)
    paths, exact = finer(copy.deepcopy(f).double(), z.double(), grids, 90 * FINER)

    @torch.no_grad()
    def go(solve: Callable[[Tensor], Tensor]) -> Tensor:
        return solve(z)

    def g(t: Tensor, z: Tensor) -> Tensor:
        return SIGMA * f(t, z)

    table = []
    for steps in grids:
        solver = EulerMaruyama(steps)
        solves = {
            "odelayers DropoutSDEBlock": own(DropoutSDEBlock(f, p=P, t1=T1, solver=solver)),
            "odelayers SDEBlock": own(SDEBlock(f, g, t1=T1, solver=solver)),
            "torchsde euler": torchsde_solve(f, steps, "euler", "ito", "diagonal"),
        }
        runs = {name: run(f, solve, go, paths[steps].float()) for name, solve in solves.items()}
        runs["bare field"] = bare(forward, f, z, steps)
        table += compare(f"Euler-Maruyama forward, {steps} steps", runs, exact, rounds)
    return table


def exact_gradient(f: nn.Module, z: Tensor, path: Tensor) -> Tensor:
    """Of scalar noise, read as Stratonovich: by the ODE run to the random time of each row."""
    clock = T1 + SIGMA * path.sum(0)
    span = torch.tensor([0.0, 1.0], dtype=z.dtype, device=z.device)

    def solve(z: Tensor) -> Tensor:
        return torchdiffeq.odeint(lambda t, y: clock * f(t, y), z, span, rtol=1e-10, atol=1e-10, method="dopri5")[-1]

    return gradients(f, z, solve)


def reversible_heun(f: Sine, z: Tensor, rounds: int, steps: int = 90) -> list[Row]:
    """Forward and backward; torchsde's adjoint of it is exact and keeps nothing on the way."""
    path = torch.randn(steps, len(z), 1, dtype=torch.float64, device=z.device) * (T1 / steps) ** 0.5
    options = {"p": P, "t1": T1, "solver": ReversibleHeun(steps), "calculus": "stratonovich", "noise": "scalar"}
    solves = {
        "odelayers Backprop": own(DropoutSDEBlock(f, **options, gradient=Backprop())),
        "odelayers Reversible": own(DropoutSDEBlock(f, **options, gradient=Reversible())),
        "odelayers Checkpoint": own(DropoutSDEBlock(f, **options, gradient=Checkpoint())),
        "torchsde backprop": torchsde_solve(f, steps, "reversible_heun", "stratonovich", "scalar"),
        "torchsde adjoint_reversible_heun": torchsde_solve(
            f, steps, "reversible_heun", "stratonovich", "scalar", adjoint=True
        ),
    }
    runs = {name: run(f, solve, partial(gradients, f, z), path.float()) for name, solve in solves.items()}
    runs["bare field"] = bare(training, f, z, steps + 1)
    exact = exact_gradient(copy.deepcopy(f).double(), z.double(), path)
    return compare(f"reversible Heun forward+backward, {steps} steps", runs, exact, rounds)


def main() -> None:
    args = arguments(parser(__doc__ or ""))
    f, z = Sine(DIM).to(args.device), torch.randn(BATCH, DIM).to(args.device)
    table = [*euler_maruyama(f, z, args.rounds), *reversible_heun(f, z, max(1, args.rounds // 2))]
    publish("sde", f"SDE: {DIM}-d sine field, dropout noise, batch {BATCH}, t in [0, {T1:g}], float32", table, args)


if __name__ == "__main__":
    main()
