"""What a phase of training adds to the cross-entropy, as data: each is a published loss over library regularisers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from odelayers import (
    JacobianRegularizer,
    KineticRegularizer,
    LyaNetRegularizer,
    LyapunovRegularizer,
    Solution,
    SteadyStateRegularizer,
)

from .models import Classifier

__all__ = ["Constraints", "LyaNet", "Penalty", "SteadyState", "Transport"]

OFFICIAL = LyapunovRegularizer.sodef_mnist()


class Penalty(Protocol):
    """A term of the loss, weights included.

    `via` are the times, as shares of the block's end time, at which it wants the states of the solve; `running` is
    what that solve accumulates. With neither it needs no solve.
    """

    @property
    def via(self) -> tuple[float, ...]:
        """See the class."""

    @property
    def running(self) -> Sequence[Any]:
        """See the class."""

    def __call__(
        self, model: Classifier, z: Tensor, labels: Tensor, solution: Solution | None, draws: torch.Generator
    ) -> Tensor:
        """Give the term, a 0-d tensor, for states `z` that enter the block and the solve from them."""


@dataclass(frozen=True)
class Constraints:
    """SODEF's regulariser of the field at the states that enter the block; with the constants of its official code."""

    regularizer: LyapunovRegularizer = OFFICIAL
    kind: str = field(default="constraints", init=False)
    via: ClassVar[tuple[float, ...]] = ()
    running: ClassVar[Sequence[Any]] = ()

    def __call__(
        self, model: Classifier, z: Tensor, labels: Tensor, solution: Solution | None, draws: torch.Generator
    ) -> Tensor:
        """See `Penalty`."""
        return self.regularizer(model.block.f, model.entering(z), generator=draws)


@dataclass(frozen=True)
class SteadyState:
    """TisODE's: `weight` times the mean of |f| over [start, stop] times the end time, along the solution.

    The weight is the paper's, the interval around the end time that of the authors' released run.
    Source: Yan et al., "On robustness of neural ordinary differential equations" (ICLR 2020), and its code.
    """

    weight: float = 0.01
    start: float = 0.75
    stop: float = 1.05
    kind: str = field(default="steady state", init=False)
    running: ClassVar[Sequence[Any]] = ()

    @property
    def via(self) -> tuple[float, ...]:
        """The start of the interval."""
        return (self.start,)

    def __call__(
        self, model: Classifier, z: Tensor, labels: Tensor, solution: Solution | None, draws: torch.Generator
    ) -> Tensor:
        """See `Penalty`."""
        assert solution is not None
        first, last = self.start * model.spec.t1, self.stop * model.spec.t1
        onward = model.block.solve(solution.zs[1], ts=[first, last], running=[SteadyStateRegularizer()])
        return self.weight * onward.running[0].mean() / (last - first)


@dataclass(frozen=True)
class Transport:
    """RNODE's: the kinetic energy and the Jacobian's size along the solve, with the weights of the source's images.

    Source: Finlay et al., "How to train your neural ODE" (ICML 2020).
    """

    kinetic: float = 0.01
    jacobian: float = 0.01
    kind: str = field(default="transport", init=False)
    via: ClassVar[tuple[float, ...]] = ()
    running: ClassVar[Sequence[Any]] = (KineticRegularizer(), JacobianRegularizer())

    def __call__(
        self, model: Classifier, z: Tensor, labels: Tensor, solution: Solution | None, draws: torch.Generator
    ) -> Tensor:
        """See `Penalty`."""
        assert solution is not None
        kinetic, jacobian = solution.running
        return self.kinetic * kinetic.mean() + self.jacobian * jacobian.mean()


@dataclass(frozen=True)
class LyaNet:
    """LyaNet's loss: relu(V' + kappa V), V the cross-entropy, at `points` states along the solution, `z` the first.

    It takes the place of the cross-entropy. It is a pointwise loss: the states further along are constants to the
    gradient, as the source's samples are.
    Source: Rodriguez, Ames, Yue, "LyaNet: a Lyapunov framework for training neural ODEs" (ICML 2022).
    """

    kappa: float = 1.0
    points: int = 4
    kind: str = field(default="lyanet", init=False)
    running: ClassVar[Sequence[Any]] = ()

    @property
    def via(self) -> tuple[float, ...]:
        """Equally spaced times."""
        return tuple(i / self.points for i in range(1, self.points))

    def __call__(
        self, model: Classifier, z: Tensor, labels: Tensor, solution: Solution | None, draws: torch.Generator
    ) -> Tensor:
        """See `Penalty`."""
        assert solution is not None
        states = torch.cat([z, *solution.zs[1:-1].detach()])
        head: nn.Module = model.head
        return LyaNetRegularizer(kappa=self.kappa)(model.block.f, states, labels.repeat(self.points), head)
