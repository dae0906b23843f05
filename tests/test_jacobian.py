"""Batched Jacobians against a per-sample loop of torch.autograd.functional.jacobian, and what may go wrong in them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from odelayers._jacobian import jacobian, jvp
from odelayers._krylov import rightmost_eigenvalues
from odelayers.fields import MLP, ConvexPotential, ConvField, SineField, SkewSymmetric

pytestmark = pytest.mark.timeout(60)
sin: Callable[[Tensor], Tensor] = lambda z: torch.sin(z)  # noqa: E731 (a builtin has no signature to read)
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "softplus")


def loop(f: Callable[..., Tensor], z: Tensor, create_graph: bool = False) -> Tensor:
    """The oracle: one Jacobian a sample, each by its own backward passes."""
    D = z[0].numel()
    one = torch.autograd.functional.jacobian
    return torch.stack([one(f, z[i : i + 1], create_graph=create_graph).reshape(D, D) for i in range(len(z))])


class Clocked(nn.Module):
    """A field of time and state, (B, 2, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.linear(z)) * torch.cos(t) + z.flip(1) ** 2


def cases() -> list[tuple[nn.Module, Tensor]]:
    closed = [SineField(5), *(cls(5, activation=a) for cls in (SkewSymmetric, ConvexPotential) for a in ACTIVATIONS)]
    fields = [(MLP(4, hidden=(7, 6)), (4,)), (ConvField(4), (4, 3, 2)), *((f, (5,)) for f in closed)]
    return [(f.double(), torch.randn(6, *shape, dtype=torch.float64)) for f, shape in fields]


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 1000])
def test_jacobian_equals_the_loop(chunk_size: int | None) -> None:
    """Jacobi 1841: Every field of the library, at any chunk size, to 1e-12."""
    for f, z in cases():
        torch.testing.assert_close(jacobian(f, z, chunk_size=chunk_size), loop(f, z), rtol=0, atol=1e-12)


def test_outputs_may_be_taken_a_few_at_once_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU's cache is small, the same Jacobian and the same gradients."""
    f, z = ConvField(4).double(), torch.randn(6, 4, 3, 2, dtype=torch.float64)
    gradients = functools.partial(torch.autograd.grad, inputs=list(f.parameters()), materialize_grads=True)
    expected = gradients(jacobian(f, z).sin().sum())
    monkeypatch.setattr("odelayers._jacobian._CACHED", 5 * z.numel())
    torch.testing.assert_close(jacobian(f, z), loop(f, z), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(jacobian(f, z).sin().sum()), expected, rtol=1e-10, atol=1e-12)


def test_time_is_passed_on() -> None:
    """A field f(t, z) is differentiated at the time asked for, in any state shape."""
    f, z = Clocked(), torch.randn(4, 2, 3, dtype=torch.float64)
    for t in (0.0, 1.3, torch.tensor(1.3, dtype=torch.float64)):
        expected = loop(lambda x, t=t: f(torch.as_tensor(t, dtype=torch.float64), x), z)
        torch.testing.assert_close(jacobian(f, z, t), expected, rtol=0, atol=1e-12)


def test_a_batch_of_scalars_has_jacobians_of_one_entry() -> None:
    """z of shape (B,), with its NaN rows named."""
    z = torch.randn(5, dtype=torch.float64)
    J = jacobian(lambda z: z**3, z, verify=True)
    torch.testing.assert_close(J, (3 * z**2).view(5, 1, 1), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"1 of 2 rows \(1\)"):
        jacobian(lambda z: z**3, torch.tensor([0.0, math.nan]))


def test_a_row_does_not_depend_on_its_mates() -> None:
    """Leaving rows out changes nothing in the others."""
    for f, z in cases():
        torch.testing.assert_close(jacobian(f, z)[2:4], jacobian(f, z[2:4]), rtol=0, atol=1e-12)


