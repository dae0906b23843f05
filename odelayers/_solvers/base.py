"""What every solver offers: a march over steps that can be taken again."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from odelayers._driver import Driver, Time
from odelayers._evaluator import Evaluator
from odelayers._field import as_rows
from odelayers._solution import SolveError, Status

__all__ = [
    "Invertible",
    "MarchingSolver",
    "Norm",
    "Part",
    "Path",
    "Solver",
    "Step",
    "Taken",
    "Trace",
    "all_finite",
    "fail",
    "leaf",
    "nonfinite_rows",
    "row_rms",
]

State = tuple[Tensor, ...]
Norm = Callable[[Tensor], Tensor]


def row_rms(error: Tensor) -> Tensor:
    """The root mean square of a scaled error `(B, ...)` over each row, `(B,)`; the worst row decides the step."""
    rows = as_rows(error)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms / math.sqrt(max(rows.shape[1], 1))


class Step(NamedTuple):
    """One step: its number, start, length, and the fractions of it at which an output lies (1.0 is its end)."""

    number: int
    t: float
    h: float
    outputs: tuple[float, ...] = ()


class Taken(NamedTuple):
    """A step taken: what `again` needs of it, the states before and after, its outputs, and the tries before it.

    `proposed` is the length that step size control asks of the next one.
    """

    step: Any
    before: State
    after: State
    outputs: list[Tensor]
    rejected: int
    proposed: float | None = None


@dataclass(frozen=True)
class Path:
    """States at the output times, `(T, B, ...)`, with the counts of steps; those of each row where they differ."""

    zs: Tensor
    accepted: int
    rejected: int
    steps: Tensor | None = None


class Trace:
    """What a march leaves behind: its outputs and how many steps it took."""

    def __init__(self, z0: Tensor) -> None:
        self.zs, self.accepted, self.rejected = [z0], 0, 0

    def add(self, taken: Taken) -> None:
        """One more step."""
        self.zs.extend(taken.outputs)
        self.accepted, self.rejected = self.accepted + 1, self.rejected + taken.rejected

    def path(self) -> Path:
        """The path when the march has ended."""
        return Path(torch.stack(self.zs), self.accepted, self.rejected)


class Solver(ABC):
    """How to step. Knows nothing of gradients.

    `calculus` names the readings of an SDE that the solver converges to (empty: it solves ODEs only), `noises` the
    kinds of noise for which it does.
    """

    calculus: ClassVar[tuple[str, ...]] = ()
    noises: ClassVar[tuple[str, ...]] = ("diagonal", "scalar")

    @abstractmethod
    def integrate(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm = row_rms) -> Path:
        """Solve from ts[0] through the strictly monotone times ts; differentiable by plain autograd."""

    def noise_steps(self, ts: Sequence[float]) -> int:
        """How many seeds or increments of noise a solve over ts needs."""
        return 0


class MarchingSolver(Solver):
    """A solver of ours, of a known `order`: a march of steps, each of which can be taken again."""

    order: ClassVar[float]

    @abstractmethod
    def start(self, f: Evaluator, t0: float, z0: Tensor, driver: Driver) -> State:
        """The state to begin with: z and whatever the solver carries from step to step."""

    def rate(self, f: Evaluator, t: float, state: State, driver: Driver) -> Tensor:
        """The field at a state of the march: evaluated, unless the solver carries it along."""
        return driver.terms(f, t, state[0])[0]

    @abstractmethod
    def march(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm) -> Iterator[Taken]:
        """Take the steps from ts[0] to ts[-1]."""

    @abstractmethod
    def again(self, f: Evaluator, step: Any, before: State, driver: Driver) -> tuple[State, list[Tensor]]:
        """Take a step of the march once more from the state before it: the state after it and its outputs."""

    @property
    def marching(self) -> MarchingSolver:
        """The solver whose march this is: its own."""
        return self

    def trace(self, z0: Tensor) -> Trace:
        """What a march from z0 is written into."""
        return Trace(z0)

    def spread(self, gradient: Tensor, steps: Sequence[Any]) -> list[list[Tensor]]:
        """The parts of a gradient of a path's states that arrive at the outputs of each step."""
        after = iter(gradient[1:])
        return [[next(after) for _ in step.outputs] for step in steps]

    def integrate(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm = row_rms) -> Path:
        trace = self.trace(z0)
        for taken in self.march(f, z0, ts, driver, norm):
            trace.add(taken)
        return trace.path()


def leaf(x: Tensor) -> Tensor:
    """The same values as the leaf of a new graph."""
    return x.detach().requires_grad_()


class Part(NamedTuple):
    """A part of a march undone: the two solutions before it, as leaves, what it makes of them, the output it passes.

    `parted` is by how much the step that begins with this part has drawn coupled solutions apart. Of a `shared` graph
    the next part uses a piece too.
    """

    before: State
    after: State
    output: Tensor | None = None
    parted: Tensor | None = None
    shared: bool = False


class Invertible(Protocol):
    """A march whose steps can be undone.

    Its state begins with two solutions of one equation, which start as one and the first of which comes out; a step has
    an output at its end or none.
    """

    def march(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm) -> Iterator[Taken]: ...
    def undo(self, f: Evaluator, steps: Sequence[Step], end: State, driver: Driver) -> Iterator[Part]:
        """The parts of a march of these steps to this end, the last first; under no_grad."""


def fail(
    solver: object, f: Evaluator, rows: Tensor, s: Time, driver: Driver, status: Status, note: str = ""
) -> SolveError:
    """The error for the rows flagged in `rows` (B,), which failed at the solver's time s, or each at its own."""
    index = rows.nonzero().flatten()
    t = torch.as_tensor(driver.time(s)).detach().to(torch.float64).reshape(-1)
    times = t.expand(rows.shape[0]) if t.numel() == 1 else t
    return SolveError(
        f"{f.field.name} solved by {solver!r}",
        tuple(index.tolist()),
        tuple(times[index.to(times.device)].tolist()),
        status,
        note,
    )


def all_finite(z: Tensor) -> bool:
    """Whether no entry is NaN or inf, by one read: each spoils the sum, and only a sum that overflows asks for more."""
    return math.isfinite(z.sum().item()) or bool(z.isfinite().all())


def nonfinite_rows(z: Tensor) -> Tensor:
    """Which rows hold a NaN or inf, `(B,)`."""
    return ~as_rows(z).isfinite().all(dim=1)
