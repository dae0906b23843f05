"""Theorems on linear systems and on what they say near an equilibrium, each with a case that is seen to fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from odelayers import Dopri5, ODEBlock, gershgorin, jacobian, log_norm, spectral_abscissa, spectrum
from odelayers._linalg import _abscissa_by_squaring
from strategies import Bounded, bounded_fields, seeds, states

F64 = torch.float64
EPS = torch.finfo(F64).eps
TIGHT = Dopri5(rtol=1e-10, atol=1e-10)


def random(*shape: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(n, n, seed=seed)).Q


def operator_norm(A: Tensor, p: float) -> Tensor:
    return torch.linalg.matrix_norm(A, ord=p)


# 3. Hartman-Grobman, near a sink


@settings(max_examples=25)
@given(seeds, st.integers(1, 5), st.floats(0.2, 2.0), st.floats(0.1, 3.0), st.floats(0.1, 1.0))
def test_near_a_sink_a_quadratic_lyapunov_function_decays(
    seed: int, n: int, gap: float, curvature: float, start: float
) -> None:
    """Lyapunov: f = Az + r, |r| <= c |z|^2, A'P + PA = -I: V = z'Pz decays like e^(-t/2|P|) where |z| <= 1 / 4c|P|."""
    A = random(n, n, seed=seed)
    A = A - (spectral_abscissa(A) + gap) * torch.eye(n, dtype=F64)
    P = torch.from_numpy(scipy.linalg.solve_continuous_lyapunov(A.T.numpy(), -np.eye(n)))
    values = torch.linalg.eigvalsh(P)
    low, high = values[0].item(), values[-1].item()
    W = orthogonal(n, seed + 1)
    u = torch.nn.functional.normalize(random(n, seed=seed + 2), dim=0)

    def V(z: Tensor) -> Tensor:
        return torch.einsum("...i,ij,...j->...", z, P, z)

    level = low / (4 * high * curvature) ** 2  # there |z| <= 1 / (4 c |P|), so V' <= -|z|^2 / 2
    z = states(8, n, seed + 3)
    z = z * (start * level / V(z)).sqrt()[:, None]
    ts = torch.linspace(0, 4 * high, 9, dtype=F64)
    scale = level**0.5  # solved in units of the set, so that the tolerance is one of V
    block = ODEBlock(lambda y: y @ A.T + curvature * scale * (y @ u)[:, None] * (y @ W.T), solver=TIGHT)
    along = V(scale * block.solve(z / scale, ts).zs)
    assert (along <= along[0] * torch.exp(-ts / (2 * high))[:, None] * (1 + 1e-6) + 1e-9 * level * high).all()


@pytest.mark.parametrize(("sign", "r0"), [(1.0, 0.5), (-1.0, 0.5)])
def test_without_hyperbolicity_the_remainder_decides(sign: float, r0: float) -> None:
    """Control, Theorem 2: z' = Rz +- |z|^2 z, R a rotation, grows or decays like 1 / (1 -+ 2 r^2 t), as no Rz says."""
    R = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    z = torch.tensor([[r0, 0.0]], dtype=F64)
    for t in (1.0, 1.9):
        end = ODEBlock(lambda z: z @ R.T + sign * z.square().sum(1, keepdim=True) * z, t1=t, solver=TIGHT)(z)
        assert end.square().sum().item() == pytest.approx(r0**2 / (1 - sign * 2 * r0**2 * t), rel=1e-7)


# 5. Gershgorin


@settings(max_examples=50)
@given(seeds, st.integers(1, 6), st.sampled_from([F64, torch.complex128]), st.floats(0.01, 1.0), st.floats(0.0, 5.0))
def test_dominance_of_the_real_part_bounds_the_flow(
    seed: int, n: int, dtype: torch.dtype, gap: float, t: float
) -> None:
    """Theorem 4, corrected: Re a_ii + R_i <= mu < 0 gives abscissa <= mu, |e^(At)|_inf <= e^(mu t); columns 1-norm."""
    J = random(n, n, seed=seed, dtype=dtype)
    for axis, p in (("row", math.inf), ("column", 1)):
        _, radii = gershgorin(J, axis)
        A = J - torch.diag(J.diagonal().real + radii + gap * (1 + torch.arange(n, dtype=F64))).to(dtype)
        centres, radii = gershgorin(A, axis)
        mu = (centres.real + radii).amax().item()
        assert mu == pytest.approx(-gap) and spectral_abscissa(A).item() <= mu + 1e-10
        assert operator_norm(torch.linalg.matrix_exp(A * t), p).item() <= math.exp(mu * t) * (1 + 1e-9)


