"""What is refused where it is written: nonsense in constructors, illegal pairs; and records that compare and pickle."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch

from odelayers import (
    RK4,
    Adjoint,
    AugmentedODEBlock,
    Backprop,
    Checkpoint,
    Dopri5,
    DropoutSDEBlock,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
    Milstein,
    ODEBlock,
    Reversible,
    ReversibleHeun,
    SDEBlock,
    SolveError,
    StratonovichHeun,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
    Uniform,
)
from odelayers._driver import Clock
from odelayers._evaluator import Evaluator
from odelayers._field import Field
from odelayers._gradients import Gradient
from odelayers._solvers import FixedGrid, MarchingSolver, Solver
from problems import name

pytestmark = pytest.mark.timeout(60)
NAN = float("nan")


@pytest.mark.parametrize(
    "f, words",
    [
        (3, "expected a callable"),
        (lambda: None, r"cannot tell f\(z\) from f\(t, z\).*time=True"),
        (lambda *a: a[0], r"cannot tell f\(z\)"),
        (lambda z, t: z, r"expected f\(t, z\) with the time first, got f\(z, t\)"),
    ],
    ids=["number", "no argument", "star", "swapped"],
)
def test_a_field_of_unclear_signature_is_refused_at_construction(f: Any, words: str) -> None:
    """f(z) or f(t, z) is decided once, and what cannot be decided is asked for."""
    with pytest.raises(TypeError, match=words):
        ODEBlock(f)


@pytest.mark.parametrize(
    "make, kind, words",
    [
        (lambda: RK4(steps=0), ValueError, "RK4: steps: expected an int >= 1, got 0"),
        (lambda: Euler(steps=-3), ValueError, "Euler: steps"),
        (lambda: RK4(steps=2.5), TypeError, "got 2.5 .float"),
        (lambda: RK4(steps=True), TypeError, "got True"),
        (lambda: RK4(), TypeError, "missing 1 required"),
        (lambda: Dopri5(rtol=-1e-3), ValueError, "Dopri5: rtol: expected a number > 0, got -0.001"),
        (lambda: Dopri5(atol=NAN), ValueError, "Dopri5: atol: expected a finite number"),
        (lambda: Dopri5(rtol="1e-3"), TypeError, "Dopri5: rtol: expected a number, got '1e-3'"),
        (lambda: Tsit5(max_steps=0), ValueError, "Tsit5: max_steps"),
        (lambda: Tsit5(first_step=0.0), ValueError, "Tsit5: first_step"),
        (lambda: Dopri5(batch="own"), ValueError, "Dopri5: batch: expected one of 'shared', 'independent', got 'own'"),
        (lambda: Dopri5(tol=1e-3), TypeError, "unexpected keyword argument 'tol'"),
        (
            lambda: TorchDiffEq("nonsense"),
            ValueError,
            "TorchDiffEq: method: expected one of .*'dopri5'.*got 'nonsense'",
        ),
        (lambda: TorchDiffEq("dopri5", step_size=0.1), ValueError, "step_size goes with euler"),
        (lambda: TorchDiffEq("rk4", step_size=-0.1), ValueError, "step_size"),
        (lambda: TorchSDE("nonsense"), ValueError, "TorchSDE: method: expected one of 'euler'"),
        (lambda: TorchSDE("euler", 0), ValueError, "TorchSDE: steps"),
        (lambda: Adjoint(max_drift=0.0), ValueError, "Adjoint: max_drift"),
        (lambda: Checkpoint(segments=0), ValueError, "Checkpoint: segments: expected an int >= 1, got 0"),
        (lambda: Checkpoint(segments="step"), TypeError, "Checkpoint: segments: expected an int >= 1, got 'step'"),
        (lambda: Checkpoint(segments=True), TypeError, "Checkpoint: segments"),
        (lambda: Reversible(coupling=1.5), ValueError, r"Reversible: coupling: expected a number in \(0, 1\], got 1.5"),
        (lambda: Reversible(coupling=0.0), ValueError, "Reversible: coupling"),
        (lambda: Reversible(max_gap=0.0), ValueError, "Reversible: max_gap"),
        (lambda: Reversible(max_drift=-1.0), ValueError, "Reversible: max_drift"),
        (lambda: Reversible(0.9, lam=1.0), TypeError, "unexpected keyword argument 'lam'"),
        (lambda: Uniform(2.0, 1.0), ValueError, "expected a < b, got a=2.0, b=1.0"),
        (lambda: ODEBlock(torch.sin, time=False, solver="rk4"), ValueError, r"got 'rk4'.*RK4\(steps=20\)"),
        (lambda: ODEBlock(torch.sin, time=False, solver=RK4), TypeError, "expected a solver such as"),
        (
            lambda: ODEBlock(torch.sin, time=False, gradient="adjoint"),
            TypeError,
            r"expected Backprop\(\), Checkpoint",
        ),
        (lambda: ODEBlock(torch.sin, time=False, rtol=1e-3), TypeError, "unexpected keyword argument 'rtol'"),
        (lambda: ODEBlock(torch.sin, time=False, on_failure="skip"), ValueError, "expected one of 'raise', 'isolate'"),
        (lambda: DropoutSDEBlock(torch.sin, 1.0, time=False), ValueError, r"drop probability in \[0, 1\), got 1.0"),
        (lambda: DropoutSDEBlock(torch.sin, -0.1, time=False), ValueError, "drop probability"),
        (
            lambda: DropoutSDEBlock(torch.sin, 0.1, layer_time=0.0, time=False),
            ValueError,
            "layer_time: expected a number > 0",
        ),
    ],
)
def test_nonsense_is_refused_at_construction(make: Any, kind: type[Exception], words: str) -> None:
    """Unknown keywords, impossible numbers and names fail where they are written."""
    with pytest.raises(kind, match=words):
        make()


ABSTRACT = {  # what a solver or a gradient of one's own must say
    Solver: ["integrate"],
    MarchingSolver: ["start", "march", "again"],
    FixedGrid: ["step"],
    Gradient: ["accepts", "solve"],
}


@pytest.mark.parametrize("base, forgotten", [(base, method) for base, ms in ABSTRACT.items() for method in ms])
def test_a_solver_or_gradient_that_lacks_a_method_is_refused_when_made(base: type, forgotten: str) -> None:
    """Not in the middle of a solve: Python names what is missing; with every method there it is made (control)."""
    methods = {method: lambda *_, **__: None for method in ABSTRACT[base]}
    arguments = {"steps": 3} if base is FixedGrid else {}
    type("Whole", (base,), methods)(**arguments)
    del methods[forgotten]
    with pytest.raises(TypeError, match=rf"abstract class Lacking .*abstract method '?{forgotten}'?"):
        type("Lacking", (base,), methods)(**arguments)


def test_errors_and_records_survive_pickling_and_copying() -> None:
    """A SolveError from a worker process reads the same; solvers and gradients compare and hash by value."""
    with pytest.raises(SolveError) as caught:
        ODEBlock(lambda z: z**2, t1=2.0)(torch.ones(2, 1))
    error = caught.value
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.rows, again.t, again.status) == (str(error), error.rows, error.t, error.status)
    assert isinstance(error, RuntimeError)
    for item in (
        Dopri5(rtol=1e-7),
        RK4(3),
        TorchSDE("heun", 4),
        TorchDiffEq("rk4", step_size=0.5),
        Adjoint(),
        Checkpoint(segments=4),
        Reversible(0.9, max_gap=0.5),
        Uniform(1, 2),
    ):
        assert pickle.loads(pickle.dumps(item)) == item == copy.deepcopy(item) == eval(repr(item))
        assert hash(item) == hash(copy.deepcopy(item))
    assert Dopri5() != Tsit5() and RK4(3) != RK4(4)


INDEPENDENT = (Dopri5(batch="independent"), Tsit5(batch="independent"))
OWN_ODE = (Dopri5(), Tsit5(), *INDEPENDENT, Euler(3), Midpoint(3), Heun(3), RK4(3))
OWN_SDE = (EulerMaruyama(3), Milstein(3), StratonovichHeun(3), ReversibleHeun(3))
LIBRARY_ODE = (TorchDiffEq("dopri5"), TorchDiffEq("rk4", step_size=0.5), TorchDiffEq("scipy_solver"))
LIBRARY_SDE = (TorchSDE("euler", 3), TorchSDE("heun", 3), TorchSDE("reversible_heun", 3))
SOLVERS = (*OWN_ODE, *OWN_SDE, *LIBRARY_ODE, *LIBRARY_SDE)


def legal(solver: Any, gradient: Any) -> bool:
    """The table of design: Backprop with every solver that leaves a graph, and so on."""
    if isinstance(gradient, Backprop):
        return solver != TorchDiffEq("scipy_solver")
    if isinstance(gradient, Checkpoint):
        return solver in (*OWN_ODE, *OWN_SDE)
    if solver in INDEPENDENT:
        return False
    if isinstance(gradient, Reversible):
        return solver in (*OWN_ODE, ReversibleHeun(3))
    return solver in (*OWN_ODE, *LIBRARY_ODE, TorchSDE("reversible_heun", 3))


def build(block: type, solver: Any, gradient: Any) -> Any:
    """A block of a kind with this solver and gradient, and for SDEs in the solver's reading, with scalar noise."""
    options: dict[str, Any] = {"solver": solver, "gradient": gradient, "time": False, "t1": 0.2}
    if block in (SDEBlock, DropoutSDEBlock):
        options |= {"noise": "scalar", "calculus": (solver.calculus or ("ito",))[0]}
    more = {SDEBlock: (torch.cos,), AugmentedODEBlock: (2,)}.get(block, ())
    return block(torch.sin, *more, **options)


