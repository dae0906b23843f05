"""The stages of a Runge-Kutta step and their linear combinations: one kernel each, forwards and backwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from odelayers._evaluator import dual, traced
from odelayers._solvers.tableau import Tableau

__all__ = ["Compiled", "Stages", "combined", "stages_like"]

FEW = 4  # stages; their sums are short, and most have one term
Row = tuple[float, ...]


def _vectors(rows: tuple[Row, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Rows of a tableau as vectors, made once; compilers and export make tensors of their own kind each time."""
    if traced() or (torch._C._len_torch_dispatch_stack() and detect_fake_mode()):
        return _new_vectors(rows, dtype, device)
    return _kept_vectors(rows, dtype, device)


def _new_vectors(rows: tuple[Row, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(row, dtype=dtype, device=device) for row in rows)


@lru_cache(maxsize=512)
def _kept_vectors(rows: tuple[Row, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):  # a later solve may save them for its backward pass
        return _new_vectors(rows, dtype, device)


class Stages(ABC):
    """The stages k_0, k_1, ... of one step from y at a time, each shaped like the state."""

    def __init__(self, tableau: Tableau) -> None:
        self.tableau = tableau

    @abstractmethod
    def begin(self, y: Tensor) -> None:
        """A new step from y; its stages come in order."""

    @abstractmethod
    def put(self, i: int, k: Tensor) -> None:
        """Add stage i."""

    @abstractmethod
    def get(self, i: int) -> Tensor:
        """Stage i, for use within this step."""

    @abstractmethod
    def advance(self, i: int, h: float) -> Tensor:
        """The state y + h sum_j a_ij k_j at which stage i is evaluated; for i = s, all stages, the step's result."""

    @abstractmethod
    def combine(self, row: Row, h: float) -> Tensor:
        """The state y plus h times the stages weighted by any row."""

    @abstractmethod
    def error(self, h: float) -> Tensor:
        """The embedded error, h times the stages weighted by the tableau's `error`; it carries no graph."""

    def keep(self, i: int) -> Tensor:
        """Stage i, for use after this step."""
        return self.get(i)


class Recorded(Stages):
    """Stages in a list, combined by plain operations: for methods of few stages, and for transforms and compilers."""

    def begin(self, y: Tensor) -> None:
        self._y = y
        self._stages: list[Tensor] = []

    def put(self, i: int, k: Tensor) -> None:
        self._stages.append(k)

    def get(self, i: int) -> Tensor:
        return self._stages[i]

    def advance(self, i: int, h: float) -> Tensor:
        return combined(self._y, self._stages, self.tableau.rows[i - 1], h)

    def combine(self, row: Row, h: float) -> Tensor:
        return combined(self._y, self._stages, row, h)

    @torch.no_grad()
    def error(self, h: float) -> Tensor:
        return combined(torch.zeros_like(self._y), self._stages, self.tableau.error, h)


def combined(y: Tensor, stages: list[Tensor], row: Row, h: float) -> Tensor:
    """The state y plus h times the stages that carry weight."""
    used = [i for i, weight in enumerate(row) if weight]
    if len(used) == 1:
        return torch.add(y, stages[used[0]], alpha=h * row[used[0]])
    (weights,) = _vectors((tuple(row[i] for i in used),), y.dtype, y.device)
    stack = torch.stack([stages[i] for i in used]).reshape(len(used), -1)
    return torch.addmv(y.reshape(-1), stack.T, weights, alpha=h).view(y.shape)


class Compiled(Recorded):
    """The stages of a step that a compiled program has taken."""

    def __init__(self, tableau: Tableau, y: Tensor, stages: list[Tensor]) -> None:
        super().__init__(tableau)
        self._y, self._stages = y, stages


class Buffered(Stages):
    """Stages in one buffer, written again at every step: for solves that record nothing."""

    def __init__(self, tableau: Tableau, like: Tensor) -> None:
        super().__init__(tableau)
        self.weights = _vectors(tableau.rows, like.dtype, like.device)
        self.columns = _vectors(tableau.columns, like.dtype, like.device)
        buffer = like.new_empty(len(tableau.c), like.numel())
        self._rows = [row.view(like.shape) for row in buffer.unbind(0)]
        self._first = [buffer[:i].T for i in range(len(tableau.c) + 1)]
        self._zero = like.new_zeros(like.numel())
        self._shape = like.shape
        (self._error,) = _vectors((tableau.error,), like.dtype, like.device)

    def begin(self, y: Tensor) -> None:
        self._y = y.reshape(-1)

    def put(self, i: int, k: Tensor) -> None:
        self._rows[i].copy_(k)

    def get(self, i: int) -> Tensor:
        return self._rows[i]

    def keep(self, i: int) -> Tensor:
        return self._rows[i].clone()

    def advance(self, i: int, h: float) -> Tensor:
        return torch.addmv(self._y, self._first[i], self.weights[i - 1], alpha=h).view(self._shape)

    def combine(self, row: Row, h: float) -> Tensor:
        weights = self._y.new_tensor(row)
        return torch.addmv(self._y, self._first[len(row)], weights, alpha=h).view(self._shape)

    def error(self, h: float) -> Tensor:
        return torch.addmv(self._zero, self._first[-1], self._error, alpha=h).view(self._shape)


class Chained(Buffered):
    """Stages under autograd: the combinations are nodes of the graph with the step's adjoint written out by hand.

    The states of a step are chained, each node leading to the one before it, so that on the way back a stage has all
    its pulls together when its own state's node runs: one product gives its gradient, where a node for each pair of a
    stage and a later state would take some twenty.
    """

    def begin(self, y: Tensor) -> None:
        super().begin(y.detach())
        self._states, self._stages = [y], list[Tensor]()
        self.pulls = _Pulls(self)

    def put(self, i: int, k: Tensor) -> None:
        self._rows[i].copy_(k.detach())
        self._stages.append(k)

    def keep(self, i: int) -> Tensor:
        return self._stages[i]

    def advance(self, i: int, h: float) -> Tensor:
        z: Tensor = _Advance.apply(self, i, h, self._states[-1], self._stages[i - 1])  # type: ignore[no-untyped-call]
        self._states.append(z)
        return z

    def value(self, i: int, h: float) -> Tensor:
        """The state at stage i without its graph."""
        return super().advance(i, h)

    def combine(self, row: Row, h: float) -> Tensor:
        return combined(self._states[0], self._stages, row, h)

    @torch.no_grad()
    def error(self, h: float) -> Tensor:
        return super().error(h)


class _Pulls:
    """What the states of one step have received in the backward pass that is running."""

    def __init__(self, stages: Buffered) -> None:
        self.columns = stages.columns
        self.received: list[Tensor | None] = [None] * len(stages.columns)
        self.running = -1

    def receive(self, i: int, gradient: Tensor | None) -> None:
        """Note what state i receives, None included; what an earlier pass has left is forgotten."""
        running = torch._C._current_graph_task_id()
        if running != self.running:
            self.running, self.received = running, [None] * len(self.columns)
        self.received[i - 1] = gradient

    def of_stage(self, i: int, h: float) -> Tensor | None:
        """The gradient of stage i: h times what the states after it received, weighted by its column of the tableau."""
        pulls, weights = self.received[i:], self.columns[i]
        found = [p for p in pulls if p is not None]
        if len(found) < len(pulls):  # some states do not reach the loss
            weights = weights[[j for j, p in enumerate(pulls) if p is not None]]
        if not found:
            return None
        stack = torch.stack(found).reshape(len(found), -1)
        return torch.addmv(stack[0], stack.T, weights, beta=0.0, alpha=h).view(found[0].shape)

    def of_start(self) -> Tensor | None:
        """The gradient of y: what all states received."""
        found = [p for p in self.received if p is not None]
        return torch.stack(found).sum(0) if found else None


class _Advance(torch.autograd.Function):
    """One state of a step. The state before it is an input too, so that its node runs after this one."""

    @staticmethod
    def forward(ctx: Any, stages: Chained, i: int, h: float, before: Tensor, k: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.pulls, ctx.i, ctx.h = stages.pulls, i, h
        return stages.value(i, h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        pulls, i = ctx.pulls, ctx.i
        pulls.receive(i, gradient)
        needed = ctx.needs_input_grad
        start = pulls.of_start() if i == 1 and needed[3] else None
        stage = pulls.of_stage(i - 1, ctx.h) if needed[4] else None
        if i == 1 or not needed[3]:  # the pass leaves the step: what is kept would keep its graph, and be kept by it
            pulls.received = [None] * len(pulls.columns)
        return None, None, None, start, stage


def stages_like(tableau: Tableau, z: Tensor) -> Stages:
    """Buffers, chained under autograd; a list for methods of few stages and where transforms or compilers look."""
    if len(tableau.c) <= FEW or traced() or dual():
        return Recorded(tableau)
    return Chained(tableau, z) if torch.is_grad_enabled() else Buffered(tableau, z)
