"""Own Runge-Kutta solvers against closed forms, matrix exponentials and scipy's DOP853."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchdiffeq
from torch import Tensor

from odelayers import RK4, Backprop, Dopri5, Euler, Heun, Midpoint, ODEBlock, Reversible, Rodas5P
from odelayers._solvers.tableau import DOPRI5, EULER, HEUN, MIDPOINT, RK4 as RK4_TABLEAU, TSIT5, Tableau
from problems import ADAPTIVE, CONTROLLED, FIXED, FORCED, LINEAR, PROBLEMS, Problem, TanhNet, name, reference, slopes

TABLEAUS = {"euler": EULER, "midpoint": MIDPOINT, "heun": HEUN, "rk4": RK4_TABLEAU, "dopri5": DOPRI5, "tsit5": TSIT5}
OWN = Dopri5(1e-9, 1e-9, batch="independent")
EVALUATIONS = {Euler: 1, Midpoint: 2, Heun: 2, RK4: 4}


def each(problem: Problem, t: float, solver: object) -> float:
    """The largest error at time t."""
    zs = ODEBlock(problem.f, t1=t, solver=solver)(problem.z0)
    return (zs - problem.solution(t)).abs().max().item()


@pytest.mark.parametrize("t1", [1.0, -0.8], ids=["forwards", "backwards"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("solver", FIXED, ids=name)
def test_fixed_grids_converge_at_their_order(solver: type, problem: Problem, t1: float) -> None:
    """Halving the step divides the error by 2^order, forwards and backwards in time."""
    steps = [20, 40, 80, 160] if solver(steps=1).order < 4 else [10, 20, 40, 80]
    errors = [each(problem, t1, solver(steps=n)) for n in steps]
    found = slopes([1 / n for n in steps], errors)
    assert found[-1] == pytest.approx(solver(steps=1).order, abs=0.15)


@pytest.mark.parametrize("t1", [1.0, -0.8], ids=["forwards", "backwards"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("solver", CONTROLLED, ids=name)
def test_adaptive_errors_fall_with_the_tolerance(solver: type, problem: Problem, t1: float) -> None:
    """The global error falls with the tolerance and stays within ten of it."""
    tolerances = [1e-4, 1e-6, 1e-8, 1e-10]
    errors = [each(problem, t1, solver(rtol=tol, atol=tol)) for tol in tolerances]
    assert all(error <= 10 * tol for error, tol in zip(errors, tolerances, strict=True)), errors
    assert errors[-1] < 1e-4 * errors[0], errors


@pytest.mark.parametrize("solver", ADAPTIVE, ids=name)
def test_a_step_of_an_adaptive_pair_has_order_five(solver: type) -> None:
    """With steps held equal by a loose tolerance, the step's result converges at order 5 and the embedded one at 4."""
    tableau, sizes = solver.tableau, [0.2, 0.1, 0.05]
    local: dict[str, list[float]] = {"step": [], "embedded": []}
    for h in sizes:
        exact = LINEAR.solution(h)
        embedded = tuple(b - e for b, e in zip(tableau.b, tableau.error, strict=True))
        for kind, weights in (("step", tableau.b), ("embedded", embedded)):
            z = LINEAR.z0 + h * combination(tableau, weights, LINEAR.f, LINEAR.z0, h)
            local[kind].append((z - exact).abs().max().item())
    assert slopes(sizes, local["step"])[-1] == pytest.approx(6, abs=0.3)
    assert slopes(sizes, local["embedded"])[-1] == pytest.approx(5, abs=0.3)


def combination(
    tableau: Tableau, weights: tuple[float, ...], f: Callable[[Tensor], Tensor], z: Tensor, h: float
) -> Tensor:
    """Sum of weights times stages, written out."""
    stages = [f(z)]
    for row in tableau.a:
        stages.append(f(z + h * sum(w * k for w, k in zip(row, stages, strict=False))))
    return sum(w * k for w, k in zip(weights, stages, strict=True))