def test_jacobian_is_differentiable() -> None:
    """Gradients of a function of J, to parameters and to z, equal those through the loop."""
    for f, z in cases():
        z.requires_grad_()
        inputs = [*f.parameters(), z]
        weights = torch.randn(z[0].numel(), z[0].numel(), dtype=torch.float64)
        ours, oracle = (
            torch.autograd.grad((torch.sin(J) * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
            for J in (jacobian(f, z), loop(f, z, create_graph=True))
        )
        for a, b in zip(ours, oracle, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Cube(torch.autograd.Function):
    """z^3 with a backward of its own, as users write them."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return 3 * z**2 * gradient


def test_fields_may_differentiate_inside_themselves() -> None:
    """A gradient flow found by autograd, and a custom autograd.Function, give their exact Jacobians."""

    def descent(z: Tensor) -> Tensor:
        potential = (z**4).sum() / 4 + (z[:, 0] * z[:, 1]).sum()
        return -torch.autograd.grad(potential, z, create_graph=True)[0]

    z = torch.randn(5, 2, dtype=torch.float64)
    cubic = torch.diag_embed(3 * z**2)
    torch.testing.assert_close(jacobian(lambda z: Cube.apply(z), z), cubic, rtol=0, atol=1e-12)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(jacobian(descent, z), -cubic - swap, rtol=0, atol=1e-12)


def test_verify_accepts_every_field_of_the_library() -> None:
    """Rows that do not interact pass, in double and in single precision."""
    for f, z in cases():
        jacobian(f, z, verify=True)
        jacobian(f.float(), z.float(), verify=True)
    jacobian(Clocked(), torch.randn(4, 2, 3, dtype=torch.float64), 0.7, verify=True)


@pytest.mark.parametrize(
    "f",
    [lambda z: z - z.mean(0), lambda z: z.flip(0), lambda z: torch.softmax(z, 0), lambda z: z + 1e-4 * z.sum(0)],
    ids=["mean", "flip", "softmax", "faint"],
)
def test_verify_finds_rows_that_interact(f: Callable[[Tensor], Tensor]) -> None:
    """Coupled rows are reported; without verify the answer is silently wrong (control)."""
    z = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rows of z interact inside field <lambda>"):
        jacobian(f, z, verify=True)
    true = torch.autograd.functional.jacobian(f, z).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    assert (jacobian(f, z) - true).abs().max() > 1e-5


def test_dropout_is_refused_in_training_and_works_in_eval() -> None:
    """A new mask at each evaluation has no Jacobian; the message names the remedy, which works."""
    f = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"draws random numbers .*\.eval\(\)"):
        jacobian(f, torch.randn(4, 3))
    jacobian(f.eval(), torch.randn(4, 3), verify=True)


def test_batchnorm_is_refused_in_training_and_works_in_eval() -> None:
    """Batch statistics couple the rows; the message names the remedy, which works."""
    f, z = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double(), torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"BatchNorm1d .* GroupNorm .* \.eval\(\)"):
        jacobian(f, z)
    torch.testing.assert_close(jacobian(f.eval(), z), loop(f, z), rtol=0, atol=1e-12)


def test_the_answer_carries_a_graph_only_when_there_is_something_to_train() -> None:
    """No graph under no_grad, in inference mode, or without parameters; one for a parameter that a closure holds."""
    z, weight = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
    frozen = MLP(3).requires_grad_(False)
    assert not jacobian(sin, z).requires_grad
    assert not jacobian(frozen, z).requires_grad
    assert jacobian(lambda x: torch.sin(x @ weight), z).requires_grad
    assert jacobian(frozen, z.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        silent = jacobian(MLP(3), z.clone().requires_grad_())
    assert not silent.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(jacobian(sin, torch.zeros(4, 3)), torch.eye(3).expand(4, 3, 3))


def test_the_users_tensors_are_left_alone() -> None:
    """z keeps its flags, and no gradient is written anywhere."""
    f, z = MLP(3), torch.randn(4, 3)
    jacobian(f, z)
    assert not z.requires_grad
    assert all(p.grad is None for p in f.parameters())


def test_a_field_that_ignores_z_has_the_jacobian_zero() -> None:
    """Constant fields, with and without parameters, and empty batches."""
    bias = nn.Parameter(torch.ones(3))
    for f in (lambda z: torch.zeros_like(z), lambda z: bias.expand_as(z), lambda z: z.detach()):
        assert torch.equal(jacobian(f, torch.randn(4, 3)), torch.zeros(4, 3, 3))
    assert jacobian(MLP(3), torch.zeros(0, 3)).shape == (0, 3, 3)


@pytest.mark.parametrize(
    ("f", "z", "error", "words"),
    [
        (sin, torch.zeros(4, 3, dtype=torch.int64), TypeError, "int64"),
        (sin, [1.0], TypeError, "list"),
        (sin, torch.tensor(1.0), ValueError, "0-d"),
        (lambda z: z[:, :2], torch.zeros(4, 3), ValueError, r"\(4, 3\).*\(4, 2\)"),
        (lambda z: z.sum(1, keepdim=True), torch.zeros(4, 3), ValueError, r"\(4, 3\).*\(4, 1\)"),
        (lambda z: z > 0, torch.zeros(4, 3), TypeError, "bool"),
        (lambda z: (z,), torch.zeros(4, 3), TypeError, "tuple"),
        (nn.Linear(3, 3), torch.zeros(4, 3, dtype=torch.float64), TypeError, "float32"),
        (sin, torch.tensor([[0.0], [math.nan], [math.inf]]), ValueError, r"z: .* 2 of 3 rows \(1, 2\)"),
        (lambda z: z.log(), torch.tensor([[1.0], [-1.0]]), ValueError, r"f\(z\): .* 1 of 2 rows \(1\)"),
        (lambda z: z.sqrt(), torch.tensor([[1.0], [0.0]]), ValueError, r"J: .* 1 of 2 rows \(1\)"),
    ],
)
def test_bad_input_is_named(f: Callable[..., Tensor], z: object, error: type[Exception], words: str) -> None:
    """Typed errors that say what, where, expected and got."""
    with pytest.raises(error, match=words):
        jacobian(f, z)


def test_a_bad_chunk_size_is_named() -> None:
    """chunk_size is an int >= 1."""
    with pytest.raises(ValueError, match="chunk_size"):
        jacobian(sin, torch.zeros(2, 3), chunk_size=0)


def test_jvp_equals_the_jacobian_times_the_vector() -> None:
    """J v in any state shape, differentiable, and also under no_grad."""
    for f, z in cases():
        v = torch.randn_like(z)
        expected = (jacobian(f, z) @ v.flatten(1).unsqueeze(-1)).view_as(z)
        found = jvp(f, z, v)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        parameters = list(f.parameters())
        weights = torch.randn_like(z)
        ours, oracle = (
            torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True, materialize_grads=True)
            for out in (found, expected)
        )
        for a, b in zip(ours, oracle, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(jvp(f, z, v), expected.detach(), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="shape of z"):
        jvp(sin, torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.cuda
def test_jacobians_stay_on_cuda() -> None:
    """On CUDA tensors the Jacobians are there too and equal the CPU's."""
    for f, z in cases():
        expected = jacobian(f, z)
        found = jacobian(f.cuda(), z.cuda(), verify=True)
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-10)


def test_a_default_device_is_none_of_its_business() -> None:
    """What is drawn to verify a Jacobian, or to start a Krylov space, is drawn where the points can be reached."""
    f, z = nn.Tanh(), torch.linspace(-1, 1, 6).reshape(2, 3)
    with torch.device("meta"):
        assert jacobian(f, z, verify=True).device == z.device
        assert rightmost_eigenvalues(f, z, k=1)[0].device == z.device
