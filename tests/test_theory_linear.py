"""Theorems on linear systems and on what they say near an equilibrium, each with a case that is seen to fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from odelayers import Dopri5, ODEBlock, gershgorin, jacobian, spectral_abscissa, spectrum
from strategies import Bounded, bounded_fields, orthogonal, random, seeds, states

F64 = torch.float64
TIGHT = Dopri5(rtol=1e-10, atol=1e-10)


def operator_norm(A: Tensor, p: float) -> Tensor:
    return torch.linalg.matrix_norm(A, ord=p)


# 3. Hartman-Grobman, near a sink


@settings(max_examples=25)
@given(seeds, st.integers(1, 5), st.floats(0.2, 2.0), st.floats(0.1, 3.0), st.floats(0.1, 1.0))
def test_near_a_sink_a_quadratic_lyapunov_function_decays(
    seed: int, n: int, gap: float, curvature: float, start: float
) -> None:
    """Lyapunov 1892: f = Az + r, |r| <= c |z|^2, A'P + PA = -Q, q the least eigenvalue of Q: V = z'Pz decays like
    e^(-qt/2|P|) where |z| <= q / 4c|P|."""
    A = random(n, n, seed=seed)
    A = A - (spectral_abscissa(A) + gap) * torch.eye(n, dtype=F64)
    Q = orthogonal(n, seed + 4) * torch.logspace(-1, 1, n, dtype=F64) @ orthogonal(n, seed + 4).T
    P = torch.from_numpy(scipy.linalg.solve_continuous_lyapunov(A.T.numpy(), -Q.numpy()))
    q = torch.linalg.eigvalsh(Q)[0].item()
    values = torch.linalg.eigvalsh(P)
    low, high = values[0].item(), values[-1].item()
    W = orthogonal(n, seed + 1)
    u = torch.nn.functional.normalize(random(n, seed=seed + 2), dim=0)

    def V(z: Tensor) -> Tensor:
        return torch.einsum("...i,ij,...j->...", z, P, z)

    level = low * (q / (4 * high * curvature)) ** 2  # there |z| <= q / (4 c |P|), so V' <= -q |z|^2 / 2
    z = states(8, n, seed + 3)
    z = z * (start * level / V(z)).sqrt()[:, None]
    ts = torch.linspace(0, 4 * high / q, 9, dtype=F64)
    scale = level**0.5  # solved in units of the set, so that the tolerance is one of V
    block = ODEBlock(lambda y: y @ A.T + curvature * scale * (y @ u)[:, None] * (y @ W.T), solver=TIGHT)
    along = V(scale * block.solve(z / scale, ts).zs)
    assert (along <= along[0] * torch.exp(-q * ts / (2 * high))[:, None] * (1 + 1e-6) + 1e-9 * level * high).all()


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
    """Jacobi 1841: the batched J is that of one row at a time (1e-12), whatever the mates and the chunks."""
    z = states(5, case.dim, seed)
    one = torch.autograd.functional.jacobian
    loop = torch.stack([one(case.f, row) for row in z])
    for found in (jacobian(case.f, z), jacobian(case.f, z, chunk_size=chunk), jacobian(case.f, z.flip(0)).flip(0)):
        torch.testing.assert_close(found, loop, rtol=0, atol=1e-12)
    torch.testing.assert_close(jacobian(case.f, z[2:3]), loop[2:3], rtol=0, atol=1e-12)


def test_rows_that_interact_have_no_jacobian_of_their_own() -> None:
    """Control, Jacobi 1841: z - mean over the batch has no Jacobian a row; verify=True sees it."""
    with pytest.raises(ValueError, match="row"):
        jacobian(lambda z: z - z.mean(0), states(4, 2, 0), verify=True)


def matched(a: Tensor, b: Tensor) -> float:
    cost = (a[:, None] - b[None]).abs().numpy()
    return float(cost[linear_sum_assignment(cost)].max())


@settings(max_examples=25)
@given(bounded_fields(), seeds)
def test_a_change_of_basis_keeps_the_spectrum(case: Bounded, seed: int) -> None:
    """Horn and Johnson 1985: Q'f(Qy) has the spectrum of f (similar matrices), compared by the best matching."""
    z, Q = states(3, case.dim, seed), orthogonal(case.dim, seed)
    J = jacobian(case.f, z)
    rotated = spectrum(lambda y: case.f(y @ Q.T) @ Q, z @ Q)
    for found, matrix in zip(rotated, J.detach(), strict=True):
        values, V = np.linalg.eig(matrix.numpy())
        slack = 1e-12 * min(np.linalg.cond(V), 1e6) + (1e-3 if np.linalg.cond(V) > 1e6 else 0.0)
        assert matched(found.detach(), torch.from_numpy(values.astype(complex))) <= slack


def test_eigenvalues_have_no_order() -> None:
    """Control, Horn and Johnson 1985: diag(1, 2) and diag(2, 1) have one spectrum, and by index it differs by 1."""
    one, two = (spectrum(lambda z, d=d: z * torch.tensor(d, dtype=F64), states(1, 2, 0))[0] for d in ([1, 2], [2, 1]))
    assert matched(one, two) < 1e-12 and (one - two).abs().max() == pytest.approx(1.0)