@pytest.mark.parametrize("gradient", [Backprop(), Checkpoint(), Reversible(), Adjoint()], ids=name)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("block", [ODEBlock, AugmentedODEBlock, SDEBlock, DropoutSDEBlock], ids=name)
def test_every_combination_runs_or_is_refused_with_the_legal_ones(block: type, solver: Any, gradient: Any) -> None:
    """A combination either trains, with a finite gradient, or raises at construction and names what is legal."""
    fits = bool(solver.calculus) == (block in (SDEBlock, DropoutSDEBlock))
    if fits and legal(solver, gradient):
        z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        build(block, solver, gradient)(z).sum().backward()
        assert z.grad is not None and bool(z.grad.isfinite().all()) and z.grad.abs().max() > 0
        return
    with pytest.raises(ValueError) as caught:
        build(block, solver, gradient)
    if fits:
        named = [g for g in (Backprop(), Checkpoint(), Reversible(), Adjoint()) if legal(solver, g)]
        assert f"{gradient!r} cannot differentiate" in str(caught.value) or f"{name(gradient)}()" in str(caught.value)
        assert all(f"{name(g)}()" in str(caught.value) for g in named)
    else:
        assert "solver" in str(caught.value) or "solves ODEs only" in str(caught.value)


def test_checkpointing_asked_past_the_block_refuses_a_foreign_solver() -> None:
    """A gradient used without a block still refuses what it cannot take again step by step."""
    f = Evaluator(Field.of(torch.sin, time=False), 2)
    with pytest.raises(TypeError, match=r"Checkpoint: expected a solver of odelayers, got TorchDiffEq"):
        Checkpoint().solve(TorchDiffEq("dopri5"), f, torch.ones(2, 1), [0.0, 1.0], Clock())


def test_solvers_of_one_kind_differ_only_by_their_numbers() -> None:
    """No two of the solvers above compare equal, and each prints as the call that makes it."""
    assert all(a != b for a, b in itertools.combinations(SOLVERS, 2))
    assert all(eval(repr(solver)) == solver for solver in SOLVERS)
