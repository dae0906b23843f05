"""Forward+backward of the blog's convolutional field beside every peer: a field that costs more than a step.

`ConvField` with 16 channels of 7x7, batch 64, t in [0, 1] and [0, 10], Dormand-Prince 5 at rtol = atol = 1e-3, float32.
The error is that of the gradient with respect to parameters and initial state, relative, against a float64 solve at
1e-6. It is large for every library: the kinks of ReLU move with the states, and gradients converge slowly through
them; the reference itself is good to some 2 % at T = 1 and 5 % at T = 10 (its change from 1e-5). `Adjoint` would refuse
some of these solves (the state found backwards drifts by over 1 %), and is told to go on as torchdiffeq does. The floor
is the eager field alone, evaluated as often in one chain.
"""

from __future__ import annotations

import copy

import torch
from harness import Row, arguments, compare, missing, parser, publish
from peers import Solve, adaptive, bare, gradients, training
from torch import Tensor, nn

from odelayers import Adjoint, Backprop, Checkpoint, ConvField, Dopri5, ODEBlock, Reversible

CHANNELS, SIZE, BATCH, TIMES, TOL, EXACT = 16, 7, 64, (1.0, 10.0), 1e-3, 1e-6


class Timed(nn.Module):
    """f(t, z) for the libraries that call it so."""

    def __init__(self) -> None:
        super().__init__()
        self.field = ConvField(CHANNELS)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field(z)


class Flat(nn.Module):
    """The same field on states (B, D), all that torchode takes."""

    def __init__(self, f: Timed) -> None:
        super().__init__()
        self.field = f

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field(t, z.unflatten(1, (CHANNELS, SIZE, SIZE))).flatten(1)


def blocks(f: nn.Module, t1: float) -> dict[str, Solve]:
    """The library's own rows; the first is what the others are compared with."""
    solver, looser, finer = (Dopri5(rtol=tol, atol=tol) for tol in (TOL, 2 * TOL, TOL / 20))
    return {
        "odelayers Backprop": ODEBlock(f, t1=t1, solver=solver, gradient=Backprop()),
        "odelayers Backprop, 2e-3": ODEBlock(f, t1=t1, solver=looser, gradient=Backprop()),
        "odelayers Backprop, 5e-5": ODEBlock(f, t1=t1, solver=finer, gradient=Backprop()),
        "odelayers compiled": ODEBlock(f, t1=t1, solver=solver, compile=True),
        "odelayers Checkpoint": ODEBlock(f, t1=t1, solver=solver, gradient=Checkpoint()),
        "odelayers Reversible": ODEBlock(f, t1=t1, solver=solver, gradient=Reversible()),
        "odelayers Adjoint, max_drift=1": ODEBlock(f, t1=t1, solver=solver, gradient=Adjoint(max_drift=1.0)),
    }


def peers(f: Timed, t1: float) -> dict[str, Solve]:
    """The other libraries of torch."""

    def whole(solve: Solve) -> Solve:
        return lambda z: solve(z.flatten(1)).view_as(z)

    return {name: whole(solve) for name, solve in adaptive(Flat(f), t1, TOL).items()}


def case(f: Timed, z: Tensor, t1: float, rounds: int) -> list[Row]:
    """The rows of one end time."""
    exact_f = copy.deepcopy(f).double()
    # Kept by torchdiffeq these steps would take some gigabytes.
    precise = ODEBlock(exact_f, t1=t1, solver=Dopri5(rtol=EXACT, atol=EXACT), gradient=Checkpoint())
    runs = {name: training(f, z, solve) for name, solve in (blocks(f, t1) | peers(f, t1)).items()}
    if "diffrax" not in missing(z.device.type):
        from peers_jax import conv_field, diffrax_runs

        runs["diffrax jit"] = diffrax_runs(conv_field, list(f.parameters()), z, t1, tol=TOL)[1]
    nfe, _ = runs["odelayers Backprop"].check()
    runs["bare field"] = bare(training, f, z, nfe)
    return compare(f"forward+backward, T={t1:g}", runs, gradients(exact_f, z.double(), precise), rounds)


def main() -> None:
    args = arguments(parser(__doc__ or "", rounds=15))
    f, z = Timed().to(args.device), torch.randn(BATCH, CHANNELS, SIZE, SIZE).to(args.device)
    table = [row for t1 in TIMES for row in case(f, z, t1, args.rounds)]
    title = f"ODE solve: ConvField, batch {BATCH} of {CHANNELS}x{SIZE}x{SIZE}, dopri5 at {TOL:g}, float32"
    publish("conv_field", title, table, args)


if __name__ == "__main__":
    main()
