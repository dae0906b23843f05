"""Memory over a long training: what a solve allocates, it gives back."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import (
    MLP,
    RK4,
    Adjoint,
    Backprop,
    Checkpoint,
    Dopri5,
    DropoutSDEBlock,
    Equilibrium,
    EulerMaruyama,
    Implicit,
    KineticRegularizer,
    ODEBlock,
    Reversible,
    ReversibleHeun,
    Rodas5P,
    TorchDiffEq,
    TorchSDE,
)
from odelayers._gradients.base import Gradient
from odelayers._solvers import Solver

STATM = Path("/proc/self/statm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not STATM.exists(), reason="reads the resident set from Linux's /proc"),
]
MIB = 2**20
DEFAULT = Backprop()


def resident() -> int:
    """Bytes of memory that this process holds, what other tests have freed not counted where the allocator lets go."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors() -> int:
    """How many tensors Python's collector knows."""
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())  # isinstance would wake lazy modules


def train(block: Any, steps: int, kept: list[Tensor] | None = None) -> None:
    """Steps of gradient descent with a running regulariser where there may be one, and a row that fails."""
    optimiser = torch.optim.SGD(block.parameters(), lr=1e-3)
    still = isinstance(block, ODEBlock) and not isinstance(block.t1, Equilibrium)
    running = [KineticRegularizer()] if still else []
    for _ in range(steps):
        z = torch.randn(64, 16)
        z[3] = torch.nan
        solution = block.solve(z, running=running, on_failure="isolate")
        healthy = solution.stats.status == 0
        loss = solution.final[healthy].square().mean() + sum(r[healthy].mean() for r in solution.running)
        optimiser.zero_grad()
        loss.backward(retain_graph=kept is not None)
        optimiser.step()
        if kept is not None:
            kept.append(loss)


def ode(gradient: Gradient = DEFAULT, **more: Any) -> ODEBlock:
    """A block with a small network."""
    return ODEBlock(MLP(16, (64,)), gradient=gradient, **more)


def sde(solver: Solver, gradient: Gradient = DEFAULT, calculus: str = "ito") -> DropoutSDEBlock:
    """The same with noise."""
    return DropoutSDEBlock(MLP(16, (64,)), 0.1, solver=solver, gradient=gradient, calculus=calculus)


class Resting(nn.Module):
    """z' = tanh(W z) / 2 - z, which comes to rest."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.inner(z)) / 2 - z


CASES: dict[str, Callable[[], nn.Module]] = {
    "Backprop": ode,
    "Checkpoint": lambda: ode(Checkpoint()),
    "Reversible": lambda: ode(Reversible()),
    "Adjoint": lambda: ode(Adjoint()),
    "independent rows": lambda: ode(solver=Dopri5(batch="independent")),
    "Rodas5P": lambda: ode(solver=Rodas5P(1e-3, 1e-3)),
    "Implicit": lambda: ODEBlock(Resting(), t1=Equilibrium(1e-3, 100.0), gradient=Implicit()),
    "torchdiffeq": lambda: ode(solver=TorchDiffEq("dopri5")),
    "torchdiffeq Adjoint": lambda: ode(Adjoint(), solver=TorchDiffEq("rk4", step_size=0.25)),
    "noise": lambda: sde(EulerMaruyama(10)),
    "noise, Checkpoint": lambda: sde(EulerMaruyama(10), Checkpoint()),
    "noise, Reversible": lambda: sde(ReversibleHeun(10), Reversible(), "stratonovich"),
    "torchsde": lambda: sde(TorchSDE("euler", 10)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_thousand_training_steps_hold_flat(case: str) -> None:
    """After a warm-up no tensor stays behind, and the resident set grows by less than 1 MiB in a thousand steps.

    The best of three thousands counts: a leak of 1 KiB a step grows in every one of them, the allocator's own growth,
    up to 4 MiB where other tests ran before, does not. Tensors are counted over all of them.
    """
    block = CASES[case]()
    train(block, 100)
    alive, grown = tensors(), []
    while len(grown) < 3 and min(grown, default=MIB) >= MIB:
        before = resident()
        train(block, 1000)
        grown.append(resident() - before)
    assert tensors() <= alive
    assert min(grown) < MIB, grown


def test_a_small_leak_would_be_seen_in_every_thousand() -> None:
    """Control: one state of 4 KiB kept a step grows the resident set by more than the bar, three times of three."""
    block, kept, grown = ode(solver=RK4(2)), list[bytearray](), []
    train(block, 100)
    for _ in range(3):
        before = resident()
        for _ in range(10):
            train(block, 100)
            kept.extend(bytearray(b"x" * 4096) for _ in range(100))
        grown.append(resident() - before)
    assert min(grown) > MIB, grown


def test_a_leak_would_be_seen() -> None:
    """Control: keeping every loss, and with it its graph, grows by far more within 100 steps."""
    block, kept = ODEBlock(MLP(16, (64,))), list[Tensor]()
    train(block, 20)
    before, alive = resident(), tensors()
    train(block, 100, kept)
    assert resident() - before > 20 * MIB and tensors() > alive + 99
