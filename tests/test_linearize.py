"""Closed-form Jacobians, declared or of linear layers with activations between them, beside differentiation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from odelayers import LyapunovRegularizer, jacobian
from odelayers._field import Field
from odelayers._linearize import _ACTIVATIONS, linearization
from odelayers.fields import SineField, SkewSymmetric

F64 = torch.float64


def wrapped(f: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same field as a function, of which nothing is known."""
    return lambda z: f(z)


def known(f: Callable[..., Tensor], z: Tensor) -> bool:
    return linearization(Field.of(f), z, 0.0) is not None


def test_closed_forms_equal_differentiation() -> None:
    """diag(s) W of the fields that say it equals autograd through the same field wrapped in a function."""
    for field in (SineField(5), *(SkewSymmetric(5, activation=a) for a in ("relu", "leaky_relu", "tanh", "softplus"))):
        f, z = field.double(), torch.randn(6, 5, dtype=F64)
        slopes, matrix = f.linearize(z)
        expected = jacobian(wrapped(f), z)
        torch.testing.assert_close(slopes[:, :, None] * matrix, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(jacobian(f, z), expected, rtol=0, atol=1e-12)


class Doubling(nn.Module):
    """f(z) = 2z, which says of its Jacobian what is recognisable, and wrong by 1e-3."""

    def forward(self, z: Tensor) -> Tensor:
        return 2 * z

    def linearize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(z, 2.001), torch.eye(z.shape[1], dtype=z.dtype)


class Tripling(Doubling):
    """A subclass that replaces forward alone."""

    def forward(self, z: Tensor) -> Tensor:
        return 3 * z


def test_a_closed_form_is_used_only_where_it_speaks_of_the_forward_that_runs() -> None:
    """Used as it stands; passed over for a subclass with another forward, a hook, or a forward set on the object."""
    z = torch.ones(2, 3)
    assert jacobian(Doubling(), z)[0, 0, 0].item() == pytest.approx(2.001)
    assert jacobian(Tripling(), z)[0, 0, 0].item() == 3
    hooked, patched = Doubling(), Doubling()
    hooked.register_forward_hook(lambda module, args, out: 5 * out)
    assert jacobian(hooked, z)[0, 0, 0].item() == 10
    patched.forward = lambda z: 7 * z
    assert jacobian(patched, z)[0, 0, 0].item() == 7


def test_verify_finds_a_wrong_closed_form() -> None:
    """An error of 1e-3 in f.linearize is reported as such; without verify it passes (control)."""
    with pytest.raises(ValueError, match=r"Doubling.linearize is not the derivative of the field at rows \[0, 1\]"):
        jacobian(Doubling(), torch.ones(2, 3, dtype=torch.float64), verify=True)
    assert jacobian(Doubling(), torch.ones(2, 3, dtype=torch.float64))[0, 0, 0] == 2.001


def test_a_closed_form_of_the_wrong_shape_is_named() -> None:
    """The shapes of what linearize gives are checked."""
    f = Doubling()
    f.linearize = lambda z: (z, z)
    with pytest.raises(ValueError, match=r"matrix of shape \(3, 3\), got \(2, 3\) and \(2, 3\)"):
        jacobian(f, torch.zeros(2, 3))


def chains() -> dict[str, nn.Module]:
    twice = nn.Linear(4, 4)
    frozen = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    frozen[0].requires_grad_(False)
    return {
        "one layer": nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
        "two layers": nn.Sequential(nn.Linear(4, 7), nn.Softplus(), nn.Linear(7, 4, bias=False)),
        "an activation of two": nn.Sequential(nn.Linear(4, 3), nn.ELU(), nn.Linear(3, 4), nn.Tanh(), nn.Sigmoid()),
        "linear": nn.Linear(4, 4),
        "linear of linear": nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)),
        "nested": nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.SiLU()), nn.Linear(6, 4), nn.GELU()),
        "a layer that occurs twice": nn.Sequential(twice, nn.Tanh(), twice),
        "a frozen first layer": frozen,
    } | {kind.__name__: nn.Sequential(nn.Linear(4, 6), kind(), nn.Linear(6, 4)) for kind in _ACTIVATIONS}


