"""The adjoint of a Runge-Kutta step, written out by hand, against autograd through the step written out plainly."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from odelayers import RK4, Dopri5, Euler, Heun, Midpoint, ODEBlock, Tsit5
from odelayers._solvers.adaptive import AdaptiveRungeKutta
from odelayers._solvers.tableau import Tableau

F64 = torch.float64
STEPS = 3
# Adaptive methods at a tolerance that accepts every step, which does not grow: the grid is that of the plain loop.
ADAPTIVE = [c(1e9, 1e9, first_step=1 / STEPS) for c in (Dopri5, Tsit5)]
SOLVERS = [c(STEPS) for c in (Euler, Midpoint, Heun, RK4)] + ADAPTIVE
Function = Callable[[Tensor, Tensor], Tensor]


class Late(nn.Module):
    """Fields with holes in their graph: v is used late alone, z early alone, or nothing has a gradient at times."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.w, self.v = nn.Parameter(torch.tensor(0.7, dtype=F64)), nn.Parameter(torch.tensor(-0.4, dtype=F64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        if self.kind == "ignores the state":
            return (self.w * t + self.v).expand_as(z)
        if self.kind == "constant":
            return torch.ones_like(z)
        if self.kind == "constant early":
            return torch.tanh(self.w * z) if t > 0.5 else torch.ones_like(z)
        if self.kind == "constant late":
            return torch.ones_like(z) if t > 0.5 else torch.tanh(self.w * z) + self.v
        if self.kind == "another parameter late":
            return torch.tanh(self.v * z) if t > 0.5 else torch.tanh(self.w * z)
        if self.kind == "linear late":
            return self.v * z if t > 0.5 else torch.tanh(self.w * z)
        if self.kind == "state detached late":
            return self.v * z.detach() if t > 0.5 else torch.sin(self.w * z)
        return torch.tanh(self.w * z) + self.v * torch.cos(t) * z.roll(1, 1)


KINDS = ["smooth", "ignores the state", "constant", "constant early", "constant late"]
KINDS += ["linear late", "another parameter late", "state detached late"]


def plain(tableau: Tableau, f: Function, z: Tensor) -> list[Tensor]:
    """The states after each of the steps, every stage and sum an operation of its own."""
    zs, h = [z], 1.0 / STEPS
    for n in range(STEPS):
        t, y = n * h, zs[-1]
        stages = [f(torch.tensor(t, dtype=F64), y)]
        for c, row in zip(tableau.c[1:], tableau.a, strict=True):
            at = y + h * sum(w * k for w, k in zip(row, stages, strict=True))
            stages.append(f(torch.tensor(t + c * h, dtype=F64), at))
        zs.append(y + h * sum(w * k for w, k in zip(tableau.b, stages, strict=True)))
    return zs


@pytest.fixture(autouse=True)
def no_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("odelayers._solvers.adaptive.GROW", 1.0)


def both(solver: RK4 | Dopri5, f: Late, z: Tensor) -> tuple[Tensor, Tensor]:
    """All states on the grid, by the library and written out."""
    ts = [i / STEPS for i in range(STEPS + 1)]
    return ODEBlock(f, solver=solver).solve(z, ts).zs, torch.stack(plain(solver.tableau, f, z))


def same(found: tuple[Tensor | None, ...], wanted: tuple[Tensor | None, ...]) -> None:
    """Equal to rounding, a gradient of None as zero."""
    for a, b in zip(found, wanted, strict=True):
        zero = torch.zeros((), dtype=F64)
        torch.testing.assert_close(zero if a is None else a, zero if b is None and a is None else b, rtol=0, atol=1e-12)


@pytest.fixture
def z() -> Tensor:
    return torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3).requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_the_gradient_is_that_of_the_step_written_out(solver: RK4 | Dopri5, kind: str, z: Tensor) -> None:
    """Also where the field ignores the state, is constant at times, or uses a parameter or the state at times only."""
    f, weights = Late(kind), torch.linspace(0.3, 1, 24, dtype=F64).reshape(4, 2, 3)
    found, wanted = (
        torch.autograd.grad((zs * weights).sum(), [z, f.w, f.v], allow_unused=True) for zs in both(solver, f, z)
    )
    same(found, wanted)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_one_graph_serves_passes_over_different_parts(solver: RK4 | Dopri5, z: Tensor) -> None:
    """A second pass sees nothing of the first: from other outputs, to other inputs, or after one that was cut short."""
    f = Late("another parameter late")
    ours, theirs = both(solver, f, z)
    for output, inputs in [(-1, [z]), (1, [f.w]), (-1, [f.v]), (2, [z, f.w]), (1, [z]), (-1, [z, f.w, f.v])]:
        found, wanted = (
            torch.autograd.grad(zs[output].square().sum(), inputs, retain_graph=True, allow_unused=True)
            for zs in (ours, theirs)
        )
        same(found, wanted)


@pytest.mark.parametrize("kind", ["smooth", "constant late", "linear late", "another parameter late"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_second_derivatives_are_those_of_the_step_written_out(solver: RK4 | Dopri5, kind: str, z: Tensor) -> None:
    """The gradient of a gradient's norm: the second pass runs through the first, and through parts of the solve again.

    Where the field is linear late, the second pass misses the late states, which the first has reached.
    """
    f, found, weights = Late(kind), [], torch.linspace(0.3, 1, 6, dtype=F64).reshape(2, 3)
    for zs in both(solver, f, z):
        first = torch.autograd.grad((zs[-1] * weights).sum(), [z, f.w], create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), [z, f.w, f.v], allow_unused=True))
    same(*found)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_many_cotangents_at_once_are_pulled_back(solver: RK4 | Dopri5, z: Tensor) -> None:
    """torch.autograd.functional.jacobian with vectorize=True, a vmap over the backward pass, equals its own loop."""
    block = ODEBlock(Late("smooth"), solver=solver)
    at_once, looped = (torch.autograd.functional.jacobian(block, z.detach(), vectorize=v) for v in (True, False))
    torch.testing.assert_close(at_once, looped, rtol=0, atol=1e-13)


def test_rejected_steps_leave_nothing_in_the_gradient(z: Tensor) -> None:
    """With a first step far too long the gradient is that of the steps accepted: the one found without a rejection."""
    f = Late("smooth")
    spoilt, clean = (Dopri5(1e-9, 1e-9, first_step=h) for h in (1.0, None))
    solutions = [ODEBlock(f, solver=s).solve(z) for s in (spoilt, clean)]
    assert isinstance(spoilt, AdaptiveRungeKutta) and solutions[0].stats.rejected > solutions[1].stats.rejected
    found = [torch.autograd.grad(s.final.square().sum(), [z, f.w, f.v]) for s in solutions]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def alive() -> int:
    """How many tensors there are."""
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


@pytest.mark.parametrize("kind", ["smooth", "state detached late", "constant early", "another parameter late"])
@pytest.mark.parametrize("leaf", [True, False])
def test_a_backward_pass_leaves_no_tensor_behind(kind: str, leaf: bool, z: Tensor) -> None:
    """Whichever nodes of a step run last, the gradients that it has received are dropped with the pass."""
    block, z = ODEBlock(Late(kind), solver=ADAPTIVE[0]), z.detach().requires_grad_(leaf)

    def gradients() -> None:
        loss = block(z).square().sum()
        into = [*block.parameters(), *([z] if leaf else [])]
        torch.autograd.grad(loss, into, create_graph=True, allow_unused=True)

    gradients()
    before = alive()
    for _ in range(3):
        gradients()
    assert alive() <= before
