"""Reversible: its gradient is that of its own steps, by an independent differentiation of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from odelayers import (
    RK4,
    Backprop,
    Checkpoint,
    Dopri5,
    DropoutSDEBlock,
    Euler,
    Heun,
    JacobianRegularizer,
    KineticRegularizer,
    Midpoint,
    ODEBlock,
    Reversible,
    ReversibleHeun,
    Tsit5,
    count_nfe,
)
from odelayers._driver import Clock
from odelayers._evaluator import Evaluator
from odelayers._field import Field
from odelayers._running import RunningField
from odelayers._solvers.base import row_rms
from odelayers._solvers.coupled import CoupledAdaptive
from problems import FORCED, KEPLER, LINEAR, LOTKA_VOLTERRA, Problem, TanhNet, close, gradients, name, slope
from strategies import Bounded, bounded_fields, seeds, states

F64 = torch.float64
FIXED = (Euler(60), Midpoint(30), Heun(30), RK4(12))
ADAPTIVE = (Dopri5(1e-6, 1e-6), Tsit5(1e-6, 1e-6))
FREE = Reversible(max_gap=1e9)  # coarse steps, whose values are of no interest here, have their gradient all the same

Rate = Callable[[Any, Tensor], Tensor]
Marks = Sequence[float]


def flow(solver: Any, f: Rate, t: float, z: Tensor, h: float) -> tuple[Tensor, list[Tensor]]:
    """One step of the method by its tableau, written down once more; and its stages."""
    a, b, c = solver.tableau.a, solver.tableau.b, solver.tableau.c
    k: list[Tensor] = []
    for i, when in enumerate(c):
        at = z + h * sum((w * x for w, x in zip(a[i - 1], k, strict=True)), torch.zeros_like(z)) if i else z
        k.append(f(torch.tensor(t + when * h, dtype=z.dtype), at))
    return z + h * sum((w * x for w, x in zip(b, k, strict=True)), torch.zeros_like(z)), k


def steps_of(solver: Any, f: Rate, z0: Tensor, marks: Marks, coupling: float) -> list[tuple[float, float]]:
    """The starts and lengths of the steps: the equal grid with the marks added, or those that step control chose."""
    if isinstance(solver, Dopri5 | Tsit5):
        march = CoupledAdaptive(solver, coupling).march
        with torch.no_grad():
            taken = march(Evaluator(Field(f, True), len(z0)), z0, marks, Clock(), row_rms)
            return [(x.step.t, x.step.h) for x in taken]
    t0, t1 = marks[0], marks[-1]
    points = {t0 + (t1 - t0) * i / solver.steps for i in range(1, solver.steps)} | set(marks)
    times = sorted(points, reverse=t1 < t0)
    times = [t for i, t in enumerate(times) if t in marks or min(abs(t - m) for m in marks) > 1e-9 or i == 0]
    return [(a, b - a) for a, b in pairwise(times)]


def recursion(solver: Any, f: Rate, z0: Tensor, marks: Marks, coupling: float = 0.999) -> Tensor:
    """The states at the marks by McCallum and Foster's equation 4, step by step; plain autograd differentiates it."""
    y = z = z0
    found = {marks[0]: z0}
    for t, h in steps_of(solver, f, z0.detach(), marks, coupling):
        y = coupling * y + (1 - coupling) * z + (flow(solver, f, t, z, h)[0] - z)
        z = z - (flow(solver, f, t + h, y, -h)[0] - y)
        found |= {mark: y for mark in marks if abs(mark - (t + h)) < 1e-9}
    return torch.stack([found[m] for m in marks])


MARKS = {"end": [0.0, 1.5], "outputs": [0.2, 0.33, 0.9, 1.7], "backwards": [1.0, 0.71, -0.4]}


@pytest.mark.parametrize("coupling", [0.999, 0.9, 1.0])
@pytest.mark.parametrize("mode", MARKS)
@pytest.mark.parametrize("solver", [*FIXED, *ADAPTIVE], ids=name)
def test_the_gradient_is_that_of_the_recursion(solver: Any, mode: str, coupling: float) -> None:
    """States, and gradients in the start, the context and the parameters, over every output time."""
    net, marks = TanhNet(), MARKS[mode]
    z = torch.randn(4, 3, dtype=F64, requires_grad=True)
    context = torch.randn(4, 5, dtype=F64, requires_grad=True)
    weights = torch.randn(len(marks), 4, 3, dtype=F64)
    solution = ODEBlock(net, solver=solver, gradient=Reversible(coupling, max_gap=1e9)).solve(z, marks, context=context)
    wanted = recursion(solver, lambda t, z: net(t, z, context), z, marks, coupling)
    assert (solution.zs - wanted).abs().max() < 1e-12
    inputs = [z, context, *net.parameters()]
    close(*(gradients((weights * zs).sum() + zs[-1].square().sum(), inputs) for zs in (solution.zs, wanted)))


