"""The layers: a field, a solver and a gradient as one module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from odelayers import _checks
from odelayers._block import Block, FieldFunction, resolve_solver
from odelayers._block_sde import NoisyBlock
from odelayers._count import count_nfe
from odelayers._driver import Diffusion, Driver, NoisyClock, Uniform
from odelayers._evaluator import Evaluator, ambient
from odelayers._field import Field, takes_time
from odelayers._gradients import Backprop, Gradient
from odelayers._solve import check_layers
from odelayers._solvers import Dopri5, Solver
from odelayers._times import Equilibrium, Times

__all__ = ["AugmentedODEBlock", "DropoutSDEBlock", "ODEBlock", "SDEBlock", "count_nfe"]


class ODEBlock(Block):
    """A layer that maps z(t0) to z(t1) along dz/dt = f(t, z).

    The state is `(B, ...)` with any number of axes; device and dtype come from it. Half-precision states are carried
    in float32 with the field under autocast. Step sizes are constants to the gradient.

    Args:
        f: the field, a module or function `f(z)` or `f(t, z)`, registered unchanged as `block.f`. Time reaches it as
            a tensor that broadcasts against z: 0-d, or `(B, 1, ...)` where samples have their own end times or steps.
        t0: start time.
        t1: end time: a float, `Uniform(a, b)`, `Equilibrium(tol, t_max)`, or a 0-d `nn.Parameter` to learn it.
        solver: a solver, or "dopri5" / "tsit5" / "rodas5p" as shorthand.
        gradient: `Backprop()`, `Checkpoint()`, `Reversible()`, `Adjoint()` or, of an equilibrium, `Implicit()`.
        time: whether f takes the time, where its signature leaves that open.
        on_failure: "raise", or "isolate" to solve the healthy rows without the failed ones.
        compile: whether torch.compile makes programs of the solve at its first calls, which takes half a minute: a
            fixed grid becomes one scan, an adaptive solve one loop in inference and a step with its own backward pass
            in training. For small fields and the explicit Runge-Kutta methods with `Backprop()`; `create_graph` and
            `retain_graph` are refused by torch. Where torch.compile fails a warning says so, and the solve is eager.

    Raises:
        TypeError, ValueError: on a field, time, solver, gradient or pair of them that does not fit.
        SolveError: from a call, if rows fail.

    Source: Chen et al., Neural Ordinary Differential Equations, NeurIPS 2018.

    Example:
        >>> import torch
        >>> decay = ODEBlock(lambda z: -z, t1=1.0)
        >>> round(decay(torch.ones(1, 1)).item(), 3)
        0.368
    """

    def __init__(
        self,
        f: FieldFunction,
        *,
        t0: float = 0.0,
        t1: float | Uniform | Equilibrium | nn.Parameter = 1.0,
        solver: Solver | str = Dopri5(),  # noqa: B008  (frozen)
        gradient: Gradient = Backprop(),  # noqa: B008  (frozen)
        time: bool | None = None,
        on_failure: str = "raise",
        compile: bool = False,
    ) -> None:
        where = type(self).__name__
        solver = resolve_solver(solver, where)
        if solver.calculus:
            raise ValueError(
                f"{where}: {solver!r} is a solver for SDEs; for an ODE use Dopri5(), Tsit5(), Rodas5P(), Euler, "
                f"Midpoint, Heun or RK4(steps), or TorchDiffEq(method)"
            )
        super().__init__(
            f, t0=t0, t1=t1, solver=solver, gradient=gradient, time=time, on_failure=on_failure, compile=compile
        )


class AugmentedODEBlock(ODEBlock):
    """An `ODEBlock` whose state is padded with zeros, so that its flow need not preserve the input's topology.

    Args:
        f: the field over the padded state.
        extra: how many zeros to append along `axis`.
        axis: the axis that grows, not the batch's.
        keep: whether the result keeps the added entries; False drops them.
        **options: as for `ODEBlock`.

    Raises:
        TypeError, ValueError: as `ODEBlock`, and on `extra` < 1 or an axis the state does not have.

    Source: Dupont, Doucet and Teh, Augmented Neural ODEs, NeurIPS 2019.

    Example:
        >>> import torch
        >>> block = AugmentedODEBlock(torch.nn.Linear(5, 5), extra=3, keep=False)
        >>> block(torch.randn(4, 2)).shape
        torch.Size([4, 2])
    """

    def __init__(self, f: FieldFunction, extra: int, *, axis: int = 1, keep: bool = True, **options: Any) -> None:
        super().__init__(f, **options)
        self.extra = _checks.positive_int(extra, "AugmentedODEBlock: extra")
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"AugmentedODEBlock: axis: expected an int, got {axis!r}")
        self.axis, self.keep = axis, _checks.boolean(keep, "AugmentedODEBlock: keep")

    def _enter(self, z: Tensor) -> Tensor:
        axis = self.axis if self.axis >= 0 else self.axis + z.ndim
        if not 1 <= axis < z.ndim:
            raise ValueError(
                f"AugmentedODEBlock: axis={self.axis} is not a state axis of z with shape {tuple(z.shape)}; expected "
                f"{f'1 to {z.ndim - 1} (axis 0 is the batch)' if z.ndim > 1 else 'a state (B, D) or larger'}"
            )
        shape = list(z.shape)
        shape[axis] = self.extra
        return torch.cat([z, z.new_zeros(shape)], dim=axis)

    def _leave(self, zs: Tensor) -> Tensor:
        if self.keep:
            return zs
        axis = self.axis + 1 if self.axis >= 0 else self.axis
        return zs.narrow(axis, 0, zs.shape[axis] - self.extra)

    def extra_repr(self) -> str:
        """The record of the block in its repr."""
        return f"{super().extra_repr()}, extra={self.extra}, axis={self.axis}, keep={self.keep}"


class SDEBlock(NoisyBlock):
    """A layer that maps z(t0) to a sample of z(t1) along dz = f(t, z) dt + g(t, z) dW.

    Noise is always on. It is drawn from torch's generator, the same for the same seed and batch; a row's noise is its
    own and stays so when other rows fail.

    Args:
        f: the drift, as the field of `ODEBlock`.
        g: the diffusion, a module or function like f with values shaped like z, registered as `block.g`.
        t0: start time.
        t1: end time, as for `ODEBlock`, after t0.
        solver: default `EulerMaruyama(steps=20)` for Ito, `StratonovichHeun(steps=20)` for Stratonovich.
        calculus: "ito" or "stratonovich": how the equation is read. Nothing is converted; a solver that converges to
            the other reading is refused.
        noise: "diagonal" (one Wiener process per coordinate) or "scalar" (one per row).
        gradient: `Backprop()`, `Checkpoint()`, with `ReversibleHeun` also `Reversible()`, and with
            `TorchSDE("reversible_heun")` `Adjoint()`.
        time: whether f and g take the time, where their signatures leave that open.
        on_failure: "raise" or "isolate".

    Raises:
        TypeError, ValueError: on arguments that do not fit together.
        SolveError: from a call, if rows fail.

    Source: Liu et al., Neural SDE, arXiv:1906.02355; Kidger, On Neural Differential Equations, chapter 4.

    Example:
        >>> import torch
        >>> block = SDEBlock(lambda z: -z, lambda z: 0.1 * z)
        >>> block(torch.ones(4, 2)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        f: FieldFunction,
        g: FieldFunction,
        *,
        t0: float = 0.0,
        t1: float | Uniform | nn.Parameter = 1.0,
        solver: Solver | None = None,
        calculus: str = "ito",
        noise: str = "diagonal",
        gradient: Gradient = Backprop(),  # noqa: B008  (frozen)
        time: bool | None = None,
        on_failure: str = "raise",
    ) -> None:
        super().__init__(
            f,
            t0=t0,
            t1=t1,
            solver=solver,
            calculus=calculus,
            noise=noise,
            gradient=gradient,
            time=time,
            on_failure=on_failure,
        )
        self._g_takes_time = takes_time(g, time)
        self.g = g

    def _driver(
        self,
        times: Times,
        z0: Tensor,
        context: tuple[Tensor, ...],
        half: torch.dtype | None,
        generator: torch.Generator | None,
        noise: Tensor | None,
    ) -> Driver:
        g = Field.of(self.g, self._g_takes_time, context)
        check_layers(g, self.gradient, self._where)
        brownian = self._brownian(times, z0, generator, noise)
        return Diffusion(times.clock, brownian, Evaluator(g, len(z0), half or ambient(z0.device)), self.calculus)


