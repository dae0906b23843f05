"""Backpropagation through the steps taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._gradients.base import Gradient
from odelayers._solvers.base import Path, Solver
from odelayers._solvers.reference import TorchDiffEq

__all__ = ["Backprop"]


@dataclass(frozen=True)
class Backprop(Gradient):
    """Backpropagate through the steps taken, step sizes held constant: the default.

    The gradient is exact for the numbers computed (discretise, then optimise), and can be differentiated again. Memory
    grows with the number of steps; `Checkpoint` trades it for time.

    Example:
        >>> Backprop()
        Backprop()
    """

    evaluates_again: ClassVar[bool] = False

    def accepts(self, solver: Solver) -> bool:
        # scipy's values come without a graph: a loss would silently get no gradient.
        return not (isinstance(solver, TorchDiffEq) and solver.method == "scipy_solver")

    def solve(self, solver: Solver, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver) -> Path:
        return solver.integrate(f, z0, ts, driver)
