"""Reversible: where the pair of solutions, what is recovered, or the gradient would be wrong, it says so by row."""

from __future__ import annotations

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
    Euler,
    GradientError,
    Heun,
    ODEBlock,
    Reversible,
    ReversibleHeun,
    SDEBlock,
    SolveError,
    Status,
    Tsit5,
)
from odelayers._gradients import reversible
from problems import name
from strategies import seeds

F64 = torch.float64
OFF = 1e300  # a limit that nothing passes


class Pull(nn.Module):
    """f(z, c) = tanh(W z) - c z: it contracts at the rate c, less what tanh adds, or expands where c < 0."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=generator(1)))[0].to(dtype))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return torch.tanh(z @ self.W) - c.reshape(-1, 1) * z


def generator(seed: int) -> torch.Generator:
    """A generator at a seed."""
    return torch.Generator().manual_seed(seed)


def pulled(gradient: Any, rates: Any, solver: Any, t1: float, dtype: torch.dtype = F64) -> list[Tensor]:
    """The gradients of a loss in the start and the parameters, with a rate for each row."""
    f, c = Pull(dtype), torch.as_tensor(rates, dtype=dtype)
    z = torch.randn(len(c), 3, dtype=F64, generator=generator(2)).to(dtype).requires_grad_()
    end = ODEBlock(f, solver=solver, gradient=gradient, t1=t1, time=False)(z, context=c)
    return list(torch.autograd.grad(end.square().sum(), [z, f.W]))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("solver", [Euler(100), RK4(100), RK4(1000), Dopri5(), Tsit5(1e-6, 1e-6)], ids=repr)
def test_a_contracting_field_is_refused_in_the_solve(solver: Any, dtype: torch.dtype) -> None:
    """Kidger et al. 2021: z' = -10 z over T = 5: the pair comes apart like e^50; rows, time, cause and remedy are
    named."""
    z = torch.randn(4, 2, dtype=dtype, requires_grad=True)
    block = ODEBlock(lambda z: -10 * z, t1=5.0, solver=solver, gradient=Reversible())
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(SolveError, match=r"came apart.*Checkpoint\(\)") as caught:
            block(z)
        assert (caught.value.rows, caught.value.status) == ((0, 1, 2, 3), Status.UNSTABLE)
        assert 0 < caught.value.t[0] < 3
    assert ODEBlock(lambda z: -10 * z, t1=5.0, gradient=Checkpoint())(z).abs().max() < 1e-4


@pytest.mark.parametrize("solver", [RK4(200), Dopri5(1e-6, 1e-6)], ids=name)
@pytest.mark.parametrize("rate", [-10.0, 5.0], ids=["contracting", "expanding"])
def test_where_the_start_is_not_recovered_the_backward_pass_refuses(rate: float, solver: Any) -> None:
    """Over T = 5, with the check of the pair switched off: the start is off by far more than 1e-3, in every row."""
    z = torch.randn(3, 2, dtype=F64, requires_grad=True)
    out = ODEBlock(lambda z: rate * z, t1=5.0, solver=solver, gradient=Reversible(max_gap=OFF))(z)
    with pytest.raises(GradientError, match=r"in 3 of 3 rows solved \[0, 1, 2\].*differ.* by up to .*Checkpoint\(\)"):
        out.sum().backward()


@pytest.mark.parametrize("solver", [RK4(300), Dopri5(1e-7, 1e-7)], ids=name)
def test_the_rows_that_fail_are_named_and_can_be_left_out(solver: Any) -> None:
    """Rows that contract or expand at rate 6 over T = 4 among mild ones: each refused by its number."""
    rates = [0.1, 6.0, -0.2, 6.5]
    with pytest.raises(SolveError) as caught:
        pulled(Reversible(), rates, solver, 4.0)
    assert caught.value.rows == (1, 3)
    with pytest.raises(GradientError, match=r"in 1 of 3 rows solved \[1\]"):
        pulled(Reversible(), [0.1, -7.0, -0.2], solver, 4.0)
    block = ODEBlock(Pull(), solver=solver, gradient=Reversible(), t1=4.0, time=False, on_failure="isolate")
    z = torch.randn(4, 3, dtype=F64, requires_grad=True)
    solution = block.solve(z, context=torch.tensor(rates, dtype=F64))
    assert solution.stats.status.tolist() == [0, Status.UNSTABLE, 0, Status.UNSTABLE]
    assert solution.final.isnan().any(dim=1).tolist() == [False, True, False, True]
    (found,) = torch.autograd.grad(solution.final[::2].square().sum(), z)
    assert (found[1::2] == 0).all() and (found[::2].abs() > 0).all()


@settings(max_examples=20)
@given(st.floats(-8.0, 8.0), st.sampled_from([Heun(200), RK4(60), Dopri5(), Tsit5(1e-8, 1e-8)]), st.booleans(), seeds)
def test_a_gradient_that_is_given_is_right(rate: float, solver: Any, double: bool, seed: int) -> None:
    """Contracting or expanding, in float32 or float64: refused, or within 10 % of the exact flow's gradient."""
    dtype = F64 if double else torch.float32
    f, c = Pull(dtype), torch.full((5,), rate, dtype=dtype)
    z = torch.randn(5, 3, dtype=F64, generator=generator(seed)).to(dtype).requires_grad_()
    block = ODEBlock(f, solver=solver, gradient=Reversible(), t1=1.5, time=False)
    try:
        found = torch.autograd.grad(block(z, context=c).square().sum(), [z, f.W])
    except (SolveError, GradientError) as error:
        assert "Checkpoint" in str(error) and abs(rate) > 1.5
        return
    exact, start = Pull(), z.detach().double().requires_grad_()
    exact.W.data.copy_(f.W.data)
    out = ODEBlock(exact, solver=Dopri5(1e-9, 1e-9), t1=1.5, time=False)(start, context=c.double())
    wanted = torch.autograd.grad(out.square().sum(), [start, exact.W])
    assert all((a - b).abs().max() < 0.1 * b.abs().max() for a, b in zip(found, wanted, strict=True))


