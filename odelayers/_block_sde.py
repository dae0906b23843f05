"""What the two SDE blocks share: how the noise is read, drawn and given."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from odelayers import _checks
from odelayers._block import Block, FieldFunction
from odelayers._driver import Brownian
from odelayers._solvers import EulerMaruyama, FixedGrid, Solver, StratonovichHeun
from odelayers._times import Times

__all__ = ["NoisyBlock"]

CALCULI = ("ito", "stratonovich")
NOISES = ("diagonal", "scalar")


class NoisyBlock(Block):
    """What the two SDE blocks share: how the noise is read, drawn and given."""

    _accumulates = False

    def __init__(self, f: FieldFunction, *, solver: Solver | None, calculus: str, noise: str, **options: Any) -> None:
        where = type(self).__name__
        calculus = _checks.one_of(calculus, f"{where}: calculus", CALCULI)
        kind = _checks.one_of(noise, f"{where}: noise", NOISES)
        if solver is None:
            solver = EulerMaruyama(steps=20) if calculus == "ito" else StratonovichHeun(steps=20)
        if not isinstance(solver, Solver):
            raise TypeError(f"{where}: solver: expected a solver such as EulerMaruyama(steps=20), got {solver!r}")
        _check_solver(solver, calculus, kind, where)
        super().__init__(f, solver=solver, **options)
        self.calculus, self.noise = calculus, kind

    def extra_repr(self) -> str:
        """The record of the block in its repr."""
        return f"{super().extra_repr()}, calculus={self.calculus!r}, noise={self.noise!r}"

    def _brownian(self, times: Times, z0: Tensor, generator: torch.Generator | None, given: Tensor | None) -> Brownian:
        """The noise source of one solve, from given increments or from seeds drawn now."""
        if times.solver[-1] < times.solver[0] or _runs_backwards(times.clock.rate):
            raise ValueError(f"{self._where}: an SDE runs forwards in time; expected an end time after the start")
        shape = tuple(z0.shape) if self.noise == "diagonal" else (len(z0), *[1] * (z0.ndim - 1))
        n = self.solver.noise_steps(times.solver)
        source = Brownian(self.noise, shape, z0.dtype, z0.device)
        if given is None:
            device = "cpu" if generator is None else generator.device
            seeds = torch.randint(2**63 - 1, (n,), generator=generator, device=device)
            return replace(source, seeds=tuple(seeds.tolist()))
        if not isinstance(given, Tensor):
            raise TypeError(f"{self._where}: noise: expected a Tensor of increments, got {type(given).__name__}")
        if not isinstance(self.solver, FixedGrid):
            raise ValueError(
                f"{self._where}: noise: {self.solver!r} draws its own path; give increments to an own solver"
            )
        if given.is_complex():
            raise TypeError(f"{self._where}: noise: expected real increments, got {given.dtype}")
        if tuple(given.shape) == (n, len(z0)) and math.prod(shape[1:]) == 1:
            given = given.reshape(n, *shape)
        if tuple(given.shape) != (n, *shape):
            raise ValueError(
                f"{self._where}: noise: expected increments of shape {(n, *shape)} ({n} steps, {self.noise} noise), "
                f"got {tuple(given.shape)}"
            )
        if not bool(given.isfinite().all()):
            raise ValueError(f"{self._where}: noise: expected finite increments, got NaN or inf")
        return replace(source, given=given.to(device=z0.device, dtype=z0.dtype))


def _runs_backwards(rate: Tensor | None) -> bool:
    return rate is not None and bool((rate < 0).any())


def _check_solver(solver: Solver, calculus: str, noise: str, where: str) -> None:
    """Refuse a solver that converges to another equation than the one written down."""
    remedy = {
        "ito": "EulerMaruyama(steps), Milstein(steps) for scalar noise, or TorchSDE('euler')",
        "stratonovich": "StratonovichHeun(steps), ReversibleHeun(steps), Milstein(steps) for scalar noise, "
        "or TorchSDE('heun')",
    }[calculus]
    if not solver.calculus:
        raise ValueError(f"{where}: {solver!r} solves ODEs only; for calculus={calculus!r} use {remedy}")
    if calculus not in solver.calculus:
        raise ValueError(
            f"{where}: {solver!r} converges to the {' or '.join(solver.calculus)} solution, but calculus={calculus!r} "
            f"asks for the other reading (nothing is converted); use {remedy}"
        )
    if noise not in solver.noises:
        raise ValueError(
            f"{where}: {solver!r} is right for {' or '.join(solver.noises)} noise only, got noise={noise!r}: with a "
            f"field that mixes coordinates it would be silently wrong; use {remedy}"
        )
