"""What every gradient offers, and how those that evaluate the field again are cut off from the graph around them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from odelayers._driver import Diffusion, Driver
from odelayers._evaluator import Evaluator
from odelayers._field import Field, parameters
from odelayers._solution import GradientError
from odelayers._solvers.base import Path, Solver, leaf

__all__ = ["Gradient", "cut", "evaluators", "fields"]


class Gradient(ABC):
    """How to differentiate; it owns the solve. `evaluates_again` says whether backward calls the field once more."""

    evaluates_again: ClassVar[bool] = True

    @abstractmethod
    def accepts(self, solver: Solver) -> bool:
        """Whether this gradient can differentiate through the solver."""

    @abstractmethod
    def solve(self, solver: Solver, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver) -> Path:
        """Solve from ts[0] through ts; the path's states carry the gradient."""


def evaluators(f: Evaluator, driver: Driver) -> list[Evaluator]:
    """The evaluators of the fields of a solve: drift and, where it is one of its own, diffusion."""
    return [f, driver.g] if isinstance(driver, Diffusion) else [f]


def fields(f: Evaluator, driver: Driver) -> list[Field]:
    """The fields that a solve evaluates."""
    return [evaluator.field for evaluator in evaluators(f, driver)]


class Cut(NamedTuple):
    """A solve cut off from the graph around it.

    Context, a tensor end time, given noise and parameters that were made of others (`torch.func.functional_call`) are
    replaced by leaves of their own: where one is made from another, or from a parameter of the field, a gradient taken
    inside the solve would otherwise run through what made it, and autograd would run there once more outside.
    """

    driver: Driver
    originals: list[Tensor]
    leaves: list[Tensor]


def cut(f: Evaluator, driver: Driver) -> Cut:
    """Cut a solve off; `f` is changed in place. `originals` get the gradients found for `leaves`.

    The field finds the leaves among them that stand in for parameters inside `Setting.restored` alone.

    The first evaluation of the solve will raise GradientError if the field depends on a tensor that is none of these
    (captured by a closure): a gradient that evaluates the field again cannot see it and would be silently zero.
    """
    every = fields(f, driver)
    pairs: dict[int, tuple[Tensor, Tensor]] = {
        id(p): (p, p if p.is_leaf else leaf(p)) for field in every for p in parameters(field.f)
    }

    def swap(x: Tensor) -> Tensor:
        return pairs.setdefault(id(x), (x, leaf(x)))[1] if x.requires_grad else x

    f.field = f.field.with_context(tuple(map(swap, f.field.context)))
    driver = driver.with_tensors(swap)
    originals, leaves = map(list, zip(*pairs.values(), strict=True)) if pairs else ([], [])
    known = {_node(x) for x in leaves}
    for evaluator in evaluators(f, driver):
        evaluator.inspect = partial(_refuse_captured, known=known, name=evaluator.field.name)
    return Cut(driver, originals, leaves)


def _node(x: Tensor) -> torch.autograd.graph.Node:
    return torch.autograd.graph.get_gradient_edge(x).node


def _refuse_captured(
    value: Tensor, t: Tensor | float, state: Tensor, known: set[torch.autograd.graph.Node], name: str
) -> None:
    """Walk the graph of one evaluation: what is neither known nor upstream of its arguments was captured.

    That is a leaf, or something that was computed before the evaluation, be it from a parameter of the field. (When,
    nodes of the graph say by a count of their thread's, which on a GPU may be autograd's own: there it is not asked.)
    """
    todo, seen = [value.grad_fn] if value.grad_fn is not None else [], set(known)
    seen |= {_node(x) for x in (t, state) if isinstance(x, Tensor) and x.requires_grad}
    begun = _node(state)._sequence_nr() if state.requires_grad and state.device.type == "cpu" else 0
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        captured = getattr(node, "variable", None)
        if captured is not None or node._sequence_nr() < begun:
            what = f"the result of {node.name()} from before the solve"
            what = what if captured is None else f"a tensor of shape {tuple(captured.shape)}"
            raise GradientError(
                f"field {name}: its value depends on {what} that is neither a parameter of the field nor its context; "
                f"a gradient that evaluates the field again would lose it silently. Register it as a parameter, "
                f"compute it inside the field, pass it as context=, or use gradient=Backprop()"
            )
        todo.extend(nxt for nxt, _ in node.next_functions if nxt is not None)
