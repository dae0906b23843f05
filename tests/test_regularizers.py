"""Regularisers against the official per-sample loop, closed forms, and what they are meant to achieve."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from odelayers._jacobian import jacobian
from odelayers.fields import MLP, SineField
from odelayers.heads import simplex_head
from odelayers.regularizers import (
    JacobianRegularizer,
    KineticRegularizer,
    LyaNetRegularizer,
    LyapunovRegularizer,
    SteadyStateRegularizer,
)
from odelayers.stability import check_stability


def official(f: Callable[[Tensor], Tensor], z: Tensor, rows: Tensor) -> Tensor:
    """The loss of the official MNIST code's second phase, one sample and one column at a time."""
    diagonal, dominance = [], []
    for i in rows.tolist():
        J = torch.autograd.functional.jacobian(f, z[i : i + 1], create_graph=True).reshape(z.shape[1], z.shape[1])
        for j in range(z.shape[1]):
            others = sum(J[i, j].abs() for i in range(z.shape[1]) if i != j)
            diagonal.append(torch.exp(J[j, j] + 1))
            dominance.append(torch.exp(0.1 * (others - J[j, j].abs() + 1)))
    field = (50 * f(z).abs()).square().mean()
    return 0.2 * field + 10 * torch.stack(diagonal).mean() + 10 * torch.stack(dominance).mean()


FIELDS = [lambda: SineField(5).double(), lambda: MLP(5, hidden=(7,)).double()]


@pytest.mark.parametrize("build", FIELDS, ids=["closed form", "general"])
def test_the_preset_equals_the_official_loop(build: Callable[[], nn.Module]) -> None:
    """Value and every gradient, to parameters and z, for the rows that were drawn."""
    f, z = build(), torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
    regularizer = LyapunovRegularizer.sodef_mnist()
    loss = regularizer(f, z, generator=torch.Generator().manual_seed(3))
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(3))[:8]
    oracle = official(f, z, rows)
    torch.testing.assert_close(loss, oracle, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, [*f.parameters(), z]) for x in (loss, oracle)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_terms_are_those_of_equation_4() -> None:
    """For z' = Az + b each term equals its formula by a loop over entries, rows and columns told apart."""
    A, b = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    z = torch.randn(4, 3, dtype=torch.float64)
    values = {}
    for axis in ("row", "column"):
        regularizer = LyapunovRegularizer(
            field_scale=2.0,
            diagonal_scale=0.5,
            diagonal_margin=0.3,
            dominance_scale=0.7,
            dominance_margin=0.2,
            axis=axis,
        )
        terms = regularizer.terms(lambda z: z @ A.T + b, z)
        M = A if axis == "row" else A.T
        radii = [sum(abs(M[i, j].item()) for j in range(3) if j != i) for i in range(3)]
        field = sum((2.0 * v) ** 2 for v in (z @ A.T + b).flatten().tolist()) / 12
        diagonal = sum(math.exp(0.5 * (A[i, i].item() + 0.3)) for i in range(3)) / 3
        dominance = sum(math.exp(0.7 * (radii[i] - abs(A[i, i].item()) + 0.2)) for i in range(3)) / 3
        assert [x.item() for x in terms] == pytest.approx([field, diagonal, dominance], rel=1e-12)
        values[axis] = terms.dominance.item()
    assert values["row"] != pytest.approx(values["column"], rel=1e-3)


def test_the_call_weighs_the_terms() -> None:
    """The scalar is the sum of weights times terms, and a weight of 0 leaves its term out."""
    f, z = MLP(3), torch.randn(4, 3)
    terms = LyapunovRegularizer().terms(f, z)
    weighted = LyapunovRegularizer(field=2.0, diagonal=0.0, dominance=3.0)(f, z)
    torch.testing.assert_close(weighted, 2 * terms.field + 3 * terms.dominance)


def test_any_state_shape_and_time_dependent_fields() -> None:
    """A field f(t, z) on (B, C, H, W) equals the same field on flat states at that time."""
    net = MLP(8, hidden=(6,)).double()
    z = torch.randn(5, 2, 2, 2, dtype=torch.float64)
    found = LyapunovRegularizer()(lambda t, z: torch.cos(t) * net(z.flatten(1)).view_as(z), z, 0.4)
    torch.testing.assert_close(found, LyapunovRegularizer()(lambda z: math.cos(0.4) * net(z), z.flatten(1)))


def test_a_batch_of_scalars_is_a_batch_of_rows_of_one() -> None:
    """z of shape (B,) gives what (B, 1) gives."""
    z, y = torch.randn(4), torch.tensor([0, 1, 0, 1])
    found, expected = (LyapunovRegularizer()(lambda z: -z, x) for x in (z, z[:, None]))
    torch.testing.assert_close(found, expected)
    found = LyaNetRegularizer()(lambda z: -z, z, y, lambda z: torch.stack([z, -z], 1))
    torch.testing.assert_close(found, LyaNetRegularizer()(lambda z: -z, z[:, None], y, lambda z: torch.cat([z, -z], 1)))


