"""Runge-Kutta steps compiled by torch.compile: one step, a fixed grid as one scan, an adaptive solve as one loop."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as functorch_config
from torch._higher_order_ops import scan, while_loop

from odelayers._driver import Clock
from odelayers._evaluator import Evaluator, dual, traced
from odelayers._field import Field
from odelayers._solvers.base import row_rms
from odelayers._solvers.control import first_guess, second_guess
from odelayers._solvers.tableau import Row, Tableau

__all__ = ["Control", "Programs", "grid_states", "solved_loop", "step_stages"]


REMEDY = (
    "Write the field without branches on values or side effects and solve float32 or float64 states outside autocast, "
    "or leave compile=True out"
)

# What is compiled inside it looks at every call whether modules have been given hooks since. Threads may share it: the
# patches of this configuration are context variables.
_WATCHED = dynamo_config.patch(skip_nnmodule_hook_guards=False)


class Control(NamedTuple):
    """The numbers of a step size control; without a first step one is chosen."""

    rtol: float
    atol: float
    max_steps: int
    safety: float
    shrink: float
    grow: float
    first_step: float | None


class Programs:
    """The compiled programs of one block, made when first called; a copy of the block makes its own.

    Where one does not compile, a warning says why, and the block is solved eagerly from then on; where torch would keep
    too many programs (of other sizes, with or without a gradient to z, with or without outputs inside a step), the
    calls that come late are.
    """

    def __init__(self) -> None:
        # By program and grad mode; None for one that does not compile.
        self._made: dict[tuple[Callable[..., Any], bool], Callable[..., Any] | None] = {}
        # The same with all of the inputs that one program is made for: whether such a call is compiled.
        self._calls: dict[tuple[Any, ...], bool] = {}

    def __reduce__(self) -> Any:
        return Programs, ()

    def __deepcopy__(self, memo: Any) -> Programs:
        return Programs()

    def run(self, program: Callable[..., Any], name: str, *inputs: Any) -> Any:
        """The result of a program, None where it cannot be compiled."""
        key = program, torch.is_grad_enabled()
        if key not in self._made:
            # dynamo keeps what it compiles with the code object, a few per object: each block has its own. Sizes and
            # numbers are constants: symbols of them do not pass into the loop.
            own = types.FunctionType(program.__code__.replace(), program.__globals__, program.__name__)
            self._made[key] = torch.compile(own, fullgraph=True, dynamic=False)
        compiled = self._made[key]
        tensors = ((x.shape, x.requires_grad) for x in inputs if isinstance(x, Tensor))
        call = (*key, *tensors, *(x for x in inputs if isinstance(x, bool | Control)))
        known = self._calls.get(call)
        if compiled is None or known is False:
            return None
        try:
            if known:
                with _WATCHED:
                    return compiled(*inputs)
            # The backward pass is compiled at once too, so that its failure is met here and not in backward().
            with functorch_config.patch(force_non_lazy_backward_lowering=True), _WATCHED:
                found = compiled(*inputs)
            self._calls[call] = True
            return found
        except torch.OutOfMemoryError:
            raise
        except FailOnRecompileLimitHit:
            self._calls[call] = False
            limit = dynamo_config.recompile_limit
            _warn(f"field {name} has been compiled into {limit} programs already", "Pad the batches to few sizes")
        except Exception as error:  # said in the warning; a fault of the field itself comes again in the eager solve
            runs = any(good for other, good in self._calls.items() if other[:2] == key)
            if runs and not isinstance(error, TorchDynamoException):
                raise  # what has run compiled does not fail for being compiled
            self._calls[call] = False
            if not runs:
                self._made[key] = None
            reason = " ".join(str(error).split())[:300]
            _warn(f"torch.compile failed on field {name} ({type(error).__name__}: {reason})")
        return None


def _warn(reason: str, remedy: str = REMEDY) -> None:
    warnings.warn(f"compile=True: {reason}; the block is solved eagerly. {remedy}", UserWarning, stacklevel=3)


def _weighted(row: Row, stages: Sequence[Tensor]) -> Tensor:
    """A linear combination as plain arithmetic, which inductor fuses into the kernels around it."""
    terms = [weight * k for weight, k in zip(row, stages, strict=False) if weight]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _stages(
    tableau: Tableau, field: Field, clock: Clock, z: Tensor, k: Tensor, times: Sequence[Tensor], h: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The result of a step and its stages, the first of which is given."""
    stages, at = [k], z
    for i, row in enumerate(tableau.rows, start=1):
        at = z + h * _weighted(row, stages)
        if i < len(tableau.c):
            stages.append(clock.terms(field, times[i], at)[0])
    return at, stages


