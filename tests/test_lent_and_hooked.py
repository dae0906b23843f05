"""Gradients beside what others do to the same tensors: hooks, lent parameters, scalers, cached weights, threads."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from odelayers import (
    RK4,
    Adjoint,
    Backprop,
    Checkpoint,
    DropoutSDEBlock,
    Equilibrium,
    GradientError,
    Implicit,
    LyaNetRegularizer,
    LyapunovRegularizer,
    ODEBlock,
    Reversible,
    Rodas5P,
    TorchDiffEq,
    jacobian,
)
from problems import TanhNet, name

pytestmark = pytest.mark.timeout(60)
F64 = torch.float64
AGAIN = (Checkpoint(), Reversible(), Adjoint())
LIBRARY = TorchDiffEq("rk4", step_size=0.25)


class Decay(nn.Module):
    """A contracting field with a weight that hooks are registered on."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, dtype=F64)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.linear(z)) - z


def decay(dim: int = 2) -> Decay:
    torch.manual_seed(0)
    return Decay(dim)


def blocks(f: nn.Module) -> list[ODEBlock]:
    """A block for each gradient that evaluates the field again, and for a library's adjoint."""
    return [
        *(ODEBlock(f, solver=RK4(64), gradient=g) for g in AGAIN),
        ODEBlock(f, solver=TorchDiffEq("dopri5", rtol=1e-9, atol=1e-9), gradient=Adjoint()),
    ]


@pytest.mark.parametrize("which", range(4))
def test_a_hook_on_a_parameter_sees_the_whole_gradient_once(which: int) -> None:
    """Not the part of each step: a hook that doubles the gradient doubles it, and is called as often as by Backprop."""
    f, z = decay(), torch.ones(3, 2, dtype=F64)
    (expected,) = torch.autograd.grad(ODEBlock(f, solver=RK4(64))(z).sum(), f.linear.weight)
    seen: list[Tensor] = []
    f.linear.weight.register_hook(lambda g: seen.append(g) or -2 * g)
    blocks(f)[which](z).sum().backward()
    assert len(seen) == 1
    assert (seen[0] - expected).abs().max() < 1e-6
    assert (f.linear.weight.grad + 2 * expected).abs().max() < 1e-6
    assert f.linear.weight._backward_hooks  # and it is still registered


@pytest.mark.parametrize("which", range(4))
def test_parameters_lent_for_a_call_are_those_of_its_backward_pass(which: int) -> None:
    """`functional_call` with weights after an inner step (MAML): the gradient is Backprop's, through the step."""
    f, z = decay(), torch.ones(3, 2, dtype=F64)

    def through_inner_step(block: ODEBlock) -> list[Tensor]:
        start = {k: v.detach().clone().requires_grad_() for k, v in block.named_parameters()}
        fast = {k: v - 0.1 * v.square() for k, v in start.items()}
        for v in fast.values():
            v.retain_grad()
        loss = torch.func.functional_call(block, fast, (z,)).square().sum()
        return list(torch.autograd.grad(loss, list(start.values())))

    expected = through_inner_step(ODEBlock(f, solver=RK4(64)))
    for found, wanted in zip(through_inner_step(blocks(f)[which]), expected, strict=True):
        assert (found - wanted).abs().max() < 1e-6


def test_parameters_lent_for_a_call_reach_an_equilibrium_s_gradient() -> None:
    """Implicit differentiates the field that was solved, not the one that the module holds by then."""

    def found(gradient: Any) -> Tensor:
        end = Equilibrium(1e-8, 100.0)
        block = ODEBlock(decay(), t1=end, solver=RK4(1000), gradient=gradient, time=False)
        lent = {k: (v.detach() - 0.1).requires_grad_() for k, v in block.named_parameters()}
        z = torch.func.functional_call(block, lent, (torch.ones(3, 2, dtype=F64),))
        return torch.cat([g.flatten() for g in torch.autograd.grad(z.sum(), list(lent.values()))])

    assert (found(Implicit()) - found(Backprop())).abs().max() < 1e-6