class DropoutSDEBlock(NoisyBlock):
    """A layer whose field runs on a noisy clock, the continuous limit of dropout: dz = f dt + sigma f dW.

    sigma = sqrt(layer_time p / (1 - p)), with p the *drop* probability as in `nn.Dropout` (the seed paper's
    SODEF_0.9, which keeps 0.9, is p = 0.1). One evaluation of f serves drift and noise. With p = 0, and in evaluation
    unless `noise_in_eval`, it is the ODE solved by the noiseless method: Euler for `EulerMaruyama`.

    Args:
        f: the field, as for `ODEBlock`.
        p: drop probability in [0, 1).
        t0: start time.
        t1: end time, after t0 where there is noise.
        solver: default `EulerMaruyama(steps=20)` for Ito, `StratonovichHeun(steps=20)` for Stratonovich.
        calculus: "ito" or "stratonovich", as for `SDEBlock`.
        noise: "diagonal" (dropout's own: every coordinate for itself) or "scalar".
        layer_time: time that one dropout layer stands for. 1.0 is the paper's equation 8; a ResNet of N layers on
            [0, 1] has the variance of layer_time = 1 / N.
        noise_in_eval: whether the noise stays on in evaluation.
        gradient, time, on_failure: as for `SDEBlock`.

    Raises:
        TypeError, ValueError: on arguments that do not fit together.
        SolveError: from a call, if rows fail.

    Source: the seed paper, equations 7 and 8; Liu et al., Neural SDE, arXiv:1906.02355.

    Example:
        >>> import torch
        >>> block = DropoutSDEBlock(lambda z: -z, p=0.1)
        >>> round(block.sigma, 4)
        0.3333
    """

    def __init__(
        self,
        f: FieldFunction,
        p: float = 0.1,
        *,
        t0: float = 0.0,
        t1: float | Uniform | nn.Parameter = 1.0,
        solver: Solver | None = None,
        calculus: str = "ito",
        noise: str = "diagonal",
        layer_time: float = 1.0,
        noise_in_eval: bool = False,
        gradient: Gradient = Backprop(),  # noqa: B008  (frozen)
        time: bool | None = None,
        on_failure: str = "raise",
    ) -> None:
        super().__init__(
            f,
            t0=t0,
            t1=t1,
            solver=solver,
            calculus=calculus,
            noise=noise,
            gradient=gradient,
            time=time,
            on_failure=on_failure,
        )
        self.p = _checks.probability(p, "DropoutSDEBlock: p")
        self.layer_time = _checks.positive_number(layer_time, "DropoutSDEBlock: layer_time")
        self.noise_in_eval = _checks.boolean(noise_in_eval, "DropoutSDEBlock: noise_in_eval")

    @property
    def sigma(self) -> float:
        """The noise coefficient sqrt(layer_time p / (1 - p))."""
        return math.sqrt(self.layer_time * self.p / (1 - self.p))

    def _driver(
        self,
        times: Times,
        z0: Tensor,
        context: tuple[Tensor, ...],
        half: torch.dtype | None,
        generator: torch.Generator | None,
        noise: Tensor | None,
    ) -> Driver:
        if self.p == 0 or not (self.training or self.noise_in_eval):
            if noise is not None:
                raise ValueError(
                    "DropoutSDEBlock: noise: increments were given, but the noise is off (p = 0, or evaluation); "
                    "set noise_in_eval=True to use them in evaluation"
                )
            return times.clock
        return NoisyClock(times.clock, self._brownian(times, z0, generator, noise), self.sigma, self.calculus)

    def extra_repr(self) -> str:
        """The record of the block in its repr."""
        return f"p={self.p}, {super().extra_repr()}, layer_time={self.layer_time}, noise_in_eval={self.noise_in_eval}"
