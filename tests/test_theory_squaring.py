"""The bound on the spectral abscissa by repeated squaring: its margins, and cases that are seen to leave them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor

from odelayers import GradientError, jacobian, log_norm, spectral_abscissa
from odelayers._squaring import bounds_by_squaring
from strategies import Bounded, bounded_fields, orthogonal, random, seeds, states

F64 = torch.float64
EPS = torch.finfo(F64).eps


def eigenvalue_blocks(n: int, seed: int, speed: float) -> tuple[Tensor, float]:
    """A block diagonal normal matrix, rotating at about `speed` in its planes, and its abscissa."""
    real = random(n, seed=seed)
    D = torch.diag(real)
    for i in range(0, n - 1, 2):
        D[i + 1, i + 1] = D[i, i]
        D[i, i + 1], D[i + 1, i] = speed * real[i + 1], -speed * real[i + 1]
    return D, D.diagonal().max().item()


@settings(max_examples=60)
@given(seeds, st.integers(1, 12), st.floats(0.0, 3.0), st.sampled_from([0.0, 1.0, 100.0]), st.integers(-100, 100))
def test_squaring_bounds_a_known_abscissa(seed: int, n: int, log_condition: float, speed: float, exponent: int) -> None:
    """Gelfand 1941: e^(t abscissa) <= |e^(tA)|: above a known abscissa but for rounding, and as near as documented."""
    D, abscissa = eigenvalue_blocks(n, seed, speed)
    stretch = torch.logspace(0, log_condition, n, dtype=F64)
    V = orthogonal(n, seed + 1) * stretch @ orthogonal(n, seed + 2)
    A = V @ D @ torch.linalg.inv(V)
    condition = 10**log_condition if n > 1 else 1.0
    rounding, t = 8 * n * EPS * A.norm().item() * condition, 2**24 / A.norm().item()
    found = spectral_abscissa(A * 2.0**exponent, method="squaring").item() / 2.0**exponent
    assert abscissa - rounding <= found <= abscissa + math.log(condition * n**0.5) / t + rounding


def jordan_block(m: int, value: float, seed: int) -> Tensor:
    """One eigenvalue with one eigenvector, in a random orthonormal basis."""
    Q = orthogonal(m, seed)
    return Q @ (value * torch.eye(m, dtype=F64) + torch.diag(torch.ones(m - 1, dtype=F64), 1)) @ Q.T


@settings(max_examples=60)
@given(seeds, st.integers(2, 7), st.floats(-2.0, 2.0), st.sampled_from([12, 16, 20, 24]))
@example(313, 2, 0.0, 24)  # 13 times the excess that a root of degree 2 (m - 1) would allow
def test_squaring_bounds_the_abscissa_of_a_jordan_block(seed: int, m: int, value: float, k: int) -> None:
    """Gelfand 1941: Never below, above by m log(2^k) |A| / 2^k and a root of the rounding.

    |e^(tA)| grows like t^(m-1), in units of |A|. To square it adds a rounding of n eps |e^(tA)|^2, as an error D of A
    with |D| t^(2m-1) of that size in the corner opposite to the block's ones; it moves the eigenvalues by |D|^(1/m).
    They are lost where that reaches 1/t, at t^(3(m-1)) = 1 / n eps, and the rate no longer falls.
    """
    A = jordan_block(m, value, seed)
    size, rounding = A.norm().item(), m * EPS
    found = spectral_abscissa(A, method="squaring", squarings=k).item()
    assert value - 8 * rounding * size <= found
    assert found <= value + size * (rounding ** (1 / (3 * m - 3)) + m * math.log(2**k) / 2**k)


def test_more_squarings_than_are_allowed_would_lose_the_bound() -> None:
    """Control: with 30, rounding takes the bound of some Jordan blocks of size 2 below their abscissa 0, |A| = 1."""
    Q = torch.linalg.qr(random(4000, 2, 2, seed=0)).Q
    blocks = Q @ torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64) @ Q.mT
    assert bounds_by_squaring(blocks, 30).upper.amin() < -1e-8
    assert spectral_abscissa(blocks, method="squaring").amin() >= 0
    with pytest.raises(ValueError, match=r"squarings: expected an int from 1 to 24, got 25"):
        spectral_abscissa(blocks, method="squaring", squarings=25)


def test_the_accuracy_is_set_by_the_number_of_squarings() -> None:
    """On normal matrices of 16 to 128 rows: from above, within what the docstring says of each number."""
    for n in (16, 64, 128):
        J = random(8, n, n, seed=n) / n**0.5
        exact = torch.linalg.eigvals(J).real.amax(-1)
        for k, excess in {8: 2e-1, 12: 1.5e-2, 16: 1e-3, 20: 5e-5, 24: 3e-6}.items():
            gap = spectral_abscissa(J, method="squaring", squarings=k) - exact
            assert ((gap > 0) & (gap < excess)).all()
    assert torch.equal(spectral_abscissa(J, method="squaring"), spectral_abscissa(J, method="squaring", squarings=24))


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"squarings": 24}, ValueError, 'is for method="squaring", got method="eig"'),
        ({"method": "squaring", "squarings": 0}, ValueError, ">= 1, got 0"),
        ({"method": "squaring", "squarings": 8.0}, TypeError, "int >= 1"),
    ],
)
def test_wrong_numbers_of_squarings_are_refused(keywords, error: type[Exception], words: str) -> None:
    """Not silently ignored by the other method, and an int of at least 1."""
    with pytest.raises(error, match=words):
        spectral_abscissa(torch.eye(2), **keywords)


@settings(max_examples=25)
@given(seeds, st.integers(2, 8), st.floats(0.3, 2.0))
def test_each_squaring_halves_the_gap_of_a_diagonalisable_matrix(seed: int, n: int, slope: float) -> None:
    """Gelfand 1941: |e^(tA)| tends to |P| e^(t abscissa), P the projector on the first mode: the gap is log|P| / t
    (2^-k)."""
    V = orthogonal(n, seed) * torch.logspace(0, slope, n, dtype=F64) @ orthogonal(n, seed + 1)
    A = V @ torch.diag(-torch.arange(n, dtype=F64)) @ torch.linalg.inv(V)
    projector = torch.linalg.matrix_norm(V[:, :1] @ torch.linalg.inv(V)[:1]).item()
    for k in (12, 13, 16):
        gap = bounds_by_squaring(A, k).upper.item() * 2**k / A.norm().item()
        assert gap == pytest.approx(math.log(projector), abs=2**k * 8 * n * EPS * 10**slope + 1e-9)


def test_the_gap_of_a_jordan_block_falls_more_slowly() -> None:
    """Control, Gelfand 1941: for [[0, 1], [0, 0]] |e^(tA)| grows like t: the gap is log(t) / t and no squaring halves
    it."""
    A = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64)
    for k in (8, 12, 16):
        now, then = (bounds_by_squaring(A, j).upper.item() for j in (k, k + 1))
        assert now == pytest.approx(math.log(math.hypot(2**k, 2**0.5)) / 2**k, rel=1e-6)
        assert now / then < 1.9


def test_the_trace_is_no_such_bound() -> None:
    """Control, Gelfand 1941: with the trace in place of a norm a rotation cancels, log|tr e^(tA)| / t < 0 = abscissa at
    t = 1.5."""
    A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    assert torch.linalg.matrix_exp(1.5 * A).trace().abs().log().item() / 1.5 < -1
    assert spectral_abscissa(A, method="squaring").item() == pytest.approx(0.0, abs=1e-6)


def low_precision(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A product whose factors have 10 bits of mantissa, as TF32's have."""

    def rounded(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)

    return lambda a, b: product(rounded(a), rounded(b))