@pytest.mark.parametrize("shape", ["one", "per sample"])
@pytest.mark.parametrize("solver", [RK4(12), Heun(30), Dopri5(1e-6, 1e-6)], ids=name)
def test_end_times_get_the_gradient_of_the_recursion(solver: Any, shape: str) -> None:
    """One end time or one for each sample, backwards among them: a factor of the field over a time of 1."""
    net, z = TanhNet(), torch.randn(4, 3, dtype=F64, requires_grad=True)
    t1 = torch.tensor(1.2 if shape == "one" else [0.5, -0.7, 1.3, 1.0], dtype=F64, requires_grad=True)
    out = ODEBlock(net, t0=0.2, solver=solver, gradient=FREE)(z, t1)
    rate = (t1 - 0.2).reshape(-1, 1)
    wanted = recursion(solver, lambda s, z: rate * net(0.2 + rate * s, z), z, [0.0, 1.0])[-1]
    assert (out - wanted).abs().max() < 1e-12
    close(*(gradients(x.square().sum(), [z, t1, *net.parameters()]) for x in (out, wanted)))


@pytest.mark.parametrize("solver", [RK4(12), Tsit5(1e-6, 1e-6)], ids=name)
def test_running_integrals_get_the_gradient_of_the_recursion(solver: Any) -> None:
    """The integrals are entries of the state, and their regularisers are differentiated with the steps."""
    net, z, running = TanhNet(), torch.randn(4, 3, dtype=F64, requires_grad=True), [KineticRegularizer()]
    running.append(JacobianRegularizer())
    solution = ODEBlock(net, solver=solver, gradient=FREE).solve(
        z, running=running, generator=torch.Generator().manual_seed(1)
    )
    field = RunningField.around(Field(net, True), running, z.detach(), torch.Generator().manual_seed(1))
    zs, totals = field.leave(recursion(solver, field, field.enter(z), [0.0, 1.0]))
    found = solution.final.square().sum() + sum(total.sum() for total in solution.running)
    wanted = zs[-1].square().sum() + sum(total.sum() for total in totals)
    close(*(gradients(loss, [z, *net.parameters()]) for loss in (found, wanted)))


@settings(max_examples=20)
@given(bounded_fields(), seeds, st.sampled_from([*FIXED, *ADAPTIVE]), st.sampled_from([1.0, -1.0]))
def test_any_field_up_to_rate_times_time_of_four(case: Bounded, seed: int, solver: Any, way: float) -> None:
    """Kidger et al. 2021: With L T <= 4, forwards and backwards, the gradient is that of the recursion to 1e-10 and
    never refused."""
    z = states(4, case.dim, seed).requires_grad_()
    out = ODEBlock(case.f, t1=way * case.time, solver=solver, gradient=FREE)(z)
    wanted = recursion(solver, lambda t, z: case.f(z), z, [0.0, way * case.time])[-1]
    close(*(gradients(x.square().sum(), [z, *case.f.parameters()]) for x in (out, wanted)))


@pytest.mark.parametrize("make, order", [(Euler, 1), (Midpoint, 2), (Heun, 2), (RK4, 4)], ids=["1", "2a", "2b", "4"])
def test_the_pair_keeps_the_order_of_its_method(make: Any, order: int) -> None:
    """The error against the closed form falls at the base method's order, or faster."""
    sizes, errors = [16, 32, 64, 128], []
    for n in sizes:
        end = ODEBlock(LINEAR.f, solver=make(n), gradient=FREE)(LINEAR.z0)
        errors.append((end - LINEAR.solution(1.0)).abs().max().item())
    assert slope([1 / n for n in sizes], errors) > order - 0.25, errors


@pytest.mark.parametrize("solver", [Dopri5, Tsit5], ids=name)
def test_step_control_holds_the_tolerance_at_every_output(solver: type) -> None:
    """Steps end at the output times, where the error falls with the tolerance; many outputs cost no accuracy."""
    ts = torch.linspace(0, 1, 23, dtype=F64).tolist()
    for tol in (1e-4, 1e-6, 1e-9):
        solution = ODEBlock(LINEAR.f, solver=solver(tol, tol), gradient=Reversible()).solve(LINEAR.z0, ts)
        assert (solution.zs - LINEAR.along(ts)).abs().max() < 10 * tol
        assert solution.stats.accepted >= 22 and (solution.stats.accepted == 22 or tol < 1e-4)


@pytest.mark.parametrize("solver", [Dopri5(1e-6, 1e-6), Tsit5(1e-6, 1e-6)], ids=name)
@pytest.mark.parametrize("problem", [FORCED, KEPLER, LOTKA_VOLTERRA], ids=lambda p: p.name)
def test_both_embedded_errors_of_a_step_are_within_the_tolerance(problem: Problem, solver: Any) -> None:
    """The forward half from z and the backward half from y', by the tableau."""
    march, t1, worst = CoupledAdaptive(solver, 0.999).march, 6.0, []
    with torch.no_grad():
        for taken in march(Evaluator(Field(problem.rate, True), 3), problem.z0, (0.0, t1), Clock(), row_rms):
            t, h, (_, z), (y, _) = taken.step.t, taken.step.h, taken.before, taken.after
            for at, start, length in ((t, z, h), (t + h, y, -h)):
                end, k = flow(solver, problem.rate, at, start, length)
                error = length * sum((w * x for w, x in zip(solver.tableau.error, k, strict=True)), torch.zeros_like(z))
                scale = 1e-6 + 1e-6 * torch.maximum(start.abs(), end.abs())
                worst.append(row_rms(error / scale).max().item())
    assert 0.5 < max(worst) <= 1.0 + 1e-9


