"""Linear equations that share a matrix: decomposed once, solved often, differentiated without the decomposition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Factored"]


class Factored:
    """Batched matrices W `(B, D, D)` and the LU decomposition by which equations with them are solved.

    The derivative of W x = r is another equation with W, so autograd never passes through the decomposition, which
    costs several times as much. A singular W is not looked for: its solutions are not finite.
    """

    def __init__(self, W: Tensor) -> None:
        self.W = W
        with torch.no_grad():
            self.LU, self.pivots, _ = torch.linalg.lu_factor_ex(W)

    def solve(self, right: Tensor) -> Tensor:
        """The rows x `(B, D)` with W x = right."""
        if not torch.is_grad_enabled():
            x: Tensor = torch.linalg.lu_solve(self.LU, self.pivots, right.unsqueeze(-1))
            return x.squeeze(-1)
        return _solve(self.W, self.LU, self.pivots, right.unsqueeze(-1), False).squeeze(-1)


def _solve(W: Tensor, LU: Tensor, pivots: Tensor, r: Tensor, transposed: bool) -> Tensor:
    x: Tensor = _Solve.apply(W, LU, pivots, r, transposed)  # type: ignore[no-untyped-call]
    return x


class _Solve(torch.autograd.Function):
    """x with W x = r, or with W' x = r; its derivatives are equations of the same kind, so all orders exist."""

    generate_vmap_rule = True  # the Jacobian of a block is taken by a vectorised backward pass

    @staticmethod
    def forward(W: Tensor, LU: Tensor, pivots: Tensor, r: Tensor, transposed: bool) -> Tensor:
        x: Tensor = torch.linalg.lu_solve(LU, pivots, r, adjoint=transposed)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        W, LU, pivots, _, ctx.transposed = inputs
        ctx.save_for_backward(W, LU, pivots, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        W, LU, pivots, x = ctx.saved_tensors
        y = _solve(W, LU, pivots, gradient, not ctx.transposed)
        into_W = None
        if ctx.needs_input_grad[0]:
            into_W = -(x @ y.mT) if ctx.transposed else -(y @ x.mT)
        return into_W, None, None, y, None
