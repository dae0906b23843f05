"""What all blocks share: end times, output times, checks, and the way from a tensor to a solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from odelayers import _checks
from odelayers._driver import Driver, Uniform
from odelayers._evaluator import inferring, recordable
from odelayers._field import Field, takes_time
from odelayers._gradients import Backprop, Gradient, Implicit
from odelayers._running import RunningField, RunningRegularizer
from odelayers._solution import Solution, Stats
from odelayers._solve import Problem, check_end, check_layers, check_pair, solve
from odelayers._solvers import AdaptiveRungeKutta, Dopri5, FixedRungeKutta, Programs, Rodas5P, Solver, Tsit5
from odelayers._times import Equilibrium, Times, end_times, output_times

__all__ = ["Block", "resolve_solver"]

FieldFunction = Callable[..., Tensor]
ON_FAILURE = ("raise", "isolate")
_SHORTHAND: dict[str, type[Solver]] = {"dopri5": Dopri5, "tsit5": Tsit5, "rodas5p": Rodas5P}


def resolve_solver(solver: Solver | str, where: str) -> Solver:
    """A solver object, or the one a shorthand string names."""
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        raise TypeError(f"{where}: solver: expected a solver such as Dopri5() or RK4(steps=20), got {solver!r}")
    if solver not in _SHORTHAND:
        raise ValueError(
            f"{where}: solver: expected 'dopri5', 'tsit5' or 'rodas5p' as shorthand, got {solver!r}; a fixed grid "
            f"needs its number of steps: RK4(steps=20); torchdiffeq's methods are TorchDiffEq({solver!r})"
        )
    return _SHORTHAND[solver]()


class Block(nn.Module):
    """The private base of the four blocks."""

    def __init__(
        self,
        f: FieldFunction,
        *,
        t0: float,
        t1: float | Uniform | Equilibrium | nn.Parameter,
        solver: Solver,
        gradient: Gradient,
        time: bool | None,
        on_failure: str,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self._where = type(self).__name__
        self._takes_time = takes_time(f, time)
        check_pair(solver, gradient, self._where)
        self.t0 = _checks.finite_number(t0, f"{self._where}: t0")
        if isinstance(t1, nn.Parameter):
            if t1.ndim != 0:
                raise ValueError(f"{self._where}: t1: expected a 0-d parameter, got shape {tuple(t1.shape)}")
        elif not isinstance(t1, Uniform | Equilibrium):
            t1 = _checks.finite_number(t1, f"{self._where}: t1")
        check_end(t1, self.t0, solver, gradient, self._takes_time, self._where, compile)
        self.f, self.t1, self.solver, self.gradient = f, t1, solver, gradient
        self.on_failure = _checks.one_of(on_failure, f"{self._where}: on_failure", ON_FAILURE)
        self._counters: list[Callable[[], None]] = []
        self._programs = self._compiled() if _checks.boolean(compile, f"{self._where}: compile") else None

    def _compiled(self) -> Programs:
        """The block's programs, where its solver and gradient have any."""
        known = isinstance(self.solver, FixedRungeKutta | AdaptiveRungeKutta)
        own_steps = getattr(self.solver, "batch", "shared") == "independent"
        if not (known and not own_steps and isinstance(self.gradient, Backprop)):
            raise ValueError(
                f"{self._where}: compile=True compiles the own explicit Runge-Kutta methods (Dopri5, Tsit5, Euler, "
                f"Midpoint, Heun, RK4), one step for the whole batch, with gradient=Backprop(), got {self.solver!r} "
                f"with {self.gradient!r}"
            )
        return Programs()

    _accumulates: ClassVar[bool] = True  # whether running regularisers may be handed to the solve

    def extra_repr(self) -> str:
        """The record of the block in its repr."""
        f = "" if isinstance(self.f, nn.Module) else f"f={getattr(self.f, '__name__', self.f)!s}, "
        said = f"{f}t0={self.t0}, t1={self.t1}, solver={self.solver}, gradient={self.gradient}"
        return said if self._programs is None else f"{said}, compile=True"

    def forward(self, z: Tensor, t1: float | Tensor | Equilibrium | None = None, *, context: Any = None) -> Tensor:
        """The state at the end time.

        Args:
            z: initial state `(B, ...)`; sets the device and dtype.
            t1: end time in place of the block's: a float, a 0-d tensor (differentiable), `(B,)`, one per sample, or an
                `Equilibrium`.
            context: tensor or tuple of tensors passed to the field after z; with first axis B it is per sample.

        Returns:
            The final state, shaped like z (with the added channels for `AugmentedODEBlock(keep=True)`).

        Raises:
            SolveError: if rows fail and on_failure is "raise".
            TypeError, ValueError: on a state, time, context or field that does not fit.
        """
        return self.solve(z, t1=t1, context=context).final

    def solve(
        self,
        z: Tensor,
        ts: Tensor | Sequence[float] | None = None,
        *,
        t1: float | Tensor | Equilibrium | None = None,
        context: Any = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        running: Sequence[RunningRegularizer] = (),
        on_failure: str | None = None,
    ) -> Solution:
        """Solve and return the whole record.

        Args:
            z: initial state `(B, ...)`; sets the device and dtype.
            ts: output times `(T,)`, strictly increasing or decreasing, shared by the batch; `ts[0]` is the start and
                takes the place of t0. Default: the start and the end. Not where t1 is an `Equilibrium`.
            t1: end time in place of the block's, as in a call; not together with ts.
            context: passed to the field after z, as in a call.
            generator: draws the noise and random end times; default torch's global generator.
            noise: given Brownian increments `(steps, B, ...)`, or `(steps, B)` for scalar noise, of variance dt.
            running: regularisers to integrate along the solve.
            on_failure: "raise" or "isolate", in place of the block's.

        Returns:
            A `Solution` with states `(T, B, ...)`.

        Raises:
            SolveError: if rows fail and on_failure is "raise".
            TypeError, ValueError: on a state, time, context or field that does not fit.
        """
        where = self._where
        chosen = self.on_failure if on_failure is None else on_failure
        isolate = _checks.one_of(chosen, f"{where}: on_failure", ON_FAILURE) == "isolate"
        z = _checks.state(z, where)
        _checks.generator(generator, f"{where}: generator")
        half = z.dtype if z.dtype in _checks.half_precision else None
        if isinstance(running, str) or not isinstance(running, Sequence):
            raise TypeError(f"{where}: running: expected a list of regularisers, got {type(running).__name__}")
        if inferring() and any(getattr(r, "needs_jacobian", False) for r in running):
            # They differentiate the field, and autograd records nothing in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                given = {"z": z, "ts": ts, "t1": t1, "context": context, "noise": noise}
                given = tree_map_only(Tensor, recordable, given)
                return Block.solve(self, **given, generator=generator, running=running, on_failure=on_failure)
        if running and not self._accumulates:
            raise ValueError(f"{where}: running: regularisers accumulate along ODE solves; use an ODEBlock")
        if running and isinstance(self.gradient, Implicit):
            raise ValueError(
                f"{where}: running: {self.gradient!r} is the gradient of the equilibrium, not of the way to it, along "
                f"which regularisers accumulate; use gradient=Backprop()"
            )
        z0 = self._enter(z if half is None else z.float())
        times = self._times(z0, ts, t1, generator)
        field = Field.of(self.f, self._takes_time, context)
        check_layers(field, self.gradient, where)
        if times.still or not len(z0):
            return self._still(z0, times, half, running)
        driver = self._driver(times, z0, field.context, half, generator, noise)
        start = z0
        if running:
            field = RunningField.around(field, running, z0, generator)
            start = field.enter(z0)
        counters = tuple(self._counters)
        problem = Problem(field, start, times.solver, driver, half, counters, self._programs, times.equilibrium)
        zs, stats, ends = solve(problem, self.solver, self.gradient, isolate)
        ts = times.reported if ends is None else torch.stack([times.reported[0], ends])
        totals: tuple[Tensor, ...] = ()
        if isinstance(field, RunningField):
            zs, totals = field.leave(zs)
        return Solution(ts, self._leave(zs if half is None else zs.to(half)), stats, totals)

    def _times(
        self, z0: Tensor, ts: Tensor | Sequence[float] | None, t1: float | Tensor | Equilibrium | None, generator: Any
    ) -> Times:
        if ts is not None:
            if isinstance(self.t1, Equilibrium):
                raise ValueError(
                    f"{self._where}: ts: under t1={self.t1!r} every row stops at a time of its own, and there are no "
                    f"output times for all; use a block with another t1 to see states on the way"
                )
            if t1 is not None:
                raise ValueError(f"{self._where}: expected ts or t1, got both; the last of ts is the end time")
            return output_times(ts, z0, self._where)
        end = self.t1 if t1 is None else t1
        if isinstance(end, Uniform):
            end = end.draw(generator) if self.training else end.mean
        if t1 is not None:
            check_end(
                t1, self.t0, self.solver, self.gradient, self._takes_time, self._where, self._programs is not None
            )
        return end_times(self.t0, end, z0, self._where)

    def _still(
        self, z0: Tensor, times: Times, half: torch.dtype | None, running: Sequence[RunningRegularizer]
    ) -> Solution:
        """The solution where no time passes or no sample is there: the field is not evaluated."""
        zs = torch.stack([z0] * len(times.solver))
        nothing = torch.zeros(len(z0), dtype=torch.long, device=z0.device)
        never = torch.full_like(nothing, torch.nan, dtype=torch.get_default_dtype())
        settled = None if times.equilibrium is None else nothing.bool()
        stats = Stats(0, 0, 0, nothing, never, nothing.clone(), settled)
        totals = tuple(z0.new_zeros(len(z0)) for _ in running)
        return Solution(times.reported, self._leave(zs if half is None else zs.to(half)), stats, totals)

    def _enter(self, z: Tensor) -> Tensor:
        """The state that is solved for, from the user's."""
        return z

    def _leave(self, zs: Tensor) -> Tensor:
        """The user's states `(T, B, ...)`, from those solved for."""
        return zs

    def _driver(
        self,
        times: Times,
        z0: Tensor,
        context: tuple[Tensor, ...],
        half: torch.dtype | None,
        generator: torch.Generator | None,
        noise: Tensor | None,
    ) -> Driver:
        """What multiplies the field; a clock unless a block says otherwise."""
        if noise is not None:
            raise ValueError(f"{self._where}: noise: an ODE takes no increments; use SDEBlock or DropoutSDEBlock")
        return times.clock