@pytest.mark.parametrize("solver", [RK4(12), Dopri5(), ReversibleHeun(12)], ids=name)
def test_training_and_evaluation_give_the_same_values(solver: Any) -> None:
    """With and without a graph, and with or without anything to differentiate, the steps are the same."""
    net, z = TanhNet(), torch.randn(4, 3, dtype=F64)
    block: Any = (
        DropoutSDEBlock(net, 0.1, solver=solver, calculus="stratonovich", gradient=Reversible())
        if solver.calculus
        else ODEBlock(net, solver=solver, gradient=Reversible())
    )
    found = []
    for start, enabled in ((z.clone().requires_grad_(), True), (z, True), (z, False)):
        with torch.set_grad_enabled(enabled):
            found.append(block.solve(start, generator=torch.Generator().manual_seed(4)))
    net.requires_grad_(False)
    found.append(block.solve(z, generator=torch.Generator().manual_seed(4)))
    assert all(torch.equal(x.final, found[0].final) and x.stats.nfe == found[0].stats.nfe for x in found)
    assert [x.final.requires_grad for x in found] == [True, True, False, False]


@pytest.mark.parametrize("solver", [RK4(5), Dopri5(1e-9, 1e-9, first_step=0.5)], ids=name)
def test_a_pair_costs_twice_its_method(solver: Any) -> None:
    """RK4 8 evaluations a step, Dopri5 14 and 6 or 13 more for one that is thrown away; backwards as many once more."""
    block = ODEBlock(TanhNet(), solver=solver, gradient=Reversible())
    with count_nfe(block) as count:
        solution = block.solve(torch.randn(4, 3, dtype=F64))
        forward, taken, thrown = count.nfe, solution.stats.accepted, solution.stats.rejected
        solution.final.sum().backward()
    each = 8 if isinstance(solver, RK4) else 14
    assert (thrown > 0) == isinstance(solver, Dopri5)
    assert each * taken + 6 * thrown <= forward <= each * taken + 13 * thrown
    assert count.nfe - forward == each * taken


def alive() -> int:
    """How many tensors Python's collector knows."""
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())  # isinstance would wake lazy modules


def kept(block: nn.Module) -> tuple[int, int]:
    """How many tensors one forward solve leaves behind with its result, and its number of steps."""
    z = torch.ones(2, 2, dtype=F64)
    with torch.no_grad():
        block(z)  # what is made once is made
    before = alive()
    out = block.solve(z)
    assert out.final.requires_grad
    return alive() - before, out.stats.accepted


LONG: dict[str, Callable[[int, Any], nn.Module]] = {
    "pair": lambda n, g: ODEBlock(TanhNet(2), solver=RK4(n), gradient=g),
    "adaptive pair": lambda n, g: ODEBlock(TanhNet(2), t1=n / 10, solver=Dopri5(1e-9, 1e-9), gradient=g),
    "reversible Heun": lambda n, g: DropoutSDEBlock(
        TanhNet(2), 0.1, solver=ReversibleHeun(n), calculus="stratonovich", gradient=g
    ),
}


@pytest.mark.parametrize("kind", LONG)
def test_nothing_that_is_kept_grows_with_the_steps(kind: str) -> None:
    """The forward solve leaves as many tensors behind after 100 steps as after 10; `Checkpoint` more (control)."""
    (few, short), (many, long), (control, _) = (
        kept(LONG[kind](n, g)) for n, g in ((10, FREE), (100, FREE), (100, Checkpoint(100)))
    )
    assert long > 5 * short and many == few < 25 and control > few + 50


@pytest.mark.parametrize("solver", [RK4(20), ReversibleHeun(20)], ids=name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_its_gradient(dtype: torch.dtype, solver: Any) -> None:
    """The state is carried in float32 and undone there; the gradient is Backprop's to the field's own rounding."""
    f, found = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)), []
    for gradient in (Reversible(), Backprop()):
        g = torch.Generator().manual_seed(1)
        z = torch.randn(4, 3, generator=g).to(dtype).requires_grad_()
        block: Any = (
            DropoutSDEBlock(f, 0.1, solver=solver, calculus="stratonovich", gradient=gradient)
            if solver.calculus
            else ODEBlock(f, solver=solver, gradient=gradient)
        )
        block.solve(z, generator=g).final.float().square().sum().backward()
        assert z.grad is not None and z.grad.dtype == dtype
        found.append(z.grad.float())
    assert (found[0] - found[1]).abs().max() < 20 * torch.finfo(dtype).eps * found[1].abs().max()
