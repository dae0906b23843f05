"""Forward and forward+backward of one ODE solve: odelayers beside torchdiffeq, at the same tolerance.

A 64-dimensional sine field, batch 128, t in [0, 5], Dormand-Prince 5 at rtol = atol = 1e-5, float32. The error stands
beside each time: of the final state, or of the parameters' gradient, against a float64 solve by torchdiffeq at 1e-12.
The same tolerance asks for more where every sample must meet it than where the batch does on average, so odelayers also
runs at 2e-5, where both libraries evaluate the field equally often.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torchdiffeq
from harness import arguments, evaluations, interleaved, publish, rows
from torch import Tensor, nn

from odelayers import Adjoint, Backprop, Checkpoint, Dopri5, ODEBlock, TorchDiffEq

DIM, BATCH, T1, TOL = 64, 128, 5.0, 1e-5
Solve = Callable[[nn.Module, Tensor], Tensor]


class Sine(nn.Module):
    """f(t, z) = sin(-(Wz + b)): one module for every library, and counted evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.sin(-self.linear(z))


def peer(odeint: Callable[..., Tensor], tol: float = TOL) -> Solve:
    """A solve by torchdiffeq."""

    def solve(f: nn.Module, z: Tensor) -> Tensor:
        return odeint(f, z, torch.tensor([0.0, T1], dtype=z.dtype), rtol=tol, atol=tol, method="dopri5")[-1]

    return solve


def gradients(f: nn.Module, final: Tensor) -> Tensor:
    """The gradient of a fixed loss with respect to every parameter, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(final.square().sum(), list(f.parameters()))])


def main() -> None:
    args = arguments(__doc__ or "")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    f, z = Sine(), torch.randn(BATCH, DIM)
    exact_f, exact_z = copy.deepcopy(f).double(), z.double()
    exact = peer(torchdiffeq.odeint, tol=1e-12)(exact_f, exact_z)
    exact_grad = gradients(exact_f, exact)

    own = Dopri5(rtol=TOL, atol=TOL)
    blocks = {
        "odelayers Backprop": ODEBlock(f, t1=T1, solver=own, gradient=Backprop()),
        "odelayers Backprop, 2e-5": ODEBlock(f, t1=T1, solver=Dopri5(rtol=2 * TOL, atol=2 * TOL)),
        "odelayers Checkpoint": ODEBlock(f, t1=T1, solver=own, gradient=Checkpoint()),
        "odelayers Adjoint": ODEBlock(f, t1=T1, solver=own, gradient=Adjoint()),
        "odelayers TorchDiffEq": ODEBlock(f, t1=T1, solver=TorchDiffEq("dopri5", rtol=TOL, atol=TOL)),
    }
    solves: dict[str, Callable[[], Tensor]] = {name: lambda b=block: b(z) for name, block in blocks.items()}
    solves["torchdiffeq odeint"] = lambda: peer(torchdiffeq.odeint)(f, z)
    solves["torchdiffeq odeint_adjoint"] = lambda: peer(torchdiffeq.odeint_adjoint)(f, z)

    once = ("odelayers Checkpoint", "odelayers Adjoint", "torchdiffeq odeint_adjoint")  # the same forward solves again
    forward = {name: solve for name, solve in solves.items() if name not in once}
    table = []
    with torch.no_grad():
        nfe, error = {}, {}
        for name, solve in forward.items():
            nfe[name], final = evaluations(f, solve)
            error[name] = (final - exact).abs().max().item()
        table += rows("forward", interleaved(forward, args.rounds), nfe, error)

    nfe, error = {}, {}
    for name, solve in solves.items():
        nfe[name], found = evaluations(f, lambda s=solve: gradients(f, s()))
        error[name] = ((found - exact_grad).norm() / exact_grad.norm()).item()
    training = {name: lambda s=solve: gradients(f, s()) for name, solve in solves.items()}
    table += rows("forward+backward", interleaved(training, args.rounds), nfe, error)

    title = f"ODE solve: {DIM}-d sine field, batch {BATCH}, t in [0, {T1:g}], dopri5 at {TOL:g}, float32"
    publish("forward_backward", title, f"python benchmarks/forward_backward.py --rounds {args.rounds}", table, args.out)


if __name__ == "__main__":
    main()
