"""Solvers for SDEs on a fixed grid; without noise each falls back to the ODE method it is built on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from odelayers._driver import Driver, Factors, NoisyClock, advance
from odelayers._evaluator import Evaluator
from odelayers._solvers.base import Part, State, Step, leaf
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
        return (advance(z, driver.terms(f, s.t, z), driver.step_factors(s.number, s.h)),)


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
        after = advance(z, terms, driver.factors(s.h, dw))
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
        z, factors = before[0], driver.step_factors(s.number, s.h)
        predicted = advance(z, driver.terms(f, s.t, z), factors)
        corrected = advance(predicted, driver.terms(f, s.t + s.h, predicted), factors)
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
        (z, mirror, *terms), factors = before, driver.step_factors(s.number, s.h)
        middle = advance(z, terms, factors, 0.5)
        reflected = torch.lerp(mirror, middle, 2.0)  # 2 middle - mirror
        fresh = driver.terms(f, s.t + s.h, reflected)
        return (advance(middle, fresh, factors, 0.5), reflected, *fresh)

    def undo(self, f: Evaluator, steps: Sequence[Step], end: State, driver: Driver) -> Iterator[Part]:
        """Undo the steps as those of a leapfrog, whose one evaluation between two mirrors serves both ways.

        Two steps take the mirror m by m'' = m + k' (dX + dX'), where k' are the terms at m' and dX, dX' what the steps
        multiply them by; at m' the solution is z' = (m + m') / 2 + k' dX / 2. Beyond both ends it stands still.
        """
        z, mirror, *slopes = end
        later, t = torch.lerp(mirror, z, 2.0), steps[-1].t + steps[-1].h
        still: Factors = (0.0,) * len(slopes)
        ahead = still
        for s in (*reversed(steps), None):
            mirror, output = leaf(mirror), None
            with torch.enable_grad():
                terms = driver.terms(f, t, mirror)
                behind = driver.step_factors(s.number, s.h) if s is not None else still
                both = tuple(a + b for a, b in zip(behind, ahead, strict=True))
            earlier = leaf(advance(later, terms, both, -1.0))
            with torch.enable_grad():
                after = mirror, advance(earlier, terms, both)
                if s is not None and s.outputs:
                    output = advance(torch.lerp(earlier, mirror, 0.5), terms, behind, 0.5)
            # Of a rate that asks for a gradient the next part has the same factors.
            yield Part(
                (earlier, mirror), after, output, shared=any(torch.is_tensor(x) and x.requires_grad for x in both)
            )
            del terms, after, output  # and their graph, before the next is built
            mirror, later, ahead, t = earlier, mirror, behind, s.t if s is not None else t