def test_products_as_short_as_tf32_s_leave_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control, Gelfand 1941: factors of 10 bits put the result off by over a hundred times the margin; float64's stay
    inside."""
    D, abscissa = eigenvalue_blocks(8, 0, 1.0)
    Q = orthogonal(8, 1)
    A = Q @ D @ Q.T
    margin = 8 * 8 * EPS * A.norm().item() + math.log(8**0.5) * A.norm().item() / 2**24
    assert abs(spectral_abscissa(A, method="squaring").item() - abscissa) <= margin
    monkeypatch.setattr(Tensor, "__matmul__", low_precision(Tensor.__matmul__))
    assert abs(spectral_abscissa(A, method="squaring").item() - abscissa) > 100 * margin


def test_squaring_takes_what_eigenvalues_take() -> None:
    """Batches of any shape, empty ones, 0, half precision, complex entries, numbers near the limits; NaN is refused."""
    J = random(2, 3, 5, 5, seed=0)
    for matrices in (J, J.float(), J.half(), J.bfloat16(), torch.complex(J, J.flip(0)), 1e300 * J, 1e-300 * J, 0 * J):
        found, exact = (spectral_abscissa(matrices, method=method) for method in ("squaring", "eig"))
        assert found.shape == (2, 3) and found.dtype == exact.dtype
        size = matrices.abs().amax().to(exact.dtype)
        assert ((found - exact).abs() <= (1e-5 if exact.dtype == F64 else 2e-5) * size).all()
    assert spectral_abscissa(torch.zeros(0, 3, 3), method="squaring").shape == (0,)
    with pytest.raises(ValueError, match=r"1 of 2 rows \(1\)"):
        spectral_abscissa(torch.tensor([[[1.0]], [[math.nan]]]), method="squaring")


def test_the_bound_s_slope_is_not_the_abscissa_s_and_is_refused() -> None:
    """Of a complex pair log |e^(tA)| / t turns with the phase: its differences in A stay away from the abscissa's,
    1/2 on the diagonal and 0 beside it, as t grows. So the bound has a value and no gradient; the eigenvalues have."""
    A = torch.tensor([[-1.0, 4.0], [-1.0, -1.0]], dtype=F64)
    change = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=F64)
    slopes = []
    for k in (12, 16, 20):
        step = 1e-3 / 2**k * change  # short beside a turn, which takes 2 pi / t
        up, down = (bounds_by_squaring(A + sign * step, k).upper.item() for sign in (1, -1))
        slopes.append((up - down) / (2e-3 / 2**k))
    assert max(map(abs, slopes)) > 0.1
    A.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(spectral_abscissa(A), A)[0], torch.eye(2, dtype=F64) / 2)
    bound = spectral_abscissa(A, method="squaring")
    assert abs(bound.item() + 1) < 1e-5
    with pytest.raises(GradientError, match='method="squaring".*use method="eig"'):
        bound.backward()
    with pytest.raises(GradientError, match='method="squaring"'):
        torch.func.jvp(lambda A: spectral_abscissa(A, method="squaring"), (A.detach(),), (change,))


@pytest.mark.cuda
def test_squaring_runs_on_cuda_whatever_the_precision_setting() -> None:
    """On CUDA float32 matrices give the CPU's bound, TF32 allowed or not."""
    J = random(64, 16, 16, seed=0).float()
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found = spectral_abscissa(J.cuda(), method="squaring")
            assert found.is_cuda
            torch.testing.assert_close(found.cpu(), spectral_abscissa(J, method="squaring"), rtol=1e-6, atol=1e-6)
    finally:
        torch.set_float32_matmul_precision(before)


@settings(max_examples=25)
@given(bounded_fields(), seeds)
def test_the_bounds_on_a_jacobian_agree_in_order(case: Bounded, seed: int) -> None:
    """Gelfand 1941, Dahlquist 1958: abscissa <= squaring <= log norm, at points of a network (|e^(tJ)| <= e^(mu t))."""
    J = jacobian(case.f, states(4, case.dim, seed)).detach()
    exact, bound = spectral_abscissa(J), spectral_abscissa(J, method="squaring")
    slack = 1e-6 * (1 + J.norm(dim=(1, 2)))
    assert (exact <= bound + slack).all()
    assert all((bound <= log_norm(J, p) + slack).all() for p in (1, 2, math.inf))
