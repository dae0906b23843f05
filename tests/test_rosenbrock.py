"""What a Rosenbrock step rests on: its linear equations, its Jacobian in closed form or not, and their derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from odelayers import Dopri5, KineticRegularizer, ODEBlock, Rodas5P, jacobian
from odelayers._solvers.factored import Factored

F64 = torch.float64


class Timed(nn.Module):
    """A field with time, parameters and a stiff part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2, dtype=F64)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return 3 * torch.tanh(self.inner(z)) + torch.sin(3 * t) - 50 * z


def test_steps_pass_gradcheck_to_second_order() -> None:
    """State, parameters and per-sample end times, for two steps held equal: the Jacobian is differentiated too."""
    f = Timed()
    block = ODEBlock(f, solver=Rodas5P(1e9, 1e9, first_step=0.5))
    z = torch.randn(2, 2, dtype=F64, requires_grad=True)
    t1 = torch.tensor([0.4, 1.0], dtype=F64, requires_grad=True)

    def run(z: Tensor, t1: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(block, {"f.inner.weight": weight, "f.inner.bias": bias}, (z, t1))

    inputs = (z, t1, *(p.detach().clone().requires_grad_() for p in f.parameters()))
    assert gradcheck(run, inputs, atol=1e-7)
    assert gradgradcheck(run, inputs, atol=1e-6)


def test_an_equation_s_derivatives_of_all_orders_are_those_of_its_solution() -> None:
    """`Factored.solve` against the inverse, whose derivatives autograd knows."""
    W = (torch.randn(4, 3, 3, dtype=F64) + 3 * torch.eye(3, dtype=F64)).requires_grad_()
    r = torch.randn(4, 3, dtype=F64, requires_grad=True)
    assert (Factored(W).solve(r) - (torch.linalg.inv(W) @ r.unsqueeze(-1)).squeeze(-1)).abs().max() < 1e-12
    assert gradcheck(lambda W, r: Factored(W).solve(r), (W, r)) and gradgradcheck(
        lambda W, r: Factored(W).solve(r), (W, r)
    )


@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_per_sample_end_times_take_the_steps_of_a_common_one(rate: float) -> None:
    """Time as a factor of the field scales value, Jacobian and derivative in time alike, so nothing changes."""
    f = lambda t, z: 3 * torch.sin(5 * t) - (1 + rate * t) * z**3  # noqa: E731
    z, solver = torch.rand(3, 2, dtype=F64), {n: Rodas5P(1e9, 1e9, first_step=n) for n in (0.5, 0.25)}
    common = ODEBlock(f, t1=2.0, solver=solver[0.5])(z)
    apart = ODEBlock(f, solver=solver[0.25])(z, torch.full((3,), 2.0, dtype=F64))
    assert (apart - common).abs().max() < 1e-13


def test_batch_statistics_and_transforms_are_refused() -> None:
    """Rows that interact have no Jacobians of their own; torch.func cannot pass the solver's own differentiation."""
    with pytest.warns(UserWarning, match="BatchNorm"), pytest.raises(ValueError, match=r"Rodas5P.*GroupNorm"):
        ODEBlock(nn.BatchNorm1d(2), solver=Rodas5P())(torch.randn(4, 2))
    block = ODEBlock(lambda z: -z, solver=Rodas5P())
    for transform in (torch.func.vmap, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=r"Rodas5P.*torch.func.*RK4\(steps\)"):
            transform(lambda x: block(x[None])[0])(torch.randn(3, 2))


class Closed(nn.Module):
    """tanh(Wz + b) + drift t, with and without its closed form."""

    def __init__(self, timed: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=F64)
        self.timed, self.asked = timed, 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -20 * torch.tanh(self.linear(z)) + (torch.sin(t) if self.timed else 0.0)

    def linearize(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        self.asked += 1
        return -20 * (1 - torch.tanh(self.linear(z)) ** 2), self.linear.weight


@pytest.mark.parametrize("timed", [False, True])
def test_a_closed_form_of_the_jacobian_is_used(timed: bool) -> None:
    """States, gradients and evaluations are those of differentiation, without a backward pass a step."""
    f, z, found = Closed(timed), torch.randn(4, 3, dtype=F64, requires_grad=True), []
    for field in (f, lambda t, z: f(t, z)):
        solution = ODEBlock(field, solver=Rodas5P()).solve(z)
        grads = torch.autograd.grad(solution.final.square().sum(), [z, *f.parameters()])
        found.append((solution.final, *grads, torch.tensor(solution.stats.nfe)))
    assert f.asked == (solution.stats.nfe - 2) / 8
    for a, b in zip(*found, strict=True):
        assert np.allclose(a.detach(), b.detach(), rtol=1e-11, atol=1e-13)


def test_a_closed_form_is_passed_over_where_integrals_run_along() -> None:
    """A field's `linearize` knows nothing of the integrals: they are those that Dopri5 finds."""
    f, z = Closed(timed=True), torch.randn(4, 3, dtype=F64)
    found = [
        ODEBlock(f, solver=solver).solve(z, running=[KineticRegularizer()]).running[0]
        for solver in (Rodas5P(1e-8, 1e-8), Dopri5(1e-8, 1e-8))
    ]
    assert f.asked == 0 and (found[0] - found[1]).abs().max() < 1e-5


def heights(root: Any, found: dict[Any, int]) -> dict[Any, int]:
    """The longest way down from each node of a graph below the root: by it autograd leaves parts out of its search."""
    stack = [root]
    while stack:
        below = [node for node, _ in stack[-1].next_functions if node is not None]
        missing = [node for node in below if node not in found]
        if not missing:
            found[stack.pop()] = 1 + max((found[node] for node in below), default=-1)
        stack += missing
    return found


def searched(out: Tensor, inputs: list[Tensor]) -> int:
    """How many nodes autograd visits on its search for a way from `out` to the inputs."""
    height = heights(out.grad_fn, {})
    lowest = min(0 if x.grad_fn is None else heights(x.grad_fn, height)[x.grad_fn] for x in inputs)
    seen, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen and height[node] >= lowest:
            seen.add(node)
            stack += [below for below, _ in node.next_functions if below is not None]
    return len(seen)


@pytest.mark.parametrize("rate", [None, 2.0])
def test_no_step_s_jacobian_searches_the_graph_of_the_steps_before(
    rate: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes that autograd visits for a Jacobian are those of one evaluation, however many steps came before."""
    differentiate, visits = torch.autograd.grad, list[int]()

    def counted(out: Tensor, inputs: list[Tensor], *rest: Any, **more: Any) -> tuple[Tensor, ...]:
        visits.append(searched(out, inputs))
        return differentiate(out, inputs, *rest, **more)

    monkeypatch.setattr("torch.autograd.grad", counted)
    t1 = None if rate is None else torch.full((2,), rate, dtype=F64, requires_grad=True)
    solution = ODEBlock(Timed(), solver=Rodas5P()).solve(torch.ones(2, 2, dtype=F64, requires_grad=True), t1=t1)
    assert len(visits) >= 2 * solution.stats.accepted > 20
    assert max(visits) < 30, visits  # two steps further on it would be hundreds


def test_a_solve_of_nothing_to_train_leaves_no_graph() -> None:
    """The time that a field is differentiated by is not taken for a parameter of it."""
    z = torch.ones(2, 2, dtype=F64)
    assert not ODEBlock(lambda t, z: -z * t, solver=Rodas5P()).solve(z).final.requires_grad
    assert ODEBlock(Timed(), solver=Rodas5P()).solve(z).final.requires_grad


@pytest.mark.parametrize("dim", [3, 7])
def test_a_block_has_a_jacobian_whatever_its_size(dim: int) -> None:
    """A few outputs are differentiated one by one, more of them at once: either passes through the linear equations."""
    torch.manual_seed(0)
    f, z = nn.Sequential(nn.Linear(dim, dim, dtype=F64), nn.Tanh()), torch.randn(3, dim, dtype=F64, requires_grad=True)
    found, expected = (jacobian(ODEBlock(f, solver=s), z) for s in (Rodas5P(1e-9, 1e-9), Dopri5(1e-10, 1e-10)))
    assert (found - expected).abs().max() < 1e-8
    second, wanted = (torch.autograd.grad(J.square().sum(), z)[0] for J in (found, expected))
    assert (second - wanted).abs().max() < 1e-7
