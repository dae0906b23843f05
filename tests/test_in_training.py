"""Gradients in the middle of a training: loss scalers, other threads, memory that is let go, a library's adjoint."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import RK4, Adjoint, Backprop, Checkpoint, DropoutSDEBlock, ODEBlock, Reversible, TorchDiffEq
from problems import TanhNet, name

pytestmark = pytest.mark.timeout(60)
F64 = torch.float64
AGAIN = (Checkpoint(), Reversible(), Adjoint())


@pytest.mark.parametrize("gradient", [Backprop(), *AGAIN], ids=name)
def test_a_loss_scaler_finds_its_scale(gradient: Any) -> None:
    """Under float16 autocast a gradient that overflows is a GradScaler's signal, and no error: the step is left out."""
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = nn.Sequential(nn.Linear(4, 4), ODEBlock(field, solver=RK4(4), gradient=gradient), nn.Linear(4, 1))
    before = [p.detach().clone() for p in model.parameters()]
    optimiser, scaler = torch.optim.SGD(model.parameters(), 1e-3), torch.amp.GradScaler("cpu", init_scale=2.0**17)
    with torch.autocast("cpu", torch.float16):
        loss = (100 * model(torch.randn(8, 4))).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 2.0**16
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_an_adjoint_that_overflows_in_float16_is_a_signal_too() -> None:
    """The gradient that arrives is finite, and its own backward solve is not: inf or NaN, as by Backprop."""
    layer, z = nn.Linear(2, 2), torch.ones(3, 2, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        end = ODEBlock(nn.Sequential(layer, nn.Tanh()), solver=RK4(4), gradient=Adjoint())(z)
    (end.sum() * 1e5).backward()
    assert not layer.weight.grad.isfinite().all()


def test_another_thread_s_random_numbers_are_not_taken_for_the_field_s() -> None:
    """torch's generator is the process's: threads that draw at the same time solve without an error."""
    block, z, failures = DropoutSDEBlock(nn.Sequential(nn.Linear(64, 64), nn.Tanh())), torch.randn(128, 64), []

    @torch.no_grad()
    def solve() -> None:
        for _ in range(60):
            try:
                block(z)
            except ValueError as error:
                failures.append(error)

    threads = [threading.Thread(target=solve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("gradient", [Checkpoint(segments=100), Reversible()], ids=name)
def test_states_kept_for_the_backward_pass_are_let_go_after_it(gradient: Any) -> None:
    """As the graph of Backprop is, though the loss lives on; with retain_graph they stay for another pass."""
    block, z = ODEBlock(TanhNet(2), solver=RK4(100), gradient=gradient), torch.randn(999, 2, dtype=F64)

    def alive() -> int:
        gc.collect()
        return sum(type(x) is Tensor and len(x.shape) == 2 and len(x) == 999 for x in gc.get_objects())

    before = alive()
    end = block(z.requires_grad_())
    loss = end.sum()
    loss.backward(retain_graph=True)
    once, z.grad = z.grad, None
    loss.backward()
    assert torch.equal(z.grad, once)
    del once, end
    assert alive() <= before + 1  # the gradient
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_library_s_adjoint_solves_backwards_once() -> None:
    """The field is called as often as by torchdiffeq alone: once forwards and once backwards for each evaluation."""
    f, calls = TanhNet(2), []
    f.register_forward_hook(lambda *_: calls.append(1))
    end = ODEBlock(f, solver=TorchDiffEq("rk4", step_size=0.25), gradient=Adjoint())(torch.ones(3, 2, dtype=F64)).sum()
    forwards = len(calls)
    end.backward()
    assert len(calls) - forwards <= forwards