def _errors(
    tableau: Tableau,
    z: Tensor,
    after: Tensor,
    stages: Sequence[Tensor],
    h: Tensor,
    rtol: Tensor | float,
    atol: Tensor | float,
) -> Tensor:
    """The embedded error of a step by row, scaled by the tolerances: a step is taken where none is above 1."""
    scale = torch.maximum(z.abs(), after.abs()) * rtol + atol
    return row_rms(h * _weighted(tableau.error, stages) / scale)


def _step(
    tableau: Tableau, field: Field, clock: Clock, z: Tensor, k: Tensor, numbers: Tensor, inside: bool
) -> tuple[Tensor, list[Tensor], Tensor]:
    *times, h, rtol, atol = numbers.unbind(0)
    after, stages = _stages(tableau, field, clock, z, k, times, h)
    values = [s.detach() for s in stages]
    errors = _errors(tableau, z.detach(), after.detach(), values, h, rtol, atol)
    # A gradient reaches the stages by the last one, which the next step begins with, and by outputs inside the step:
    # where there is none, the backward pass need not be given a zero for each.
    return after, stages if inside else [*values[:-1], stages[-1]], errors


def _grid(tableau: Tableau, field: Field, clock: Clock, z: Tensor, times: Tensor, lengths: Tensor) -> Tensor:
    def body(z: Tensor, at: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        stage_times, h = at[0].unbind(0), at[1]
        after, _ = _stages(tableau, field, clock, z, clock.terms(field, stage_times[0], z)[0], stage_times, h)
        return after, after.clone()

    states: Tensor = scan(body, z, (times, lengths))[1]
    return states


def _first_step(
    tableau: Tableau, field: Field, clock: Clock, z: Tensor, k: Tensor, t0: Tensor, t1: Tensor, control: Control
) -> Tensor:
    """Hairer's choice of the first step, as in the eager march; not finite where a row's state or slope is not."""
    guess = first_guess(z, k, row_rms, control.rtol, control.atol)
    h = torch.minimum(guess.h.amin().to(t0.dtype), (t1 - t0).abs())
    ahead = (t1 - t0).sign() * h
    there = clock.terms(field, (t0 + ahead).to(z.dtype), z + ahead.to(z.dtype) * k)[0]
    bend = row_rms((there - k) / guess.scale) / h.to(z.dtype)
    fastest = torch.maximum(guess.speed, bend).amax().to(t0.dtype)
    chosen = torch.minimum(second_guess(h, fastest, tableau.order), (t1 - t0).abs())
    return torch.where(guess.speed.amax().isfinite(), chosen, math.nan)


def _loop(
    tableau: Tableau, field: Field, clock: Clock, z: Tensor, k: Tensor, t0: Tensor, t1: Tensor, control: Control
) -> tuple[Tensor, Tensor]:
    """The final state, and (time left, steps accepted, steps tried); times and lengths are in float64."""
    way, shortest = (t1 - t0).sign(), 4 * torch.finfo(t0.dtype).eps * (t1 - t0).abs()
    if control.first_step is None:
        h = _first_step(tableau, field, clock, z, k, t0, t1, control)
    else:
        h = (t1 - t0).abs().clamp(max=control.first_step)

    def going(t: Tensor, h: Tensor, z: Tensor, k: Tensor, accepted: Tensor, tried: Tensor) -> Tensor:
        able = (tried < control.max_steps) & (h >= shortest) & h.isfinite() & (t + h * way != t)
        return ((t1 - t) * way > 0) & able

    def body(t: Tensor, h: Tensor, z: Tensor, k: Tensor, accepted: Tensor, tried: Tensor) -> tuple[Tensor, ...]:
        left = (t1 - t) * way
        last = h * 1.01 >= left  # as in the eager march: no sliver is left for a last step
        h = torch.where(last, left, h)
        end = torch.where(last, t1, t + h * way)
        times = [(t + c * h * way).to(z.dtype) for c in tableau.c]
        length = (h * way).to(z.dtype)
        after, stages = _stages(tableau, field, clock, z, k, times, length)
        worst = _errors(tableau, z, after, stages, length, control.rtol, control.atol).amax().to(t.dtype)
        good = worst <= 1.0
        factor = control.safety * worst.clamp(min=1e-300) ** (-1 / tableau.order)
        longer, shorter = factor.clamp(max=control.grow), factor.clamp(min=control.shrink)
        h = h * torch.where(good, longer, torch.where(worst.isfinite(), shorter, control.shrink))
        return (
            torch.where(good, end, t),
            h,
            torch.where(good, after, z),
            torch.where(good, stages[-1], k),
            accepted + good,
            tried + 1,
        )

    zero = torch.zeros((), dtype=torch.long, device=z.device)
    t, _, z, _, accepted, tried = while_loop(  # type: ignore[no-untyped-call]
        going, body, (t0, h, z, k, zero, zero.clone())
    )
    left = torch.where(z.isfinite().all(), (t1 - t) * way, math.nan)  # an overflow is no arrival
    return z, torch.stack([left, accepted.to(t.dtype), tried.to(t.dtype)])


def step_stages(
    f: Evaluator,
    tableau: Tableau,
    clock: Clock,
    before: tuple[Tensor, ...],
    span: tuple[float, float],
    tolerances: tuple[float, float],
    inside: bool,
) -> tuple[Tensor, list[Tensor], Tensor] | None:
    """One step over the span (t, h): its result, stages and scaled error by row; None where it cannot be compiled.

    `inside`: whether there are outputs inside the step, which ask the stages for a gradient.
    """
    t, h = span
    numbers = before[0].new_tensor([*(t + c * h for c in tableau.c), h, *tolerances])
    found: tuple[Tensor, list[Tensor], Tensor] | None = _run(
        f, _step, tableau, f.field, clock, *before, numbers, inside
    )
    if found is not None:
        f.count(len(tableau.c) - 1)
    return found


def grid_states(f: Evaluator, tableau: Tableau, clock: Clock, z: Tensor, steps: Sequence[Any]) -> Tensor | None:
    """The states after each of the steps `(n, B, ...)`; None where the scan cannot be compiled."""
    times = torch.tensor([[s.t + c * s.h for c in tableau.c] for s in steps], dtype=z.dtype, device=z.device)
    lengths = torch.tensor([s.h for s in steps], dtype=z.dtype, device=z.device)
    states: Tensor | None = _run(f, _grid, tableau, f.field, clock, z, times, lengths)
    if states is not None:
        f.count(len(steps) * len(tableau.c))
    return states


def solved_loop(
    f: Evaluator,
    tableau: Tableau,
    clock: Clock,
    before: tuple[Tensor, ...],
    span: tuple[float, float],
    control: Control,
) -> tuple[Tensor, int, int] | None:
    """The final state over the span (t0, t1), and the steps accepted and tried.

    None where it cannot be compiled or did not reach the end.
    """
    numbers = [torch.tensor(x, dtype=torch.float64, device=before[0].device) for x in span]
    found = _run(f, _loop, tableau, f.field, clock, *before, *numbers, control)
    if found is None:
        return None
    left, accepted, tried = found[1].tolist()  # the solve's one host read
    f.count(int(tried) * (len(tableau.c) - 1) + (control.first_step is None))
    return (found[0], int(accepted), int(tried)) if left == 0 else None


def _run(f: Evaluator, program: Callable[..., Any], *inputs: Any) -> Any:
    programs: Programs = f.programs
    if traced() or dual():  # whoever looks sees through the eager steps
        return None
    if f.half is not None:
        _warn(f"field {f.field.name} runs under autocast")
        return None
    return programs.run(program, f.field.name, *inputs)
