"""Whether matrices are Hurwitz: by bounds where they suffice, and never against the eigenvalues."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from odelayers import _hurwitz, gershgorin, is_hurwitz, log_norm
from odelayers._squaring import bounds_by_squaring
from strategies import seeds

F64 = torch.float64
EPS = torch.finfo(F64).eps
KINDS = ("any", "normal", "skew", "dominant", "triangular", "complex")

STABLE_DISCS_ASTRIDE = [[-1.0, 100.0], [0.0, -1.0]]  # and a log norm of 49
STABLE_NORMAL = [[-1.0, 0.3, 0.3], [0.3, -1.0, -0.8], [0.3, -0.8, -1.0]]  # rows of 1.1 beside a diagonal of 1
DOMINANT = [[-3.0, 1.0], [0.5, -2.0]]
UNSTABLE_TRACE = [[1.0, 3.0], [0.0, -1.0]]
UNSTABLE_INSIDE = [[-1.0, 3.0], [3.0, -1.0]]  # trace and diagonal negative, abscissa 2
ROTATION = [[0.0, 1.0], [-1.0, 0.0]]


def matrix(kind: str, n: int, seed: int) -> np.ndarray:
    """A matrix of a kind with numbers of order 1."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n))
    if kind == "normal":
        Q = np.linalg.qr(A)[0]
        return Q @ np.diag(rng.normal(size=n)) @ Q.T
    if kind == "skew":
        return A - A.T
    if kind == "dominant":
        return A - n * np.diag(rng.uniform(1, 2, size=n))
    if kind == "triangular":
        return 3 * np.triu(A)
    return A + 1j * rng.normal(size=(n, n)) if kind == "complex" else A


def by_squaring(patch: pytest.MonkeyPatch) -> None:
    """Take the way of devices where LAPACK takes one matrix at a time."""
    patch.setattr(_hurwitz, "_takes_one_at_a_time", lambda device: True)