def test_samples_draw_rows_from_the_generator() -> None:
    """The same generator state draws the same rows, the global one is used by default, all rows need no draw."""
    f, z = MLP(3), torch.randn(50, 3)
    few = LyapunovRegularizer(samples=4)
    seeded = [few(f, z, generator=torch.Generator().manual_seed(s)).item() for s in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    torch.manual_seed(5)
    first = few(f, z).item()
    torch.manual_seed(5)
    assert few(f, z).item() == first
    state = torch.get_rng_state()
    torch.testing.assert_close(LyapunovRegularizer(samples=50)(f, z), LyapunovRegularizer()(f, z))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_overflowing_exponential_goes_on_as_its_tangent() -> None:
    """Where exp would be inf (control), the value and the square of its gradient are finite and still point down."""
    gain = torch.tensor(1e3, requires_grad=True)
    assert torch.exp(gain).item() == math.inf
    loss = LyapunovRegularizer(field=0.0)(lambda z: gain * z, torch.ones(2, 3))
    (gradient,) = torch.autograd.grad(loss, gain)
    assert math.isfinite(loss.item()) and 0 < gradient.item() and math.isfinite((gradient**2).item())
    bend = math.log(torch.finfo(torch.float32).max) / 4
    diagonal = [LyapunovRegularizer().terms(lambda z, g=g: g * z, torch.ones(1, 1)).diagonal.item() for g in (22, 23)]
    assert diagonal == pytest.approx([math.exp(22), math.exp(bend) * (1 + 23 - bend)], rel=1e-5)


def test_half_precision_is_computed_in_float32() -> None:
    """(50 f)^2 and the exponentials stay finite in float16 and agree with float32 to its rounding."""
    z = torch.randn(4, 3)
    half, single = (LyapunovRegularizer(field_scale=50.0)(lambda z: 20 * z, x) for x in (z.half(), z.half().float()))
    assert half.dtype == torch.float32 and half.item() == pytest.approx(single.item(), rel=1e-2)


def test_training_with_it_makes_points_stable() -> None:
    """A sine field trained on the penalty meets constraints 2 and 3 at every point, so Gershgorin's theorem puts all
    eigenvalues on the left (theorem 4); untrained it does not (control)."""
    f, z = SineField(4), 0.1 * torch.randn(32, 4)
    assert "contracting" not in check_stability(f, z).verdict
    regularizer = LyapunovRegularizer(diagonal_margin=0.3, dominance_margin=0.3)
    optimizer = torch.optim.Adam(f.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        regularizer(f, z).backward()
        optimizer.step()
    report = check_stability(f, z)
    assert (report.diagonal < 0).all() and (report.row_dominance > 0).all()
    assert (report.log_norm_inf < 0).all() and (report.abscissa <= report.log_norm_inf + 1e-6).all()
    assert report.verdict == ["contracting"] * 32


def test_a_regularizer_is_a_record() -> None:
    """Frozen, comparable, picklable, and its repr builds it again."""
    regularizer = LyapunovRegularizer.sodef_mnist()
    assert eval(repr(regularizer)) == regularizer == pickle.loads(pickle.dumps(regularizer))
    assert regularizer != dataclasses.replace(regularizer, axis="row")
    assert LyapunovRegularizer.sodef_mnist(samples=None).samples is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        regularizer.field = 1.0
    assert LyaNetRegularizer(kappa=2.0) == LyaNetRegularizer(kappa=2.0)
    assert KineticRegularizer() == KineticRegularizer() != SteadyStateRegularizer()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"field": -1.0}, ValueError),
        ({"diagonal": math.nan}, ValueError),
        ({"dominance": "1"}, TypeError),
        ({"field_scale": 0.0}, ValueError),
        ({"dominance_margin": math.inf}, ValueError),
        ({"axis": "columns"}, ValueError),
        ({"samples": 0}, ValueError),
        ({"weight": 1.0}, TypeError),
    ],
)
def test_wrong_constants_are_refused_at_construction(wrong: dict[str, object], error: type[Exception]) -> None:
    """Each error names the argument."""
    with pytest.raises(error, match=next(iter(wrong))):
        LyapunovRegularizer(**wrong)


def test_an_empty_batch_is_refused() -> None:
    """A mean over nothing would be NaN and poison the loss."""
    with pytest.raises(ValueError, match="at least one point"):
        LyapunovRegularizer()(MLP(3), torch.zeros(0, 3))


@pytest.mark.parametrize("build", FIELDS, ids=["closed form", "general"])
def test_rows_that_are_not_finite_are_named(build: Callable[[], nn.Module]) -> None:
    """NaN neither passes into the loss nor stays anonymous."""
    z = torch.zeros(3, 5, dtype=torch.float64)
    z[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"1 of 3 rows \(1\)"):
        LyapunovRegularizer()(build(), z)