UNGUARDED: dict[str, tuple[Any, Any, float, torch.dtype]] = {
    "values of the pair": (Reversible(max_gap=OFF), RK4(30), 4.0, F64),
    "gradient of the pair": (Reversible(max_gap=OFF), RK4(100), 3.5, F64),
    "its rounding": (Reversible(max_gap=OFF), RK4(100), 3.0, torch.float32),
    "states": (Reversible(max_drift=OFF), RK4(100), -6.5, F64),
}


@pytest.mark.parametrize("check", UNGUARDED)
def test_without_each_check_a_wrong_gradient_would_pass(check: str) -> None:
    """Control, Kidger et al. 2021: one check off and the others on, over T = 3, a gradient is given that is off by more
    than 5 %."""
    gradient, solver, rate, dtype = UNGUARDED[check]
    found = pulled(gradient, [rate], solver, 3.0, dtype)
    wanted = pulled(Backprop(), [rate], Dopri5(1e-11, 1e-11), 3.0)
    assert any((a.double() - b).abs().max() > 0.05 * b.abs().max() for a, b in zip(found, wanted, strict=True))
    with pytest.raises((SolveError, GradientError), match="Checkpoint") as caught:
        pulled(Reversible(), [rate], solver, 3.0, dtype)
    assert isinstance(caught.value, SolveError) == (check == "values of the pair")


@pytest.mark.parametrize(
    ("rate", "steps", "said", "unsaid"),
    [(-6.5, 100, "states recovered", "coupled solutions"), (3.5, 100, "coupled solutions", "states recovered")],
    ids=["states", "pair"],
)
def test_a_refusal_names_what_failed_and_nothing_else(rate: float, steps: int, said: str, unsaid: str) -> None:
    """Expanding over T = 3 loses the states and keeps the pair together; contracting does the reverse."""
    with pytest.raises(GradientError, match=said) as caught:
        pulled(Reversible(), [rate, rate], RK4(steps), 3.0)
    assert unsaid not in str(caught.value)


def test_a_distance_of_the_pair_costs_nothing_where_gradients_do_not_cancel() -> None:
    """A field that turns and expands, over three turns: what its steps bring into the pair adds up to 0.2 of a row,
    twice the limit, but nothing cancels that would lay it bare: the gradient is given, and right to 1 %."""
    turn = torch.tensor([[0.2, 2.0], [-2.0, 0.2]], dtype=F64)
    z = torch.ones(1, 2, dtype=F64, requires_grad=True)
    out = ODEBlock(lambda z: z @ turn, t1=10.0, solver=Euler(400), gradient=Reversible())(z)
    (found,) = torch.autograd.grad(out.sum(), z)
    wanted = torch.linalg.matrix_exp(10 * turn).sum(dim=1)
    assert (found - wanted).norm() < 0.01 * wanted.norm()


