"""Rightmost eigenvalues and Euclidean log norms of Jacobians too large to store, from products with vectors alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from odelayers._checks import at_least_float32, positive_int, positive_number, state
from odelayers._evaluator import Evaluator
from odelayers._field import Field, as_rows
from odelayers._jacobian import refuse_batch_statistics
from odelayers._linalg import check_rows_finite, eigenpairs, row_norms, unit_rows

__all__ = ["RitzValues", "euclidean_log_norm", "rightmost_eigenvalues"]


class RitzValues(NamedTuple):
    """Estimates of eigenvalues from a Krylov space, and how far each is from being one.

    >>> RitzValues(torch.tensor([[-1.0]]), torch.tensor([[0.1]]), torch.tensor([[False]])).converged.all().item()
    False

    Attributes:
        values: the Ritz values.
        residuals: |A v - value v| of the unit vector v that goes with each: it is an eigenvalue of a matrix that
            differs from A by as much. Never less than sqrt(D) eps |A|, the rounding of the products.
        converged: where the residual is at most `tol` times the norm of A on the Krylov space.
    """

    values: Tensor
    residuals: Tensor
    converged: Tensor


@torch.no_grad()
def rightmost_eigenvalues(
    f: Callable[..., Tensor],
    z: Tensor,
    t: Tensor | float = 0.0,
    *,
    k: int = 1,
    iterations: int = 100,
    tol: float = 1e-3,
) -> RitzValues:
    """Estimate the k eigenvalues of largest real part of the field's Jacobian at every row of z, without the Jacobian.

    Arnoldi's method: all rows advance together, by one product J v an iteration (two to three evaluations of f for the
    whole batch). It keeps (B, iterations + 1, D) numbers instead of (B, D, D), and is exact from D iterations on.

    These are estimates. A Ritz value has the residual that is given, and may lie on either side of the eigenvalue near
    it; that no eigenvalue lies further right than those found is likely where they have converged, and never proven.

    Args:
        f: field, `f(z)` or `f(t, z)`.
        z: points (B, ...), floating point.
        t: time, a float or a tensor that broadcasts against z.
        k: number of eigenvalues, conjugates counted each.
        iterations: dimension of the Krylov space, >= k; more are sharper, and no row takes fewer than another, so that
            none depends on its mates.
        tol: residual, relative to the norm of J on the Krylov space, at which a value counts as converged.

    Returns:
        `RitzValues` of entries (B, k), by falling real part; the values are complex.

    Raises:
        TypeError: z is not a floating-point tensor, or an argument is of the wrong kind.
        ValueError: an argument is outside its range; f returns another shape than z's; z or J v is not finite (rows
            named); f has batch statistics, or draws random numbers.

    Source: Arnoldi (1951); Saad, "Numerical methods for large eigenvalue problems" (2011), chapter 6. Orthogonalised
    twice: Giraud, Langou, Rozloznik (2005).

    >>> found = rightmost_eigenvalues(lambda z: z * torch.tensor([-3.0, -1.0, -2.0]), torch.zeros(1, 3), k=2)
    >>> found.values.real.round(decimals=4), found.converged.all().item()
    (tensor([[-1., -2.]]), True)
    """
    where = "rightmost_eigenvalues"
    field, z = _checked(f, z, where)
    D = z.shape[1:].numel()
    if positive_int(k, f"{where}: k") > min(D, positive_int(iterations, f"{where}: iterations")):
        raise ValueError(f"{where}: k: expected at most {min(D, iterations)} (D={D}, iterations={iterations}), got {k}")
    tol = positive_number(tol, f"{where}: tol")
    H, left = _arnoldi(_Jacobian(field, z, t).times, z, iterations, f"{where}: J v")
    values, vectors = eigenpairs(H, where)
    residuals = left[:, None] * vectors[:, -1].abs()
    # By real part, of a conjugate pair the one above first: a stable sort by the second criterion goes first.
    order = values.imag.argsort(dim=1, descending=True)
    order = order.gather(1, values.real.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :k]
    return _judged(values.gather(1, order), residuals.gather(1, order), H, tol, z)


@torch.no_grad()
def euclidean_log_norm(
    f: Callable[..., Tensor], z: Tensor, t: Tensor | float = 0.0, *, iterations: int = 50, tol: float = 1e-3
) -> RitzValues:
    """Estimate `log_norm(J, 2)` of the field's Jacobian at every row of z, without the Jacobian.

    Lanczos' method on (J + J') / 2: one J v and one J' v each iteration for all rows together. The value never
    exceeds the log norm but for rounding, rises with the iterations, and is exact from D on; an eigenvalue of
    (J + J') / 2 lies within the residual of it, and that it is the largest is likely, not proven. So a value above 0
    proves that the field does not contract there, and one below 0 proves nothing.

    Args:
        f: field, `f(z)` or `f(t, z)`.
        z: points (B, ...), floating point.
        t: time, a float or a tensor that broadcasts against z.
        iterations: dimension of the Krylov space.
        tol: residual, relative to the norm of (J + J') / 2 on the Krylov space, at which a value counts as converged.

    Returns:
        `RitzValues` of entries (B,).

    Raises:
        TypeError, ValueError: as `rightmost_eigenvalues`.

    Source: Lanczos (1950), orthogonalised in full.

    >>> A = torch.tensor([[-1.0, 4.0], [0.0, -1.0]])
    >>> euclidean_log_norm(lambda z: z @ A.T, torch.zeros(1, 2)).values.round(decimals=4)
    tensor([1.])
    """
    where = "euclidean_log_norm"
    field, z = _checked(f, z, where)
    positive_int(iterations, f"{where}: iterations")
    tol = positive_number(tol, f"{where}: tol")
    J = _Jacobian(field, z, t)
    H, left = _arnoldi(lambda v: (J.times(v) + J.transposed_times(v)) / 2, z, iterations, f"{where}: (J + J') v")
    values, vectors = eigenpairs(H / 2 + H.mT / 2, where, symmetric=True)
    found = _judged(values[:, -1:], left[:, None] * vectors[:, -1, -1:].abs(), H, tol, z)
    return RitzValues(*(x[:, 0] for x in found))


def _checked(f: Callable[..., Tensor], z: Tensor, where: str) -> tuple[Field, Tensor]:
    field, z = Field.of(f), state(z, where)
    if z.shape[1:].numel() == 0:
        raise ValueError(f"{where}: expected rows with at least one coordinate, got z of shape {tuple(z.shape)}")
    refuse_batch_statistics(field, where)
    check_rows_finite(z, f"{where}: z")
    return field, z


class _Jacobian:
    """Products of the Jacobians at z, and of their transposes, with rows v (B, D), from one evaluation of the field.

    J'u by a backward pass, and J v by one through that pass, which is linear in u: faster than forward mode.
    """

    def __init__(self, field: Field, z: Tensor, t: Tensor | float) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self.x = z.clone().detach().requires_grad_()
            self.out = Evaluator(field, len(z))(t, self.x)
            self.u = torch.zeros_like(self.out, requires_grad=True)
            self.pulled = self._pull(self.out, self.x, self.u, create_graph=True)

    def times(self, v: Tensor) -> Tensor:
        return as_rows(self._pull(self.pulled, self.u, v.to(self.x.dtype).reshape(self.x.shape)))

    def transposed_times(self, v: Tensor) -> Tensor:
        return as_rows(self._pull(self.out, self.x, v.to(self.x.dtype).reshape(self.x.shape)))

    @staticmethod
    def _pull(out: Tensor, of: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
        if not out.requires_grad:
            return torch.zeros_like(of)
        (found,) = torch.autograd.grad(out, of, v, retain_graph=True, create_graph=create_graph, materialize_grads=True)
        return found


def _judged(values: Tensor, residuals: Tensor, H: Tensor, tol: float, z: Tensor) -> RitzValues:
    """The Ritz values and residuals in the precision and on the device of z, with the verdict."""
    real = at_least_float32(z).dtype
    norm = torch.linalg.matrix_norm(H, 2)[:, None] if len(H) else H.new_zeros(0, 1)
    residuals = torch.maximum(residuals, _rounding(z) * norm)
    converged = residuals <= tol * norm
    values = values.to(real.to_complex() if values.is_complex() else real)
    return RitzValues(values.to(z.device), residuals.to(z.device, real), converged.to(z.device))


def _rounding(z: Tensor) -> float:
    """The relative error of a product of a Jacobian with a vector like z."""
    return math.sqrt(z.shape[1:].numel()) * torch.finfo(z.dtype).eps


def _arnoldi(product: Callable[[Tensor], Tensor], z: Tensor, iterations: int, where: str) -> tuple[Tensor, Tensor]:
    """Give H (B, m, m) = V' A V, V an orthonormal basis of a Krylov space, and (B,) what A maps its last vector out by.

    Both in float64 on the CPU: they are small. Where a row's space is mapped into itself, it goes on with a new
    direction, so that its eigenvalues are still those of A and the others are found too.
    """
    B, D = len(z), z.shape[1:].numel()
    m = min(iterations, D)
    dtype = at_least_float32(z).dtype
    draws = torch.Generator().manual_seed(0)  # the same for every row: none depends on its place among its mates

    def direction() -> Tensor:
        return torch.randn(D, generator=draws, dtype=torch.float64, device="cpu").to(z.device, dtype).expand(B, D)

    V, H = (
        torch.zeros(B, m + 1, D, dtype=dtype, device=z.device),
        torch.zeros(B, m + 1, m, dtype=dtype, device=z.device),
    )
    V[:, 0] = unit_rows(direction())
    for j in range(m):
        image = product(V[:, j]).to(dtype)
        coefficients, rest = _orthogonalised(image, V[:, : j + 1])
        left = row_norms(rest)
        closed = left <= _rounding(z) * row_norms(image)
        left = left.masked_fill(closed, 0.0)
        H[:, : j + 1, j], H[:, j + 1, j] = coefficients, left
        if j + 1 < D and bool(closed.any()):
            _, other = _orthogonalised(unit_rows(direction()), V[:, : j + 1])
            rest = torch.where(closed[:, None], other, rest)
        V[:, j + 1] = unit_rows(rest)
    check_rows_finite(H, where)
    H = H.double().cpu()
    return H[:, :m], H[:, m, m - 1]


def _orthogonalised(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients of w in an orthonormal basis (B, j, D), and the rest."""
    total = torch.zeros_like(basis[..., 0])
    for _ in range(2):  # once leaves the rest orthogonal to rounding of w, not of itself
        part = (basis @ w.unsqueeze(-1)).squeeze(-1)
        w = w - (part.unsqueeze(1) @ basis).squeeze(1)
        total = total + part
    return total, w