def test_running_rates_equal_their_formulas() -> None:
    """|f|, |f|^2 / D, and |e' J|^2 / D whose mean over the unit vectors e gives the Frobenius norm of J."""
    f = MLP(6, hidden=(5,)).double()
    z = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    shaped = lambda z: f(z.flatten(1)).view_as(z)  # noqa: E731
    dz, flat = shaped(z), f(z.flatten(1))
    probe = torch.randn_like(z)
    torch.testing.assert_close(SteadyStateRegularizer().rate(0.0, z, dz, probe), flat.square().sum(1).sqrt())
    torch.testing.assert_close(KineticRegularizer().rate(0.0, z, dz, probe), flat.square().sum(1) / 6)
    J = jacobian(shaped, z)
    rate = JacobianRegularizer().rate(0.0, z, dz, probe)
    torch.testing.assert_close(rate, (probe.flatten(1)[:, None] @ J).square().sum((1, 2)) / 6)
    units = torch.eye(6, dtype=torch.float64).view(6, 1, 2, 3).expand(6, 4, 2, 3)
    rates = [JacobianRegularizer().rate(0.0, z, dz, e) for e in units]
    torch.testing.assert_close(torch.stack(rates).sum(0), J.square().sum((1, 2)) / 6)


def test_the_jacobian_rate_trains_the_field() -> None:
    """Its gradient to the parameters is that of the closed form for z' = Wz, |e' W|^2 / D."""
    linear = nn.Linear(3, 3, bias=False).double()
    z, probe = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, dtype=torch.float64)
    rate = JacobianRegularizer().rate(0.0, z, linear(z), probe).sum()
    (found,) = torch.autograd.grad(rate, linear.weight)
    torch.testing.assert_close(found, 2 / 3 * probe.T @ probe @ linear.weight)


def test_the_jacobian_rate_of_a_field_that_ignores_z_is_zero_and_a_dead_z_is_refused() -> None:
    """The Jacobian of a constant is 0; a z without gradient is a mistake of the caller, not a Jacobian of 0."""
    z = torch.randn(2, 3, requires_grad=True)
    assert JacobianRegularizer().rate(0.0, z, torch.ones(2, 3), torch.ones(2, 3)).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="requires a gradient"):
        JacobianRegularizer().rate(0.0, z.detach(), z.detach(), torch.ones(2, 3))


def test_lyanet_penalises_the_rate_of_the_loss_along_the_flow() -> None:
    """relu(V' + kappa V) with V' by central differences of the cross-entropy along the field."""
    f, head = MLP(4, hidden=(8,)).double(), simplex_head(3, 4).double()
    z, y, kappa, h = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2]), 0.5, 1e-5

    def V(z: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(z), y, reduction="none")

    rate = (V(z + h * f(z)) - V(z - h * f(z))) / (2 * h)
    expected = (rate + kappa * V(z)).relu()
    assert (expected > 0).any()
    torch.testing.assert_close(LyaNetRegularizer(kappa=kappa)(f, z, y, head), expected.mean(), atol=1e-8, rtol=0)


def test_lyanet_is_differentiable_and_quiet_under_no_grad() -> None:
    """gradcheck to z through the penalty, gradients for field and head, and no graph under no_grad."""
    f, head = MLP(2, hidden=(4,)).double(), simplex_head(3, 2, trainable=True).double()
    z, y = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2])
    regularizer = LyaNetRegularizer()
    assert torch.autograd.gradcheck(lambda z: regularizer(f, z, y, head), z)
    regularizer(f, z, y, head).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [*f.parameters(), *head.parameters()])
    with torch.no_grad():
        assert not regularizer(f, z, y, head).requires_grad


def test_where_lyanet_is_zero_the_loss_falls_at_the_wanted_rate() -> None:
    """Gradient descent on V fast enough has no penalty, and V falls at least like e^(-kappa t) along it; a field that
    climbs is penalised (control)."""
    head, y, kappa, h = simplex_head(3, 2).double(), torch.tensor([0, 1]), 0.1, 1e-3

    def V(z: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(z), y, reduction="none")

    def descend(z: Tensor) -> Tensor:
        with torch.enable_grad():
            x = z.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(V(x).sum(), x)
        return -5 * gradient

    z = torch.tensor([[0.1, 0.2], [0.3, -0.1]], dtype=torch.float64)
    start, regularizer = V(z), LyaNetRegularizer(kappa=kappa)
    for _ in range(500):
        assert regularizer(descend, z, y, head).item() == 0
        z = z + h * descend(z)
    assert (V(z) <= start * math.exp(-kappa * 500 * h)).all()
    assert regularizer(lambda z: -descend(z), z, y, head).item() > 0


def test_all_terms_weigh_one_unless_told() -> None:
    """With f = 0 and J = 0 each exponential is 1 and the residual 0; with f = 1 the residual adds its square."""
    z = torch.zeros(4, 3)
    assert LyapunovRegularizer()(lambda z: 0 * z, z).item() == pytest.approx(2.0)
    assert LyapunovRegularizer()(lambda z: 0 * z + 1, z).item() == pytest.approx(3.0)


def test_lyanet_needs_points() -> None:
    """The mean over no points would be NaN."""
    with pytest.raises(ValueError, match=r"LyaNetRegularizer: expected at least one point, got z of shape \(0, 3\)"):
        LyaNetRegularizer()(lambda z: -z, torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), lambda z: z)
