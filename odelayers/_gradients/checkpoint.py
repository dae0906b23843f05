"""Checkpointing: keep some of the states on the way, take the steps again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from odelayers._checks import positive_int
from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._gradients.again import Gradients, Replay
from odelayers._gradients.base import Gradient
from odelayers._solvers.base import MarchingSolver, Path, Solver, State, leaf, row_rms

__all__ = ["Checkpoint"]

KEEP = 16  # states kept before any is dropped


@dataclass(frozen=True)
class Checkpoint(Gradient):
    """Backpropagate through the steps taken, keeping some of the states and evaluating the rest again.

    The memory saver that is always right: the gradient is that of `Backprop` up to rounding. Up to 16 steps one state a
    step is kept, for about one forward solve more; beyond that about sqrt(n) of n, for two. Noise is drawn again from
    its seed. The gradient cannot be differentiated twice.

    Args:
        segments: how many states are kept at most, evenly spaced, at least half as many on more steps than that; None
            for about sqrt(n). The steps between two of them are held together in the backward pass: fewer than
            sqrt(n) save no memory, n or more spare the second forward solve.

    Raises:
        TypeError, ValueError: if segments is neither None nor an int >= 1.
        GradientError: from the solve, if the field depends on a tensor captured by a closure; from the backward pass,
            if the incoming gradient is NaN or inf.

    Source: Griewank and Walther, Evaluating Derivatives, chapter 12.

    Example:
        >>> Checkpoint()
        Checkpoint(segments=None)
    """

    segments: int | None = None

    def __post_init__(self) -> None:
        if self.segments is not None:
            positive_int(self.segments, "Checkpoint: segments")

    def accepts(self, solver: Solver) -> bool:
        return isinstance(solver, MarchingSolver)

    def solve(self, solver: Solver, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver) -> Path:
        if not isinstance(solver, MarchingSolver):
            raise TypeError(f"Checkpoint: expected a solver of odelayers, got {solver!r}")
        if not torch.is_grad_enabled():
            return solver.integrate(f, z0, ts, driver)
        return _Checkpointed(self.segments, solver.marching, f, ts, driver).path(z0)


class _Checkpointed(Replay):
    """A solve with some of the states on its way."""

    solver: MarchingSolver

    def __init__(
        self, segments: int | None, solver: MarchingSolver, f: Evaluator, ts: Sequence[float], driver: Driver
    ) -> None:
        super().__init__(f, ts, driver)
        self.segments, self.solver = segments, solver
        self.kept: dict[int, State] = {}

    def forward(self, z0: Tensor) -> Tensor:
        """The states at ts, with the steps recorded and every stride-th state before them.

        How many steps there will be is not known: where more than `segments` or, by default, than KEEP and 2 stride
        states are kept, every second is dropped, so that n steps keep between sqrt(n / 2) and sqrt(2 n) of them.
        """
        trace, stride = self.solver.trace(z0), 1
        for i, taken in enumerate(self.solver.march(self.f, z0, self.ts, self.driver, row_rms)):
            self.steps.append(taken.step)
            if i % stride == 0:
                self.kept[i] = taken.before
            if len(self.kept) > (self.segments or max(KEEP, 2 * stride)):
                stride *= 2
                self.kept = {j: state for j, state in self.kept.items() if j % stride == 0}
            trace.add(taken)
        path = trace.path()
        self.accepted, self.rejected, self.row_steps = path.accepted, path.rejected, path.steps
        return path.zs

    def release(self) -> list[Tensor]:
        states = [x for state in self.kept.values() for x in state]
        self.kept = dict.fromkeys(self.kept, ())
        return states

    def hold(self, states: list[Tensor]) -> None:
        width, rest = len(states) // max(1, len(self.kept)), iter(states)
        self.kept = {i: tuple(islice(rest, width)) for i in self.kept}

    def through_steps(self, z0: Tensor, gradient: Tensor, total: Gradients) -> Tensor | None:
        after_grads: Gradients = []
        at_outputs = self.solver.spread(gradient, self.steps)
        for step, before in self._backwards():
            leaves = tuple(map(leaf, before))
            with torch.enable_grad():
                after, outputs = self.solver.again(self.f, step, leaves, self.driver)
            arriving = [*(after_grads or [None] * len(after)), *at_outputs.pop()]
            after_grads = self.pull_back([*after, *outputs], arriving, leaves, total)
        first = leaf(z0)
        with torch.enable_grad():
            start = self.solver.start(self.f, self.ts[0], first, self.driver)
        return self.pull_back(start, after_grads, (first,), total)[0]

    def _backwards(self) -> Iterator[tuple[Any, State]]:
        """The steps with the states before them, last first; the states of a segment are found again from its first."""
        end = len(self.steps)
        for start in reversed(self.kept):
            states = [self.kept[start]]
            for step in self.steps[start : end - 1]:
                states.append(self.solver.again(self.f, step, states[-1], self.driver)[0])
            yield from zip(reversed(self.steps[start:end]), reversed(states), strict=True)
            end = start
