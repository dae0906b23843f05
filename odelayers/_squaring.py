"""Bounds on the spectral abscissa by batched matrix products alone: the exponential, squared again and again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from odelayers._checks import positive_int

__all__ = ["Bounds", "bounds_by_squaring", "number_of_squarings", "power_of_two"]

_SQUARINGS = 24  # with more, rounding (for a Jordan block of size 2, 1e-7 |J|) outweighs what keeps the bound above
_TAYLOR = 18  # terms of e^X at |X| = 1: what is left out is below the rounding of float64


class Bounds(NamedTuple):
    """Bounds on the abscissa of each matrix, and what to think of them, (...) each."""

    lower: Tensor
    upper: Tensor
    cancelled: Tensor  # the largest |P|^2 / |P^2|, P a power: by how much a squaring amplifies rounding


def bounds_by_squaring(J: Tensor, squarings: int) -> Bounds:
    """Give log(|tr e^{tJ}| / n) / t, the largest over the powers, and log |e^{tJ}| / t at t = 2^squarings / |J|.

    All in float64 (Frobenius norms), each power kept at norm 1 and its logarithm added apart. |tr e^{tJ}| <=
    n e^{t abscissa} <= n |e^{tJ}|, exactly; with rounding, so far as not too much of it is amplified.
    """
    wide, n = torch.complex128 if J.is_complex() else torch.float64, J.shape[-1]
    scale = power_of_two(J)
    X = (J / scale).to(wide)
    size = torch.linalg.matrix_norm(X, keepdim=True)
    X = X / size.clamp(min=1.0)  # below 1 only for J = 0
    identity = torch.eye(n, dtype=wide, device=J.device)
    power = identity.expand_as(X)
    for term in range(_TAYLOR, 0, -1):
        power = identity + X @ power / term
    norm = torch.linalg.matrix_norm(power, keepdim=True)
    rate = norm.log()
    lower, cancelled = torch.full_like(rate, -torch.inf), torch.zeros_like(rate)
    for k in range(1, squarings + 1):
        power = power / norm
        power = power @ power
        norm = torch.linalg.matrix_norm(power, keepdim=True)
        rate = rate + norm.log() / 2**k  # log |P^2| / 2 = log |P| + log |(P / |P|)^2| / 2
        trace = power.diagonal(dim1=-2, dim2=-1).sum(-1).abs()[..., None, None]
        lower = torch.maximum(lower, rate + (trace / (n * norm)).log() / 2**k)
        cancelled = torch.maximum(cancelled, 1 / norm)
    lower, upper = ((bound * size).to(scale.dtype) * scale for bound in (lower, rate))
    return Bounds(lower[..., 0, 0], upper[..., 0, 0], cancelled[..., 0, 0])


def number_of_squarings(squarings: int | None, where: str) -> int:
    """Return the number that is asked for, or the default, if it keeps the bound above the abscissa."""
    if squarings is None:
        return _SQUARINGS
    if positive_int(squarings, f"{where}: squarings") > _SQUARINGS:
        raise ValueError(
            f"{where}: squarings: expected an int from 1 to {_SQUARINGS}, got {squarings}: beyond, rounding "
            f'outweighs the gain and the bound could fall below the abscissa; method="eig" is sharper'
        )
    return squarings


def power_of_two(J: Tensor) -> Tensor:
    """The power of two (..., 1, 1) by which the largest entry of each matrix lies in [1, 2); tiny for a matrix of 0."""
    largest = J.detach().abs().amax((-2, -1), keepdim=True)
    power = torch.exp2((torch.frexp(largest).exponent - 1).to(largest.dtype))
    return power.clamp(min=torch.finfo(J.dtype).tiny)
