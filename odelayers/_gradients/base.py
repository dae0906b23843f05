"""What every gradient offers, and what those that evaluate the field again must remember of the first time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from odelayers._driver import Diffusion, Driver
from odelayers._evaluator import Evaluator, readable
from odelayers._field import Field, modules, parameters, tensors
from odelayers._solution import GradientError
from odelayers._solvers.base import Path, Solver

__all__ = ["Gradient", "Setting", "check_cotangent", "cut", "evaluators"]


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

    Context, a tensor end time and given noise are replaced by leaves of their own: where one is made from another, or
    from a parameter of the field, a gradient taken inside the solve would otherwise run through what made it, and
    autograd would run there once more outside.
    """

    driver: Driver
    originals: list[Tensor]
    leaves: list[Tensor]


def cut(f: Evaluator, driver: Driver) -> Cut:
    """Cut a solve off; `f` is changed in place. `originals` get the gradients found for `leaves`.

    The first evaluation of the solve will raise GradientError if the field depends on a tensor that is none of these
    (captured by a closure): a gradient that evaluates the field again cannot see it and would be silently zero.
    """
    originals: list[Tensor] = list({id(p): p for field in fields(f, driver) for p in parameters(field.f)}.values())
    leaves, copies = list(originals), dict[int, Tensor]()

    def leaf(x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        if id(x) not in copies:
            copies[id(x)] = x.detach().requires_grad_()
            originals.append(x)
            leaves.append(copies[id(x)])
        return copies[id(x)]

    f.field = f.field.with_context(tuple(map(leaf, f.field.context)))
    driver = driver.with_tensors(leaf)
    known = {_node(x) for x in leaves}
    for evaluator in evaluators(f, driver):
        evaluator.inspect = partial(_refuse_captured, known=known, name=evaluator.field.name)
    return Cut(driver, originals, leaves)


def _node(x: Tensor) -> torch.autograd.graph.Node:
    return torch.autograd.graph.get_gradient_edge(x).node


def _refuse_captured(value: Tensor, state: Tensor, known: set[torch.autograd.graph.Node], name: str) -> None:
    """Walk the graph of one evaluation; a leaf that is neither known nor upstream of the state was captured."""
    todo, seen = [value.grad_fn] if value.grad_fn is not None else [], set(known)
    if state.requires_grad:
        seen.add(_node(state))
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            raise GradientError(
                f"field {name}: its value depends on a tensor of shape {tuple(leaf.shape)} that is neither a parameter "
                f"of the field nor its context; a gradient that evaluates the field again would lose it silently. "
                f"Register it as a parameter, pass it as context=, or use gradient=Backprop()"
            )
        todo.extend(nxt for nxt, _ in node.next_functions if nxt is not None)


class Setting:
    """What the forward solve read and ran under: the backward pass must find the same.

    Training modes and autocast are restored; tensors that have changed in place since are refused.
    """

    def __init__(self, f: Evaluator, driver: Driver, device: torch.device) -> None:
        read = [x for field in fields(f, driver) for x in (*tensors(field.f), *field.context)]
        read += [driver.noise.given] if driver.noise is not None and driver.noise.given is not None else []
        self.versions = [(x, x._version) for x in read if not x.is_inference()]
        self.modes = [(m, m.training) for field in fields(f, driver) for m in modules(field.f)]
        self.device = device.type
        self.autocast = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)

    def check_still(self) -> None:
        """Refuse a field that changed its own buffers while it was solved for: evaluated again it would be another."""
        if any(x._version != version for x, version in self.versions):
            raise GradientError(
                "the field's parameters or buffers moved while it was evaluated (spectral_norm in training mode, a "
                "running statistic): a gradient that evaluates the field again would see another field. Call "
                "field.eval(), or use gradient=Backprop()"
            )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run as in the forward solve."""
        for x, version in self.versions:
            if x._version != version:
                raise GradientError(
                    f"backward pass: a tensor of shape {tuple(x.shape)} that the field reads was modified by an "
                    f"inplace operation since the forward solve, and the field must be evaluated again: call "
                    f"backward() first, or change a copy"
                )
        now = [(m, m.training) for m, _ in self.modes]
        enabled, dtype = self.autocast
        try:
            for m, training in self.modes:
                m.training = training
            with torch.autocast(self.device, enabled=enabled, dtype=dtype):
                yield
        finally:
            for m, training in now:
                m.training = training


def check_cotangent(gradient: Tensor) -> None:
    """Refuse a second derivative, and a NaN that comes from the loss before it is mistaken for a failed solve."""
    if torch.is_grad_enabled():  # in a backward pass: create_graph=True
        raise GradientError(
            "backward pass: a gradient that evaluates the field again cannot be differentiated twice "
            "(create_graph=True); use gradient=Backprop()"
        )
    if readable(gradient) and not bool(gradient.isfinite().all()):
        raise GradientError(
            "backward pass: the gradient that reaches the solution is NaN or inf already: it comes from the loss or "
            "the layers after the block, not from the solve; look there first (torch.autograd.detect_anomaly)"
        )
