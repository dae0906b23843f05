"""Gradients beside what others do to the same tensors: hooks, lent and replaced parameters, cached weights."""

from __future__ import annotations

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
from problems import name

pytestmark = pytest.mark.timeout(60)
F64 = torch.float64
AGAIN = (Checkpoint(), Reversible(), Adjoint())


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
    for times in (1, 2, 4):  # memory that is free again may be taken anew
        f = decay()
        end = ODEBlock(f, solver=RK4(8), gradient=gradient)(torch.ones(3, 2, dtype=F64)).sum()
        for _ in range(times):
            f.linear.weight.data = torch.zeros(2, 2, dtype=F64)
        with pytest.raises(GradientError, match=r"shape \(2, 2\).*by \.data since the forward solve"):
            end.backward()


@pytest.mark.parametrize("gradient", AGAIN, ids=name)
def test_a_parameter_renamed_before_backward_leaves_the_module_whole(gradient: Any) -> None:
    """weight_norm takes a parameter away under its name: the backward pass does not put an empty one there."""
    f, z = nn.Linear(2, 2, dtype=F64), torch.ones(3, 2, dtype=F64, requires_grad=True)
    block = ODEBlock(f, solver=RK4(8), gradient=gradient)
    end = block(z).sum()
    nn.utils.parametrizations.weight_norm(f)
    end.backward()
    assert z.grad is not None and "weight" not in f._parameters
    block(z).sum().backward()


@pytest.mark.parametrize("gradient", AGAIN, ids=name)
def test_a_context_or_a_lent_weight_that_is_captured_as_well_is_refused(gradient: Any) -> None:
    """What the field takes out of a closure gets no gradient, though the same tensor is handed over too."""
    z, c = torch.ones(3, 2, dtype=F64), torch.tensor(0.5, dtype=F64, requires_grad=True)
    with pytest.raises(GradientError, match=r"shape \(\) that is neither a parameter of the field nor its context"):
        ODEBlock(lambda z, x: -c * z, solver=RK4(8), gradient=gradient, time=False)(z, context=c)
    f, start = decay(), torch.zeros(2, dtype=F64, requires_grad=True)
    lent = start + 0.1
    f.register_forward_hook(lambda f, args, out: out + lent)
    with pytest.raises(GradientError, match="result of AddBackward0 from before the solve"):
        torch.func.functional_call(ODEBlock(f, gradient=gradient), {"f.linear.bias": lent}, (z,))


class Diffusing(nn.Module):
    """A field with a sparse buffer, as a graph's adjacency matrix is."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5, dtype=F64))
        self.register_buffer("A", torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64).to_sparse())

    def forward(self, z: Tensor) -> Tensor:
        return self.rate * (torch.sparse.mm(self.A, z.T).T - z)


@pytest.mark.parametrize("gradient", AGAIN, ids=name)
def test_sparse_buffers_are_read_like_others(gradient: Any) -> None:
    """The gradient is Backprop's."""
    f, z = Diffusing(), torch.tensor([[1.0, -0.5], [0.2, 0.7]], dtype=F64)
    found, expected = (
        torch.autograd.grad(ODEBlock(f, solver=RK4(64), gradient=g)(z).square().sum(), f.rate)[0]
        for g in (gradient, Backprop())
    )
    assert (found - expected).abs() < 1e-6


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
    """Inside `parametrize.cached()` a cached weight has a graph of its own: a solve does without it.

    Here the layer is used before the block, and the block twice.
    """
    found = []
    for chosen in (Backprop(), gradient):
        torch.manual_seed(0)
        layer = parametrizations.orthogonal(nn.Linear(3, 3, dtype=F64))
        block = ODEBlock(layer, solver=RK4(64), gradient=chosen)
        with parametrize.cached():
            block(block(layer(torch.ones(2, 3, dtype=F64)))).sum().backward()
            assert parametrize._cache_enabled
        found.append(torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).abs().max() < 1e-6


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
