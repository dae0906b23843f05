"""Heads and ready-made fields: the geometry and the stability that their docstrings promise."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from odelayers._jacobian import jacobian
from odelayers._linalg import log_norm, spectral_abscissa
from odelayers.fields import MLP, ConvexPotential, ConvField, SineField, SkewSymmetric
from odelayers.heads import orthogonal_head, simplex_head
from strategies import seeds, states

SLOPES = {"relu": 0.0, "leaky_relu": 0.01, "tanh": 0.0, "softplus": 0.0}  # the infimum of each activation's slope


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (2, 5), (3, 2), (10, 9), (10, 10), (10, 64), (100, 512)])
def test_simplex_rows_are_unit_vectors_at_equal_obtuse_angles(classes: int, dim: int, double: None) -> None:
    """Rankin 1955: Every cosine is -1/(classes - 1), every length 1, to rounding."""
    V = simplex_head(classes, dim).weight
    expected = torch.full((classes, classes), -1 / (classes - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(V @ V.T, expected, rtol=0, atol=1e-13)


@given(seeds, st.integers(2, 8), st.integers(1, 8))
def test_no_unit_vectors_are_further_apart_than_the_simplex(seed: int, classes: int, dim: int) -> None:
    """Rankin 1955: the largest cosine of any k unit vectors is at least -1/(k - 1), in any dimension."""
    V = nn.functional.normalize(states(classes, dim, seed), dim=1)
    cosines = (V @ V.T).fill_diagonal_(-math.inf)
    assert cosines.max() >= -1 / (classes - 1) - 1e-12


@pytest.mark.parametrize(("classes", "dim"), [(1, 1), (2, 5), (10, 10), (10, 64)])
def test_orthogonal_rows_are_orthonormal(classes: int, dim: int, double: None) -> None:
    """V V' = I to rounding."""
    V = orthogonal_head(classes, dim).weight
    torch.testing.assert_close(V @ V.T, torch.eye(classes), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: simplex_head(10, 8), "dim >= classes - 1 = 9, got 8"),
        (lambda: simplex_head(1, 8), "at least 2"),
        (lambda: orthogonal_head(10, 9), "dim >= classes = 10, got 9"),
        (lambda: orthogonal_head(0, 9), "classes"),
    ],
)
def test_heads_that_do_not_fit_are_refused(call: Callable[[], nn.Module], words: str) -> None:
    """The message says which dimension would do."""
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("build", [simplex_head, orthogonal_head])
def test_heads_are_frozen_unless_trainable(build: Callable[..., nn.Module]) -> None:
    """z @ weight.T without bias, one key in the state dict, and a gradient only when asked for."""
    head, z = build(3, 4), torch.randn(2, 4)
    assert list(head.state_dict()) == ["weight"] and head.weight.shape == (3, 4)
    torch.testing.assert_close(head(z), z @ head.weight.T)
    assert not head.weight.requires_grad and build(3, 4, trainable=True).weight.requires_grad
    torch.testing.assert_close(build(3, 4).weight, head.weight)  # no randomness


@pytest.mark.parametrize(("channels", "parameters"), [(16, 17_418), (128, 655_370)])
def test_the_blogs_nets_have_the_blogs_number_of_parameters(channels: int, parameters: int) -> None:
    """conv3x3(1 -> C) and BatchNorm before the field, a linear head on 7x7 after it."""
    before = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels))
    net = nn.Sequential(before, ConvField(channels), nn.Flatten(), nn.Linear(channels * 49, 10))
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_the_conv_field_is_the_blogs() -> None:
    """GroupNorm, then four times ReLU, convolution, GroupNorm, by hand; groups divide the channels."""
    f, z = ConvField(6), torch.randn(2, 6, 5, 4)
    norms = [m for m in f if isinstance(m, nn.GroupNorm)]
    convs = [m for m in f if isinstance(m, nn.Conv2d)]
    out = nn.functional.group_norm(z, norms[0].num_groups)
    for conv in convs:
        out = nn.functional.conv2d(out.relu(), conv.weight, padding=1)
        out = nn.functional.group_norm(out, norms[0].num_groups)
    torch.testing.assert_close(f(z), out)
    groups = {c: next(iter(ConvField(c).children())).num_groups for c in (7, 16, 48, 64, 128)}
    assert groups == {7: 7, 16: 16, 48: 24, 64: 32, 128: 32}


def test_fields_are_their_formulas() -> None:
    """sin(-(Wz+b)), act(Az+b) with A put together by hand, -W' act(Wz+b), and an MLP layer by layer."""
    z = torch.randn(3, 5)
    sine, skew, potential, mlp = SineField(5), SkewSymmetric(5, damping=0.3), ConvexPotential(5, 7), MLP(5, (4,))
    torch.testing.assert_close(sine(z), torch.sin(-(z @ sine.linear.weight.T + sine.linear.bias)))
    A = torch.zeros(5, 5)
    A[:2, 2:], A[2:, :2] = skew.weight, -skew.weight.T
    A -= 0.3 * torch.eye(5)
    torch.testing.assert_close(skew(z), nn.functional.leaky_relu(z @ A.T + skew.bias, 0.01))
    W, b = potential.linear.weight, potential.linear.bias
    torch.testing.assert_close(potential(z), -torch.relu(z @ W.T + b) @ W)
    torch.testing.assert_close(mlp(z), mlp[2](torch.tanh(mlp[0](z))))


