"""Penalties accumulated along a solve: what a trajectory costs, integrated beside its state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from odelayers._checks import at_least_float32
from odelayers._field import as_rows

__all__ = ["JacobianRegularizer", "KineticRegularizer", "SteadyStateRegularizer"]


@dataclass(frozen=True)
class SteadyStateRegularizer:
    """TisODE's steady-state penalty along a solve: the integral of |f(t, z)|, Euclidean over the coordinates of a row.

    Hand it to the solve that goes on after the end time, from t1 to a later t2:

        z = block(x)
        rest = block.solve(z, ts=[t1, t2], running=[SteadyStateRegularizer()])
        loss = cross_entropy(head(z), y) + 0.01 * rest.running[0].mean()

    Divide by the length of that solve for the mean of |f| over it.
    Source: Yan, Du, Tan, Feng, "On robustness of neural ordinary differential equations" (ICLR 2020), section 4.
    """

    needs_jacobian: ClassVar[bool] = False

    def rate(self, t: Tensor | float, z: Tensor, dz: Tensor, probe: Tensor) -> Tensor:
        """Give |dz| of each row, (B,).

        >>> SteadyStateRegularizer().rate(0.0, torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
        tensor([5.])
        """
        speed: Tensor = torch.linalg.vector_norm(at_least_float32(as_rows(dz)), dim=1)
        return speed


@dataclass(frozen=True)
class KineticRegularizer:
    """The kinetic energy of a trajectory: the integral of |f(t, z)|^2 / D, D the number of coordinates of a row.

    Source: Finlay et al., "How to train your neural ODE" (ICML 2020), there without the division.
    """

    needs_jacobian: ClassVar[bool] = False

    def rate(self, t: Tensor | float, z: Tensor, dz: Tensor, probe: Tensor) -> Tensor:
        """Give the mean of dz^2 over each row, (B,).

        >>> KineticRegularizer().rate(0.0, torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
        tensor([12.5000])
        """
        return at_least_float32(as_rows(dz)).square().mean(1)


@dataclass(frozen=True)
class JacobianRegularizer:
    """The size of the Jacobian along a trajectory: the integral of |e' J|^2 / D, e standard normal, fixed for a solve.

    Its mean over e is the squared Frobenius norm of J over D, the number of coordinates of a row.

    Source: Finlay et al., "How to train your neural ODE" (ICML 2020), there without the division.
    """

    needs_jacobian: ClassVar[bool] = True

    def rate(self, t: Tensor | float, z: Tensor, dz: Tensor, probe: Tensor) -> Tensor:
        """Give the mean of (probe' J)^2 over each row, (B,).

        Raises:
            ValueError: z does not require a gradient.

        >>> z = torch.zeros(1, 2, requires_grad=True)
        >>> JacobianRegularizer().rate(0.0, z, 3 * z, torch.tensor([[1.0, 2.0]])).item()
        22.5
        """
        if not z.requires_grad:
            raise ValueError("JacobianRegularizer: rate: expected a state z that requires a gradient")
        gradient = None
        if dz.requires_grad:
            (gradient,) = torch.autograd.grad(dz, z, probe, create_graph=True, allow_unused=True)
        # A field that does not depend on z has the Jacobian 0.
        return z.new_zeros(len(z)) if gradient is None else at_least_float32(as_rows(gradient)).square().mean(1)