@pytest.mark.parametrize("name", chains())
@pytest.mark.parametrize("wanted", [False, True], ids=["z constant", "z trained"])
def test_a_chain_of_layers_is_multiplied_out(name: str, wanted: bool) -> None:
    """J and the gradients of a function of it equal those of differentiation, to 1e-12; so does its having a graph."""
    f, z = chains()[name].double(), torch.randn(5, 4, dtype=F64, requires_grad=wanted)
    assert known(f, z) and not known(wrapped(f), z)
    found, expected = jacobian(f, z, verify=True), jacobian(wrapped(f), z)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    inputs = [p for p in [z, *f.parameters()] if p.requires_grad]
    weights = torch.randn_like(found)
    ours, oracle = (
        torch.autograd.grad((J.sin() * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
        for J in (found, expected)
    )
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert not jacobian(f, z).requires_grad
    assert not jacobian(f.requires_grad_(False), z.detach()).requires_grad


def test_a_chain_s_jacobian_is_the_caller_s_own() -> None:
    """Written into, it changes neither the weights nor the other rows."""
    f, z = nn.Linear(3, 3), torch.randn(2, 3)
    with torch.no_grad():
        J = jacobian(f, z)
        J[0] = 0
    assert (f.weight != 0).all() and torch.equal(J[1], f.weight)
    with torch.inference_mode():
        two = nn.Sequential(f, nn.Tanh(), f)
        torch.testing.assert_close(
            jacobian(two, torch.zeros(2, 3) - f.bias @ f.weight.inverse().T)[0], f.weight @ f.weight
        )


class Doubled(nn.Linear):
    """A linear layer with another forward."""

    def forward(self, z: Tensor) -> Tensor:
        return 2 * super().forward(z)


class Residual(nn.Sequential):
    """A chain with another forward."""

    def forward(self, z: Tensor) -> Tensor:
        return z + super().forward(z)


def hooked(backward: bool) -> nn.Module:
    f = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    if backward:
        f[1].register_full_backward_hook(lambda module, inside, outside: (3 * inside[0],))
    else:
        f[0].register_forward_hook(lambda module, args, out: 5 * out)
    return f


def patched() -> nn.Module:
    f = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    f[1].forward = torch.sin
    return f


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(Doubled(4, 4), nn.Tanh()),
        lambda: Residual(nn.Linear(4, 4), nn.Tanh()),
        lambda: hooked(backward=False),
        lambda: hooked(backward=True),
        patched,
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).eval(), nn.Tanh()),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)),
        lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, 4)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
    ],
    ids=[
        "layer",
        "forward",
        "hook",
        "backward hook",
        "patch",
        "parametrisation",
        "norm",
        "softmax",
        "first",
        "inplace",
    ],
)
def test_what_is_no_such_chain_is_differentiated(build: Callable[[], nn.Module]) -> None:
    """Another forward, a hook, a layer that is not known: passed over, and right all the same."""
    f, z = build().double(), torch.randn(5, 4, dtype=F64)
    assert not known(f, z)
    torch.testing.assert_close(jacobian(f, z), jacobian(wrapped(f), z), rtol=0, atol=1e-12)


def test_chains_are_for_states_that_are_vectors() -> None:
    """A linear layer on the last of several axes, and one under autocast, are differentiated."""
    f = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    z = torch.randn(2, 3, 3)  # as many axes as coordinates: the shape alone gives nothing away
    assert not known(f, z)
    torch.testing.assert_close(jacobian(f, z), jacobian(wrapped(f), z))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not known(f, z[:, 0])


@pytest.mark.parametrize("axis", ["row", "column"])
def test_the_regulariser_of_one_layer_needs_no_jacobian(axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its terms and their gradients are those through the Jacobians, of which none is built."""
    f, z = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double(), torch.randn(5, 4, dtype=F64)
    regularizer = LyapunovRegularizer(axis=axis, diagonal_scale=2.0, dominance_margin=0.5)
    expected = regularizer(wrapped(f), z)
    monkeypatch.setattr("odelayers.regularizers.jacobian", None)
    found = regularizer(f, z)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours, oracle = (torch.autograd.grad(value, list(f.parameters())) for value in (found, expected))
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.cuda
def test_chains_are_multiplied_out_on_cuda() -> None:
    """On CUDA, in float64, as on the CPU."""
    for f in chains().values():
        z = torch.randn(5, 4, dtype=F64)
        expected = jacobian(f.double(), z)
        found = jacobian(f.cuda(), z.cuda())
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-10)
