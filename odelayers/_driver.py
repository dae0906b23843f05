"""A driver: what multiplies the field over one step: `dt`, or `dt + sigma dW`, or `dt` beside `g dW`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from odelayers._checks import finite_number
from odelayers._evaluator import Evaluator

__all__ = ["Brownian", "Clock", "Diffusion", "Driver", "NoisyClock", "Time", "Uniform", "advance", "against"]

Time = Tensor | float
Evaluate = Callable[[Time, Tensor], Tensor]
Terms = tuple[Tensor, ...]
Factors = tuple[Tensor | float, ...]
Swap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Uniform:
    """An end time drawn uniformly from [a, b] at every call in training, and their mean in evaluation.

    One draw serves the whole batch. Source: the random end times of the blog post on equilibria (a = 10, b = 100).

    Raises:
        TypeError, ValueError: if a or b is not a finite number, or a >= b.

    Example:
        >>> Uniform(10, 100).mean
        55.0
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        if not finite_number(self.a, "Uniform: a") < finite_number(self.b, "Uniform: b"):
            raise ValueError(f"Uniform: expected a < b, got a={self.a}, b={self.b}")

    @property
    def mean(self) -> float:
        """The end time used in evaluation."""
        return (self.a + self.b) / 2

    def draw(self, generator: torch.Generator | None = None) -> float:
        """One end time, from `generator` or torch's global one."""
        device = generator.device if generator is not None else "cpu"
        return self.a + (self.b - self.a) * torch.rand((), generator=generator, device=device).item()


def against(per_row: Tensor, ndim: int) -> Tensor:
    """A 0-d or `(..., B)` tensor, shaped to broadcast against a state of `ndim` axes."""
    return per_row if per_row.ndim == 0 else per_row.reshape(*per_row.shape, *[1] * (ndim - 1))


def advance(z: Tensor, terms: Sequence[Tensor], factors: Factors, share: float = 1.0) -> Tensor:
    """Give z plus this share of each term times its factor: 1 for a step's increment, 1/2 for half, -1 to undo it."""
    for term, factor in zip(terms, factors, strict=True):
        if isinstance(factor, Tensor):
            z = torch.addcmul(z, term, factor, value=share)
        else:
            z = torch.add(z, term, alpha=share * factor)
    return z


@dataclass(frozen=True)
class Clock:
    """`dt`: the solver's time s is the field's time, or t = start + rate s where the end time is a tensor.

    With a rate, 0-d or `(B,)`, the solver runs over s in [0, 1]: per-sample and differentiable end times are then
    ordinary factors of the field, and their gradient is that of the steps taken. The solver's time is a number, or a
    tensor `(B,)` where rows have their own; the field's broadcasts against the user's state, of `ndim` axes.
    """

    start: float = 0.0
    rate: Tensor | None = None
    ndim: int = 2

    def time(self, s: Time) -> Time:
        """The field's time at the solver's time s."""
        s = against(s, self.ndim) if isinstance(s, Tensor) else s
        return s if self.rate is None else self.start + against(self.rate, self.ndim) * s

    def dt(self, h: float) -> Tensor | float:
        """The field's time that passes in a step of length h."""
        return h if self.rate is None else h * against(self.rate, self.ndim)

    def root(self, dw: Tensor) -> Tensor:
        """Noise of variance ds as noise of variance dt: times sqrt(rate), whose gradient is 0 where no time passes."""
        if self.rate is None:
            return dw
        passes = self.rate > 0
        return dw * against(self.rate.where(passes, 1.0).sqrt() * passes, dw.ndim)

    def with_tensors(self, swap: Swap) -> Clock:
        """The same clock with its tensors swapped for others."""
        return self if self.rate is None else replace(self, rate=swap(self.rate))

    def take(self, rows: Tensor) -> Clock:
        """The same clock for these rows of the batch alone."""
        if self.rate is None or self.rate.ndim == 0:
            return self
        return replace(self, rate=self.rate[rows])

    def terms(self, f: Evaluate, s: Time, z: Tensor) -> Terms:
        """What this driver needs of the field at (s, z); one evaluation."""
        if self.rate is None:
            return (f(self.time(s), z),)
        return (against(self.rate, z.ndim) * f(self.time(s), z),)

    def factors(self, h: float, dw: Tensor | None) -> Factors:
        """What the terms are multiplied by in a step of length h: the rate is in the term."""
        return (h,)

    def increment(self, number: int, h: float) -> None:
        """A clock carries no noise."""

    def step_factors(self, number: int, h: float) -> Factors:
        """The factors of step `number`."""
        return self.factors(h, None)

    def noise_coefficient(self, f: Evaluate, s: Time, z: Tensor) -> Tensor:
        """G(s, z) = 0."""
        return torch.zeros_like(z)

    @property
    def clock(self) -> Clock:
        """The clock of a noisy driver; its own self here."""
        return self

    @property
    def noise(self) -> Brownian | None:
        """The noise source; a clock has none."""
        return None

    @property
    def calculus(self) -> str:
        """How the noise is read; without noise both readings agree."""
        return "ito"


