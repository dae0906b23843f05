"""Solvers for SDEs on a fixed grid; without noise each falls back to the ODE method it is built on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from odelayers._driver import Driver, NoisyClock
from odelayers._evaluator import Evaluator
from odelayers._solvers.base import State, Step, Undo, leaf
from odelayers._solvers.fixed import FixedGrid

__all__ = ["EulerMaruyama", "Milstein", "ReversibleHeun", "StratonovichHeun"]


@dataclass(frozen=True)
class EulerMaruyama(FixedGrid):
    """Euler-Maruyama: converges to the Ito solution with strong order 1/2, one evaluation a step.

    Args:
        steps: number of equal steps over the time of the solve.

    Raises:
        TypeError, ValueError: if steps is not an int >= 1.

    Source: Kloeden and Platen, Numerical Solution of SDEs, 10.2.

    Example:
        >>> EulerMaruyama(steps=20)
        EulerMaruyama(steps=20)
    """

    order, calculus = 0.5, ("ito",)

    def step(self, f: Evaluator, s: Step, before: State, driver: Driver) -> State:
        z = before[0]
        return (driver.advance(z, driver.terms(f, s.t, z), s.h, driver.increment(s.number, s.h)),)


@dataclass(frozen=True)
class Milstein(FixedGrid):
    """Milstein's method for scalar noise, in either reading: strong order 1.

    One Wiener process drives every coordinate of a row, so the correction is the directional derivative of g along g,
    one forward-mode product; for independent noise it would be wrong, and `SDEBlock` refuses the pair.

    Args:
        steps: number of equal steps over the time of the solve.

    Raises:
        TypeError, ValueError: if steps is not an int >= 1.

    Source: Kloeden and Platen, Numerical Solution of SDEs, 10.3.

    Example:
        >>> Milstein(steps=20).order
        1.0
    """

    order, calculus, noises = 1.0, ("ito", "stratonovich"), ("scalar",)

    def step(self, f: Evaluator, s: Step, before: State, driver: Driver) -> State:
        z, dw = before[0], driver.increment(s.number, s.h)
        terms = driver.terms(f, s.t, z)
        after = driver.advance(z, terms, s.h, dw)
        if dw is None:
            return (after,)
        # The diffusion is the last term, or a multiple of the only one.
        g = driver.sigma * terms[0] if isinstance(driver, NoisyClock) else terms[-1]
        along = torch.func.jvp(lambda at: driver.noise_coefficient(f, s.t, at), (z,), (g,))[1]
        square = dw * dw - driver.clock.dt(s.h) if driver.calculus == "ito" else dw * dw
        return (after + along * square / 2,)


@dataclass(frozen=True)
class StratonovichHeun(FixedGrid):
    """Heun's method with the noise in both stages: converges to the Stratonovich solution, strong order 1/2.

    The default for Stratonovich equations: stable where `ReversibleHeun` is not. Strong order 1 for scalar noise.

    Args:
        steps: number of equal steps over the time of the solve.

    Raises:
        TypeError, ValueError: if steps is not an int >= 1.

    Source: Rumelin, SIAM J. Numer. Anal. 19 (1982).

    Example:
        >>> StratonovichHeun(steps=20).calculus
        ('stratonovich',)
    """

    order, calculus = 0.5, ("stratonovich",)

    def step(self, f: Evaluator, s: Step, before: State, driver: Driver) -> State:
        z, dw = before[0], driver.increment(s.number, s.h)
        predicted = driver.advance(z, driver.terms(f, s.t, z), s.h, dw)
        corrected = driver.advance(predicted, driver.terms(f, s.t + s.h, predicted), s.h, dw)
        # z + (increment at z + increment at the prediction) / 2
        return ((z + corrected) / 2,)


@dataclass(frozen=True)
class ReversibleHeun(FixedGrid):
    """Reversible Heun: a Stratonovich method whose steps can be undone algebraically, one evaluation a step.

    Not recommended on contracting fields, where it is unstable at any step size: z' = -5z diverges. Use
    `StratonovichHeun` there.

    Args:
        steps: number of equal steps over the time of the solve.

    Raises:
        TypeError, ValueError: if steps is not an int >= 1.

    Source: Kidger, Foster, Li, Lyons, Efficient and Accurate Gradients for Neural SDEs, NeurIPS 2021.

    Example:
        >>> ReversibleHeun(steps=20).order
        0.5
    """

    order, calculus = 0.5, ("stratonovich",)

    def start(self, f: Evaluator, t0: float, z0: Tensor, driver: Driver) -> State:
        return (z0, z0, *driver.terms(f, t0, z0))

    def step(self, f: Evaluator, s: Step, before: State, driver: Driver) -> State:
        (z, mirror, *terms), dw = before, driver.increment(s.number, s.h)
        reflected = driver.advance(2 * z - mirror, tuple(terms), s.h, dw)
        fresh = driver.terms(f, s.t + s.h, reflected)
        mean = tuple((a + b) / 2 for a, b in zip(terms, fresh, strict=True))
        return (driver.advance(z, mean, s.h, dw), reflected, *fresh)

    def undo(self, f: Evaluator, step: Step, driver: Driver) -> tuple[Undo]:
        """Undo a step at once."""
        return (partial(self._undo, f, step, driver),)

    def _undo(self, f: Evaluator, s: Step, driver: Driver, after: State) -> tuple[State, State]:
        """The same formulas with -h and -dW, and the step taken again from where they lead."""
        (z, mirror, *terms), dw = after, driver.increment(s.number, s.h)
        back = None if dw is None else -dw
        reflected = driver.advance(2 * z - mirror, tuple(terms), -s.h, back)
        fresh = driver.terms(f, s.t, reflected)
        mean = tuple((a + b) / 2 for a, b in zip(terms, fresh, strict=True))
        before = tuple(map(leaf, (driver.advance(z, mean, -s.h, back), reflected, *fresh)))
        with torch.enable_grad():
            return before, self.step(f, s, before, driver)
