"""Bad input: every fault ends in a typed error that says what, where, expected, got and what to do. Nothing hangs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import (
    RK4,
    Adjoint,
    Backprop,
    Checkpoint,
    Dopri5,
    DropoutSDEBlock,
    Euler,
    EulerMaruyama,
    ODEBlock,
    Reversible,
    Rodas5P,
    SDEBlock,
    SolveError,
    Status,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
)
from problems import name

pytestmark = pytest.mark.timeout(60)
NAN, INF = float("nan"), float("inf")
OWN = Dopri5(batch="independent")
CONTROLLED = (Dopri5(), Tsit5(), OWN, Rodas5P())
SOLVERS = (*CONTROLLED, RK4(steps=20), TorchDiffEq("dopri5"), TorchDiffEq("rk4", step_size=0.1))
ONES = torch.ones(4, 2, dtype=torch.float64)


def failure(block: nn.Module, z: Tensor, **options: Any) -> SolveError:
    """The error of a solve that must fail, whose text must be readable and complete."""
    with pytest.raises(SolveError) as caught:
        block.solve(z, **options)
    error = caught.value
    assert "To mend it:" in str(error) and "on_failure='isolate'" in str(error)
    return error


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_a_bad_initial_row_is_named(solver: Any, bad: float) -> None:
    """NaN or inf in one row of z0: the row, the start time and the cause; not the whole batch."""
    z = ONES.clone()
    z[2, 1] = bad
    error = failure(ODEBlock(lambda z: -z, t0=0.25, solver=solver), z)
    assert (error.rows, error.t, error.status) == ((2,), (0.25,), Status.NONFINITE)
    assert "1 row(s) failed [2] at t = 0.25: the initial state or the field's value there is NaN or inf" in str(error)


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_a_field_that_gives_nan_is_reported(solver: Any) -> None:
    """log of a negative state: that row, at the start. torchdiffeq's fixed grid is not looked into before its end."""
    z = ONES.clone()
    z[1] = -1.0
    error = failure(ODEBlock(torch.log, solver=solver, time=False), z)
    late = solver == TorchDiffEq("rk4", step_size=0.1)
    wanted = ((1,), (1.0,), Status.BLOW_UP) if late else ((1,), (0.0,), Status.NONFINITE)
    assert (error.rows, error.t, error.status) == wanted


