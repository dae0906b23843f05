"""What crosses between host and device during a solve, and what a CUDA graph can hold of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from odelayers import AugmentedODEBlock, Backprop, Checkpoint, ODEBlock
from problems import ADAPTIVE, FIXED, name


class Traffic(TorchDispatchMode):
    """Counts what would cross between host and device: tensors made from Python numbers, and values read."""

    def __init__(self) -> None:
        super().__init__()
        self.made = self.read = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func is torch.ops.aten.lift_fresh.default
        self.read += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("solver", [*(cls(steps=3) for cls in FIXED), *(cls(1e-3, 1e-3) for cls in ADAPTIVE)], ids=name)
def test_steps_make_no_tensor_of_host_numbers_and_read_one_value_at_most(solver: Any, recording: bool) -> None:
    """On a device each waits: weights are made once, a grid is read once a solve, step control once a step tried."""
    more = replace(solver, **({"steps": 40} if hasattr(solver, "steps") else {"rtol": 1e-9, "atol": 1e-9}))
    made, read = [], []
    for each in (solver, more):
        block, z = ODEBlock(torch.cos, solver=each, time=False), torch.randn(3, 2, dtype=torch.float64)
        with torch.set_grad_enabled(recording):
            block(z)
            with Traffic() as traffic:
                stats = block.solve(z).stats
        made.append(traffic.made)
        read.append(traffic.read - (0 if hasattr(solver, "steps") else stats.accepted + stats.rejected))
    assert stats.accepted >= 10 and made[0] == made[1] and read[0] == read[1]


@pytest.mark.parametrize("how", ["plain", "time", "checkpoint", "t1", "t1 of each", "half", "augmented"])
@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("solver", [cls(steps=3) for cls in FIXED], ids=name)
def test_a_fixed_grid_touches_no_host_number_while_a_graph_is_captured(
    solver: Any, recording: bool, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a tensor made from the host nor a value read: what a CUDA graph cannot hold."""
    f = (lambda t, z: torch.cos(z) * t) if how == "time" else torch.cos
    options: dict[str, Any] = {"solver": solver, "time": how == "time"}
    options["gradient"] = Checkpoint() if how == "checkpoint" else Backprop()
    block = AugmentedODEBlock(f, 2, **options) if how == "augmented" else ODEBlock(f, **options)
    z = torch.randn(3, 2, dtype=torch.bfloat16 if how == "half" else torch.float64)
    t1 = {"t1": torch.tensor(0.5, requires_grad=True), "t1 of each": torch.tensor([0.5, 1.0, 2.0])}.get(how)
    with torch.set_grad_enabled(recording):
        expected = block(z.requires_grad_(recording), t1)
        monkeypatch.setattr("odelayers._evaluator.capturing", lambda z: True)
        with Traffic() as traffic:
            found = block(z, t1)
            if recording:
                found.sum().backward()
    assert torch.equal(found, expected) and (traffic.made, traffic.read) == (0, 0)


def waits(run: Callable[[], Any]) -> int:
    """How often a run makes the host wait for the GPU, by torch's own account."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)


@pytest.mark.cuda
@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("solver", [*(cls(steps=3) for cls in FIXED), *(cls(1e-3, 1e-3) for cls in ADAPTIVE)], ids=name)
def test_steps_wait_for_the_gpu_where_step_control_reads_and_nowhere_else(solver: Any, recording: bool) -> None:
    """The same on a GPU, where whatever waits is counted: 40 steps of a grid as often as 3, step control once a try."""
    more = replace(solver, **({"steps": 40} if hasattr(solver, "steps") else {"rtol": 1e-9, "atol": 1e-9}))
    found, z = [], torch.randn(3, 2, dtype=torch.float64, device="cuda")
    for each in (solver, more):
        block = ODEBlock(torch.cos, solver=each, time=False)
        with torch.set_grad_enabled(recording):
            stats = block.solve(z).stats
            tries = 0 if hasattr(solver, "steps") else stats.accepted + stats.rejected
            found.append(waits(lambda: block(z)) - tries)  # noqa: B023  (run at once)
    assert found[0] == found[1]
    assert waits(lambda: z.sum().item()) == 1  # control: a wait is seen


@pytest.mark.cuda
@pytest.mark.parametrize("solver", [cls(steps=5) for cls in FIXED], ids=name)
def test_a_fixed_grid_becomes_a_cuda_graph(solver: Any) -> None:
    """torch.cuda.make_graphed_callables holds forward and backward: the eager numbers, again and on other inputs."""
    f = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double().cuda()
    block, sample = ODEBlock(f, solver=solver), torch.randn(8, 4, dtype=torch.float64, device="cuda")
    graphed = torch.cuda.make_graphed_callables(ODEBlock(f, solver=solver), (sample.clone().requires_grad_(),))
    for _ in range(3):
        z = torch.randn_like(sample).requires_grad_()
        found, expected = (torch.autograd.grad(b(z).square().sum(), [z, *f.parameters()]) for b in (graphed, block))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
