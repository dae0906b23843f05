"""Spectra, stability reports, theorems on Jacobians, and Lyapunov exponents, against scipy and closed forms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from odelayers._solution import SolveError, Status
from odelayers.fields import MLP
from odelayers.stability import check_stability, jacobian, lyapunov_exponents, spectrum
from strategies import seeds, states

LINEAR = {
    "contracting": [[-1.0, 0.5], [0.0, -2.0]],
    "stable": [[-1.0, 100.0], [0.0, -1.0]],  # the transient control: no log norm is negative
    "undecided": [[0.0, 1.0], [-1.0, 0.0]],
    "unstable": [[1.0, 0.0], [0.0, -3.0]],
}


def linear(A: Tensor):
    return lambda z: z @ A.T


def distance_between_spectra(a: Tensor, b: np.ndarray) -> float:
    """The largest distance in the best matching: eigenvalues have no order."""
    cost = np.abs(a.numpy()[:, None] - b[None, :])
    return float(cost[scipy.optimize.linear_sum_assignment(cost)].max())


@given(seeds, st.integers(1, 6))
def test_spectrum_is_that_of_the_jacobian(seed: int, dim: int) -> None:
    """For tanh networks, matched to scipy's eigenvalues of the Jacobian at each point."""
    torch.manual_seed(seed)
    f, z = MLP(dim, hidden=(8,)).double(), torch.randn(3, dim, dtype=torch.float64)
    for values, J in zip(spectrum(f, z), jacobian(f, z).detach(), strict=True):
        assert distance_between_spectra(values.detach(), scipy.linalg.eigvals(J.numpy())) < 1e-9


