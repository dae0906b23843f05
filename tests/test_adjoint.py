"""The adjoint: its error falls with the tolerance, and where it would be wrong it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import (
    RK4,
    Adjoint,
    Backprop,
    Dopri5,
    GradientError,
    Heun,
    ODEBlock,
    SDEBlock,
    SolveError,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
)
from problems import TanhNet, gradients, name

ADAPTIVE = (Dopri5, Tsit5, lambda rtol, atol: TorchDiffEq("dopri5", rtol, atol))


def solved(block: ODEBlock, **times: Any) -> list[Tensor]:
    """The gradients of a loss over the outputs in the state, the context and the parameters."""
    g = torch.Generator().manual_seed(2)
    z = torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_()
    context = torch.randn(4, 5, generator=g, dtype=torch.float64).requires_grad_()
    zs = block.solve(z, context=context, **times).zs
    return [x for x in gradients(zs.square().sum(), [z, context, *block.parameters()]) if x is not None]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference."""
    assert len(found) == len(wanted)
    return max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "times", [{"t1": 1.5}, {"ts": [0.3, 0.9, 1.7]}, {"ts": [1.0, 0.2, -0.5]}], ids=["end", "ts", "back"]
)
@pytest.mark.parametrize("make", ADAPTIVE, ids=["Dopri5", "Tsit5", "TorchDiffEq"])
def test_the_adjoint_s_error_falls_with_the_tolerance(make: Any, times: dict[str, Any]) -> None:
    """Pontryagin 1962: Against Backprop at 1e-12, for states, context and parameters, over outputs forwards and
    backwards."""
    net = TanhNet()
    exact = solved(ODEBlock(net, solver=Dopri5(1e-12, 1e-12)), **times)
    errors = [
        distance(solved(ODEBlock(net, solver=make(t, t), gradient=Adjoint()), **times), exact)
        for t in (1e-4, 1e-7, 1e-10)
    ]
    assert errors[0] < 1e-1 and errors[1] < 1e-4 and errors[2] < 1e-7, errors
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("solver", [RK4, Heun], ids=name)
def test_on_a_fixed_grid_the_adjoint_converges_with_the_steps(solver: type) -> None:
    """Optimise-then-discretise differs from Backprop by the order of the method."""
    net = TanhNet()
    exact = solved(ODEBlock(net, solver=Dopri5(1e-12, 1e-12)), t1=1.0)
    coarse, fine = (
        distance(solved(ODEBlock(net, solver=solver(steps=n), gradient=Adjoint()), t1=1.0), exact) for n in (20, 40)
    )
    assert coarse / fine > 0.8 * 2 ** solver(steps=1).order


@pytest.mark.parametrize("shape", ["one", "per sample"])
def test_the_adjoint_gives_end_times_their_gradient(shape: str) -> None:
    """dL/dt1 = dL/dz . f(t1, z(t1)), for one end time and for one per sample."""
    net, z = TanhNet(), torch.randn(4, 3, dtype=torch.float64)
    t1 = torch.tensor(1.2 if shape == "one" else [0.5, 0.9, 1.2, 1.4], dtype=torch.float64, requires_grad=True)
    out = ODEBlock(net, solver=Dopri5(1e-9, 1e-9), gradient=Adjoint())(z, t1)
    (found,) = torch.autograd.grad(out.sum(), t1)
    wanted = net(t1.reshape(-1, 1) if t1.ndim else t1, out).sum(dim=1)
    assert torch.allclose(found, wanted if t1.ndim else wanted.sum(), atol=1e-6)


@pytest.mark.parametrize("rate, refused", [(-10.0, True), (-1.0, False)], ids=["contracting", "mild"])
def test_the_adjoint_refuses_where_its_backward_solve_loses_the_state(rate: float, refused: bool) -> None:
    """Pontryagin 1962: z' = -10 z over T = 5: the recovered state is off by e^50 roundings; the error names Checkpoint.
    -z is fine."""
    z = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    out = ODEBlock(lambda z: rate * z, t1=5.0, gradient=Adjoint())(z)
    if refused:
        with pytest.raises(
            GradientError, match=r"differs from the forward solve's by .*Checkpoint\(\) or Backprop\(\)"
        ):
            out.sum().backward()
    else:
        out.sum().backward()
        assert z.grad is not None and (z.grad - torch.tensor(rate * 5.0, dtype=torch.float64).exp()).abs().max() < 1e-3


