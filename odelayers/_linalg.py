"""Batched spectra of matrices and the bounds on them: Gershgorin discs, logarithmic norms, spectral abscissa."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from odelayers._checks import at_least_float32, one_of
from odelayers._solution import GradientError
from odelayers._squaring import bounds_by_squaring, number_of_squarings, power_of_two

__all__ = [
    "check_rows_finite",
    "eigenpairs",
    "eigenvalues",
    "finite_square",
    "gershgorin",
    "log_norm",
    "row_norms",
    "spectral_abscissa",
    "unit_rows",
]

_AXES = ("row", "column")
_METHODS = ("eig", "squaring")
_SHIFT = 0.6180339887498949  # of no matrix's diagonal, so that no eigenvalue is 0


def gershgorin(J: Tensor, axis: str = "row") -> tuple[Tensor, Tensor]:
    """Give the centres and radii of the Gershgorin discs of each matrix, which together hold all its eigenvalues.

    Args:
        J: real or complex matrices (..., n, n); half precision is computed in float32.
        axis: `"row"` sums |J_ij| over j != i, `"column"` over i != j.

    Returns:
        centres (..., n), the diagonal (complex for a complex J), and radii (..., n), real.

    Raises:
        TypeError: J is not a floating-point or complex tensor.
        ValueError: J is not square, or `axis` is unknown.

    Source: Gershgorin (1931). The largest Re J_ii + R_i is `log_norm(J, math.inf)` for rows and `log_norm(J, 1)` for
    columns, and bounds the spectral abscissa from above.

    >>> centres, radii = gershgorin(torch.tensor([[[-3.0, 1.0], [0.5, -2.0]]]))
    >>> centres.tolist(), radii.tolist()
    ([[-3.0, -2.0]], [[1.0, 0.5]])
    """
    J = _square(J, "gershgorin")
    one_of(axis, "gershgorin: axis", _AXES)
    # The diagonal is masked, not subtracted: |J_ii| may be far larger than the radius and would round it away.
    on_diagonal = torch.eye(J.shape[-1], dtype=torch.bool, device=J.device)
    radii = J.abs().masked_fill(on_diagonal, 0.0).sum(-1 if axis == "row" else -2)
    return J.diagonal(dim1=-2, dim2=-1), radii


def log_norm(J: Tensor, p: float) -> Tensor:
    """Give the logarithmic norm mu_p of each matrix: ||e^{Jt}||_p <= e^{mu_p t} for t >= 0, sharp as t falls to 0.

    Args:
        J: real or complex matrices (..., n, n); half precision is computed in float32.
        p: 1 (columns), 2 (largest eigenvalue of the Hermitian part) or `math.inf` (rows).

    Returns:
        mu_p (...), real. It may be negative, and bounds the spectral abscissa from above.

    Raises:
        TypeError: J is not a floating-point or complex tensor.
        ValueError: J is not square or not finite (rows named), or `p` is none of 1, 2, inf.

    Source: Dahlquist (1958), Lozinskii (1958).

    >>> J = torch.tensor([[[-1.0, 4.0], [0.0, -1.0]]])
    >>> [round(log_norm(J, p).item(), 5) for p in (1, 2, math.inf)]
    [3.0, 1.0, 3.0]
    """
    if isinstance(p, bool) or p not in (1, 2, math.inf):
        raise ValueError(f"log_norm: expected p as 1, 2 or math.inf, got {p!r}")
    J = finite_square(J, "log_norm")
    if p == 2:
        X, scale = _prepared(J / 2 + J.mH / 2)
        largest: Tensor = torch.linalg.eigvalsh(X)[..., -1]
        return (largest - _SHIFT) * scale[..., 0]
    centres, radii = gershgorin(J, "row" if p == math.inf else "column")
    return (centres.real + radii).amax(-1)


def spectral_abscissa(J: Tensor, method: str = "eig", *, squarings: int | None = None) -> Tensor:
    """Give the largest real part of the eigenvalues of each matrix.

    z' = Jz tends to 0 from every start exactly when it is negative.

    Args:
        J: real or complex matrices (..., n, n); half precision is computed in float32.
        method: `"eig"`, all eigenvalues by LAPACK; or `"squaring"`, an upper bound by batched matrix products alone,
            log |e^{tJ}| / t at t = 2^squarings / |J| (Frobenius norms), for devices where LAPACK takes one matrix at a
            time. The products are in float64 whatever the dtype of J, so TF32 has no part in them.
        squarings: how often e^{J / |J|} is squared, 1 to 24 (the default); for `"squaring"` alone. Each one halves the
            excess: on matrices of 16 to 128 rows with independent normal entries of variance 1/n, whose abscissa is
            near 1, it was at most 0.12 with 8, 0.013 with 12, 7e-4 with 16, 3.4e-5 with 20 and 2.2e-6 with 24.

    Returns:
        The spectral abscissa (...), real. With `"eig"` it has the rounding of the eigenvalues: for a normal matrix
        about n eps times its norm, up to the n-th root of that for a defective one. With `"squaring"` it is no less
        than the abscissa but for a margin of rounding, 8 n eps |J| c (eps of float64, c the condition number of the
        eigenvectors) and that of J's dtype in the result, and exceeds it by that margin and log(c sqrt(n)) |J| / 2^k
        at most, k = squarings, for c up to 1000. Further from normal, rounding loosens the bound: for a Jordan block
        of size m the excess is up to |J| times the root of n eps of degree 3 (m - 1), and m log(2^k) |J| / 2^k.

    Raises:
        TypeError: J is not a floating-point or complex tensor, or `squarings` no int.
        ValueError: J is not square or not finite (rows named), `method` is unknown, or `squarings` outside 1 to 24 or
            given for `"eig"`.
        GradientError: from a backward pass, or in forward mode, of `"squaring"`. The bound turns with the phase of a
            complex pair: near as it is to the abscissa, its slope in J is another, by any factor, however often is
            squared.

    Source: e^{t abscissa} <= |e^{tJ}| for t > 0, in every submultiplicative norm; e^{2tJ} is the square of e^{tJ}.

    >>> J = torch.tensor([[[-1.0, 10.0], [0.0, -2.0]]])
    >>> round(spectral_abscissa(J).item(), 5), round(spectral_abscissa(J, method="squaring").item(), 5)
    (-1.0, -1.0)
    """
    if one_of(method, "spectral_abscissa: method", _METHODS) == "squaring":
        k = number_of_squarings(squarings, "spectral_abscissa")
        matrices = finite_square(J, "spectral_abscissa")
        bound = bounds_by_squaring(matrices.detach(), k).upper
        upper: Tensor = _Bound.apply(matrices, bound)  # type: ignore[no-untyped-call]
        return upper
    if squarings is not None:
        raise ValueError(f'spectral_abscissa: squarings={squarings!r} is for method="squaring", got method="eig"')
    return eigenvalues(J, "spectral_abscissa").real.amax(-1)


class _Bound(torch.autograd.Function):
    """The bound beside the matrices that it is of; says why it has no gradient when one is asked for."""

    @staticmethod
    def forward(J: Tensor, bound: Tensor) -> Tensor:
        return bound.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> None:
        raise GradientError(
            'spectral_abscissa: method="squaring" gives a bound whose slope is not that of the abscissa: of a complex '
            'pair it is wrong by any factor; use method="eig" for a gradient, or pass J.detach()'
        )

    jvp = backward  # forward mode asks for the same slope


def eigenvalues(J: Tensor, where: str) -> Tensor:
    """Give all eigenvalues (..., n), complex, in no particular order."""
    X, scale = _prepared(finite_square(J, where))
    values: Tensor = torch.linalg.eigvals(X)
    return (values - _SHIFT) * scale


def eigenpairs(J: Tensor, where: str, *, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Give all eigenvalues (..., n) and unit eigenvectors (..., n, n) in columns; rising and real if symmetric."""
    X, scale = _prepared(finite_square(J, where))
    values, vectors = torch.linalg.eigh(X) if symmetric else torch.linalg.eig(X)
    return (values - _SHIFT) * scale, vectors