@pytest.mark.parametrize("verdict", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_verdict_on_linear_fields(verdict: str, dtype: torch.dtype) -> None:
    """Contracting, stable yet growing first, rotating, unstable."""
    A = torch.tensor(LINEAR[verdict], dtype=dtype)
    assert check_stability(linear(A), torch.randn(3, 2, dtype=dtype)).verdict == [verdict] * 3


def test_the_numbers_of_a_report_are_those_of_the_matrix() -> None:
    """For z' = Az + b every entry equals its closed form."""
    A, b = torch.tensor([[-3.0, 1.0], [-0.5, -2.0]], dtype=torch.float64), torch.tensor([3.0, 4.0]).double()
    report = check_stability(lambda z: z @ A.T + b, torch.zeros(1, 2, dtype=torch.float64))
    expected = {
        "residual": 5.0,
        "abscissa": -2.5 + 0.0,  # trace -5, determinant 6.5: -2.5 +- 0.5i
        "log_norm_1": -1.0,
        "log_norm_2": -2.5 + math.hypot(0.5, 0.25),
        "log_norm_inf": -1.5,
        "diagonal": -2.0,
        "row_dominance": 1.5,
        "column_dominance": 1.0,
    }
    for name, value in expected.items():
        assert getattr(report, name).item() == pytest.approx(value, abs=1e-12), name


def test_a_sign_within_margin_and_rounding_is_undecided() -> None:
    """An abscissa of -0.1 has a sign at margin 0 and none at margin 0.2; nor has one of 1e-9 in float32."""
    z = torch.zeros(1, 2)
    assert check_stability(lambda z: -0.1 * z, z).verdict == ["contracting"]
    assert check_stability(lambda z: -0.1 * z, z, margin=0.2).verdict == ["undecided"]
    faint = torch.tensor([[1e-9, 1.0], [0.0, -1.0]])
    assert check_stability(linear(faint), z).verdict == ["undecided"]
    assert check_stability(linear(faint.double()), z.double()).verdict == ["unstable"]


def test_a_check_at_a_point_is_no_certificate_of_a_basin() -> None:
    """Control, Theorem 2 of the paper: z' = -z + z^3 is contracting at 0 by every measure, and the solution from 1.1
    blows up."""
    report = check_stability(lambda z: -z + z**3, torch.tensor([[0.0], [1.1]], dtype=torch.float64))
    assert report.verdict == ["contracting", "unstable"]
    solution = scipy.integrate.solve_ivp(lambda t, z: -z + z**3, (0, 5), [1.1], events=lambda t, z: abs(z[0]) - 1e3)
    assert solution.t_events[0].size == 1
    with pytest.raises(SolveError, match="<lambda>"):
        lyapunov_exponents(lambda z: -z + z**3, torch.tensor([[1.1]], dtype=torch.float64), t1=5.0)


def test_a_report_prints_as_an_aligned_table() -> None:
    """One row a quantity, columns in line, a theorem beside each count, and the counts add up."""
    text = str(check_stability(MLP(3), torch.randn(7, 3), margin=0.01))
    lines = text.splitlines()
    assert lines[0] == "MLP at 7 points, t = 0, margin = 0.01"
    assert {len(line) for line in lines[1:11]} == {26 + 5 * 11}
    assert "theorem 3" in text and "theorem 4" in text and "at these points, not around them" in text
    counts = [int(part.split()[0]) for part in lines[-1].removeprefix("verdict: ").split("(")[0].split(", ")]
    assert sum(counts) == 7
    assert max(map(len, lines)) <= 120


COUNTS = {"contracting": (3, 3, 3, 3), "stable": (3, 0, 0, 0), "undecided": (0, 0, 0, 0), "unstable": (0, 0, 0, 0)}


@pytest.mark.parametrize("verdict", LINEAR)
def test_the_counts_printed_are_of_points_below_zero(verdict: str) -> None:
    """Abscissa, log norms by rows, by columns and for p = 2: so many of three points lie below 0, margin and all."""
    A, z = torch.tensor(LINEAR[verdict], dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    printed = str(check_stability(linear(A), z)).splitlines()
    table = printed[printed.index(next(line for line in printed if line.startswith("negative"))) + 1 : -1]
    assert [line[26:37].strip() for line in table] == [f"{count}/3" for count in COUNTS[verdict]]
    some = torch.tensor([[0.0], [0.1], [1.1]], dtype=torch.float64)  # where -1 + 3 z^2 is negative twice
    assert str(check_stability(lambda z: -z + z**3, some)).count(" 2/3  ") == 4
    assert str(check_stability(lambda z: -z + z**3, some, margin=0.98)).count(" 1/3  ") == 4


def test_a_report_becomes_a_plain_dict() -> None:
    """to_dict survives JSON and holds one number a point."""
    report = check_stability(MLP(3), torch.randn(4, 3))
    record = json.loads(json.dumps(report.to_dict()))
    assert record == report.to_dict()
    assert record["abscissa"] == report.abscissa.tolist() and len(record["verdict"]) == 4
    assert not any(v.requires_grad for v in vars(report).values() if isinstance(v, Tensor))


def test_an_empty_batch_gives_an_empty_report() -> None:
    """Nothing to check is no error: every entry has length 0 and it still prints."""
    report = check_stability(MLP(3), torch.zeros(0, 3))
    assert report.verdict == [] and "0 points" in str(report)


def test_reports_refuse_what_they_cannot_check() -> None:
    """NaN rows are named, a negative margin is refused."""
    with pytest.raises(ValueError, match=r"1 of 2 rows \(1\)"):
        check_stability(MLP(2), torch.tensor([[0.0, 0.0], [math.nan, 0.0]]))
    with pytest.raises(ValueError, match="margin"):
        check_stability(MLP(2), torch.zeros(1, 2), margin=-1.0)


def test_lemma_2_gives_equilibria_with_any_jacobians() -> None:
    """Lemma 2 of the paper: f = sum phi_i(z) A_i (z - z_i) with disjoint C^1 bumps has f(z_i) = 0 and Jacobian A_i
    there; without the bumps the Jacobian is the sum of all A_i (control)."""
    points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    A = torch.randn(3, 2, 2, dtype=torch.float64)

    def f(z: Tensor, bump: Callable[[Tensor], Tensor]) -> Tensor:
        apart = z[:, None] - points
        return (bump(apart.square().sum(-1, keepdim=True)) * torch.einsum("kij,bkj->bki", A, apart)).sum(1)

    bumps = {"compact": lambda r2: (1 - r2).clamp(min=0) ** 2, "none": torch.ones_like}
    assert (f(points, bumps["compact"]) == 0).all()
    torch.testing.assert_close(jacobian(lambda z: f(z, bumps["compact"]), points), A, rtol=0, atol=1e-12)
    torch.testing.assert_close(jacobian(lambda z: f(z, bumps["none"]), points), A.sum(0).expand(3, 2, 2))


def test_the_trace_over_a_ball_is_bounded_by_the_field_on_its_surface() -> None:
    """Divergence theorem in the plane: mean tr J over a disc of radius r is (2/r) times the mean of f . n on its rim,
    hence at least -(2/r) sup |f|; f = -z attains that, so f = 0 and tr J < 0 cannot both hold on an open set."""
    radius, centre = 0.8, torch.tensor([0.3, -0.2], dtype=torch.float64)
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(24))
    angle = torch.arange(64, dtype=torch.float64) * (2 * math.pi / 64)
    normal = torch.stack([angle.cos(), angle.sin()], 1)
    r = radius * (nodes + 1) / 2
    inside = centre + (r[:, None, None] * normal).reshape(-1, 2)
    measure = (weights * r / (weights * r).sum())[:, None].expand(-1, 64).reshape(-1) / 64
    for f, sharp in ((MLP(2, hidden=(16,)).double(), False), (lambda z: centre - z, True)):
        trace = (jacobian(f, inside).diagonal(dim1=1, dim2=2).sum(1) * measure).sum()
        rim = f(centre + radius * normal)
        torch.testing.assert_close(trace, 2 / radius * (rim * normal).sum(1).mean(), rtol=0, atol=1e-10)
        bound = -2 / radius * torch.cat([rim, f(inside)]).norm(dim=1).max()
        assert trace >= bound - 1e-10
        assert (trace - bound < 1e-9) == sharp


@settings(max_examples=25)
@given(seeds, st.integers(1, 4))
def test_exponents_of_a_triangular_linear_system_are_its_diagonal(seed: int, dim: int) -> None:
    """The frame stays put, so even a short time gives the diagonal, sorted."""
    A = states(dim, dim, seed).triu()
    found = lyapunov_exponents(linear(A), torch.zeros(2, dim, dtype=torch.float64), t1=1.0, steps=50)
    asking = torch.zeros(1, dim, dtype=torch.float64, requires_grad=True)
    assert not lyapunov_exponents(linear(A), asking, t1=1.0, steps=2).requires_grad
    expected = A.diagonal().sort(descending=True).values.expand(2, dim)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_exponents_of_a_linear_system_tend_to_the_real_parts_of_its_eigenvalues() -> None:
    """Complex pairs and non-normal mixing included, with an error that falls like 1/T."""
    A = torch.tensor([[-0.2, 2.0, 0.0], [-2.0, -0.2, 3.0], [0.0, 0.0, -1.5]], dtype=torch.float64).T
    expected = torch.tensor([-0.2, -0.2, -1.5], dtype=torch.float64)
    z = torch.zeros(1, 3, dtype=torch.float64)
    errors = [(lyapunov_exponents(linear(A), z, t1=t, steps=int(25 * t)) - expected).abs().max() for t in (20.0, 80.0)]
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 2


def test_the_sum_of_the_exponents_is_the_mean_divergence() -> None:
    """Liouville: for a network of time and state, against scipy's quadrature of tr J along scipy's solution."""
    net = MLP(3, hidden=(8,)).double()

    def f(t: Tensor, z: Tensor) -> Tensor:
        return net(z) * (1 + torch.sin(t))

    def augmented(t: float, y: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(y[None, :3].copy())
        with torch.no_grad():
            trace = jacobian(f, z, t)[0].trace()
            return np.append(f(torch.tensor(t, dtype=torch.float64), z)[0].numpy(), trace.item())

    z0 = torch.randn(2, 3, dtype=torch.float64)
    found = lyapunov_exponents(f, z0, t0=0.5, t1=2.0, steps=100).sum(1)
    for row, total in zip(z0, found, strict=True):
        solution = scipy.integrate.solve_ivp(augmented, (0.5, 2.0), [*row.tolist(), 0.0], rtol=1e-9, atol=1e-11)
        assert total.item() == pytest.approx(solution.y[3, -1] / 1.5, abs=1e-6)


def test_lorenz_has_its_known_exponents() -> None:
    """(0.906, 0, -14.57), averaged over starts on the attractor; their sum is exactly -(10 + 1 + 8/3)."""

    def lorenz(z: Tensor) -> Tensor:
        x, y, w = z.unbind(1)
        return torch.stack([10 * (y - x), x * (28 - w) - y, x * y - 8 / 3 * w], 1)

    start = np.random.default_rng(0).normal(size=(48, 3)) + [0, 0, 25]
    z = torch.from_numpy(start)
    h = 0.01
    for _ in range(1500):  # onto the attractor, by a Runge-Kutta of the test's own
        k1 = lorenz(z)
        k2 = lorenz(z + h / 2 * k1)
        k3 = lorenz(z + h / 2 * k2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + lorenz(z + h * k3))
    found = lyapunov_exponents(lorenz, z, t1=25.0, steps=1500)
    torch.testing.assert_close(found.sum(1), torch.full((48,), -41 / 3, dtype=torch.float64), atol=5e-3, rtol=0)
    mean, spread = found.mean(0), found.std(0) / 48**0.5
    for value, error, known in zip(mean.tolist(), spread.tolist(), (0.9056, 0.0, -14.5723), strict=True):
        assert abs(value - known) < 4 * error + 0.03  # sampling, and the frame's way into line
    assert mean[0] > 0.8


def test_exponents_do_not_depend_on_mates_or_shape() -> None:
    """A row alone, and the state in another shape, give the same numbers."""
    net = MLP(4, hidden=(8,)).double()
    z = torch.randn(3, 4, dtype=torch.float64)
    found = lyapunov_exponents(net, z, t1=1.0, steps=20)
    torch.testing.assert_close(found[1:2], lyapunov_exponents(net, z[1:2], t1=1.0, steps=20), atol=1e-12, rtol=0)
    scalar = lyapunov_exponents(lambda z: -2 * z, torch.ones(3, dtype=torch.float64), t1=1.0, steps=50)
    torch.testing.assert_close(scalar, torch.full((3, 1), -2.0, dtype=torch.float64), atol=1e-5, rtol=0)
    assert check_stability(lambda z: -2 * z, torch.ones(3)).verdict == ["contracting"] * 3
    square = lyapunov_exponents(lambda z: net(z.flatten(1)).view_as(z), z.view(3, 2, 2), t1=1.0, steps=20)
    torch.testing.assert_close(found, square, atol=1e-12, rtol=0)


def test_exponents_of_a_solution_that_blows_up_say_so() -> None:
    """z' = z^2 from 1 is infinite at t = 1: no fault of the initial state."""
    with pytest.raises(SolveError, match=r"lyapunov_exponents: .*finite-time blow-up") as caught:
        lyapunov_exponents(lambda z: z**2, torch.ones(2, 1), t1=3.0, steps=50)
    assert caught.value.status is Status.BLOW_UP and caught.value.rows == (0, 1)
    with pytest.raises(SolveError, match="the initial state") as caught:
        lyapunov_exponents(lambda z: z / 0, torch.ones(2, 1), t1=3.0, steps=50)
    assert caught.value.status is Status.NONFINITE


@pytest.mark.parametrize("t", [2, 2.0, np.float32(2.0), torch.tensor(2.0), torch.tensor([2.0])], ids=repr)
def test_the_time_of_a_report_is_one_number(t: object) -> None:
    """Of whatever kind; f = -tz has the abscissa -t."""
    report = check_stability(lambda t, z: -t * z, torch.ones(3, 2), t)
    assert report.t == 2.0 and report.abscissa.tolist() == [-2.0] * 3


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_a_report_does_not_depend_on_the_scale_of_time(scale: float) -> None:
    """In float32 the squares of these speeds are out of range: the verdicts and norms are those at scale 1."""
    A, z = torch.tensor([[-2.0, 1.0], [0.0, -1.0]]), torch.ones(3, 2)
    report, known = (check_stability(lambda z, s=s: s * (z @ A.T), z) for s in (scale, 1.0))
    assert report.verdict == known.verdict == ["contracting"] * 3
    for name in ("residual", "rounding", "abscissa", "log_norm_2"):
        torch.testing.assert_close(getattr(report, name) / scale, getattr(known, name), rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrong", [{"t1": 0.0}, {"t1": -1.0}, {"t1": math.inf}, {"t1": 1.0, "steps": 0}])
def test_exponents_refuse_wrong_arguments(wrong: dict[str, float]) -> None:
    """Times must increase and be finite, steps be an int >= 1."""
    with pytest.raises(ValueError, match="lyapunov_exponents"):
        lyapunov_exponents(MLP(2), torch.zeros(1, 2), **wrong)
