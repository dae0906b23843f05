"""Memory over a long training: what a solve allocates, it gives back."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from odelayers import (
    MLP,
    Adjoint,
    Backprop,
    Checkpoint,
    DropoutSDEBlock,
    EulerMaruyama,
    KineticRegularizer,
    ODEBlock,
    Reversible,
)
from problems import name

STATM = Path("/proc/self/statm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not STATM.exists(), reason="reads the resident set from Linux's /proc"),
]
MIB = 2**20


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
    running = [KineticRegularizer()] if isinstance(block, ODEBlock) else []
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


CASES = [("ode", g) for g in (Backprop(), Checkpoint(), Reversible(), Adjoint())]
CASES += [("sde", Backprop()), ("sde", Checkpoint())]


@pytest.mark.parametrize("kind, gradient", CASES, ids=lambda v: v if isinstance(v, str) else name(v))
def test_a_thousand_training_steps_hold_flat(kind: str, gradient: Any) -> None:
    """After a warm-up no tensor stays behind, and the resident set grows by less than 1 MiB in a thousand steps.

    A leak grows in every thousand; the allocator's own growth, up to 4 MiB where other tests ran before, does not.
    """
    f = MLP(16, (64,))
    block: Any = (
        ODEBlock(f, gradient=gradient)
        if kind == "ode"
        else DropoutSDEBlock(f, 0.1, solver=EulerMaruyama(10), gradient=gradient)
    )
    train(block, 100)
    alive, grown = tensors(), []
    while len(grown) < 3 and min(grown, default=MIB) >= MIB:
        before = resident()
        train(block, 1000)
        grown.append(resident() - before)
    assert tensors() <= alive
    assert min(grown) < MIB


def test_a_leak_would_be_seen() -> None:
    """Control: keeping every loss, and with it its graph, grows by far more within 100 steps."""
    block, kept = ODEBlock(MLP(16, (64,))), list[Tensor]()
    train(block, 20)
    before, alive = resident(), tensors()
    train(block, 100, kept)
    assert resident() - before > 20 * MIB and tensors() > alive + 99
