"""Blocks under torch.func, export and inference mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from odelayers import MLP, RK4, Adjoint, Checkpoint, Dopri5, Heun, ODEBlock, Reversible, Rodas5P, Tsit5, jacobian
from odelayers._solvers.stages import _kept_vectors


@pytest.fixture
def z() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def block(solver: RK4 | Dopri5) -> ODEBlock:
    return ODEBlock(MLP(4, (8,)).double(), solver=solver)


def test_a_block_s_jacobian_is_that_of_every_transform(z: Tensor) -> None:
    """jacobian(block), vmap of jacrev and jvp agree on a fixed grid to rounding."""
    flow = block(RK4(steps=8))
    J = jacobian(flow, z)
    by_row = torch.func.vmap(torch.func.jacrev(lambda x: flow(x[None])[0]))(z)
    assert (J - by_row).abs().max() < 1e-13
    along = torch.func.jvp(flow, (z,), (z,))[1]
    assert (along - (J @ z.unsqueeze(-1)).squeeze(-1)).abs().max() < 1e-13


def test_an_adaptive_block_s_jacobian_needs_no_loop(z: Tensor) -> None:
    """jacobian works through adaptive steps, and equals that of a fine grid within the tolerance."""
    tight, fine = block(Dopri5(1e-10, 1e-10)), block(RK4(steps=200))
    fine.load_state_dict(tight.state_dict())
    assert (jacobian(tight, z) - jacobian(fine, z)).abs().max() < 1e-8


def test_vmap_over_adaptive_steps_is_refused_with_the_remedy(z: Tensor) -> None:
    """vmap cannot read an error on the host: the message names a fixed grid."""
    adaptive = block(Dopri5())
    with pytest.raises(RuntimeError, match=r"Dopri5.*vmap.*use a fixed grid such as RK4"):
        torch.func.vmap(lambda x: adaptive(x[None])[0])(z)
    with pytest.raises(RuntimeError, match=r"Dopri5.*vmap.*use a fixed grid such as RK4"):
        torch.func.vmap(torch.func.jacrev(lambda x: adaptive(x[None])[0]))(z)


# The Jacobian of the first is known in closed form.
@pytest.mark.parametrize("f", [nn.Sequential(nn.Linear(4, 4), nn.Tanh()), MLP(4, (8,))], ids=["chain", "MLP"])
def test_transforms_of_a_jacobian_work_or_are_refused_with_the_remedy(f: nn.Module, z: Tensor) -> None:
    """In reverse mode with respect to z they give the gradient of autograd; all others say what to do instead.

    So they do where z is a tensor that requires a gradient, which a transform by the parameters takes for a constant.
    """
    f, func = f.double(), torch.func

    def size(z: Tensor) -> Tensor:
        return jacobian(f, z).square().sum()

    def size_of_one(row: Tensor) -> Tensor:
        return size(row[None])

    def by_parameters(p: dict[str, Tensor], z: Tensor) -> Tensor:
        return jacobian(lambda x: func.functional_call(f, p, (x,)), z).sum()

    x, p = z.clone().requires_grad_(), {name: p.detach() for name, p in f.named_parameters()}
    (wanted,) = torch.autograd.grad(size(x), x)
    for found in (func.grad(size)(z), func.jacrev(size)(z), func.vjp(size, z)[1](torch.ones_like(z[0, 0]))[0]):
        assert torch.equal(found, wanted)
    for refused in (
        lambda: func.vmap(size_of_one)(z),
        lambda: func.vmap(func.grad(size_of_one))(z),
        lambda: func.jacfwd(size)(z),  # a vmap over directions
    ):
        with pytest.raises(
            RuntimeError, match=r"jacobian under a torch\.func transform.*as one batch, jacobian\(f, z\)"
        ):
            refused()
    for refused in (
        lambda: func.jvp(size, (z,), (z,)),
        lambda: func.grad(by_parameters)(p, z),
        lambda: func.grad(by_parameters)(p, x),
        lambda: func.jvp(lambda p: by_parameters(p, x), (p,), (p,)),
    ):
        with pytest.raises(RuntimeError, match=r"forbid; differentiate the result with torch\.autograd\.grad"):
            refused()


def test_an_exported_block_gives_the_same_numbers(z: Tensor) -> None:
    """torch.export of a fixed-grid block computes what the block does."""
    flow = block(RK4(steps=4))
    exported = torch.export.export(flow, (z,)).module()
    assert torch.equal(exported(z), flow(z))


@pytest.mark.parametrize("solver", [RK4(steps=4), Dopri5(), Dopri5(batch="independent")], ids=repr)
def test_inference_mode_changes_no_number(solver: RK4 | Dopri5, z: Tensor) -> None:
    """Under inference_mode the result is that of no_grad, bit for bit."""
    flow = block(solver)
    with torch.no_grad():
        expected = flow(z)
    with torch.inference_mode():
        assert torch.equal(flow(z), expected)


def untouched(call: Callable[[ODEBlock], object], solver: RK4 | Dopri5, z: Tensor) -> None:
    """Whatever came first in a process, the block's gradient is what it is without it."""
    flow = block(solver)
    _kept_vectors.cache_clear()
    expected = torch.autograd.grad(flow(z).sum(), flow.parameters())
    _kept_vectors.cache_clear()
    call(flow)
    for found, wanted in zip(torch.autograd.grad(flow(z).sum(), flow.parameters()), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("solver", [RK4(steps=4), Dopri5()], ids=repr)
def test_inference_mode_leaves_nothing_behind_that_training_cannot_use(solver: RK4 | Dopri5, z: Tensor) -> None:
    """A block that is served first can be trained afterwards."""
    untouched(torch.inference_mode()(lambda flow: flow(z)), solver, z)


@pytest.mark.parametrize("strict", [False, True])
def test_export_leaves_nothing_behind_that_a_block_cannot_use(strict: bool, z: Tensor) -> None:
    """Tensors made while exporting are the exporter's own."""
    untouched(lambda flow: torch.export.export(flow, (z,), strict=strict), RK4(steps=4), z)


@pytest.mark.parametrize("gradient", [Checkpoint(), Reversible(), Adjoint()], ids=repr)
def test_gradients_that_evaluate_again_refuse_dual_numbers(gradient: Checkpoint, z: Tensor) -> None:
    """They would drop the tangent of a context without a word."""
    flow = ODEBlock(lambda z, c: torch.tanh(z) * c, time=False, solver=RK4(steps=4), gradient=gradient)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward mode.*use gradient=Backprop\(\)"):
        flow(z, context=forward_ad.make_dual(z, z))


def test_what_differentiates_the_field_itself_refuses_dual_numbers(z: Tensor) -> None:
    """A Jacobian, and the steps of a Rosenbrock method, would lose or falsify the tangents."""
    with forward_ad.dual_level():
        x = forward_ad.make_dual(z, z)
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"Rodas5P.*dual numbers.*use a fixed grid"):
            block(Rodas5P())(x)
        with pytest.raises(RuntimeError, match=r"jacobian under a torch.func transform or with dual numbers"):
            jacobian(lambda z: z**2, x)