def test_dominance_of_the_modulus_lets_the_flow_grow() -> None:
    """Control, Theorem 4 as printed: [[-1+10i, 5], [5, -1+10i]] has |a_ii| > R_i, Re a_ii < 0 and grows like e^(4t)."""
    A = torch.tensor([[-1 + 10j, 5], [5, -1 + 10j]], dtype=torch.complex128)
    centres, radii = gershgorin(A)
    assert (centres.abs() > radii).all() and (centres.real < 0).all()
    for t in (0.5, 1.0, 3.0):
        assert operator_norm(torch.linalg.matrix_exp(A * t), math.inf).item() >= math.exp(4 * t) * (1 - 1e-9)


# 6. Jacobians


@settings(max_examples=25)
@given(bounded_fields(), seeds, st.integers(1, 7))
def test_vectorised_jacobians_are_the_loop_s(case: Bounded, seed: int, chunk: int) -> None:
    """The batched J is that of one row at a time (1e-12), whatever the mates and the chunks (definition of J)."""
    z = states(5, case.dim, seed)
    one = torch.autograd.functional.jacobian
    loop = torch.stack([one(case.f, row) for row in z])
    for found in (jacobian(case.f, z), jacobian(case.f, z, chunk_size=chunk), jacobian(case.f, z.flip(0)).flip(0)):
        torch.testing.assert_close(found, loop, rtol=0, atol=1e-12)
    torch.testing.assert_close(jacobian(case.f, z[2:3]), loop[2:3], rtol=0, atol=1e-12)


def test_rows_that_interact_have_no_jacobian_of_their_own() -> None:
    """Control: z - mean over the batch has no Jacobian a row; verify=True sees it."""
    with pytest.raises(ValueError, match="row"):
        jacobian(lambda z: z - z.mean(0), states(4, 2, 0), verify=True)


def matched(a: Tensor, b: Tensor) -> float:
    cost = (a[:, None] - b[None]).abs().numpy()
    return float(cost[linear_sum_assignment(cost)].max())


@settings(max_examples=25)
@given(bounded_fields(), seeds)
def test_a_change_of_basis_keeps_the_spectrum(case: Bounded, seed: int) -> None:
    """Q'f(Qy) has the spectrum of f, compared by the best matching (similar matrices)."""
    z, Q = states(3, case.dim, seed), orthogonal(case.dim, seed)
    J = jacobian(case.f, z)
    rotated = spectrum(lambda y: case.f(y @ Q.T) @ Q, z @ Q)
    for found, matrix in zip(rotated, J.detach(), strict=True):
        values, V = np.linalg.eig(matrix.numpy())
        slack = 1e-12 * min(np.linalg.cond(V), 1e6) + (1e-3 if np.linalg.cond(V) > 1e6 else 0.0)
        assert matched(found.detach(), torch.from_numpy(values.astype(complex))) <= slack


def test_eigenvalues_have_no_order() -> None:
    """Control: diag(1, 2) and diag(2, 1) have one spectrum, and by index it differs by 1."""
    one, two = (spectrum(lambda z, d=d: z * torch.tensor(d, dtype=F64), states(1, 2, 0))[0] for d in ([1, 2], [2, 1]))
    assert matched(one, two) < 1e-12 and (one - two).abs().max() == pytest.approx(1.0)


