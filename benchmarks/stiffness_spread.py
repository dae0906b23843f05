"""A batch whose rows differ a thousandfold in stiffness: what a step size of its own for each row is worth.

Each row relaxes at its own rate k, from 1 to 1000, towards a moving target: z' = -k (z - cos(t + phase)), batch 128 of
16 coordinates, t in [0, 1], Dormand-Prince 5 at rtol = atol = 1e-5, float32. The solution is known in closed form, and
so is its gradient with respect to k and z0: the errors are against those in float64 (relative). NFE here is the mean
over the rows of how often a row is evaluated, which is what a step size of its own saves.
"""

from __future__ import annotations

from functools import partial

import torch
import torchdiffeq
from harness import Run, arguments, compare, missing, parser, publish
from peers import Solve, no_graph
from torch import Tensor, nn

from odelayers import Dopri5, ODEBlock

BATCH, DIM, T1, TOL = 128, 16, 1.0, 1e-5


class Relaxation(nn.Module):
    """f(t, z, k) = -k (z - cos(t + phase)); k (B, 1) is context, so that a row that is left out takes its own along."""

    def __init__(self) -> None:
        super().__init__()
        self.phase: Tensor
        self.register_buffer("phase", torch.linspace(0.0, 3.0, DIM))
        self.rows = 0

    def forward(self, t: Tensor, z: Tensor, k: Tensor) -> Tensor:
        self.rows += len(z)
        return -k * (z - torch.cos(t.reshape(-1, 1) + self.phase))


def exact(k: Tensor, z: Tensor, phase: Tensor) -> Tensor:
    """The solution at T1."""

    def slow(t: float) -> Tensor:
        return (k**2 * torch.cos(t + phase) + k * torch.sin(t + phase)) / (k**2 + 1)

    return slow(T1) + (z - slow(0.0)) * torch.exp(-k * T1)


def solvers(f: Relaxation, k: Tensor) -> dict[str, Solve]:
    """Every library's way from the initial state to the final one."""

    def g(t: Tensor, z: Tensor) -> Tensor:
        return f(t, z, k)

    def own(block: ODEBlock) -> Solve:
        return lambda z: block(z, context=k)

    span = torch.tensor([0.0, T1], device=k.device)
    found = {
        "odelayers, shared steps": own(ODEBlock(f, time=True, t1=T1, solver=Dopri5(rtol=TOL, atol=TOL))),
        "odelayers, own steps": own(ODEBlock(f, time=True, t1=T1, solver=Dopri5(TOL, TOL, batch="independent"))),
        "torchdiffeq odeint": lambda z: torchdiffeq.odeint(g, z, span, rtol=TOL, atol=TOL, method="dopri5")[-1],
    }
    if "torchode" not in missing():
        from peers import torchode_solve

        found["torchode, own steps"] = torchode_solve(g, T1, tol=TOL)
    return found


def gradient(solve: Solve, k: Tensor, z: Tensor) -> Tensor:
    """Forward and backward, with respect to the rates and the initial state."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(solve(z).square().sum(), [k, z])])


def main() -> None:
    args = arguments(parser(__doc__ or "", rounds=7))
    f = Relaxation().to(args.device)
    k = torch.logspace(0, 3, BATCH, device=args.device)[:, None].requires_grad_()
    z = torch.randn(BATCH, DIM).to(args.device).requires_grad_()

    def run(go: partial[Tensor]) -> Run:
        def check() -> tuple[float, Tensor]:
            f.rows = 0
            found = go()
            return f.rows / BATCH, found

        return Run(go, check)

    solves = solvers(f, k)
    exact_k, exact_z, phase = (x.detach().double().requires_grad_() for x in (k, z, f.phase))
    state = exact(exact_k, exact_z, phase)
    slopes = gradient(lambda z: exact(exact_k, z, phase), exact_k, exact_z)
    ahead = {name: run(partial(no_graph, solve, z)) for name, solve in solves.items()}
    both = {name: run(partial(gradient, solve, k, z)) for name, solve in solves.items()}
    table = [
        *compare("forward", ahead, state.detach(), args.rounds),
        *compare("forward+backward", both, slopes, args.rounds),
    ]
    title = f"Rates from 1 to 1000 in one batch of {BATCH}: dopri5 at {TOL:g}, t in [0, {T1:g}], float32"
    publish("stiffness_spread", title, table, args)


if __name__ == "__main__":
    main()
