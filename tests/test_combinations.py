"""Features together: whatever is combined, a row is solved as if alone and every gradient is Backprop's."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor, nn

from odelayers import (
    RK4,
    Adjoint,
    AugmentedODEBlock,
    Backprop,
    Checkpoint,
    Dopri5,
    Heun,
    JacobianRegularizer,
    KineticRegularizer,
    ODEBlock,
    Rodas5P,
    Solution,
    Tsit5,
)
from strategies import seeds

F64 = torch.float64
SOLVERS = (RK4(steps=12), Heun(steps=30), Dopri5(1e-9, 1e-9), Tsit5(1e-9, 1e-9), Rodas5P(1e-9, 1e-9))
RUNNING = {"none": [], "kinetic": [KineticRegularizer()], "both": [KineticRegularizer(), JacobianRegularizer()]}


class Pointwise(nn.Module):
    """A field on states of any shape, with time and contexts; rows do not interact."""

    def __init__(self, timed: bool) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(x, dtype=F64)) for x in (0.8, -0.3))
        self.timed = timed

    def forward(self, t: Tensor, z: Tensor, *context: Tensor) -> Tensor:
        force = torch.sin(2 * t) if self.timed else 0.0
        shift = sum((c.reshape(-1, *[1] * (z.ndim - 1)) for c in context), start=torch.zeros((), dtype=F64))
        return self.a * torch.sin(z + shift) + self.b * z.flip(-1 if z.ndim > 1 else ()) + force


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """One way to call a block on a batch of three rows."""
    g = torch.Generator().manual_seed(draw(seeds))
    shape = draw(st.sampled_from([(3,), (3, 2), (3, 2, 2)]))
    way = draw(st.sampled_from([1.0, -1.0]))
    ends: dict[str, Any] = {
        "float": {"t1": way * 1.2},
        "tensor": {"t1": torch.tensor(way * 1.2, dtype=F64, requires_grad=True)},
        "rows": {"t1": (way * torch.tensor([0.4, 1.2, 0.9], dtype=F64)).requires_grad_()},
        "outputs": {"ts": [0.1 * way, 0.37 * way, 1.2 * way]},
    }
    contexts = draw(st.integers(0, 2))
    return {
        "z": torch.randn(shape, generator=g, dtype=F64),
        "context": tuple(torch.randn(3, generator=g, dtype=F64).requires_grad_() for _ in range(contexts)),
        "timed": draw(st.booleans()),
        "pad": draw(st.booleans()) and len(shape) > 1,
        "solver": draw(st.sampled_from(SOLVERS)),
        "running": draw(st.sampled_from(sorted(RUNNING))),
        "spoil": draw(st.sampled_from([None, 0, 2])),
        **draw(st.sampled_from(list(ends.values()))),
    }


def solve(case: dict[str, Any], f: nn.Module, gradient: Any, row: int | None = None) -> tuple[Solution, Tensor]:
    """The solution for the batch, or for one row of it alone; and the z that was solved from."""
    pick = slice(None) if row is None else slice(row, row + 1)
    z = case["z"][pick].clone()
    if row is None and case["spoil"] is not None:
        z[case["spoil"]] = float("nan")
    z.requires_grad_()
    times = {k: v[pick] if isinstance(v, Tensor) and v.ndim else v for k, v in case.items() if k in ("t1", "ts")}
    kind, more = (AugmentedODEBlock, (1,)) if case["pad"] else (ODEBlock, ())
    block = kind(f, *more, solver=case["solver"], gradient=gradient, time=True, on_failure="isolate")
    running = RUNNING[case["running"]] if row is None else RUNNING[case["running"]][:1]  # probes differ between batches
    context = tuple(c[pick] for c in case["context"])
    return block.solve(z, **times, context=context, running=running, generator=torch.Generator().manual_seed(1)), z


@settings(max_examples=40)
@given(cases())
def test_a_row_of_a_batch_is_solved_as_if_alone(case: dict[str, Any]) -> None:
    """States, output times and running integrals of each healthy row equal those of the row by itself."""
    f = Pointwise(case["timed"])
    whole, _ = solve(case, f, Backprop())
    for row in range(3):
        if row == case["spoil"]:
            assert whole.zs[:, row].isnan().all() and whole.stats.status[row] != 0
            continue
        alone, _ = solve(case, f, Backprop(), row)
        assert (whole.zs[:, row] - alone.zs[:, 0]).abs().max() < 1e-7
        for a, b in zip(whole.running, alone.running, strict=False):
            assert abs(a[row] - b[0]) < 1e-7


@settings(max_examples=40)
@given(cases(), st.sampled_from([Checkpoint(), Adjoint()]))
def test_every_gradient_is_backprop_s(case: dict[str, Any], gradient: Any) -> None:
    """For state, contexts, end times and parameters, over states and running integrals of the healthy rows."""
    assume(gradient.accepts(case["solver"]))
    f, found = Pointwise(case["timed"]), []
    for g in (gradient, Backprop()):
        solution, z = solve(case, f, g)
        healthy = solution.stats.status == 0
        loss = solution.zs[:, healthy].square().sum() + sum(r[healthy].sum() for r in solution.running)
        ends = [case["t1"]] if isinstance(case.get("t1"), Tensor) else []
        found.append(torch.autograd.grad(loss, [z, *case["context"], *ends, *f.parameters()]))
    tolerance = 1e-11 if isinstance(gradient, Checkpoint) else 1e-5
    if isinstance(gradient, Adjoint) and not isinstance(case["solver"], Dopri5 | Tsit5):
        tolerance = 5e-2  # the adjoint of a fixed grid is that of the equation, not of the grid
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())
