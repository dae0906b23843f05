"""Gradients that evaluate the field again must find it as it was: what changed is noticed, never silently used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import (
    RK4,
    Adjoint,
    Backprop,
    Checkpoint,
    Dopri5,
    DropoutSDEBlock,
    Euler,
    EulerMaruyama,
    GradientError,
    ODEBlock,
    Reversible,
    ReversibleHeun,
    SDEBlock,
    TorchDiffEq,
    TorchSDE,
)
from problems import TanhNet, gradients, name

pytestmark = pytest.mark.timeout(60)
AGAIN = (Checkpoint(), Reversible(), Adjoint())
TIGHT = Dopri5(rtol=1e-9, atol=1e-9)
F64 = torch.float64


@pytest.mark.parametrize("gradient", AGAIN, ids=name)
def test_a_captured_tensor_is_refused_by_gradients_that_evaluate_again(gradient: Any) -> None:
    """A closure's tensor would lose its gradient silently: refused with the remedy, right under Backprop."""
    w, layer = torch.tensor(0.5, dtype=torch.float64, requires_grad=True), nn.Linear(1, 1, dtype=torch.float64)
    z = torch.ones(2, 1, dtype=torch.float64)
    for f in (lambda z: -w * z, lambda z: layer(z)):
        with pytest.raises(GradientError, match=r"neither a parameter.*context=.*Backprop"):
            ODEBlock(f, gradient=gradient)(z)
        with torch.no_grad():
            ODEBlock(f, gradient=gradient)(z)
    ODEBlock(lambda z: -w * z, solver=TIGHT)(z).sum().backward()
    assert w.grad is not None and w.grad.item() == pytest.approx(-2 * 0.60653066, abs=1e-7)


class Moody(nn.Module):
    """A field that differs between training and evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return -self.rate * z if self.training else -10 * self.rate * z


@pytest.mark.parametrize("gradient", AGAIN, ids=name)
def test_the_mode_of_the_forward_pass_holds_in_the_backward_pass(gradient: Any) -> None:
    """eval() between forward and backward changes nothing, and the mode set stays set."""
    f, z, found = Moody(), torch.ones(2, 2, dtype=torch.float64), []
    for flip in (False, True):
        out = ODEBlock(f.train(), gradient=gradient)(z)
        if flip:
            f.eval()
        found.append(gradients(out.sum(), [f.rate]))
    assert torch.equal(found[0][0], found[1][0])
    assert not f.training


@pytest.mark.parametrize("gradient", [Backprop(), *AGAIN], ids=name)
def test_a_parameter_changed_in_place_before_backward_raises(gradient: Any) -> None:
    """An optimiser's step between forward and backward is an error, as it is in plain torch."""
    net = TanhNet(2)
    out = ODEBlock(net, gradient=gradient)(torch.ones(2, 2, dtype=torch.float64))
    with torch.no_grad():
        net.second.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Reader(nn.Module):
    """A field that reads a buffer, a frozen parameter and a context."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.frozen = nn.Linear(2, 2, dtype=F64), nn.Linear(2, 2, dtype=F64).requires_grad_(False)
        self.register_buffer("buffer", torch.ones(2, dtype=F64))

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        return torch.tanh(self.linear(z)) * self.buffer * context + self.frozen(torch.sin(z))


@pytest.mark.parametrize("gradient", [Backprop(), *AGAIN], ids=name)
@pytest.mark.parametrize("what", ["context", "buffer", "frozen"])
def test_whatever_the_field_reads_must_not_change_before_backward(what: str, gradient: Any) -> None:
    """A context, buffer or frozen parameter changed in place is an error in every mode, as in plain torch."""
    f, context = Reader(), torch.ones(3, 2, dtype=F64)
    out = ODEBlock(f, gradient=gradient)(torch.randn(3, 2, dtype=F64), context=context)
    {"context": context, "buffer": f.buffer, "frozen": f.frozen.weight}[what].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_given_increments_are_those_of_the_forward_solve() -> None:
    """Noise handed over and then overwritten: an error where steps are taken again, else the path's own gradient."""
    f, z, dw = TanhNet(2), torch.randn(3, 2, dtype=F64), torch.randn(4, 3, 2, dtype=F64)

    def overwritten(gradient: Any, factor: float) -> Tensor:
        given = dw.clone()
        out = DropoutSDEBlock(f, 0.2, solver=EulerMaruyama(4), gradient=gradient).solve(z, noise=given).final
        if factor != 1.0:
            given.mul_(factor)
        return torch.autograd.grad(out.sum(), f.second.weight)[0]

    with pytest.raises(GradientError, match=r"shape \(4, 3, 2\).*modified by an inplace operation"):
        overwritten(Checkpoint(), 3.0)
    wanted = overwritten(Checkpoint(), 1.0)
    assert torch.allclose(overwritten(Backprop(), 1.0), wanted, rtol=1e-12, atol=1e-14)
    assert torch.equal(overwritten(Backprop(), 3.0), overwritten(Backprop(), 1.0))


def test_a_field_whose_buffers_move_is_refused() -> None:
    """Spectral normalisation in training moves its vectors at every evaluation: refused, or equal to Backprop."""
    f = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3, dtype=F64))
    z = torch.randn(4, 3, dtype=F64)
    with pytest.raises((GradientError, ValueError), match=r"buffer.*eval\(\)|moved.*eval\(\)"):
        ODEBlock(f, gradient=Checkpoint())(z).sum().backward()
    f.eval()
    weights = list(f.parameters())
    found, wanted = (torch.autograd.grad(ODEBlock(f, gradient=g)(z).sum(), weights) for g in (Checkpoint(), Backprop()))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("gradient", AGAIN, ids=name)
