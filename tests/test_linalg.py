"""Spectra of matrices and the bounds on them, against dense loops, scipy and the theorems that they stand for."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from odelayers._linalg import eigenvalues, gershgorin, log_norm, spectral_abscissa
from strategies import any_matrices, matrices, orthogonal, random, seeds

NORMS = (1, 2, math.inf)


@given(any_matrices(), st.sampled_from(["row", "column"]))
def test_gershgorin_sums_off_the_diagonal(J: Tensor, axis: str) -> None:
    """Centres and radii equal a loop over entries, for rows and for columns, real and complex."""
    centres, radii = gershgorin(J, axis)
    for b, A in enumerate(J if axis == "row" else J.mT):
        for i in range(len(A)):
            assert centres[b, i] == A[i, i]
            assert math.isclose(radii[b, i], sum(abs(A[i, j].item()) for j in range(len(A)) if j != i), abs_tol=1e-12)


def test_gershgorin_keeps_a_radius_far_smaller_than_the_diagonal() -> None:
    """A radius of 1e-12 beside a diagonal of 1e8 is not rounded away."""
    assert gershgorin(torch.tensor([[1e8, 1e-12], [0.0, 1.0]]))[1].tolist() == [pytest.approx(1e-12), 0.0]


@given(any_matrices(), st.sampled_from(["row", "column"]))
def test_every_eigenvalue_lies_in_a_disc(J: Tensor, axis: str) -> None:
    """Gershgorin 1931: each eigenvalue (by scipy) is within a radius of its centre."""
    centres, radii = gershgorin(J, axis)
    for A, c, r in zip(J, centres, radii, strict=True):
        for value in scipy.linalg.eigvals(A.numpy()):
            assert ((c - value).abs() <= r + 1e-10).any()


@given(any_matrices(), st.sampled_from(NORMS))
def test_log_norm_is_the_derivative_of_the_norm_at_the_identity(J: Tensor, p: float) -> None:
    """mu_p(J) = lim (||I + hJ||_p - 1) / h as h falls to 0, by its definition."""
    h = 1e-7
    quotient = (torch.linalg.matrix_norm(torch.eye(J.shape[-1]) + h * J, ord=p) - 1) / h
    torch.testing.assert_close(log_norm(J, p), quotient, atol=1e-5, rtol=0)


@given(any_matrices(), st.sampled_from(NORMS), st.floats(0.0, 3.0))
def test_log_norm_bounds_the_flow_and_the_abscissa(J: Tensor, p: float, t: float) -> None:
    """Dahlquist 1958, Lozinskii 1958: ||e^{Jt}||_p <= e^{mu_p t}, and the spectral abscissa is at most mu_p."""
    mu = log_norm(J, p)
    growth = torch.linalg.matrix_norm(torch.linalg.matrix_exp(J * t), ord=p)
    assert (growth <= torch.exp(mu * t) * (1 + 1e-9)).all()
    assert (spectral_abscissa(J) <= mu + 1e-10).all()


@given(any_matrices(), st.sampled_from([("row", math.inf), ("column", 1)]), st.floats(1e-3, 1.0))
def test_dominance_of_the_real_part_gives_stability(J: Tensor, which: tuple[str, float], gap: float) -> None:
    """Theorem 4 of the paper, corrected: Re a_ii < -R_i for all i gives abscissa <= max(Re a_ii + R_i) = mu < 0."""
    axis, p = which
    _, radii = gershgorin(J, axis)
    A = J - torch.diag_embed(J.diagonal(dim1=-2, dim2=-1).real + radii + gap).to(J.dtype)
    centres, radii = gershgorin(A, axis)
    bound = (centres.real + radii).amax(-1)
    torch.testing.assert_close(bound, torch.full_like(bound, -gap))
    torch.testing.assert_close(log_norm(A, p), bound)
    assert (spectral_abscissa(A) <= bound + 1e-10).all()


def test_dominance_of_the_modulus_alone_does_not() -> None:
    """Control, Theorem 4 of the paper as printed: [[-1+10i, 5], [5, -1+10i]] is dominant, Re a_ii < 0; abscissa +4."""
    A = torch.tensor([[[-1 + 10j, 5], [5, -1 + 10j]]], dtype=torch.complex128)
    centres, radii = gershgorin(A)
    assert (centres.abs() > radii).all() and (centres.real < 0).all()
    assert spectral_abscissa(A).item() == pytest.approx(4.0)
    assert log_norm(A, math.inf).item() == pytest.approx(4.0)


@given(matrices(), st.floats(0.05, 1.0))
def test_a_negative_abscissa_is_decay_and_a_positive_one_growth(J: Tensor, gap: float) -> None:
    """Theorem 3 of the paper: ||e^{At}|| -> 0 when the abscissa is -gap, and e^{gap t} <= ||e^{At}|| when it is gap."""
    abscissa = torch.tensor([max(scipy.linalg.eigvals(A.numpy()).real) for A in J], dtype=torch.float64)
    torch.testing.assert_close(spectral_abscissa(J), abscissa, atol=1e-9, rtol=0)
    centred = J - abscissa[:, None, None] * torch.eye(J.shape[-1])
    t, identity = 40 / gap, torch.eye(J.shape[-1])
    assert (torch.linalg.matrix_norm(torch.linalg.matrix_exp((centred - gap * identity) * t), 2) < 1e-3).all()
    grown = torch.linalg.matrix_norm(torch.linalg.matrix_exp(centred + gap * identity), 2)
    assert (grown >= math.exp(gap) * (1 - 1e-6)).all()


@given(st.lists(st.floats(-3.0, 3.0), min_size=2, max_size=3), st.integers(0, 3), st.floats(0.0, 1.0), seeds)
def test_eigenvalues_on_the_axis_may_rotate_or_grow(
    speeds: list[float], damped: int, log_condition: float, seed: int
) -> None:
    """Theorem 3 of the paper, corrected: A = V diag(rotations, -d) V^-1 has |e^(At)| <= cond(V) at every t; with two
    rotations of one speed made a Jordan block the norm grows like t (control)."""
    speeds = [speeds[0], *speeds[:-1]]  # the first speed twice: semisimple all the same
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    decay = -torch.diag(random(damped, seed=seed).abs())
    D = torch.block_diag(*(speed * turn for speed in speeds), decay)
    n, condition = len(D), 10**log_condition
    stretch = torch.logspace(0, log_condition, n, dtype=torch.float64)
    V = orthogonal(n, seed + 1) * stretch @ orthogonal(n, seed + 2)
    coupled = D.clone()
    coupled[:2, 2:4] = torch.eye(2)
    bounded, growing = (V @ X @ torch.linalg.inv(V) for X in (D, coupled))
    ts = torch.logspace(-2, 3, 30, dtype=torch.float64)
    norms, grown = (
        torch.linalg.matrix_norm(torch.linalg.matrix_exp(A * ts[:, None, None]), 2) for A in (bounded, growing)
    )
    assert spectral_abscissa(bounded).item() == pytest.approx(0.0, abs=1e-6)
    assert (norms <= condition * (1 + 1e-8)).all() and (norms >= 1 - 1e-8).all()
    assert (grown >= ts / condition * (1 - 1e-6)).all() and grown[-1] > 9 * condition


def test_a_stable_matrix_may_grow_first() -> None:
    """Control, Theorem 3 of the paper: [[-1,100],[0,-1]] has abscissa -1 and grows at first at its log norm, 49."""
    A = torch.tensor([[-1.0, 100.0], [0.0, -1.0]], dtype=torch.float64)
    assert spectral_abscissa(A).item() == pytest.approx(-1.0)
    assert log_norm(A, 2).item() == pytest.approx(49.0)
    assert torch.linalg.matrix_norm(torch.linalg.matrix_exp(A), 2).item() > 30


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ask", [spectral_abscissa, *(lambda J, p=p: log_norm(J, p) for p in NORMS)])
def test_nan_and_inf_never_reach_lapack(ask, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are named before any eigenvalue routine is called: on such input it can kill the process."""

    def reached(*_: object) -> None:
        raise RuntimeError("LAPACK was reached")

    monkeypatch.setattr(torch.linalg, "eigvals", reached)
    monkeypatch.setattr(torch.linalg, "eigvalsh", reached)
    J = torch.zeros(5, 3, 3)
    J[1, 0, 2] = J[4, 2, 2] = bad
    with pytest.raises(ValueError, match=r"NaN or inf in 2 of 5 rows \(1, 4\)"):
        ask(J)


