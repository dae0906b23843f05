"""Batched Jacobians and the Lyapunov regulariser beside the per-sample loops that they replace.

float32; n = 64 and batch 128, and a conv field of n = 16 x 7 x 7 = 784 with batch 2. The loop is
`torch.autograd.functional.jacobian`, one sample at a time, as in the official code of SODEF; its regulariser takes 8
samples, ours is timed on the same 8 and on all 128. Fields given as a function are differentiated, the others
multiplied out. Errors are relative, against the loop in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from harness import Row, arguments, interleaved, parser, publish, relative, rows
from torch import Tensor, nn

from odelayers import ConvField, LyapunovRegularizer, SineField, jacobian

DIM, BATCH, OFFICIAL = 64, 128, 8


def loop_jacobian(f: Callable[[Tensor], Tensor], z: Tensor, create_graph: bool = False) -> Tensor:
    """The Jacobian of each sample by its own call, (B, n, n)."""
    one = torch.autograd.functional.jacobian
    n = z[0].numel()
    return torch.stack([one(f, row[None], create_graph=create_graph).reshape(n, n) for row in z])


def loop_regularizer(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The official MNIST loss of SODEF's second phase, columns summed, over Jacobians found one sample at a time."""
    J = loop_jacobian(f, z, create_graph=True)
    diagonal = J.diagonal(dim1=-2, dim2=-1)
    off = J.abs().sum(-2) - diagonal.abs()
    field = (50 * f(z)).square().mean()
    dominance = (0.1 * (off - diagonal.abs() + 1)).exp().mean()
    return 0.2 * field + 10 * (diagonal + 1).exp().mean() + 10 * dominance


def jacobian_rows(name: str, f: nn.Module, z: Tensor, rounds: int, known: bool = True) -> list[Row]:
    """`jacobian` beside the loop for one field, of which it may know that it is a module of layers."""
    exact = loop_jacobian(copy.deepcopy(f).double(), z.double())
    field = f if known else lambda x: f(x)
    runs = {"odelayers jacobian": lambda: jacobian(field, z), "per-sample loop": lambda: loop_jacobian(f, z)}
    with torch.no_grad():
        error = {key: relative(run(), exact) for key, run in runs.items()}
        return rows(f"jacobian, {name}", interleaved(runs, rounds), {}, error)


def regularizer_rows(name: str, f: nn.Module, z: Tensor, rounds: int) -> list[Row]:
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
    return rows(f"regulariser step, {name}", interleaved(steps, rounds), {}, error)


def main() -> None:
    args = arguments(parser(__doc__ or ""))
    z = torch.randn(BATCH, DIM).to(args.device)
    sine = SineField(DIM).to(args.device)
    one_layer = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()).to(args.device)
    two_layers = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM)).to(args.device)
    layer, layers = "tanh(Wz + b)", "two layers"
    conv, state = ConvField(16).to(args.device), torch.randn(2, 16, 7, 7).to(args.device)
    table = [
        *jacobian_rows("SineField (closed form)", sine, z, args.rounds),
        *jacobian_rows(layer, one_layer, z, args.rounds),
        *jacobian_rows(f"{layer} as a function", one_layer, z, args.rounds, known=False),
        *jacobian_rows(layers, two_layers, z, args.rounds),
        *jacobian_rows(f"{layers} as a function", two_layers, z, args.rounds, known=False),
        *jacobian_rows("ConvField, n = 784, batch 2", conv, state, args.rounds),
        *regularizer_rows("SineField", sine, z, args.rounds),
        *regularizer_rows(layer, one_layer, z, args.rounds),
        *regularizer_rows(layers, two_layers, z, args.rounds),
    ]
    title = f"Jacobians and the Lyapunov regulariser: n = {DIM}, batch {BATCH}, float32"
    publish("jacobians", title, table, args)


if __name__ == "__main__":
    main()