@pytest.mark.parametrize("solver", [RK4(steps=16), Dopri5(1e-10, 1e-10)], ids=repr)
def test_an_end_time_has_a_forward_mode_derivative(solver: RK4 | Dopri5, z: Tensor) -> None:
    """A scalar end time under jvp or as a dual number moves the end state by the field there."""
    flow, t1 = block(solver), torch.tensor(1.0, dtype=torch.float64)
    along = torch.func.jvp(lambda t: flow(z, t1=t), (t1,), (torch.ones_like(t1),))[1]
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(flow(z, t1=forward_ad.make_dual(t1, torch.ones_like(t1)))).tangent
    expected = flow.f(flow(z))
    assert (along - expected).abs().max() < 1e-5 and (dual - along).abs().max() < 1e-12


@pytest.mark.parametrize(
    "solver", [Heun(steps=4), RK4(steps=4), Dopri5(), Tsit5(), Dopri5(batch="independent")], ids=repr
)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_differentiation_gives_the_jacobian_s_products(
    solver: RK4 | Dopri5, grad: bool, z: Tensor
) -> None:
    """Dual numbers through the steps give J v, in either grad mode."""
    flow, v = block(solver), torch.randn_like(z)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        found = forward_ad.unpack_dual(flow(forward_ad.make_dual(z, v))).tangent
    assert (found - (jacobian(flow, z) @ v.unsqueeze(-1)).squeeze(-1)).abs().max() < 1e-12