def test_autocast_around_the_forward_pass_holds_in_the_backward_pass(gradient: Any) -> None:
    """A solve under bfloat16 autocast is evaluated again under it, though backward runs outside."""
    f = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    z, found = torch.randn(3, 2), []
    for g in (gradient, Backprop()):
        with torch.autocast("cpu", torch.bfloat16):
            out = ODEBlock(f, gradient=g)(z)
        assert out.dtype == torch.float32
        found.append(gradients(out.sum(), list(f.parameters())))
    exact = gradients(ODEBlock(f)(z).sum(), list(f.parameters()))
    for a, b, c in zip(*found, exact, strict=True):
        assert a is not None and b is not None and c is not None
        # Backprop adds its steps' gradients in bfloat16, so it is no closer to the float32 gradient than these.
        assert (a - b).abs().max() < 0.05 * b.abs().max() and (a - c).abs().max() < 0.05 * c.abs().max()


def test_checkpointing_keeps_no_graph_of_the_steps() -> None:
    """The result hangs on one node, whatever the number of steps; backpropagation's graph grows with them."""
    z = torch.ones(2, 2, dtype=F64, requires_grad=True)
    sizes = {}
    for gradient in (Checkpoint(), Backprop()):
        node, seen = [ODEBlock(TanhNet(2), gradient=gradient, t1=10.0)(z).grad_fn], set()
        while node:
            at = node.pop()
            if at is not None and at not in seen:
                seen.add(at)
                node.extend(nxt for nxt, _ in at.next_functions)
        sizes[name(gradient)] = len(seen)
    assert sizes["Checkpoint"] < 20 and sizes["Backprop"] > 300


def by_library(which: str, f: nn.Module) -> nn.Module:
    """A block whose gradient is a library's own adjoint."""
    if which == "torchdiffeq":
        return ODEBlock(f, solver=TorchDiffEq("dopri5"), gradient=Adjoint())
    solver = TorchSDE("reversible_heun", 20)
    return SDEBlock(f, lambda z: 0.1 * z, solver=solver, calculus="stratonovich", gradient=Adjoint())


@pytest.mark.parametrize("which", ["torchdiffeq", "torchsde"])
def test_library_adjoints_hold_the_mode_of_the_forward_pass(which: str) -> None:
    """eval() between forward and backward changes nothing there either, or is refused."""
    f, z, found = Moody(), torch.ones(2, 2, dtype=F64), []
    for flip in (False, True):
        torch.manual_seed(0)
        out = by_library(which, f.train())(z)
        if flip:
            f.eval()
        found.append(torch.autograd.grad(out.sum(), f.rate)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("which", ["torchdiffeq", "torchsde"])
def test_library_adjoints_report_a_bad_incoming_gradient(which: str) -> None:
    """NaN from the loss is named as such, not an assertion or a NaN gradient."""
    out = by_library(which, Moody())(torch.ones(2, 2, dtype=F64))
    with pytest.raises(GradientError, match="backward pass: the gradient that reaches the solution is NaN or inf"):
        out.backward(torch.full_like(out, float("nan")))


@pytest.mark.parametrize("which", ["torchdiffeq", "torchsde"])
def test_library_adjoints_notice_a_parameter_changed_in_place(which: str) -> None:
    """An optimiser's step before backward is an error."""
    f = Moody()
    out = by_library(which, f)(torch.ones(2, 2, dtype=F64))
    with torch.no_grad():
        f.rate.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Saved:
    """What autograd has saved and not yet let go of, counted: it dies with the node that holds it."""

    alive = most = 0

    def __init__(self, x: Tensor) -> None:
        self.x = x
        Saved.alive += 1
        Saved.most = max(Saved.most, Saved.alive)

    def __del__(self) -> None:
        Saved.alive -= 1


@pytest.mark.parametrize("gradient", [Reversible(), Checkpoint()], ids=name)
@pytest.mark.parametrize("solver", [Euler(1), RK4(1), ReversibleHeun(1)], ids=name)
def test_two_parts_graphs_never_live_at_once(solver: Any, gradient: Any) -> None:
    """Going back through 24 steps autograd holds no more than twice what one step alone saves, and lets go of it.

    The states kept for the way back are not counted.
    """
    f, z = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(2, 3)

    def held(steps: int, chosen: Any) -> tuple[int, int, int]:
        Saved.alive = Saved.most = 0
        solved = replace(solver, steps=steps)
        options: dict[str, Any] = {"solver": solved, "gradient": chosen}
        noisy = isinstance(solver, ReversibleHeun)
        block = SDEBlock(f, f, calculus="stratonovich", **options) if noisy else ODEBlock(f, **options)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: Saved(x.detach()), lambda saved: saved.x):
            end = block(z.clone().requires_grad_()).sum()
            before = Saved.alive
            end.backward()
        return before, Saved.most - before, Saved.alive

    (one, *_), (_, most, left) = held(1, Backprop()), held(24, gradient)
    assert most <= 2 * one + 4, (most, one)
    assert left == 0
    assert held(24, Backprop())[0] > 10 * one
