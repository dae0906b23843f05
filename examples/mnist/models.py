"""The models of the study: the same features and fixed head around different blocks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from odelayers import (
    AugmentedODEBlock,
    Backprop,
    Dopri5,
    DropoutSDEBlock,
    EulerMaruyama,
    ODEBlock,
    Reversible,
    ReversibleHeun,
    SineField,
    SkewSymmetric,
    Solution,
    StratonovichHeun,
    orthogonal_head,
    simplex_head,
)
from odelayers.heads import Head

from .features import DIM, EXTRACTORS, Features

__all__ = ["CLASSES", "IDENTITY", "Block", "Classifier", "Features", "RandomTimeODEBlock"]

CLASSES = 10
IDENTITY = "identity"


class Staircase(nn.Module):
    """Round the state to multiples of `step`: a made-up defence whose gradient is zero everywhere."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, z: Tensor) -> Tensor:
        """Round (B, 64)."""
        return torch.round(z / self.step) * self.step


class RandomTimeODEBlock(ODEBlock):
    """An `ODEBlock` that ends at the random time t1 + sigma W_T, T = t1 - t0 and sigma = sqrt(layer_time p / (1 - p)).

    That is dropout's noise shared by all coordinates, in Stratonovich's reading: dz = f o (dt + sigma dW). In training
    one end time serves the batch; in evaluation, with `noise_in_eval`, each row draws its own.
    """

    def __init__(
        self, f: nn.Module, p: float, *, layer_time: float = 1.0, noise_in_eval: bool = True, **options: Any
    ) -> None:
        super().__init__(f, **options)
        self.sigma = math.sqrt(layer_time * p / (1 - p))
        self.noise_in_eval = noise_in_eval

    def solve(self, z: Tensor, ts: Any = None, *, t1: Any = None, generator: Any = None, **options: Any) -> Solution:
        """As `ODEBlock.solve`, with the end time drawn where neither `ts` nor `t1` gives one."""
        if ts is None and t1 is None and self.sigma and (self.training or self.noise_in_eval):
            draws = torch.randn(() if self.training else len(z), generator=generator, device=z.device, dtype=z.dtype)
            t1 = self.t1 + self.sigma * math.sqrt(self.t1 - self.t0) * draws
        return super().solve(z, ts, t1=t1, generator=generator, **options)


# How an SDE is read and stepped. The paper's pair is the last: see `ReversibleHeun` on where it does not hold.
METHODS: dict[str, tuple[str, Callable[[int], Any], Any]] = {
    "euler_maruyama": ("ito", EulerMaruyama, Backprop()),
    "heun": ("stratonovich", StratonovichHeun, Backprop()),
    "reversible_heun": ("stratonovich", ReversibleHeun, Reversible()),
}
FIELDS: dict[str, Callable[[int], nn.Module]] = {
    "sine": SineField,
    "skew": lambda dim: SkewSymmetric(dim, damping=0.1),
}
SOLVED = ("ode", "sde", "random_time")


@dataclass(frozen=True)
class Block:
    """What stands between features and head, as data.

    `kind` is "none", "ode" (adaptive, on `extra` more coordinates), "sde" (dropout noise with drop probability `p`, in
    fixed steps by `method`), "random_time" (the same noise on the end time alone) or "staircase". `noise_at_test` says
    whether noise stays on in evaluation.
    """

    kind: str
    t1: float = 10.0
    tolerance: float = 1e-5
    steps: int = 20
    p: float = 0.0
    staircase: float = 0.1
    field: str = "sine"
    extra: int = 0
    method: str = "euler_maruyama"
    layer_time: float = 1.0
    noise_at_test: bool = True

    def __post_init__(self) -> None:
        for name, table in (("kind", BUILDERS), ("field", FIELDS), ("method", METHODS)):
            _one_of(f"Block.{name}", getattr(self, name), table)

    def build(self) -> nn.Module:
        """The block itself, with fresh weights."""
        return BUILDERS[self.kind](self)

    @property
    def noisy(self) -> bool:
        """Whether two evaluations differ."""
        return self.kind in ("sde", "random_time") and self.p > 0 and self.noise_at_test

    @property
    def has_adjoint(self) -> bool:
        """Whether its solver is one that the adjoint goes back with."""
        return self.kind in ("ode", "random_time")


def _ode(spec: Block) -> nn.Module:
    f, solver = FIELDS[spec.field](DIM + spec.extra), Dopri5(rtol=spec.tolerance, atol=spec.tolerance)
    if spec.extra:
        return AugmentedODEBlock(f, spec.extra, keep=False, t1=spec.t1, solver=solver)
    return ODEBlock(f, t1=spec.t1, solver=solver)


