"""What an Equilibrium goes with: calls, contexts, times, half precision; what it is refused with; what rest is not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import (
    RK4,
    Adjoint,
    AugmentedODEBlock,
    Backprop,
    Checkpoint,
    Dopri5,
    DropoutSDEBlock,
    Equilibrium,
    Implicit,
    ODEBlock,
    SDEBlock,
    SteadyStateRegularizer,
    TorchDiffEq,
    Uniform,
    check_stability,
)
from problems import name

pytestmark = pytest.mark.timeout(60)
F64 = torch.float64
END = Equilibrium(1e-2, 20.0)


def decay(z: Tensor) -> Tensor:
    return -z


def test_an_equilibrium_is_a_value_and_stands_in_the_repr() -> None:
    """It compares, hashes, pickles and copies by value, and a block's repr is the record."""
    for item in (END, Implicit()):
        assert pickle.loads(pickle.dumps(item)) == item == copy.deepcopy(item) == eval(repr(item))
        assert hash(item) == hash(copy.deepcopy(item))
    assert "t1=Equilibrium(tol=0.01, t_max=20.0)" in repr(ODEBlock(decay, t1=END))
    block = copy.deepcopy(ODEBlock(nn.Linear(2, 2), t1=END, gradient=Checkpoint()))
    assert block.t1 == END and pickle.loads(pickle.dumps(block)).t1 == END


@pytest.mark.parametrize("gradient", [Backprop(), Checkpoint()], ids=name)
def test_it_may_be_given_in_a_call_and_replaced_in_one(gradient: Any) -> None:
    """block(z, END) on a block with a number as t1 is the block with END; and the other way round."""
    z = torch.linspace(0.1, 3, 8, dtype=F64).reshape(4, 2)
    plain, settling = ODEBlock(decay, t1=2.0, gradient=gradient), ODEBlock(decay, t1=END, gradient=gradient)
    assert torch.equal(plain(z, END), settling(z)) and torch.equal(plain.solve(z, t1=END).ts, settling.solve(z).ts)
    assert torch.equal(settling(z, 2.0), plain(z)) and settling.solve(z, t1=2.0).stats.settled is None
    assert plain.solve(z).stats.settled is None and plain.solve(z, [0.0, 1.0]).stats.settled is None


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: Equilibrium(0.0, 1.0), ValueError, "Equilibrium: tol: expected a number > 0, got 0.0"),
    (lambda: Equilibrium("1e-3", 1.0), TypeError, "Equilibrium: tol: expected a number"),
    (lambda: Equilibrium(1e-3, float("inf")), ValueError, "Equilibrium: t_max: expected a finite number"),
    (lambda: Equilibrium(1e-3), TypeError, "t_max"),
    (lambda: ODEBlock(decay, t0=20.0, t1=END), ValueError, "ODEBlock: t1=Equilibrium.*expected t_max after t0=20.0"),
    (
        lambda: ODEBlock(decay, t1=END, solver=TorchDiffEq("dopri5")),
        ValueError,
        r"does not stop row by row; use Dopri5",
    ),
    (lambda: ODEBlock(decay, t1=END, gradient=Adjoint()), ValueError, "solves backwards, out of the equilibrium"),
    (lambda: ODEBlock(decay, t1=END, solver=Dopri5(batch="independent")), ValueError, "leave batch='independent' out"),
    (lambda: ODEBlock(decay, t1=END, compile=True), ValueError, "compile=True compiles solves to a time that is known"),
    (lambda: SDEBlock(decay, torch.cos, t1=END, time=False), ValueError, "SDEBlock: .*noise never comes to rest"),
    (lambda: DropoutSDEBlock(decay, t1=END), ValueError, "DropoutSDEBlock: .*noise never comes to rest"),
    (lambda: AugmentedODEBlock(decay, 1, t1=END, gradient=Adjoint()), ValueError, "AugmentedODEBlock: .*backwards"),
    (lambda: ODEBlock(decay, gradient=Implicit()), ValueError, r"gradient of an equilibrium, got t1=1.0"),
    (lambda: ODEBlock(decay, t1=Uniform(1, 2), gradient=Implicit()), ValueError, "got t1=Uniform"),
    (lambda: ODEBlock(lambda t, z: -z, t1=END, gradient=Implicit()), ValueError, r"takes f\(z\) = 0 for granted"),
    (lambda: DropoutSDEBlock(decay, gradient=Implicit()), ValueError, "is the gradient of an equilibrium"),
]
STATE = torch.ones(2, 1, dtype=F64)
REFUSED_IN_A_CALL: list[tuple[Any, str]] = [
    (lambda: ODEBlock(decay, t1=END).solve(STATE, [0.0, 1.0]), "ts: under t1=Equilibrium.*no output times for all"),
    (lambda: ODEBlock(decay).solve(STATE, [0.0, 1.0], t1=END), "expected ts or t1, got both"),
    (lambda: ODEBlock(decay, t0=30.0, t1=31.0)(STATE, END), "expected t_max after t0=30.0"),
    (lambda: ODEBlock(decay, gradient=Adjoint())(STATE, END), "solves backwards"),
    (lambda: ODEBlock(decay, solver=TorchDiffEq("rk4"))(STATE, END), "does not stop row by row"),
    (lambda: DropoutSDEBlock(decay).eval()(STATE, END), r"use ODEBlock\(f, t1=...\)"),
    (lambda: ODEBlock(decay, t1=END, gradient=Implicit())(STATE, 2.0), "got t1=2.0"),
    (
        lambda: ODEBlock(decay, t1=END, gradient=Implicit()).solve(STATE, running=[SteadyStateRegularizer()]),
        "not of the way to it, along which regularisers accumulate",
    ),
]