@pytest.fixture(params=["cpu", "squaring"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "squaring":
        by_squaring(monkeypatch)
    return request.param


@pytest.fixture
def to_lapack(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices went to LAPACK, call by call."""
    counts: list[int] = []
    eigenvalues = _hurwitz.eigenvalues

    def counted(A: Tensor, where: str) -> Tensor:
        counts.append(len(A))
        return eigenvalues(A, where)

    monkeypatch.setattr(_hurwitz, "eigenvalues", counted)
    return counts


@settings(max_examples=150)
@given(
    st.booleans(),
    st.sampled_from(KINDS),
    st.integers(1, 8),
    seeds,
    st.floats(-11.0, 1.0),
    st.sampled_from([-1, 1]),
    st.sampled_from([0.0, 0.5, 3.0]),
)
def test_the_answer_is_that_of_the_eigenvalues(
    squaring: bool, kind: str, n: int, seed: int, log_gap: float, side: int, margin: float
) -> None:
    """For an abscissa of -margin +- gap, gaps from 10 down to 1e-11: numpy's eigenvalues, but within rounding."""
    A = matrix(kind, n, seed)
    A = A + (side * 10**log_gap - margin - np.linalg.eigvals(A).real.max()) * np.eye(n)
    values, V = np.linalg.eig(A)
    rounding = 16 * n * EPS * np.linalg.norm(A) * max(np.linalg.cond(V), 1.0)
    with pytest.MonkeyPatch.context() as patch:
        if squaring:
            by_squaring(patch)
        answer = is_hurwitz(torch.from_numpy(A), margin=margin).item()
    abscissa = values.real.max()
    if abs(abscissa + margin) > rounding:
        assert answer == (abscissa < -margin)


@pytest.mark.parametrize(
    ("A", "answer"),
    [
        (DOMINANT, True),
        (STABLE_NORMAL, True),
        (STABLE_DISCS_ASTRIDE, True),
        (UNSTABLE_TRACE, False),
        (UNSTABLE_INSIDE, False),
        (ROTATION, False),
        ([[0.0, 0.0], [0.0, 0.0]], False),
        ([[0.0, 1.0], [0.0, 0.0]], False),
        ([[-1e-3, 1.0], [0.0, -1e-3]], True),
        ([[1e-3, 1.0], [0.0, 1e-3]], False),
    ],
)
def test_known_matrices(way: str, A: list[list[float]], answer: bool) -> None:
    """Stable with and without a bound that says so, unstable, marginal, defective; and the same times powers of 2."""
    J = torch.tensor(A, dtype=F64)
    for factor in (1.0, 2.0**-900, 2.0**900):
        assert is_hurwitz(factor * J).item() is answer
    assert is_hurwitz(J.T).item() is answer
    assert is_hurwitz(J.to(torch.complex128)).item() is answer


def test_what_lies_at_the_margin_is_no(way: str) -> None:
    """An abscissa of exactly -margin is no, one that is lower by 1e-12 yes; 0 beside any margin is no."""
    J = -torch.eye(3, dtype=F64)
    assert not is_hurwitz(J, margin=1.0) and is_hurwitz(J, margin=1.0 - 1e-12)
    rotation, identity = torch.tensor(ROTATION, dtype=F64), torch.eye(2, dtype=F64)
    assert is_hurwitz(rotation - (0.5 + 1e-12) * identity, margin=0.5)
    assert not is_hurwitz(rotation - 0.5 * identity, margin=0.5)
    assert not is_hurwitz(torch.zeros(2, 2), margin=1e308) and not is_hurwitz(1e-300 * J, margin=1e308)


def test_only_what_the_bounds_leave_open_goes_to_lapack(to_lapack: list[int]) -> None:
    """Discs, the trace and the log norm decide three of five; the two that are left are counted."""
    three = [*(torch.block_diag(torch.tensor(A), -9 * torch.eye(1)) for A in (DOMINANT, STABLE_DISCS_ASTRIDE))]
    three += [torch.tensor(STABLE_NORMAL), torch.block_diag(torch.tensor(UNSTABLE_TRACE), torch.eye(1))]
    three += [torch.block_diag(torch.tensor(UNSTABLE_INSIDE), -torch.eye(1))]
    J = torch.stack(three).double()
    assert is_hurwitz(J).tolist() == [True, True, True, False, False]
    assert to_lapack == [2]
    assert (sum(gershgorin(J[2])).amax() > 0) and log_norm(J[2], 2) < 0  # the discs alone leave it open
    assert log_norm(J[1], 2) > 0  # and the log norm this one


def test_squaring_leaves_almost_nothing_to_lapack(to_lapack: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """200 stable and unstable matrices, far from dominant: LAPACK gets nearly all without it, none with it."""
    J = torch.randn(200, 16, 16, dtype=F64, generator=torch.Generator().manual_seed(0)) / 4 - torch.eye(16)
    expected = np.linalg.eigvals(J.numpy()).real.max(-1) < 0
    assert 20 < expected.sum() < 180
    assert is_hurwitz(J).tolist() == expected.tolist()
    assert to_lapack == [197]  # three have a trace above 0
    by_squaring(monkeypatch)
    assert is_hurwitz(J).tolist() == expected.tolist()
    assert to_lapack == [197]


def test_defective_matrices_are_left_to_lapack(to_lapack: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gelfand 1941: Stable Jordan blocks near the axis: squaring alone takes some for unstable (control), the answer is
    right."""
    Q = torch.linalg.qr(torch.randn(400, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))).Q
    J = Q @ torch.tensor([[-5e-7, 1.0], [0.0, -5e-7]], dtype=F64) @ Q.mT
    assert (bounds_by_squaring(J, 24).lower > 1e-7).any()
    by_squaring(monkeypatch)
    assert is_hurwitz(J).all() and to_lapack == [400]


@settings(max_examples=60)
@given(st.sampled_from(KINDS), st.integers(1, 8), seeds)
def test_the_abscissa_lies_between_the_bounds_by_squaring(kind: str, n: int, seed: int) -> None:
    """Gelfand 1941: |tr e^(tA)| / n <= e^(t abscissa) <= |e^(tA)|, and both are near: the trace's within 10 / 2^22 of
    |A|."""
    A = torch.from_numpy(matrix(kind, n, seed))
    exact = torch.linalg.eigvals(A).real.amax().item()
    lower, upper, cancelled = (x.item() for x in bounds_by_squaring(A, 24))
    size = A.norm().item()
    rounding = 8 * n * EPS * size * cancelled + 64 * n * EPS * size * np.linalg.cond(np.linalg.eig(A.numpy())[1])
    if cancelled < 1000:
        assert lower - rounding <= exact <= upper + rounding
        assert upper - lower <= 30 / 2**22 * size


def test_answers_come_in_the_shape_of_the_batch(way: str) -> None:
    """Several axes, none, an empty batch; half precision; and no graph."""
    J = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)) - torch.eye(4)
    expected = torch.linalg.eigvals(J.double()).real.amax(-1) < 0
    found = is_hurwitz(J.requires_grad_())
    assert found.dtype == torch.bool and torch.equal(found, expected)
    assert is_hurwitz(J[0, 0]).shape == () and is_hurwitz(torch.zeros(0, 3, 3)).shape == (0,)
    assert torch.equal(is_hurwitz(J.half()), torch.linalg.eigvals(J.half().double()).real.amax(-1) < 0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: is_hurwitz(torch.zeros(2, 3)), ValueError, r"is_hurwitz: expected square .* \(2, 3\)"),
        (lambda: is_hurwitz(torch.tensor([[[1.0]], [[math.nan]]])), ValueError, r"1 of 2 rows \(1\)"),
        (lambda: is_hurwitz(torch.eye(2), margin=-0.1), ValueError, ">= 0, got -0.1"),
        (lambda: is_hurwitz(torch.eye(2), margin=math.inf), ValueError, "finite"),
        (lambda: is_hurwitz([[1.0]]), TypeError, "list"),
    ],
)
def test_wrong_arguments_are_refused(call, error: type[Exception], words: str) -> None:
    """Each error names what was expected and what came."""
    with pytest.raises(error, match=words):
        call()


@pytest.mark.cuda
def test_answers_on_cuda_are_the_cpu_s() -> None:
    """Stable and unstable, 64 of them, in float32 and float64."""
    J = torch.randn(64, 16, 16, generator=torch.Generator().manual_seed(0)) / 4 - torch.eye(16)
    for matrices in (J, J.double()):
        found = is_hurwitz(matrices.cuda())
        assert found.is_cuda and torch.equal(found.cpu(), is_hurwitz(matrices))