def test_states_recovered_on_the_way_are_compared_too() -> None:
    """A field that expands by e^20, then contracts by it: the start is recovered, the output between the two is not."""
    f = lambda t, z: torch.where(t < 1, 20.0, -20.0) * z + torch.sin(3 * z)  # noqa: E731
    z = torch.randn(3, 2, dtype=F64, generator=generator(3), requires_grad=True)
    block = ODEBlock(f, solver=RK4(100), gradient=Reversible(max_gap=OFF))
    with pytest.raises(GradientError, match="recovered by undoing the steps differ"):
        block.solve(z, [0.0, 1.0, 2.0]).final.sum().backward()


def test_a_smaller_coupling_holds_the_pair_together_and_costs_digits() -> None:
    """z' = -5 z over T = 5, c h < 2 (1 - 0.9) / (1 + 0.9): stable where 0.999 is not; but 0.5^100 is lost."""
    z = torch.ones(2, 1, dtype=F64, requires_grad=True)
    decay = lambda z: -5 * z  # noqa: E731
    with pytest.raises(SolveError, match="came apart"):
        ODEBlock(decay, t1=5.0, solver=RK4(500), gradient=Reversible())(z)
    end = ODEBlock(decay, t1=5.0, solver=RK4(500), gradient=Reversible(coupling=0.9))(z)
    assert (end - torch.exp(torch.tensor(-25.0))).abs().max() < 1e-12
    for coupling in (0.5, 0.999):
        out = ODEBlock(torch.sin, t1=1.0, solver=RK4(100), gradient=Reversible(coupling), time=False)(z)
        if coupling == 0.999:
            out.sum().backward()
        else:
            with pytest.raises(GradientError, match="too many for the coupling"):
                out.sum().backward()


def test_a_row_that_starts_at_zero_is_measured_by_its_way() -> None:
    """z0 = 0 has no relative error of its own: rows at rest and rows that leave are both given their gradient."""
    z = torch.zeros(2, 1, requires_grad=True)
    push = torch.tensor([0.0, 1.0])
    ODEBlock(lambda z, c: c[:, None] - 0.1 * z, time=False, gradient=Reversible())(z, context=push).sum().backward()
    assert z.grad is not None and (z.grad - torch.exp(torch.tensor(-0.1))).abs().max() < 1e-4


@pytest.mark.parametrize("rate", [1.0, 12.0])
def test_reversible_heun_is_checked_too(rate: float) -> None:
    """dz = -rate (z - 1) dt + 0.3 dW over T = 3 and 100 steps: recovered at rate 1, lost and refused at 12."""
    z = torch.randn(4, 2, dtype=F64, requires_grad=True)
    options: dict[str, Any] = {"solver": ReversibleHeun(100), "calculus": "stratonovich", "gradient": Reversible()}
    out = SDEBlock(lambda z: -rate * (z - 1), lambda z: torch.full_like(z, 0.3), t1=3.0, **options)(z)
    if rate == 1.0:
        out.sum().backward()
        return
    with pytest.raises(GradientError, match=r"recovered by undoing the steps differ.*Checkpoint"):
        out.sum().backward()


def test_failures_of_the_solve_stay_what_they_are() -> None:
    """NaN at the start, a blow-up in finite time, a spent budget and a huge field: by row, as without a pair."""
    z = torch.tensor([[0.5], [float("nan")]], dtype=F64)
    for solver in (RK4(20), Dopri5()):
        stats = (
            ODEBlock(torch.sin, time=False, solver=solver, gradient=Reversible(), on_failure="isolate").solve(z).stats
        )
        assert stats.status.tolist() == [Status.OK, Status.NONFINITE]
    with pytest.raises(SolveError) as caught:
        ODEBlock(lambda z: z**2, t1=2.0, gradient=Reversible())(torch.ones(1, 1, dtype=F64))
    assert caught.value.status == Status.BLOW_UP and caught.value.t[0] == pytest.approx(1.0, abs=0.05)
    with pytest.raises(SolveError) as caught:
        ODEBlock(torch.sin, time=False, t1=9.0, solver=Dopri5(max_steps=3), gradient=Reversible())(z[:1])
    assert caught.value.status == Status.MAX_STEPS


def test_the_default_limit_of_the_pair_is_a_tenth_of_a_row_or_a_thousand_tolerances() -> None:
    """The numbers that the documentation states."""
    assert reversible.MAX_GAP == 0.1 and (Reversible().coupling, Reversible().max_drift) == (0.999, 1e-3)
    for solver, words in (
        (RK4(50), r"more than 0\.1 of"),
        (Dopri5(1e-6, 1e-7), r"more than 0\.001 of their size \+ 0\.0001"),
    ):
        with pytest.raises(SolveError, match=words):
            ODEBlock(lambda z: -9 * z, t1=5.0, solver=solver, gradient=Reversible())(torch.ones(1, 1, dtype=F64))