@pytest.mark.parametrize("way", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("solver", CONTROLLED, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_finite_time_blow_up_is_diagnosed_with_its_time(solver: Any, way: int, dtype: torch.dtype) -> None:
    """y' = y^2 from 1 has no solution beyond t = 1: BLOW_UP of the rows that reach it, close to t = 1."""
    z = torch.tensor([[0.1], [1.0], [-1.0]], dtype=dtype)
    error = failure(ODEBlock(lambda z: way * z**2, t1=2.0 * way, solver=solver), z)
    assert (error.rows, error.status) == ((1,), Status.BLOW_UP)
    assert error.t[0] == pytest.approx(way * 1.0, abs=1e-2)


@pytest.mark.parametrize("solver", [RK4(steps=4), Dopri5(), OWN, Rodas5P()], ids=name)
def test_a_field_that_is_infinite_at_the_start_time_alone_fails_there(solver: Any) -> None:
    """log t at t = 0: the states are finite and so is the field later on; all rows fail at 0, as not finite."""
    error = failure(ODEBlock(lambda t, z: t.log() + 0 * z, t1=2.0, solver=solver), torch.ones(2, 1))
    assert (error.rows, error.t, error.status) == ((0, 1), (0.0, 0.0), Status.NONFINITE)


@pytest.mark.parametrize("solver", [RK4(steps=400), Euler(steps=400)], ids=name)
def test_a_blow_up_on_a_fixed_grid_names_row_and_time(solver: Any) -> None:
    """A fixed grid steps over the singularity and overflows soon after: the first bad step is found."""
    z = torch.tensor([[0.1], [1.0]], dtype=torch.float64)
    error = failure(ODEBlock(lambda z: z**2, t1=2.0, solver=solver), z)
    assert (error.rows, error.status) == ((1,), Status.BLOW_UP) and 1.0 <= error.t[0] < 1.2


@pytest.mark.parametrize("solver", [Dopri5(), Tsit5(), OWN], ids=name)
def test_a_state_that_overflows_with_a_small_error_is_no_result(solver: Any) -> None:
    """At a constant rate a step has no error, and relative to inf it is 0: the row fails, its neighbour does not."""
    z = torch.tensor([[1.0], [3.4e38]])
    block = ODEBlock(lambda z: torch.where(z > 1e38, 1e33, 0.0), t1=1e5, solver=solver)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            error = failure(block, z)
            assert (error.rows, error.status) == ((1,), Status.BLOW_UP)
            found = block.solve(z, on_failure="isolate").final
        assert found[0] == 1.0 and found[1].isnan()


@pytest.mark.parametrize("solver", [Dopri5(), RK4(steps=4)], ids=name)
def test_finite_states_whose_sum_overflows_are_a_result(solver: Any) -> None:
    """Finite states are told by their sum, which these two overflow: nothing is wrong with them. With -inf there is."""
    z = torch.full((2, 1), 3e38)
    assert torch.equal(ODEBlock(lambda z: 0 * z.sin(), solver=solver)(z), z)
    z[1] = -torch.inf
    assert failure(ODEBlock(lambda z: 0 * z.sin(), solver=solver), z).rows == (1,)


def test_a_blow_up_inside_a_noisy_solve_names_row_and_time() -> None:
    """An SDE whose drift blows up fails with the row and the time of the step."""
    z = torch.tensor([[0.0], [40.0]], dtype=torch.float64)
    error = failure(DropoutSDEBlock(lambda z: z**3, 0.1, t1=2.0, solver=EulerMaruyama(40)), z)
    assert (error.rows, error.status) == ((1,), Status.BLOW_UP) and 0 < error.t[0] < 2
    error = failure(SDEBlock(lambda z: z**3, torch.ones_like, solver=TorchSDE("euler", 40), time=False), z)
    assert (error.rows, error.status) == ((1,), Status.BLOW_UP)


@pytest.mark.parametrize("solver", [Dopri5(), Tsit5(), OWN], ids=name)
def test_a_stiff_field_is_called_stiff_and_an_implicit_method_named(solver: Any) -> None:
    """-1e6 z spends a budget of 1500 steps; stability limits the step, and the message says what helps."""
    error = failure(ODEBlock(lambda z: -1e6 * z, solver=replace(solver, max_steps=1500)), torch.ones(2, 1))
    assert (error.rows, error.status) == ((0, 1), Status.STIFF)
    assert "solver=Rodas5P()" in str(error) and "1500 steps" in str(error)


@pytest.mark.parametrize("solver", [Dopri5(), Tsit5(), OWN], ids=name)
def test_a_step_too_short_for_the_time_is_said(solver: Any) -> None:
    """-1e20 z asks for steps that vanish beside t = 1; rows that step by themselves get far enough to be STIFF."""
    error = failure(ODEBlock(lambda z: -1e20 * z, solver=replace(solver, max_steps=1500)), torch.ones(2, 1))
    assert (error.rows, error.status) == ((0, 1), Status.STIFF if solver == OWN else Status.STEP_UNDERFLOW)
    assert all(0 <= t < 1e-15 for t in error.t)


def test_the_remedy_for_a_stiff_field_works() -> None:
    """Rodas5P, as the message advises, solves and trains it: z -> level / 1e6, whose derivative is 1e-6."""
    level = torch.ones(1, requires_grad=True)
    end = ODEBlock(lambda z, level: -1e6 * z + level, solver=Rodas5P(), time=False)(ONES.float(), context=level)
    assert (end - 1e-6).abs().max() < 1e-5
    (found,) = torch.autograd.grad(end[0, 0], level)
    assert found.item() == pytest.approx(1e-6, rel=1e-3)


def test_a_hard_row_is_told_from_its_easy_mates_when_the_budget_is_spent() -> None:
    """Only the row that needs the short steps is named, with how far the solve came."""
    speed = torch.tensor([[0.1], [500.0], [0.1]], dtype=torch.float64)
    block = ODEBlock(lambda t, z, w: w * torch.cos(w * t) + 0 * z, solver=Dopri5(max_steps=60))
    error = failure(block, torch.zeros(3, 1, dtype=torch.float64), context=speed)
    assert (error.rows, error.status) == ((1,), Status.MAX_STEPS)
    assert 0 < error.t[0] < 1 and "raise max_steps" in str(error) and "60 steps" in str(error)


def test_the_step_budget_may_be_spent_exactly() -> None:
    """A solve that ends with its last allowed step is a success."""
    used = ODEBlock(torch.sin, time=False).solve(ONES).stats
    tight = Dopri5(max_steps=used.accepted + used.rejected)
    assert ODEBlock(torch.sin, time=False, solver=tight).solve(ONES).stats.accepted == used.accepted
    failure(ODEBlock(torch.sin, time=False, solver=Dopri5(max_steps=tight.max_steps - 1)), ONES)


@pytest.mark.parametrize(
    "z, kind, words",
    [
        (torch.ones(2, 1, dtype=torch.int64), TypeError, "expected a floating-point state z, got torch.int64.*z.float"),
        (torch.ones(2, 1, dtype=torch.bool), TypeError, "expected a floating-point state z, got torch.bool"),
        (torch.ones(2, 1, dtype=torch.complex64), TypeError, "view_as_real"),
        (torch.tensor(1.0), ValueError, r"expected a state z of shape \(B, \.\.\.\), got a 0-d tensor"),
        ([[1.0]], TypeError, r"expected the state z as a Tensor \(B, \.\.\.\), got list"),
        (
            torch.ones(2, 1, dtype=torch.float64),
            TypeError,
            r"the state z is torch.float64, a parameter.*torch.float32.*block.to",
        ),
    ],
)
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_a_state_that_does_not_fit_is_refused(solver: Any, z: Any, kind: type[Exception], words: str) -> None:
    """Integer, complex, 0-d, no tensor, or another dtype than the field's: expected, got, remedy."""
    with pytest.raises(kind, match=words):
        ODEBlock(nn.Linear(1, 1), solver=solver)(z)


@pytest.mark.parametrize(
    "f, kind, words",
    [
        (lambda z: z[:, :1], ValueError, r"expected dz/dt of the state's shape \(4, 2\), got \(4, 1\)"),
        (lambda z: z.sum(), ValueError, r"shape \(4, 2\), got \(\)"),
        (lambda z: z.float(), TypeError, "expected dz/dt in the state's torch.float64, got torch.float32"),
        (lambda z: None, TypeError, "expected a Tensor, got NoneType"),
        (lambda z: (z, z), TypeError, "expected a Tensor, got tuple"),
        (lambda z: z.mul_(-1), ValueError, "changed its input z in place.*out-of-place"),
    ],
    ids=["broadcast", "scalar", "dtype", "none", "tuple", "in place"],
)
@pytest.mark.parametrize("gradient", [Backprop(), Checkpoint(), Reversible(), Adjoint()], ids=name)
def test_a_field_that_does_not_fit_is_refused(gradient: Any, f: Any, kind: type[Exception], words: str) -> None:
    """Wrong shape, dtype or type, or work in place: the solve's own first evaluation says so, and z is unharmed."""
    z = ONES.clone()
    for solver in (Dopri5(), OWN, RK4(3), TorchDiffEq("dopri5")):
        if gradient.accepts(solver):
            with pytest.raises(kind, match=words):
                ODEBlock(f, solver=solver, gradient=gradient)(z)
    assert torch.equal(z, ONES)


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_an_error_of_the_field_s_own_reaches_the_user_as_it_is(solver: Any) -> None:
    """Where dtype and device agree nothing is guessed: the field's RuntimeError passes, and as what it was raised."""

    class Broken(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            raise RuntimeError("the valve is stuck")

    with pytest.raises(RuntimeError, match="^the valve is stuck$") as caught:
        ODEBlock(Broken(2, 2).double(), solver=solver)(ONES)
    assert type(caught.value) is RuntimeError


def test_a_diffusion_that_does_not_fit_is_refused() -> None:
    """g is checked as f is, by name."""
    with pytest.raises(ValueError, match=r"field g: expected dz/dt of the state's shape \(4, 2\), got \(4, 1\)"):
        SDEBlock(lambda z: -z, g)(ONES)


def g(z: Tensor) -> Tensor:
    """Too narrow a diffusion."""
    return z[:, :1]


@pytest.mark.parametrize("gradient", [Backprop(), Checkpoint(), Reversible(), Adjoint()], ids=name)
def test_dropout_in_the_field_is_refused_in_training(gradient: Any) -> None:
    """A mask drawn anew at every evaluation is another field each time; eval() and DropoutSDEBlock are the remedies."""
    block = ODEBlock(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), gradient=gradient)
    with pytest.raises(ValueError, match=r"holds Dropout in training mode.*DropoutSDEBlock.*eval\(\)"):
        block(ONES.float())
    block.eval()(ONES.float())


def test_batchnorm_in_the_field_is_warned_of_or_refused() -> None:
    """Batch statistics couple the samples: a warning under Backprop, refused by gradients that evaluate again."""
    f = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.warns(UserWarning, match=r"BatchNorm1d using batch statistics.*GroupNorm") as caught:
        ODEBlock(f, solver=RK4(4))(torch.randn(4, 2))
    assert len(caught) == 1  # of a solve with 16 evaluations
    for gradient in (Checkpoint(), Reversible(), Adjoint()):
        with pytest.raises(
            ValueError, match=rf"BatchNorm1d.*{name(gradient)}\(\) evaluates the field again and is refused"
        ):
            ODEBlock(f, gradient=gradient)(torch.randn(4, 2))
    ODEBlock(f.eval(), gradient=Checkpoint())(torch.randn(4, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", [Dopri5(), OWN, RK4(20)], ids=name)
def test_half_precision_is_carried_in_float32(solver: Any, dtype: torch.dtype) -> None:
    """The result and the gradient have the state's dtype and are right to its rounding; the field may stay float32."""
    f = nn.Linear(3, 3)
    z = torch.randn(4, 3)
    wanted = ODEBlock(f, solver=solver)(z)
    low = z.to(dtype).requires_grad_()
    found = ODEBlock(f, solver=solver)(low)
    assert found.dtype == dtype and (found.float() - wanted).abs().max() < 20 * torch.finfo(dtype).eps
    found.sum().backward()
    assert low.grad is not None and low.grad.dtype == dtype and low.grad.isfinite().all()
