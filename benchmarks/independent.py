"""A batch whose stiffness spreads a thousandfold: one step for the batch beside a step of its own for each sample.

z' = -k (z - cos t) over t in [0, 1] for 256 samples of 8 entries, k spread from 1 to 1000 over the batch,
Dormand-Prince 5 at rtol = atol = 1e-5, float32 and float64. torchdiffeq and batch="shared" take one step for the batch,
torchode and batch="independent" one for each sample. The samples evaluated, summed over the evaluations, are what the
field costs where it is dear; so it is in the last cases, with a network of 128 hidden units whose output is times zero.
The error of the final state is that against the closed form in float64, of a gradient that against differentiating it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

import torch
import torchdiffeq
from harness import Row, arguments, interleaved, publish, rows
from torch import Tensor, nn

from odelayers import Checkpoint, Dopri5, ODEBlock

try:
    import torchode
except ImportError:  # of the extra `bench`; its absence stands in the title
    torchode = None

BATCH, DIM, T1, TOL, HIDDEN = 256, 8, 1.0, 1e-5, 128
SHARED, INDEPENDENT = Dopri5(TOL, TOL), Dopri5(TOL, TOL, batch="independent")
Solve = Callable[[Tensor], Tensor]


class Relaxation(nn.Module):
    """z' = -k (z - cos t), with a network times zero where `hidden` says so; counts calls and samples."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(DIM, hidden), nn.Tanh(), nn.Linear(hidden, DIM)) if hidden else None
        self.calls = self.samples = 0

    def forward(self, t: Tensor, z: Tensor, k: Tensor) -> Tensor:
        self.calls, self.samples = self.calls + 1, self.samples + len(z)
        t = t.unsqueeze(1) if t.ndim == 1 else t  # torchode's times are (B,)
        dz = -k * (z - torch.cos(t))
        return dz if self.net is None else dz + 0 * self.net(z)


def exact(z: Tensor, k: Tensor) -> Tensor:
    """z(T1), by variation of constants."""
    there, here = (k * (k * math.cos(t) + math.sin(t)) / (1 + k**2) for t in (T1, 0.0))
    return there + (z - here) * torch.exp(-k * T1)


def by_torchode(f: nn.Module, k: Tensor) -> Solve:
    """A solve by torchode with the same pair and an elementary controller, as it comes: without compilation."""
    term = torchode.ODETerm(f, with_args=True)
    controller = torchode.IntegralController(atol=TOL, rtol=TOL, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller)
    ts = torch.tensor([0.0, T1], dtype=k.dtype).repeat(BATCH, 1)
    return lambda z: solver.solve(torchode.InitialValueProblem(y0=z, t_eval=ts), args=k).ys[:, -1]


def solves(f: nn.Module, k: Tensor) -> dict[str, Solve]:
    """Every way to solve, the shared step first."""
    ts = torch.tensor([0.0, T1], dtype=k.dtype)
    own = {
        "odelayers shared": ODEBlock(f, t1=T1, solver=SHARED, time=True),
        "odelayers independent": ODEBlock(f, t1=T1, solver=INDEPENDENT, time=True),
        "odelayers independent, Checkpoint": ODEBlock(f, t1=T1, solver=INDEPENDENT, gradient=Checkpoint(), time=True),
    }
    found: dict[str, Solve] = {name: lambda z, b=block: b(z, context=k) for name, block in own.items()}
    found["torchdiffeq dopri5"] = lambda z: torchdiffeq.odeint(
        lambda t, x: f(t, x, k), z, ts, rtol=TOL, atol=TOL, method="dopri5"
    )[-1]
    if torchode is not None:
        found["torchode dopri5"] = by_torchode(f, k)
    return found


def case(dtype: torch.dtype, hidden: int, training: bool, rounds: int) -> list[Row]:
    """The lines of one case: forward alone, or with the gradient with respect to the initial state."""
    torch.manual_seed(0)
    k = torch.logspace(0, 3, BATCH, dtype=dtype)[torch.randperm(BATCH)].unsqueeze(1)
    z, f = torch.randn(BATCH, DIM, dtype=dtype).requires_grad_(training), Relaxation(hidden).to(dtype)
    start = z.detach().double().requires_grad_()
    wanted = exact(start, k.double())
    if training:
        (wanted,) = torch.autograd.grad(wanted.square().sum(), start)

    def run(solve: Solve) -> Tensor:
        final = solve(z)
        return torch.autograd.grad(final.square().sum(), z)[0] if training else final

    runs, calls, samples, error = {}, {}, {}, {}
    for name, solve in solves(f, k).items():
        if name.endswith("Checkpoint") and not training:
            continue
        runs[name] = lambda s=solve: run(s)
        f.calls = f.samples = 0
        error[name] = (runs[name]() - wanted).abs().max().item()
        calls[name], samples[name] = f.calls, f.samples
    what = f"{'forward+backward' if training else 'forward'}, {str(dtype)[6:]}{', dear field' if hidden else ''}"
    table = rows(what, interleaved(runs, rounds), calls, error)
    return [replace(row, samples=samples[row.name]) for row in table]


def main() -> None:
    args = arguments(__doc__ or "")
    torch.set_num_threads(1)
    table = []
    for training in (False, True):
        with torch.set_grad_enabled(training):
            for dtype, hidden in ((torch.float32, 0), (torch.float64, 0), (torch.float32, HIDDEN)):
                table += case(dtype, hidden, training, args.rounds)
    peer = "torchode not installed" if torchode is None else f"torchode {version('torchode')}"
    title = f"Stiffness from 1 to 1000 over {BATCH} samples of {DIM}, t in [0, {T1:g}], dopri5 at {TOL:g}; {peer}"
    publish("independent", title, f"python benchmarks/independent.py --rounds {args.rounds}", table, args.out)


if __name__ == "__main__":
    main()