def check_rows_finite(x: Tensor, where: str) -> None:
    """Raise ValueError naming the rows of `x`, its entries along the first axis, that hold NaN or inf."""
    finite = x.isfinite()
    if bool(finite.all()):
        return
    bad = (~finite.reshape(len(x), -1).all(1)).nonzero().flatten().tolist()
    rows = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
    raise ValueError(
        f"{where}: expected finite numbers, got NaN or inf in {len(bad)} of {len(x)} rows ({rows}); "
        f"leave these rows out, or look for what overflows there"
    )


def finite_square(J: Any, where: str) -> Tensor:
    """Return J as finite square matrices in a precision that LAPACK knows: NaN or inf in them can kill the process."""
    matrices = _square(J, where)
    check_rows_finite(matrices.reshape(-1, matrices.shape[-2] * matrices.shape[-1]), f"{where}: J")
    return matrices


def row_norms(x: Tensor) -> Tensor:
    """Give the Euclidean norms (B,) of rows (B, n), also where squares of entries leave the range of the dtype."""
    scale = power_of_two(x.unsqueeze(1))[:, 0]
    norms: Tensor = (x / scale).norm(dim=1) * scale[:, 0]
    return norms


def unit_rows(x: Tensor) -> Tensor:
    """Give the rows (B, n) at length 1, however short or long they are; rows of 0 stay."""
    x = x / power_of_two(x.unsqueeze(1))[:, 0]
    units: Tensor = x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return units


def _prepared(J: Tensor) -> tuple[Tensor, Tensor]:
    """J / scale + _SHIFT I without entries below rounding, and the scale (..., 1), a power of two.

    Finite matrices can break LAPACK too. Where entries, or eigenvalues that are exactly 0, let products underflow, the
    iteration of MKL's `geev` does not converge, and torch.linalg.eig has been seen to corrupt memory then (torch 2.13;
    [[0, 0, -.72091], [0, 0, -.09291], [.72091, .09291, 0]] is enough). What is changed here is smaller than the
    backward error of the eigenvalues.
    """
    scale = power_of_two(J)
    X = J / scale
    negligible = X.detach().masked_fill(
        X.detach().abs() >= torch.finfo(J.dtype).eps ** 2, 0.0
    )  # subtracted, X keeps its gradient
    identity = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
    return X - negligible + _SHIFT * identity, scale[..., 0]


def _square(J: Any, where: str) -> Tensor:
    """Return J as square matrices in a precision that LAPACK knows."""
    if not isinstance(J, Tensor):
        raise TypeError(f"{where}: expected a Tensor (..., n, n), got {type(J).__name__}")
    if not (J.is_floating_point() or J.is_complex()):
        raise TypeError(f"{where}: expected floating-point or complex matrices, got {J.dtype}; pass J.double()")
    if J.ndim < 2 or J.shape[-1] != J.shape[-2] or J.shape[-1] == 0:
        raise ValueError(f"{where}: expected square matrices (..., n, n) with n >= 1, got shape {tuple(J.shape)}")
    return at_least_float32(J)