def order_conditions(tableau: Tableau, weights: tuple[float, ...], order: int) -> list[float]:
    """The residuals of Butcher's conditions for the rooted trees of up to `order` nodes, of products in long double."""
    s = len(tableau.c)
    a = np.zeros((s, s), dtype=np.longdouble)
    for i, row in enumerate(tableau.a, start=1):
        a[i, : len(row)] = row
    b, c = np.array(weights, dtype=np.longdouble), np.array(tableau.c, dtype=np.longdouble)
    ac, ac2 = a @ c, a @ c**2
    trees = [
        (1, b.sum(), 1),
        (2, b @ c, 1 / 2),
        (3, b @ c**2, 1 / 3),
        (3, b @ ac, 1 / 6),
        (4, b @ c**3, 1 / 4),
        (4, b @ (c * ac), 1 / 8),
        (4, b @ ac2, 1 / 12),
        (4, b @ (a @ ac), 1 / 24),
        (5, b @ c**4, 1 / 5),
        (5, b @ (c**2 * ac), 1 / 10),
        (5, b @ ac**2, 1 / 20),
        (5, b @ (c * ac2), 1 / 15),
        (5, b @ (a @ c**3), 1 / 20),
        (5, b @ (c * (a @ ac)), 1 / 30),
        (5, b @ (a @ (c * ac)), 1 / 40),
        (5, b @ (a @ ac2), 1 / 60),
        (5, b @ (a @ (a @ ac)), 1 / 120),
    ]
    return [abs(float(value) - wanted) for nodes, value, wanted in trees if nodes <= order]


@pytest.mark.parametrize("method", TABLEAUS)
def test_tableaus_satisfy_the_order_conditions(method: str) -> None:
    """Every rooted tree up to the order holds, the stages' times are row sums, the embedded weights are of order 4."""
    tableau = TABLEAUS[method]
    assert max(order_conditions(tableau, tableau.b, tableau.order)) < 1e-13
    assert all(abs(sum(row) - c) < 1e-13 for row, c in zip(tableau.a, tableau.c[1:], strict=True))
    if tableau.error:
        assert tableau.a[-1] == tableau.b[:6] and tableau.b[6] == 0.0  # first same as last
        embedded = tuple(b - e for b, e in zip(tableau.b, tableau.error, strict=True))
        assert max(order_conditions(tableau, embedded, 4)) < 1e-12
        assert max(order_conditions(tableau, embedded, 5)) > 1e-5  # else it would estimate nothing


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_continuous_extensions_have_order_four(method: str) -> None:
    """At theta the weights satisfy Butcher's conditions scaled by theta^nodes up to order 4, and join at the ends."""
    tableau = TABLEAUS[method]
    assert tableau.dense_weights(0.0) == (0.0,) * 7
    assert tableau.dense_weights(1.0) == pytest.approx(tableau.b, abs=1e-12)
    for theta in (0.1, 0.5, 0.83):
        scaled = Tableau(
            tuple(c / theta for c in tableau.c),
            tuple(tuple(x / theta for x in row) for row in tableau.a),
            tuple(w / theta for w in tableau.dense_weights(theta)),
            4,
        )
        assert max(order_conditions(scaled, scaled.b, 4)) < 1e-12


