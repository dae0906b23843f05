"""Forward and forward+backward of one adaptive ODE solve beside every peer, at the same tolerance.

A 64-dimensional sine field, batch 128 and 1024, t in [0, 5], Dormand-Prince 5 at rtol = atol = 1e-5, float32. The error
stands beside each time: of the final state (the largest of an entry), or of the gradient with respect to parameters and
initial state (relative), against a float64 solve by torchdiffeq at 1e-12. The same tolerance asks for more where every
sample must meet it, as here and in torchode, than where the batch does on average, so odelayers also runs at 2e-5,
where at batch 128 it evaluates the field as often as torchdiffeq. The floor is the eager field alone, evaluated as
often in one chain; beside it stands that chain as one program of torch.compile.
"""

from __future__ import annotations

import copy

import torch
from harness import Row, Run, arguments, compare, largest, missing, parser, publish
from peers import Solve, adaptive, bare, forward, gradients, no_graph, odeint, training
from torch import Tensor, nn

from odelayers import Adjoint, Backprop, Checkpoint, Dopri5, ODEBlock, Reversible

DIM, BATCHES, T1, TOL = 64, (128, 1024), 5.0, 1e-5
BARE: dict[str, dict[str, bool]] = {"bare field": {}, "bare field, compiled": {"compiled": True}}


class Sine(nn.Module):
    """f(t, z) = sin(-(Wz + b)): one module for every library."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.sin(-self.linear(z))


def blocks(f: nn.Module, t1: float = T1, tol: float = TOL) -> dict[str, Solve]:
    """The library's own rows; the first is what the others are compared with."""
    solver, looser = Dopri5(rtol=tol, atol=tol), Dopri5(rtol=2 * tol, atol=2 * tol)
    return {
        "odelayers Backprop": ODEBlock(f, t1=t1, solver=solver, gradient=Backprop()),
        "odelayers Backprop, 2e-5": ODEBlock(f, t1=t1, solver=looser, gradient=Backprop()),
        "odelayers compiled": ODEBlock(f, t1=t1, solver=solver, compile=True),
        "odelayers compiled, 2e-5": ODEBlock(f, t1=t1, solver=looser, compile=True),
        "odelayers Checkpoint": ODEBlock(f, t1=t1, solver=solver, gradient=Checkpoint()),
        "odelayers Reversible": ODEBlock(f, t1=t1, solver=solver, gradient=Reversible()),
        "odelayers Adjoint": ODEBlock(f, t1=t1, solver=solver, gradient=Adjoint()),
    }


def diffrax_rows(f: Sine, z: Tensor) -> tuple[dict[str, Run], dict[str, Run]]:
    """diffrax's runs, forward and forward+backward."""
    import diffrax
    from peers_jax import diffrax_runs, sine

    ways = {
        "diffrax jit": {},
        "diffrax jit, Tsit5": {"solver": diffrax.Tsit5()},
        "diffrax jit, BacksolveAdjoint": {"adjoint": diffrax.BacksolveAdjoint()},
    }
    found = {name: diffrax_runs(sine, list(f.parameters()), z, T1, tol=TOL, **way) for name, way in ways.items()}
    return {name: run[0] for name, run in found.items()}, {name: run[1] for name, run in found.items()}


def case(f: Sine, z: Tensor, rounds: int) -> list[Row]:
    """Both tables of one batch."""
    exact_f, exact_z = copy.deepcopy(f).double(), z.double()
    precise = odeint(exact_f, T1, 1e-12)
    solves = blocks(f) | adaptive(f, T1, TOL)
    jax_forward, jax_training = diffrax_rows(f, z) if "diffrax" not in missing(z.device.type) else ({}, {})
    once = ("Checkpoint", "Reversible", "Adjoint", "odeint_adjoint")  # forward these solve as others do
    ahead = {name: forward(f, z, solve) for name, solve in solves.items() if not name.endswith(once)}
    ahead |= {name: run for name, run in jax_forward.items() if not name.endswith("BacksolveAdjoint")}
    both = {name: training(f, z, solve) for name, solve in solves.items()} | jax_training
    nfe, _ = ahead["odelayers Backprop"].check()
    ahead |= {name: bare(forward, f, z, nfe, **how) for name, how in BARE.items()}
    both |= {name: bare(training, f, z, nfe, **how) for name, how in BARE.items()}
    final, gradient = no_graph(precise, exact_z), gradients(exact_f, exact_z, precise)
    return [
        *compare(f"forward, B={len(z)}", ahead, final, rounds, largest),
        *compare(f"forward+backward, B={len(z)}", both, gradient, rounds),
    ]


def main() -> None:
    args = arguments(parser(__doc__ or ""))
    f = Sine().to(args.device)
    table = [row for batch in BATCHES for row in case(f, torch.randn(batch, DIM).to(args.device), args.rounds)]
    title = f"ODE solve: {DIM}-d sine field, t in [0, {T1:g}], dopri5 at {TOL:g}, float32"
    publish("forward_backward", title, table, args)


if __name__ == "__main__":
    main()