@pytest.mark.parametrize("make, kind, words", REFUSED)
def test_what_does_not_go_with_an_equilibrium_is_refused_at_construction(
    make: Any, kind: type[Exception], words: str
) -> None:
    """Numbers that make no sense, a start after the end, solvers without steps of their own, noise, adjoints."""
    with pytest.raises(kind, match=words):
        make()


@pytest.mark.parametrize("call, words", REFUSED_IN_A_CALL)
def test_what_does_not_go_with_an_equilibrium_is_refused_in_a_call(call: Any, words: str) -> None:
    """Output times, and the same pairs where the end time comes with the call."""
    with pytest.raises(ValueError, match=words):
        call()


def test_it_is_refused_under_vmap_with_the_reason() -> None:
    """The host decides who is at rest."""
    block = ODEBlock(decay, t1=END, solver=RK4(5))
    with pytest.raises(RuntimeError, match=r"Equilibrium under torch.func.vmap.*hand the rows over as one batch"):
        torch.func.vmap(lambda z: block(z[None])[0])(STATE)


def test_an_empty_batch_and_inference_mode() -> None:
    """Nothing gives nothing, with a settled of its length; inference mode gives the same states."""
    for gradient in (Backprop(), Checkpoint(), Implicit()):
        block = ODEBlock(decay, t1=END, gradient=gradient)
        empty = block.solve(torch.zeros(0, 3, dtype=F64))
        assert empty.zs.shape == (2, 0, 3) and empty.ts.shape == (2, 0) and empty.stats.settled.shape == (0,)
        with torch.inference_mode():
            found = block(STATE)
        with torch.no_grad():
            assert torch.equal(found, block(STATE))