@pytest.mark.parametrize("way", [1, -1], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("solver", [RK4(steps=100), OWN, *(cls(1e-9, 1e-9) for cls in CONTROLLED)], ids=name)
def test_dense_output_matches_the_solution(solver: object, problem: Problem, way: int) -> None:
    """States at many output times, rising or falling, with ts[0] included and the batch on axis 1."""
    ts = [way * t for t in (0.0, 0.013, 0.3, 0.31, 0.777, 1.0)]
    solution = ODEBlock(problem.f, solver=solver).solve(problem.z0, torch.tensor(ts, dtype=torch.float64))
    assert solution.zs.shape == (6, *problem.z0.shape)
    assert torch.equal(solution.zs[0], problem.z0)
    assert (solution.zs - problem.along(ts)).abs().max() < 2e-7
    assert solution.ts.tolist() == ts


@pytest.mark.parametrize("solver", ADAPTIVE, ids=name)
def test_outputs_cost_no_evaluation_and_move_no_step(solver: type) -> None:
    """Fifty outputs and two give the same end state and the same number of evaluations."""
    block = ODEBlock(LINEAR.f, solver=solver())
    few, many = (block.solve(LINEAR.z0, torch.linspace(0, 2, n, dtype=torch.float64)) for n in (2, 50))
    assert torch.equal(few.final, many.final)
    assert few.stats.nfe == many.stats.nfe


def test_ts_that_do_not_start_at_zero_take_the_place_of_t0() -> None:
    """ts[0] is the start of a time-dependent solve."""
    net = TanhNet()
    z0, ts = torch.randn(4, 3, dtype=torch.float64), [1.5, 1.2, -0.4]
    zs = ODEBlock(net, t0=7.0, solver=Dopri5(1e-10, 1e-10)).solve(z0, ts).zs
    assert (zs - reference(net, z0, ts, timed=True)).abs().max() < 1e-8


@pytest.mark.parametrize("shape", [(5,), (2, 1), (2, 3, 4), (1, 2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("solver", [RK4(steps=40), Dopri5(1e-8, 1e-8), OWN, Rodas5P(1e-8, 1e-8)], ids=name)
def test_any_state_shape(solver: object, shape: tuple[int, ...]) -> None:
    """A state of any number of axes is solved entry by entry as its flattened self."""
    z0 = torch.rand(shape, dtype=torch.float64)
    assert (ODEBlock(lambda z: -(z**2), solver=solver)(z0) - z0 / (1 + z0)).abs().max() < 1e-7


def test_a_contiguous_state_is_not_needed() -> None:
    """A transposed or expanded state gives what its contiguous copy gives."""
    z = torch.randn(3, 4, 2, dtype=torch.float64).transpose(1, 2)
    expanded = torch.randn(3, 1, dtype=torch.float64).expand(3, 3)
    for state, f in ((z, torch.sin), (expanded, LINEAR.f)):
        for solver in (RK4(steps=5), Dopri5(), OWN, Rodas5P()):
            block = ODEBlock(f, solver=solver, time=False)
            assert torch.allclose(block(state), block(state.contiguous()), rtol=0, atol=1e-15)


@pytest.mark.parametrize("solver", FIXED, ids=name)
def test_fixed_grids_count_their_evaluations(solver: type) -> None:
    """NFE is stages times steps; an output between grid points divides one step."""
    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -z

    block, z = ODEBlock(f, solver=solver(steps=10)), torch.ones(2, 1)
    for ts, steps in (([0, 1], 10), ([0, 0.5, 1], 10), ([0, 0.25, 1], 11)):
        calls = 0
        stats = block.solve(z, ts).stats
        assert (stats.accepted, stats.rejected) == (steps, 0)
        assert stats.nfe == calls == steps * EVALUATIONS[solver]


@pytest.mark.parametrize("way", [1, -1])
def test_float32_output_times_lie_on_the_grid(way: int) -> None:
    """Output times rounded to float32 do not split the steps of a grid that they lie on."""
    ts = torch.linspace(0, way * 1.0, 11)
    stats = ODEBlock(lambda z: -z, solver=RK4(steps=10)).solve(torch.ones(2, 1), ts).stats
    assert (stats.accepted, stats.nfe) == (10, 40)


@pytest.mark.parametrize("solver", ADAPTIVE, ids=name)
def test_adaptive_solvers_count_their_evaluations(solver: type) -> None:
    """NFE is one at the start, one for the first step's length unless given, and six for every step tried."""
    calls = 0

    def f(t: Tensor, z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.sin(40 * t) * z

    for first, extra in ((None, 2), (0.9, 1)):
        calls = 0
        stats = ODEBlock(f, solver=solver(first_step=first)).solve(torch.ones(2, 1)).stats
        assert stats.nfe == calls == extra + 6 * (stats.accepted + stats.rejected)
    assert stats.rejected > 0


@pytest.mark.parametrize("gradient", [Backprop(), Reversible()], ids=name)
@pytest.mark.parametrize("method", ADAPTIVE, ids=name)
def test_a_hard_sample_meets_its_tolerance_among_easy_mates(method: type, gradient: object) -> None:
    """One fast oscillator among 999 at rest is solved as well as alone; the norm over the batch misses by far."""
    speed = torch.full((1000, 1), 1e-3, dtype=torch.float64)
    speed[0] = 20.0
    z0 = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(1000, 1)

    def f(t: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return w * torch.stack([-z[:, 1], z[:, 0]], dim=1)

    exact = torch.tensor([20.0], dtype=torch.float64)
    exact, tol = torch.cat([torch.cos(exact), torch.sin(exact)]), 1e-5
    block = ODEBlock(f, solver=method(tol, tol), gradient=gradient)
    alone, among = block(z0[:1], context=speed[:1])[0], block(z0, context=speed)[0]
    batch = torchdiffeq.odeint(lambda t, z: f(t, z, speed), z0, torch.tensor([0.0, 1.0]), rtol=tol, atol=tol)[-1, 0]
    assert (among - exact).norm() <= 1.01 * (alone - exact).norm()
    assert (among - exact).norm() < 20 * tol
    assert (batch - exact).norm() > 10 * (among - exact).norm()


def test_the_tolerance_is_not_below_the_rounding_of_the_dtype() -> None:
    """A float32 solve at rtol 1e-12 ends, as accurate as float32 allows."""
    problem = FORCED
    z = ODEBlock(problem.f, solver=Dopri5(rtol=1e-12, atol=1e-30, max_steps=500))(problem.z0.float())
    assert (z - problem.solution(1.0)).abs().max() < 1e-5
