"""Classifier matrices whose class vectors are fixed far apart: regular simplex and orthogonal."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odelayers._checks import positive_int

__all__ = ["Head", "orthogonal_head", "simplex_head"]


class Head(nn.Module):
    """Scores z . v_k for fixed class vectors v_k, the rows of `weight` (classes, dim); no bias."""

    def __init__(self, weight: Tensor, *, trainable: bool = False):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trainable)

    def forward(self, z: Tensor) -> Tensor:
        """Give the scores (B, classes) of states (B, dim)."""
        return F.linear(z, self.weight)

    def extra_repr(self) -> str:
        """Describe the head in its repr."""
        return f"classes={self.weight.shape[0]}, dim={self.weight.shape[1]}, trainable={self.weight.requires_grad}"


def simplex_head(classes: int, dim: int, *, trainable: bool = False) -> Head:
    """Give a head whose class vectors form a regular simplex: unit length, all cosines -1/(classes - 1).

    No set of vectors has a smaller largest cosine. The construction is deterministic and spreads over all coordinates;
    it is done in float64, then cast to torch's default dtype.

    Args:
        classes: number of classes, at least 2.
        dim: number of coordinates of the state, at least classes - 1.
        trainable: let the optimiser move the vectors; they are frozen otherwise.

    Raises:
        TypeError, ValueError: an argument is not an int >= 1, classes < 2, or dim < classes - 1.

    Source: SODEF, corollary 1 (Kang et al. 2021); the bound is Rankin's (1955).

    >>> V = simplex_head(4, 8).weight
    >>> bool(torch.allclose(V @ V.T, torch.eye(4) * 4 / 3 - 1 / 3, atol=1e-6))
    True
    """
    if positive_int(classes, "simplex_head: classes") < 2:
        raise ValueError("simplex_head: classes: expected at least 2, got 1: a simplex is a set of points apart")
    if positive_int(dim, "simplex_head: dim") < classes - 1:
        raise ValueError(
            f"simplex_head: expected dim >= classes - 1 = {classes - 1}, got {dim}: a regular simplex of {classes} "
            f"points does not fit; raise dim"
        )
    # Rows of the cosine basis but the first sum to zero: their columns are the corners of a simplex around the origin.
    corners = _cosine_basis(classes)[1:].mT * math.sqrt(classes / (classes - 1))
    return Head(_cast(corners @ _cosine_basis(dim)[: classes - 1]), trainable=trainable)


def orthogonal_head(classes: int, dim: int, *, trainable: bool = False) -> Head:
    """Give a head whose class vectors are orthonormal.

    The construction is deterministic and spreads over all coordinates; it is done in float64, then cast to torch's
    default dtype.

    Args:
        classes: number of classes.
        dim: number of coordinates of the state, at least `classes`.
        trainable: let the optimiser move the vectors; they are frozen otherwise.

    Raises:
        TypeError, ValueError: an argument is not an int >= 1, or dim < classes.

    >>> V = orthogonal_head(3, 5).weight
    >>> bool(torch.allclose(V @ V.T, torch.eye(3), atol=1e-6))
    True
    """
    if positive_int(dim, "orthogonal_head: dim") < positive_int(classes, "orthogonal_head: classes"):
        raise ValueError(
            f"orthogonal_head: expected dim >= classes = {classes}, got {dim}: so many orthogonal vectors do not fit; "
            f"raise dim, or take simplex_head (dim >= classes - 1)"
        )
    return Head(_cast(_cosine_basis(dim)[:classes]), trainable=trainable)


def _cosine_basis(n: int) -> Tensor:
    """The orthonormal rows of the discrete cosine transform (n, n) in float64; the first is constant."""
    index = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi / n * index.unsqueeze(1) * (index + 0.5)) * math.sqrt(2 / n)
    rows[0] = 1 / math.sqrt(n)
    return rows


def _cast(weight: Tensor) -> Tensor:
    return weight.to(torch.get_default_dtype())