@pytest.mark.parametrize("gradient", [Backprop(), *AGAIN], ids=name)
def test_a_parameter_replaced_before_backward_gets_none_of_the_gradient(gradient: Any) -> None:
    """The gradient belongs to the tensor that was solved with; the module holds the new one afterwards."""
    f = decay()
    end, old = ODEBlock(f, solver=RK4(8), gradient=gradient)(torch.ones(3, 2, dtype=F64)).sum(), f.linear.weight
    f.linear.weight = new = nn.Parameter(torch.zeros(2, 2, dtype=F64))
    end.backward()
    assert old.grad is not None and new.grad is None and f.linear.weight is new


@pytest.mark.parametrize("gradient", AGAIN, ids=name)
def test_a_parameter_whose_data_is_replaced_before_backward_raises(gradient: Any) -> None:
    """`vector_to_parameters` and `.data =` leave the version as it is, and are noticed all the same."""
    f = decay()
    end = ODEBlock(f, solver=RK4(8), gradient=gradient)(torch.ones(3, 2, dtype=F64)).sum()
    f.linear.weight.data = torch.zeros(2, 2, dtype=F64)
    with pytest.raises(GradientError, match=r"shape \(2, 2\).*by \.data since the forward solve"):
        end.backward()


class Prepared(nn.Module):
    """A field whose weight is computed once for many evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.eye(2, dtype=F64) * 0.5 + 0.1)

    def prepare(self) -> None:
        self.weight = -(self.raw @ self.raw.T)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight)


@pytest.mark.parametrize("gradient", AGAIN, ids=name)
def test_a_weight_computed_before_the_solve_is_refused(gradient: Any) -> None:
    """Its graph is gone after the first step taken again: said at once, and right under Backprop."""
    f, z = Prepared(), torch.ones(3, 2, dtype=F64)
    f.prepare()
    with pytest.raises(GradientError, match=r"result of \w+ from before the solve.*compute it inside the field"):
        ODEBlock(f, gradient=gradient)(z)
    ODEBlock(f)(z).sum().backward()
    assert f.raw.grad is not None


@pytest.mark.parametrize("gradient", AGAIN, ids=name)
def test_weights_cached_by_parametrize_are_computed_again(gradient: Any) -> None:
    """Inside `parametrize.cached()` a cached weight has a graph of its own: the backward pass does without it."""
    found = []
    for chosen in (Backprop(), gradient):
        torch.manual_seed(0)
        layer = parametrizations.orthogonal(nn.Linear(3, 3, dtype=F64))
        with parametrize.cached():
            ODEBlock(layer, solver=RK4(64), gradient=chosen)(torch.ones(2, 3, dtype=F64)).sum().backward()
            assert parametrize._cache_enabled
        found.append(torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).abs().max() < 1e-6


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


@pytest.mark.parametrize("dim", [3, 6])
def test_hooks_on_the_points_leave_jacobians_and_penalties_alone(dim: int) -> None:
    """A hook on z, or retain_grad, sees the caller's gradient: what is differentiated inside is as without it."""
    f, head = decay(dim), nn.Linear(dim, 4, dtype=F64)
    plain = torch.randn(5, dim, dtype=F64).requires_grad_() * 1.0
    hooked = plain.detach().clone().requires_grad_() * 1.0
    hooked.register_hook(lambda g: -10 * g)
    kept = plain.detach().clone().requires_grad_() * 1.0
    kept.retain_grad()
    labels = torch.arange(5) % 4
    for quantity in (
        lambda z: jacobian(f, z),
        lambda z: LyapunovRegularizer()(lambda x: f(x), z),
        lambda z: LyaNetRegularizer()(f, z, labels, head),
        lambda z: ODEBlock(f, solver=Rodas5P())(z),
    ):
        expected = quantity(plain)
        assert all(torch.equal(quantity(z), expected) for z in (hooked, kept))
    assert kept.grad is None
    LyapunovRegularizer()(f, kept).backward()
    assert kept.grad.shape == kept.shape


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
    f, calls = decay(), []
    f.register_forward_hook(lambda *_: calls.append(1))
    end = ODEBlock(f, solver=LIBRARY, gradient=Adjoint())(torch.ones(3, 2, dtype=F64)).sum()
    forwards = len(calls)
    end.backward()
    assert len(calls) - forwards <= forwards