@pytest.mark.parametrize("gradient", [Backprop(), Checkpoint()], ids=name)
@pytest.mark.parametrize("solver", [RK4(100), Dopri5()], ids=name)
def test_contexts_follow_their_rows_and_one_for_all_stays_whole(solver: Any, gradient: Any) -> None:
    """Even one with as many entries as rows are left, after some failed and others settled."""
    z = torch.ones(5, 4, dtype=F64)
    z[0], z[3] = float("nan"), 0.0
    own = torch.tensor([[9.0], [1.0], [2.0], [0.0], [-3.0]], dtype=F64, requires_grad=True)
    shared = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64, requires_grad=True)  # as many as are left without row 0
    f = lambda z, a, b: a * b - z  # noqa: E731
    block = ODEBlock(f, t1=END, solver=solver, gradient=gradient, time=False, on_failure="isolate")
    solution = block.solve(z, context=(own, shared))
    assert solution.stats.settled.tolist() == [False, True, True, True, True] and solution.ts[1, 3] == 0.0
    rest = own[1:] * shared
    wanted = rest + (z[1:] - rest) * torch.exp(-solution.ts[1, 1:])[:, None]
    assert (solution.final[1:] - wanted).abs().max() < 1e-4
    found, right = (torch.autograd.grad(x.sum(), (own, shared)) for x in (solution.final[1:], wanted))
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_half_precision_state_settles_in_float32(half: torch.dtype) -> None:
    """The state goes back in its dtype; times are float32."""
    solution = ODEBlock(decay, t1=Equilibrium(1e-1, 20.0)).solve(torch.tensor([[0.05], [4.0]], dtype=half))
    assert solution.final.dtype == half and solution.ts.dtype == torch.float32
    assert solution.stats.settled.all() and solution.ts[1, 0] == 0 and 3.6 < solution.ts[1, 1] < 6


def test_a_field_with_a_time_is_asked_at_the_time_reached() -> None:
    """z' = 1 - t comes to rest at t = 1 and would move on: the row stops within a step of it."""
    block = ODEBlock(lambda t, z: 1 - t + 0 * z, t0=0.25, t1=Equilibrium(6e-2, 9.0), solver=RK4(88))
    solution = block.solve(torch.zeros(2, 1, dtype=F64))
    assert solution.ts[1].tolist() == pytest.approx([1.0, 1.0], abs=0.1)
    assert solution.stats.nfe == 4 * solution.stats.accepted + 1


@pytest.mark.parametrize("gradient", [Backprop(), Checkpoint()], ids=name)
@pytest.mark.parametrize("solver", [RK4(300), Dopri5()], ids=name)
def test_a_steady_state_that_is_never_reached_is_bounded_by_t_max(solver: Any, gradient: Any) -> None:
    """A field that pushes for ever is asked for no time after t_max, and its rows end there unsettled."""
    seen: list[float] = []

    def f(t: Tensor, z: Tensor) -> Tensor:
        seen.append(float(t))
        return torch.ones_like(z)

    block = ODEBlock(f, t0=-1.0, t1=Equilibrium(1e-3, 30.0), solver=solver, gradient=gradient)
    solution = block.solve(torch.zeros(2, 1, dtype=F64))
    assert solution.ts[1].tolist() == [30.0, 30.0] and not solution.stats.settled.any()
    assert solution.final.flatten().tolist() == pytest.approx([31.0, 31.0])
    assert min(seen) == -1.0 and max(seen) == pytest.approx(30.0, abs=1e-12) and max(seen) <= 30.0 + 1e-12


def test_rest_is_not_stability() -> None:
    """Control: at the saddle of z' = (x, -y) a row is at rest at once; check_stability tells it from a sink."""
    saddle = lambda z: z * torch.tensor([1.0, -1.0], dtype=F64)  # noqa: E731
    solution = ODEBlock(saddle, t1=END).solve(torch.tensor([[1e-9, 1.0]], dtype=F64))
    assert solution.stats.settled.all() and solution.ts[1] < 6
    assert check_stability(saddle, solution.final).abscissa > 0 > check_stability(decay, solution.final).abscissa


def test_step_size_control_does_not_resolve_a_tol_below_its_own() -> None:
    """Steps at the limit of stability keep |f| near the solver's atol: tighter tolerances or a fixed grid settle."""
    z = torch.linspace(-2, 2, 20, dtype=F64).reshape(10, 2)
    f = lambda z: torch.tanh(z.flip(1) / 2) + 0.3 - z  # noqa: E731
    end = Equilibrium(1e-8, 200.0)
    loose, tight, grid = (
        ODEBlock(f, t1=end, solver=s).solve(z).stats for s in (Dopri5(), Dopri5(1e-9, 1e-9), RK4(400))
    )
    assert not loose.settled.any() and loose.nfe > 500
    assert tight.settled.all() and grid.settled.all()