@pytest.mark.parametrize("activation", SLOPES)
@given(seed=seeds, dim=st.integers(2, 6), damping=st.floats(0.0, 2.0))
def test_no_mode_of_the_skew_symmetric_field_grows(activation: str, seed: int, dim: int, damping: float) -> None:
    """Abscissa <= -damping times the smallest slope, anywhere; without the skew structure it is positive (control)."""
    torch.manual_seed(seed)
    f = SkewSymmetric(dim, damping=damping, activation=activation).double()
    nn.init.normal_(f.weight)
    z = 2 * torch.randn(5, dim, dtype=torch.float64)
    # An eigenvalue 0 of a defective matrix (slopes of 0) is computed to the square root of the rounding only.
    assert (spectral_abscissa(jacobian(f, z)) <= -damping * SLOPES[activation] + 1e-6).all()
    coupling = f.matrix() + damping * torch.eye(dim, dtype=torch.float64)
    assert spectral_abscissa(coupling.abs()) > 0.0


def test_the_skew_symmetric_field_loses_energy_only_by_damping() -> None:
    """H = sum log cosh(Az + b) changes at the rate -damping |tanh(Az + b)|^2 along a tanh field; yet the flow does not
    contract (control): its Euclidean log norm is positive somewhere."""
    f = SkewSymmetric(6, damping=0.4, activation="tanh").double()
    nn.init.normal_(f.weight)
    z = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    u = z @ f.matrix().T + f.bias
    (gradient,) = torch.autograd.grad(torch.log(torch.cosh(u)).sum(), z)
    torch.testing.assert_close((gradient * f(z)).sum(1), -0.4 * torch.tanh(u).square().sum(1))
    assert log_norm(jacobian(f, z), 2).max() > 0.1


@pytest.mark.parametrize("activation", SLOPES)
@given(seed=seeds, dim=st.integers(1, 5), hidden=st.integers(1, 7))
def test_the_flow_of_a_convex_potential_is_1_lipschitz(activation: str, seed: int, dim: int, hidden: int) -> None:
    """J is symmetric with eigenvalues in [-||W||^2, 0], and Euler at max_step moves no two points apart."""
    torch.manual_seed(seed)
    f = ConvexPotential(dim, hidden, activation=activation).double()
    a, b = 3 * torch.randn(2, 20, dim, dtype=torch.float64)
    J, norm = jacobian(f, a), f.operator_norm().item()
    torch.testing.assert_close(J, J.mT)
    eigenvalues = torch.linalg.eigvalsh(J)
    assert (eigenvalues <= 1e-12).all() and (eigenvalues >= -(norm**2) * (1 + 1e-12)).all()
    assert (log_norm(J, 2) <= 1e-12).all()
    for h in (0.3 * f.max_step(), f.max_step()):
        after = (a + h * f(a) - b - h * f(b)).norm(dim=1)
        assert (after <= (a - b).norm(dim=1) * (1 + 1e-12)).all()


def test_euler_beyond_max_step_moves_points_apart() -> None:
    """Control: at 1.1 times max_step two points along the leading singular vector part, where the slope is 1."""
    f = ConvexPotential(4, activation="leaky_relu").double()
    nn.init.constant_(f.linear.bias, 10.0)
    direction = torch.linalg.svd(f.linear.weight).Vh[0]
    a, b = torch.zeros(1, 4, dtype=torch.float64), 0.1 * direction[None]
    for factor, apart in ((1.0, False), (1.1, True)):
        h = factor * f.max_step()
        ratio = (a + h * f(a) - b - h * f(b)).norm() / (a - b).norm()
        assert (ratio > 1 + 1e-9).item() == apart


def test_the_operator_norm_is_exact() -> None:
    """The root of the largest eigenvalue of W'W, in float64 whatever the field's dtype; W = 0 allows any step."""
    f = ConvexPotential(6, 9)
    W = f.linear.weight.double()
    assert f.operator_norm().item() == pytest.approx(torch.linalg.eigvalsh(W.T @ W)[-1].sqrt().item(), rel=1e-12)
    assert f.max_step() == pytest.approx(2 / f.operator_norm().item() ** 2)
    nn.init.zeros_(f.linear.weight)
    assert f.max_step() == math.inf


@pytest.mark.parametrize("f", [MLP(4), ConvField(4), SineField(4), SkewSymmetric(4), ConvexPotential(4)], ids=repr)
def test_fields_are_ordinary_modules(f: nn.Module) -> None:
    """Picklable, in double precision too, with gradients for every parameter."""
    z = torch.randn(3, 4, 2, 2) if isinstance(f, ConvField) else torch.randn(3, 4)
    torch.testing.assert_close(pickle.loads(pickle.dumps(f))(z), f(z))
    f.double()(z.double()).square().sum().backward()
    assert all(p.grad is not None for p in f.parameters())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: MLP(0), ValueError, "MLP: dim"),
        (lambda: MLP(2, hidden=(2.0,)), TypeError, "MLP: hidden"),
        (lambda: ConvField(0), ValueError, "ConvField: channels"),
        (lambda: SineField(True), TypeError, "SineField: dim"),
        (lambda: SkewSymmetric(1), ValueError, ">= 2"),
        (lambda: SkewSymmetric(4, damping=-1.0), ValueError, "damping"),
        (lambda: SkewSymmetric(4, activation="sin"), ValueError, "'tanh'"),
        (lambda: ConvexPotential(4, 0), ValueError, "hidden"),
        (lambda: ConvexPotential(4, activation="sin"), ValueError, "'relu'"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Tensor], error: type[Exception], words: str) -> None:
    """Each error names the argument."""
    with pytest.raises(error, match=words):
        call()
