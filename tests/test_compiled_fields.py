"""Compiled blocks on a field of many kinds of layers: numbers and gradients that settings of a compiler can spoil."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config

from odelayers import RK4, Dopri5, ODEBlock

F64 = torch.float64
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch to `torch.compile`:DeprecationWarning"),
]


class Layers(nn.Module):
    """Time as a channel, a convolution, a normalisation, and sums of elementwise operations that are used again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(5, 4, 3, padding=1)
        self.shift = nn.Parameter(0.3 * torch.randn(4, 1, 1))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        h = torch.cat([z, t * torch.ones_like(z[:, :1])], 1)
        h = nn.functional.gelu(self.norm(self.conv(h)))
        return torch.sin(h + self.shift) * h.softmax(1) - 0.3 * z + z.flip(3) * self.shift.abs()


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("solver", [RK4(4), Dopri5(1e-7, 1e-7)], ids=lambda s: type(s).__name__)
def test_every_program_gives_the_eager_numbers_on_convolutions(solver: Any) -> None:
    """The scan, the loop and the step: states without a gradient, and with outputs and the gradients to everything.

    Inductor told to keep every elementwise result (`realize_opcount_threshold=0`) is wrong by percents here.
    """
    f, z = Layers().double(), torch.randn(3, 4, 5, 5, dtype=F64, requires_grad=True)
    found = []
    for compile in (True, False):
        block = ODEBlock(f, solver=solver, time=True, compile=compile)
        with torch.no_grad():
            still = block(z)
        zs = block.solve(z, ts=[0.0, 0.3, 1.0]).zs
        found.append([still, zs, *torch.autograd.grad(zs.pow(2).sum(), [z, *f.parameters()])])
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-11)


def test_another_tolerance_asks_for_no_other_training_program(recwarn: pytest.WarningsRecorder) -> None:
    """A tolerance is a number that a step is given: with room for one program, three are solved compiled."""
    f, z = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), torch.randn(2, 3, dtype=F64, requires_grad=True)
    block = ODEBlock(f, solver=Dopri5(), compile=True)
    with dynamo_config.patch(recompile_limit=1):
        for tol in (1e-4, 1e-6, 1e-8):
            block.solver = replace(block.solver, rtol=tol, atol=tol)
            ours, eager = (b.solve(z).final for b in (block, ODEBlock(f, solver=block.solver)))
            torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-13)
    assert not [w for w in recwarn if "compile=True" in str(w.message)]
    assert set(block._programs._calls.values()) == {True}