@given(any_matrices(), st.sampled_from([-900, -40, 0, 40, 900]))
def test_eigenvalues_scale_with_the_matrix(J: Tensor, exponent: int) -> None:
    """Matrices of any size between the limits of the dtype, powers of two apart, have abscissas as far apart."""
    factor = 2.0**exponent
    torch.testing.assert_close(spectral_abscissa(factor * J) / factor, spectral_abscissa(J), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_norm(factor * J, 2) / factor, log_norm(J, 2), rtol=0, atol=1e-12)


BREAKING = [  # torch 2.13 with MKL: torch.linalg.eigvals does not converge on these, torch.linalg.eig may crash
    [[0.0, 0.0, -0.72091], [0.0, 0.0, -0.09291], [0.72091, 0.09291, 0.0]],
    [
        [-1.0701353507433884e-269, 0.00919405633765284, -0.0025851732517870787],
        [-0.00919405633765284, -1.0701353507433884e-269, 0.0],
        [0.25851732517870785, 0.0, -1.0701353507433884e-267],
    ],
]


@pytest.mark.parametrize("matrix", BREAKING)
def test_finite_matrices_that_break_lapack_have_their_eigenvalues(matrix: list[list[float]]) -> None:
    """A rotation of the plane in three dimensions, and entries of 1e-267 beside 0.01: 0 and +-i sqrt(-tr J^2 / 2)."""
    J = torch.tensor(matrix, dtype=torch.float64)
    values = eigenvalues(J, "test")
    frequency = (-torch.trace(J @ J) / 2).sqrt()
    torch.testing.assert_close(values.real, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-14)
    expected = torch.stack([-frequency, torch.zeros_like(frequency), frequency])
    torch.testing.assert_close(values.imag.sort().values, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("c", [0.3, 10.0, 100.0])
@pytest.mark.parametrize("mu", [-1.0, 0.0, 2.0])
def test_squaring_exceeds_the_abscissa_by_the_documented_factor(mu: float, c: float) -> None:
    """Of [[mu, c], [0, mu - 1]] the exponential at the documented t = 2^24 / |J| is e^(mu t) [[1, c], [0, 0]]: the
    bound exceeds mu by log sqrt(1 + c^2) / t, the closed form, and by no other time's."""
    J = torch.tensor([[mu, c], [0.0, mu - 1.0]], dtype=torch.float64)
    t = 2**24 / J.norm().item()
    excess = spectral_abscissa(J, method="squaring").item() - mu
    assert excess == pytest.approx(math.log(math.hypot(1.0, c)) / t, rel=1e-3)


def test_eigenvalues_are_differentiable() -> None:
    """gradcheck of the abscissa and of the log norms, zero entries included."""
    J = torch.randn(3, 4, 4, dtype=torch.float64)
    J[:, 0, 2] = 0.0
    J.requires_grad_()
    assert torch.autograd.gradcheck(spectral_abscissa, J)
    assert torch.autograd.gradcheck(lambda J: log_norm(J, 2), J)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """Halves give what their exact values give in float32."""
    J = torch.randn(4, 5, 5).to(dtype)
    torch.testing.assert_close(spectral_abscissa(J), spectral_abscissa(J.float()), rtol=0, atol=0)
    for p in NORMS:
        torch.testing.assert_close(log_norm(J, p), log_norm(J.float(), p), rtol=0, atol=0)


def test_batches_may_be_empty_or_have_several_axes() -> None:
    """Shapes follow the batch: none, empty, or several axes, equal to a loop over them."""
    J = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    looped = torch.stack([torch.stack([spectral_abscissa(A) for A in row]) for row in J])
    torch.testing.assert_close(spectral_abscissa(J), looped)
    assert spectral_abscissa(torch.zeros(0, 3, 3)).shape == (0,)
    assert [log_norm(torch.zeros(0, 3, 3), p).shape for p in NORMS] == [(0,)] * 3


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gershgorin(torch.zeros(2, 2), "rows"), ValueError, "'row', 'column'"),
        (lambda: log_norm(torch.zeros(2, 2), 3), ValueError, "1, 2 or math.inf"),
        (lambda: spectral_abscissa(torch.zeros(2, 2), "power"), ValueError, "'eig'"),
        (lambda: spectral_abscissa(torch.zeros(2, 3)), ValueError, r"square .* \(2, 3\)"),
        (lambda: spectral_abscissa(torch.zeros(2, 2, dtype=torch.int64)), TypeError, "int64"),
        (lambda: gershgorin([[1.0]]), TypeError, "list"),
    ],
)
def test_wrong_arguments_are_refused(call, error: type[Exception], words: str) -> None:
    """Each error names what was expected and what came."""
    with pytest.raises(error, match=words):
        call()


@pytest.mark.cuda
def test_everything_runs_on_cuda() -> None:
    """On CUDA tensors the answers stay there and equal the CPU's."""
    J = torch.randn(8, 6, 6, dtype=torch.float64)
    for ask in (spectral_abscissa, *(lambda J, p=p: log_norm(J, p) for p in NORMS)):
        found = ask(J.cuda())
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), ask(J))