@pytest.mark.parametrize("lost", [0.0, 0.25, 0.5])
def test_the_drift_is_dated_by_the_output_at_which_it_is_seen(lost: float) -> None:
    """The state is compared at every output: the error names the one where the contracting stretch starts."""
    ts = [0.0, 0.25, 0.5, 0.75]
    z = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    block = ODEBlock(lambda t, z: -150 * ((t >= lost) & (t <= lost + 0.25)) * z, solver=RK4(60), gradient=Adjoint())
    zs = block.solve(z, ts).zs
    with pytest.raises(GradientError, match=rf"the state at s = {lost:g} differs"):
        zs.sum().backward()


def test_a_backward_solve_that_fails_says_so_of_the_adjoint() -> None:
    """z' = -10 z over T = 2 takes 30 steps forwards and over 40 backwards: the error is not the forward solve's."""
    z = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    block = ODEBlock(lambda z: -10 * z, t1=2.0, solver=Dopri5(1e-6, 1e-6, max_steps=40), gradient=Adjoint(1e300))
    out = block(z)
    with pytest.raises(SolveError, match=r"^the adjoint of <lambda> solved by Dopri5.* the step budget was spent"):
        out.sum().backward()


def test_without_the_check_the_contracting_gradient_would_be_wrong() -> None:
    """Control, Pontryagin 1962: with torchdiffeq's adjoint, which recovers the state unchecked, a nonlinear gradient is
    far off."""

    def f(z: Tensor) -> Tensor:
        return torch.tanh(3 * z.flip(1)) - 10 * z

    z = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    exact = gradients(ODEBlock(f, t1=2.0, solver=Dopri5(1e-10, 1e-10))(z).sum(), [z])[0]
    found = gradients(ODEBlock(f, t1=2.0, solver=TorchDiffEq("dopri5"), gradient=Adjoint())(z).sum(), [z])[0]
    assert exact is not None and found is not None
    assert (found - exact).abs().max() > 0.5 * exact.abs().max()
    with pytest.raises(GradientError, match="Checkpoint"):
        ODEBlock(f, t1=2.0, gradient=Adjoint())(z).sum().backward()


def test_torchsde_s_own_adjoint_agrees_with_backprop_through_it() -> None:
    """adjoint_reversible_heun recomputes the path: equal to backpropagation, to amplified rounding."""
    drift, diffusion, found = TanhNet(), TanhNet(scale=0.2), []
    solver = TorchSDE("reversible_heun", steps=20)
    for gradient in (Adjoint(), Backprop()):
        block = SDEBlock(drift, diffusion, solver=solver, calculus="stratonovich", gradient=gradient)
        torch.manual_seed(11)
        found.append(solved(block, t1=1.0))
    assert distance(*found) < 1e-7


def test_the_adjoint_keeps_no_graph_of_the_steps() -> None:
    """The result hangs on one node, whatever the number of steps."""
    z = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    for gradient, limit in ((Adjoint(), 20), (Backprop(), 10**9)):
        node, seen = [ODEBlock(TanhNet(2), solver=RK4(steps=50), gradient=gradient)(z).grad_fn], set()
        while node:
            at = node.pop()
            if at is not None and at not in seen:
                seen.add(at)
                node.extend(nxt for nxt, _ in at.next_functions)
        assert (len(seen) < limit) and (limit == 20 or len(seen) > 500)


class Mixed(nn.Module):
    """A field with parameters of other dtypes than its state's: a float64 number, a complex spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.2, -0.4], [0.3, 0.1]]))
        self.rate = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.spectrum = nn.Parameter(torch.tensor([0.5 + 0.3j, 0.2 - 0.1j]))
        self.shift = nn.Parameter(torch.tensor(0.3))

    def forward(self, z: Tensor) -> Tensor:
        mixed = torch.fft.ifft(self.spectrum * torch.fft.fft(z)).real
        return torch.tanh(z @ self.weight) - self.rate * z + mixed + self.shift


def test_parameters_of_other_dtypes_have_an_adjoint() -> None:
    """Their integrals run along in the state's dtype, complex ones as two parts; each gradient has its own dtype."""
    f, z = Mixed(), torch.tensor([[1.0, -0.5], [0.3, 0.8]])
    found, expected = (gradients(ODEBlock(f, gradient=g)(z).sum(), f.parameters()) for g in (Adjoint(), Backprop()))
    for p, ours, theirs in zip(f.parameters(), found, expected, strict=True):
        assert ours.dtype == p.dtype
        assert (ours - theirs).abs().max() < 1e-3 and theirs.abs().max() > 0.1
