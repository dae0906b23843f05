"""RK4 over 20 equal steps, forward and forward+backward, beside every peer that has it or takes its tableau.

A 64-dimensional sine field, batch 128, t in [0, 5], float32. torchdiffeq's rk4 is the 3/8 rule; torchode and diffrax
have no method of order four at fixed steps and get the classical tableau. The error is of the final state (the largest
of an entry), or of the gradient with respect to parameters and initial state (relative), against a float64 solve by
torchdiffeq at 1e-12: nearly all of it is that of the method. The floor is the eager field alone, evaluated as often in
one chain; beside it stands that chain as one program of torch.compile.
"""

from __future__ import annotations

import copy

import torch
from forward_backward import BARE, DIM, T1, Sine
from harness import Run, arguments, compare, largest, missing, parser, publish
from peers import Solve, bare, forward, gradients, no_graph, odeint, rk4, training
from torch import Tensor, nn

from odelayers import RK4, Adjoint, Backprop, Checkpoint, ODEBlock, Reversible

BATCH, STEPS = 128, 20


def blocks(f: nn.Module) -> dict[str, Solve]:
    """The library's own rows; the first is what the others are compared with."""
    solver = RK4(STEPS)
    return {
        "odelayers Backprop": ODEBlock(f, t1=T1, solver=solver, gradient=Backprop()),
        "odelayers compiled": ODEBlock(f, t1=T1, solver=solver, compile=True),
        "odelayers Reversible": ODEBlock(f, t1=T1, solver=solver, gradient=Reversible()),
        "odelayers Checkpoint": ODEBlock(f, t1=T1, solver=solver, gradient=Checkpoint()),
        "odelayers Adjoint": ODEBlock(f, t1=T1, solver=solver, gradient=Adjoint()),
    }


def diffrax_row(f: Sine, z: Tensor) -> tuple[dict[str, Run], dict[str, Run]]:
    """diffrax's run, forward and forward+backward."""
    import peers_jax

    weights = list(f.parameters())
    ahead, both = peers_jax.diffrax_runs(peers_jax.sine, weights, z, T1, steps=STEPS, solver=peers_jax.RK4())
    return {"diffrax jit, RK4 tableau": ahead}, {"diffrax jit, RK4 tableau": both}


def main() -> None:
    args = arguments(parser(__doc__ or ""))
    f, z = Sine().to(args.device), torch.randn(BATCH, DIM).to(args.device)
    exact_f, exact_z = copy.deepcopy(f).double(), z.double()
    precise = odeint(exact_f, T1, 1e-12)
    solves = blocks(f) | rk4(f, T1, STEPS)
    jax_forward, jax_training = diffrax_row(f, z) if "diffrax" not in missing(args.device) else ({}, {})
    once = ("Checkpoint", "Reversible", "Adjoint")  # forward these solve as Backprop does
    ahead = {name: forward(f, z, s) for name, s in solves.items() if not name.endswith(once)}
    ahead |= jax_forward
    both = {name: training(f, z, s) for name, s in solves.items()} | jax_training
    ahead |= {name: bare(forward, f, z, 4 * STEPS, **how) for name, how in BARE.items()}
    both |= {name: bare(training, f, z, 4 * STEPS, **how) for name, how in BARE.items()}
    table = [
        *compare("forward", ahead, no_graph(precise, exact_z), args.rounds, largest),
        *compare("forward+backward", both, gradients(exact_f, exact_z, precise), args.rounds),
    ]
    title = f"Fixed grid: {DIM}-d sine field, batch {BATCH}, t in [0, {T1:g}], RK4 with {STEPS} steps, float32"
    publish("fixed_grid", title, table, args)


if __name__ == "__main__":
    main()
