"""The logarithmic norms beside loops over rows and columns, and scipy's largest eigenvalue of the Hermitian part."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

from odelayers import log_norm

F64 = torch.float64


def by_rows(matrix: list[list[complex]]) -> float:
    """The largest over rows i of Re J_ii plus the sum of |J_ij| over the other columns j, number by number."""
    sums = []
    for i, row in enumerate(matrix):
        off = 0.0
        for j, entry in enumerate(row):
            off += abs(entry) if j != i else 0.0
        sums.append(row[i].real + off)
    return max(sums)


def looped(J: Tensor, p: float) -> Tensor:
    """The logarithmic norm of each matrix of a batch `(B, n, n)`."""
    found = []
    for matrix in J:
        if p == 2:
            hermitian = (matrix + matrix.mH).numpy() / 2
            found.append(float(scipy.linalg.eigh(hermitian, eigvals_only=True)[-1]))
        else:
            found.append(by_rows((matrix if p == math.inf else matrix.T).tolist()))
    return torch.tensor(found, dtype=F64)


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("kind", ["normal", "shifted", "triangular", "complex", "one row"])
def test_the_log_norm_is_that_of_a_loop_over_rows(kind: str, p: float) -> None:
    """Of 40 matrices of 1 to 9 rows, negative diagonals and matrices far from normal among them, to rounding."""
    n = 1 if kind == "one row" else 9
    J = torch.randn(40, n, n, dtype=torch.complex128 if kind == "complex" else F64)
    if kind == "shifted":
        J = J - 10 * torch.eye(n, dtype=F64)
    if kind == "triangular":
        J = 100 * J.triu()
    found = log_norm(J, p)
    assert found.dtype == F64
    torch.testing.assert_close(found, looped(J, p), rtol=1e-12, atol=1e-12)
    if n > 1:  # control: rows are not columns, and neither is the symmetric part
        others = [looped(J, q) for q in (1, 2, math.inf) if q != p]
        assert all((found - other).abs().max() > 0.1 for other in others)
    if kind == "shifted":
        assert (looped(J, 2) < 0).all()  # a norm is never negative, a log norm may be