# 7. The spectral bound by squaring


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
    """e^(t abscissa) <= |e^(tA)| (Gelfand): above a known abscissa but for rounding, and as near as documented."""
    D, abscissa = eigenvalue_blocks(n, seed, speed)
    stretch = torch.logspace(0, log_condition, n, dtype=F64)
    V = orthogonal(n, seed + 1) * stretch @ orthogonal(n, seed + 2)
    A = V @ D @ torch.linalg.inv(V)
    condition = 10**log_condition if n > 1 else 1.0
    rounding, t = 8 * n * EPS * A.norm().item() * condition, 2**24 / A.norm().item()
    found = spectral_abscissa(A * 2.0**exponent, method="squaring").item() / 2.0**exponent
    assert abscissa - rounding <= found <= abscissa + math.log(condition * n**0.5) / t + rounding


@settings(max_examples=40)
@given(seeds, st.integers(2, 5), st.floats(-2.0, 2.0))
def test_squaring_bounds_the_abscissa_of_a_jordan_block(seed: int, m: int, value: float) -> None:
    """|e^(tA)| grows like t^(m-1): the bound is not below, and above by a root of the rounding."""
    Q = orthogonal(m, seed)
    A = Q @ (value * torch.eye(m, dtype=F64) + torch.diag(torch.ones(m - 1, dtype=F64), 1)) @ Q.T
    margin = 8 * (m * EPS) ** (1 / (2 * m - 2)) * A.norm().item()
    found = spectral_abscissa(A, method="squaring").item()
    assert (
        value - 8 * m * EPS * A.norm().item() <= found <= value + margin + m * math.log(2**24) * A.norm().item() / 2**24
    )


@settings(max_examples=25)
@given(seeds, st.integers(2, 8), st.floats(0.3, 2.0))
def test_each_squaring_halves_the_gap_of_a_diagonalisable_matrix(seed: int, n: int, slope: float) -> None:
    """|e^(tA)| tends to |P| e^(t abscissa), P the projector on the first mode: the gap is log|P| / t (2^-k)."""
    V = orthogonal(n, seed) * torch.logspace(0, slope, n, dtype=F64) @ orthogonal(n, seed + 1)
    A = V @ torch.diag(-torch.arange(n, dtype=F64)) @ torch.linalg.inv(V)
    projector = torch.linalg.matrix_norm(V[:, :1] @ torch.linalg.inv(V)[:1]).item()
    for k in (12, 13, 16):
        gap = _abscissa_by_squaring(A, k).item() * 2**k / A.norm().item()
        assert gap == pytest.approx(math.log(projector), abs=2**k * 8 * n * EPS * 10**slope + 1e-9)


def test_the_gap_of_a_jordan_block_falls_more_slowly() -> None:
    """Control: for [[0, 1], [0, 0]] |e^(tA)| grows like t: the gap is log(t) / t and no squaring halves it."""
    A = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64)
    for k in (8, 12, 16):
        now, then = (_abscissa_by_squaring(A, j).item() for j in (k, k + 1))
        assert now == pytest.approx(math.log(math.hypot(2**k, 2**0.5)) / 2**k, rel=1e-6)
        assert now / then < 1.9


def test_the_trace_is_no_such_bound() -> None:
    """Control: with the trace in place of a norm a rotation cancels, log|tr e^(tA)| / t < 0 = abscissa at t = 1.5."""
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
    """Control: factors of 10 bits put the result off by over a hundred times the margin; float64's stay inside."""
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


def test_the_bound_s_gradient_is_the_abscissa_s() -> None:
    """d abscissa / dA = the projector on the rightmost mode, transposed; by both methods."""
    A = random(3, 4, 4, seed=1).requires_grad_()
    by = [torch.autograd.grad(spectral_abscissa(A, method=m).sum(), A)[0] for m in ("squaring", "eig")]
    torch.testing.assert_close(by[0], by[1], rtol=0, atol=1e-5)


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
    """abscissa <= squaring <= log norm, at points of a network (|e^(tJ)| <= e^(mu t))."""
    J = jacobian(case.f, states(4, case.dim, seed)).detach()
    exact, bound = spectral_abscissa(J), spectral_abscissa(J, method="squaring")
    slack = 1e-6 * (1 + J.norm(dim=(1, 2)))
    assert (exact <= bound + slack).all()
    assert all((bound <= log_norm(J, p) + slack).all() for p in (1, 2, math.inf))