def _sde(spec: Block) -> nn.Module:
    calculus, solver, gradient = METHODS[spec.method]
    return DropoutSDEBlock(
        FIELDS[spec.field](DIM), spec.p, t1=spec.t1, solver=solver(spec.steps), calculus=calculus, gradient=gradient,
        layer_time=spec.layer_time, noise_in_eval=spec.noise_at_test,
    )  # fmt: skip


def _random_time(spec: Block) -> nn.Module:
    return RandomTimeODEBlock(
        FIELDS[spec.field](DIM), spec.p, t1=spec.t1, solver=Dopri5(rtol=spec.tolerance, atol=spec.tolerance),
        layer_time=spec.layer_time, noise_in_eval=spec.noise_at_test,
    )  # fmt: skip


BUILDERS: dict[str, Callable[[Block], nn.Module]] = {
    "none": lambda spec: nn.Identity(),
    "ode": _ode,
    "sde": _sde,
    "random_time": _random_time,
    "staircase": lambda spec: Staircase(spec.staircase),
}
HEADS: dict[str, Callable[[], nn.Module]] = {
    "simplex": lambda: simplex_head(CLASSES, DIM),  # fixed, as the next two: no optimiser moves them
    "orthogonal": lambda: orthogonal_head(CLASSES, DIM),
    "random": lambda: Head(normalize(torch.randn(CLASSES, DIM), dim=1)),
    "linear": lambda: nn.Linear(DIM, CLASSES),
}


def _one_of(where: str, value: str, table: Iterable[str]) -> None:
    if value not in table:
        raise ValueError(f"{where}: expected one of {', '.join(map(repr, table))}, got {value!r}")


class Classifier(nn.Module):
    """head(block(features(x))): the extractor `net` of these widths, the block, and a head, "simplex" or "linear".

    Raises:
        ValueError: `net` or `head` is unknown.
    """

    def __init__(self, widths: tuple[int, int, int], block: Block, head: str = "simplex", net: str = "resnet") -> None:
        super().__init__()
        _one_of("Classifier: head", head, HEADS)
        _one_of("Classifier: net", net, EXTRACTORS)
        self.spec = block
        self.features = EXTRACTORS[net](widths)
        self.block = block.build()
        self.head = HEADS[head]()

    @property
    def noisy(self) -> bool:
        """Whether two calls differ."""
        return self.spec.noisy

    @property
    def routes(self) -> tuple[str | float, ...]:
        """The ways around the block's own gradient: the identity, and for a solver a tenth of the end time."""
        if self.spec.kind not in SOLVED:
            return () if self.spec.kind == "none" else (IDENTITY,)
        return (IDENTITY, self.spec.t1 / 10)

    def end(self, z: Tensor, generator: torch.Generator | None = None, t1: float | None = None) -> Tensor:
        """The block's end state (B, 64) from `z`; noise comes from `generator`, and `t1` replaces the end time."""
        if self.spec.kind in SOLVED:
            return self.block.solve(z, t1=t1, generator=generator).final
        return self.block(z)

    def finer(self) -> Classifier:
        """The same model, weights shared, solved in half the steps' length: twice as many, or 1/32 of the tolerance."""
        fine, solver = copy.copy(self), self.block.solver
        fine._modules = {**self._modules, "block": copy.copy(self.block)}
        if hasattr(solver, "steps"):
            fine.block.solver = replace(solver, steps=2 * solver.steps)
        else:  # of order 5: the error of a step of half the length is 1/32
            fine.block.solver = replace(solver, rtol=solver.rtol / 32, atol=solver.atol / 32)
        return fine

    def entering(self, z: Tensor) -> Tensor:
        """The states that the block's field sees at the start: `z`, padded where the block is augmented."""
        return pad(z, (0, self.spec.extra))

    def start_from(self, state: Mapping[str, Tensor], same_head: bool = True) -> None:
        """Take a trained model's weights as far as they are this one's: features always, the block where it fits.

        A block that the other lacks, or that has another shape, stays fresh. So does the head, unless it is of the
        `same_head` kind: all kinds have the same shape.

        Raises:
            RuntimeError: the features do not fit.
        """

        def shapes(state: Mapping[str, Tensor], part: str) -> dict[str, torch.Size]:
            return {name: tensor.shape for name, tensor in state.items() if name.startswith(part)}

        own = self.state_dict()
        for part in ("block.", "head."):
            fits = shapes(own, part) == shapes(state, part)
            if not fits or (part == "head." and not same_head):
                state = {name: tensor for name, tensor in state.items() if not name.startswith(part)}
        missing, unexpected = self.load_state_dict(dict(state), strict=False)
        strange = [name for name in (*missing, *unexpected) if not name.startswith(("block.", "head."))]
        if strange:
            raise RuntimeError(f"Classifier.start_from: the features do not fit: {', '.join(strange)}")

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits (B, 10) of images (B, 1, 28, 28)."""
        return self.head(self.end(self.features(x), generator))