@dataclass(frozen=True)
class Brownian:
    """Brownian increments over the steps of a fixed grid, given or drawn, each by its index alone.

    A step's increment is drawn from a generator seeded for that step, so it can be drawn again (checkpointing) and a
    row keeps its noise when other rows are left out: the whole batch is drawn and `rows` picks from it.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    seeds: tuple[int, ...] = ()
    given: Tensor | None = None
    rows: Tensor | None = None

    def increment(self, index: int, h: float, clock: Clock) -> Tensor:
        """The increment dW of step `index`, of length h in the solver's time, over the field's time that passes."""
        return self.given[index] if self.given is not None else clock.root(self.draw(index, 0.0, abs(h) ** 0.5))

    def draw(self, index: int, mean: float, std: float) -> Tensor:
        """Normal numbers of this mean and deviation for step `index`, the same at every call."""
        generator = torch.Generator(self.device).manual_seed(self.seeds[index])
        drawn = torch.empty(self.shape, dtype=self.dtype, device=self.device).normal_(mean, std, generator=generator)
        return drawn if self.rows is None else drawn[self.rows]

    def with_tensors(self, swap: Swap) -> Brownian:
        """The same noise with given increments swapped for others."""
        return self if self.given is None else replace(self, given=swap(self.given))

    def take(self, rows: Tensor) -> Brownian:
        """The same noise for these rows of the batch alone."""
        return replace(
            self,
            given=None if self.given is None else self.given[:, rows],
            rows=rows if self.rows is None else self.rows[rows],
        )


@dataclass(frozen=True)
class _Noisy:
    """What the two noisy drivers share: a clock and a source of noise."""

    clock: Clock
    noise: Brownian

    def time(self, s: Time) -> Time:
        """The field's time at the solver's time s."""
        return self.clock.time(s)

    def increment(self, number: int, h: float) -> Tensor:
        """The increment dW of a step."""
        return self.noise.increment(number, h, self.clock)

    def with_tensors(self, swap: Swap) -> Self:
        """The same driver with its tensors swapped for others."""
        return replace(self, clock=self.clock.with_tensors(swap), noise=self.noise.with_tensors(swap))

    def take(self, rows: Tensor) -> Self:
        """The same driver for these rows of the batch alone."""
        return replace(self, clock=self.clock.take(rows), noise=self.noise.take(rows))


@dataclass(frozen=True)
class NoisyClock(_Noisy):
    """`dt + sigma dW` times the same field: dz = f (dt + sigma dW), one evaluation of f a step."""

    sigma: float
    calculus: str = "ito"

    def terms(self, f: Evaluate, s: Time, z: Tensor) -> Terms:
        """The field alone, which also carries the noise."""
        return (f(self.time(s), z),)

    def factors(self, h: float, dw: Tensor) -> Factors:
        """What the field is multiplied by: dt + sigma dW."""
        return (self.clock.dt(h) + self.sigma * dw,)

    def step_factors(self, number: int, h: float) -> Factors:
        """What `factors` gives, drawn in one pass where the noise is neither given nor scaled by an end time."""
        if self.clock.rate is not None or self.noise.given is not None:
            return self.factors(h, self.increment(number, h))
        return (self.noise.draw(number, h, self.sigma * abs(h) ** 0.5),)

    def noise_coefficient(self, f: Evaluate, s: Time, z: Tensor) -> Tensor:
        """G(s, z) = sigma f(s, z)."""
        return self.sigma * f(self.time(s), z)


@dataclass(frozen=True)
class Diffusion(_Noisy):
    """`dt` for the field beside `dW` for a diffusion of its own: dz = f dt + g dW."""

    g: Evaluator
    calculus: str = "ito"

    def with_tensors(self, swap: Swap) -> Self:
        """The same driver with its tensors swapped for others."""
        g = self.g.over(self.g.field.with_context(tuple(map(swap, self.g.field.context))))
        return replace(super().with_tensors(swap), g=g)

    def take(self, rows: Tensor) -> Self:
        """The same driver for these rows of the batch alone."""
        return replace(super().take(rows), g=self.g.take(rows))

    def terms(self, f: Evaluate, s: Time, z: Tensor) -> Terms:
        """The drift and the diffusion."""
        return (*self.clock.terms(f, s, z), self.noise_coefficient(f, s, z))

    def factors(self, h: float, dw: Tensor) -> Factors:
        """What drift and diffusion are multiplied by: dt, as the clock counts it, and dW."""
        return (*self.clock.factors(h, None), dw)

    def step_factors(self, number: int, h: float) -> Factors:
        """The factors of step `number`, with its noise."""
        return self.factors(h, self.increment(number, h))

    def noise_coefficient(self, f: Evaluate, s: Time, z: Tensor) -> Tensor:
        """G(s, z) = g(t(s), z)."""
        return self.g(self.time(s), z)


class Driver(Protocol):
    """What a solver asks of a driver."""

    @property
    def noise(self) -> Brownian | None: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def calculus(self) -> str: ...
    def time(self, s: Time) -> Time: ...
    def take(self, rows: Tensor) -> Driver: ...
    def with_tensors(self, swap: Swap) -> Driver: ...
    def terms(self, f: Evaluate, s: Time, z: Tensor) -> Terms: ...
    def increment(self, number: int, h: float) -> Tensor | None: ...
    def factors(self, h: float, dw: Any) -> Factors: ...
    def step_factors(self, number: int, h: float) -> Factors: ...
    def noise_coefficient(self, f: Evaluate, s: Time, z: Tensor) -> Tensor: ...
