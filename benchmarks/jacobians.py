"""Batched Jacobians and the Lyapunov regulariser beside the per-sample loops that they replace.

n = 64, batch 128, float32. The loop is `torch.autograd.functional.jacobian`, one sample at a time, as in the official
code of SODEF; its regulariser takes 8 samples, ours is timed on the same 8 and on all 128. Errors are relative, against
the loop in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from harness import Row, arguments, interleaved, parser, publish, relative, rows
from torch import Tensor, nn

from odelayers import LyapunovRegularizer, SineField, jacobian

DIM, BATCH, OFFICIAL = 64, 128, 8


def loop_jacobian(f: Callable[[Tensor], Tensor], z: Tensor, create_graph: bool = False) -> Tensor:
    """The Jacobian of each sample by its own call, (B, D, D)."""
    one = torch.autograd.functional.jacobian
    return torch.stack([one(f, row[None], create_graph=create_graph).reshape(DIM, DIM) for row in z])


def loop_regularizer(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The official MNIST loss of SODEF's second phase, columns summed, over Jacobians found one sample at a time."""
    J = loop_jacobian(f, z, create_graph=True)
    diagonal = J.diagonal(dim1=-2, dim2=-1)
    off = J.abs().sum(-2) - diagonal.abs()
    field = (50 * f(z)).square().mean()
    dominance = (0.1 * (off - diagonal.abs() + 1)).exp().mean()
    return 0.2 * field + 10 * (diagonal + 1).exp().mean() + 10 * dominance


def jacobian_rows(name: str, f: nn.Module, z: Tensor, rounds: int) -> list[Row]:
    """`jacobian` beside the loop for one field."""
    exact = loop_jacobian(copy.deepcopy(f).double(), z.double())
    runs = {"odelayers jacobian": lambda: jacobian(f, z), "per-sample loop": lambda: loop_jacobian(f, z)}
    with torch.no_grad():
        error = {key: relative(run(), exact) for key, run in runs.items()}
        return rows(f"jacobian, {name}", interleaved(runs, rounds), {}, error)


def regularizer_rows(f: nn.Module, z: Tensor, rounds: int) -> list[Row]:
    """A regulariser step (value and gradient of every parameter) beside the official loop's."""
    ours, few = LyapunovRegularizer.sodef_mnist(samples=None), z[:OFFICIAL]
    losses: dict[str, Callable[[], Tensor]] = {
        f"odelayers, {OFFICIAL} samples": lambda: ours(f, few),
        f"odelayers, {BATCH} samples": lambda: ours(f, z),
        f"official loop, {OFFICIAL} samples": lambda: loop_regularizer(f, few),
    }
    exact_f = copy.deepcopy(f).double()
    error = {
        name: relative(loss(), loop_regularizer(exact_f, (z if str(BATCH) in name else few).double()))
        for name, loss in losses.items()
    }
    parameters = list(f.parameters())
    steps = {name: lambda r=loss: torch.autograd.grad(r(), parameters) for name, loss in losses.items()}
    return rows("regulariser step", interleaved(steps, rounds), {}, error)


def main() -> None:
    args = arguments(parser(__doc__ or ""))
    z = torch.randn(BATCH, DIM).to(args.device)
    sine = SineField(DIM).to(args.device)
    one_layer = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()).to(args.device)
    two_layers = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM)).to(args.device)
    table = [
        *jacobian_rows("SineField (closed form)", sine, z, args.rounds),
        *jacobian_rows("tanh(Wz + b)", one_layer, z, args.rounds),
        *jacobian_rows("two layers", two_layers, z, args.rounds),
        *regularizer_rows(sine, z, args.rounds),
    ]
    title = f"Jacobians and the Lyapunov regulariser: n = {DIM}, batch {BATCH}, float32"
    publish("jacobians", title, table, args)


if __name__ == "__main__":
    main()
