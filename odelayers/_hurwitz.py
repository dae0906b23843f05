"""The sign of the spectral abscissa: bounds first, eigenvalues only where the bounds leave it open."""

from __future__ import annotations

import torch
from torch import Tensor

from odelayers._checks import finite_number
from odelayers._linalg import eigenvalues, finite_square, gershgorin
from odelayers._squaring import bounds_by_squaring, number_of_squarings, power_of_two

__all__ = ["is_hurwitz"]

_EPS = torch.finfo(torch.float64).eps
_CANCELLED = 1000  # where a squaring amplifies rounding more, J is too far from normal for these bounds


@torch.no_grad()
def is_hurwitz(J: Tensor, margin: float = 0.0) -> Tensor:
    """Say of each matrix whether all its eigenvalues have a real part below -margin.

    Then z' = Jz tends to 0 from every start, in the end faster than e^(-margin t). Each matrix takes the first of these
    that decides it:

    1. the mean of the eigenvalues, trace / n, does not lie left of -margin: no.
    2. Gershgorin's discs, over rows or over columns, all do: yes.
    3. -(J + J') / 2 - margin I has a Cholesky factor, so that the Euclidean log norm is below -margin: yes.
    4. on other devices than the CPU, where LAPACK takes one matrix at a time: log(|tr e^{tJ}| / n) / t and
       log |e^{tJ}| / t, between which the abscissa lies, by repeated squaring; yes or no.
    5. the eigenvalues, by LAPACK.

    Args:
        J: real or complex matrices (..., n, n); all is computed in float64.
        margin: wanted distance of the eigenvalues from the imaginary axis, >= 0, in units of J.

    Returns:
        The answers (...), bool. What lies within rounding of -margin is no: yes needs a real part, or a bound on it, of
        less than -margin - n eps |J| (eps of float64, Frobenius norm). Beyond that the answer is that of the
        eigenvalues as computed, which are off by up to c times as much, c the condition number of the eigenvectors, and
        for a defective matrix by up to the n-th root of n eps times |J|.

    Raises:
        TypeError: J is not a floating-point or complex tensor, or `margin` not a number.
        ValueError: J is not square or not finite (rows named), or `margin` is negative or not finite.

    Source: Gershgorin (1931); Dahlquist (1958) for the log norm.

    >>> J = torch.tensor([[[-1.0, 100.0], [0.0, -1.0]], [[0.0, 1.0], [-1.0, 0.0]]])
    >>> is_hurwitz(J).tolist(), is_hurwitz(J, margin=2.0).tolist()
    ([True, False], [False, False])
    """
    if finite_number(margin, "is_hurwitz: margin") < 0:
        raise ValueError(f"is_hurwitz: margin: expected a number >= 0, got {margin}")
    J = finite_square(J, "is_hurwitz")
    A = J.reshape(-1, *J.shape[-2:]).to(torch.complex128 if J.is_complex() else torch.float64)
    scale = power_of_two(A)
    A = A / scale
    limit = -margin / scale[:, 0, 0] - A.shape[-1] * _EPS * torch.linalg.matrix_norm(A)
    answer, rows = torch.zeros(len(A), dtype=torch.bool, device=A.device), torch.arange(len(A), device=A.device)
    squaring = (_by_squaring,) if _takes_one_at_a_time(A.device) else ()
    for decide in (_by_trace, _by_discs, _by_log_norm, *squaring, _by_eigenvalues):
        if len(rows) == 0:
            break
        yes, no = decide(A, limit)
        answer[rows[yes]] = True
        left = ~(yes | no)
        rows, A, limit = rows[left], A[left], limit[left]
    return answer.reshape(J.shape[:-2])


def _takes_one_at_a_time(device: torch.device) -> bool:
    """Whether LAPACK's eigenvalues cost a device far more than matrix products."""
    return device.type != "cpu"


# Each gives what it proves: the abscissa lies below the limit, or does not.


def _by_trace(A: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    no = A.diagonal(dim1=-2, dim2=-1).real.mean(-1) >= limit
    return torch.zeros_like(no), no


def _by_discs(A: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    bounds = []
    for axis in ("row", "column"):
        centres, radii = gershgorin(A, axis)
        bounds.append((centres.real + radii).amax(-1))
    yes = torch.minimum(*bounds) < limit
    return yes, torch.zeros_like(yes)


def _by_log_norm(A: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    _, failed = torch.linalg.cholesky_ex(limit[:, None, None] * identity - (A + A.mH) / 2)
    yes = failed == 0
    return yes, torch.zeros_like(yes)


def _by_squaring(A: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper, cancelled = bounds_by_squaring(A, number_of_squarings(None, "is_hurwitz"))
    rounding = 8 * A.shape[-1] * _EPS * torch.linalg.matrix_norm(A) * cancelled
    trusted = cancelled < _CANCELLED
    return trusted & (upper < limit - rounding), trusted & (lower > limit + rounding)


def _by_eigenvalues(A: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    yes = eigenvalues(A, "is_hurwitz").real.amax(-1) < limit
    return yes, ~yes
