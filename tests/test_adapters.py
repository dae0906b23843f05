"""torchdiffeq and torchsde as solvers: they are what they claim, and their failures are ours to word."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
import torchsde
from scipy.integrate import solve_ivp
from torch import Tensor

from odelayers import (
    Adjoint,
    Dopri5,
    DropoutSDEBlock,
    EulerMaruyama,
    ODEBlock,
    SDEBlock,
    SolveError,
    Status,
    StratonovichHeun,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
    count_nfe,
)
from odelayers._solvers.reference import _ADAPTIVE, _FIXED
from problems import FORCED, LINEAR, ORACLES, PROBLEMS, Problem, TanhNet, name, slopes

pytestmark = pytest.mark.timeout(60)
F64 = torch.float64
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")
READINGS = {
    "ito": ["euler"],
    "stratonovich": ["midpoint", "heun", "euler_heun", "reversible_heun"],
    "ito scalar": ["euler", "srk", "milstein"],
    "stratonovich scalar": ["midpoint", "heun", "euler_heun", "reversible_heun", "milstein"],
}


@pytest.mark.parametrize("method", [*_ADAPTIVE, *_FIXED, "scipy_solver"])
@pytest.mark.parametrize("problem", [LINEAR, FORCED], ids=lambda p: p.name)
def test_every_method_of_torchdiffeq_solves(problem: Any, method: str) -> None:
    """Each method of the installed version comes within 1e-3 of the solution, with outputs in between."""
    step = 0.01 if method in _FIXED else None
    if method == "euler":
        step = 0.0005
    ts = [0.0, 0.4, 1.0]
    with torch.no_grad():
        block = ODEBlock(problem.f, solver=TorchDiffEq(method, 1e-6, 1e-6, step), gradient=Adjoint())
        zs = block.solve(problem.z0, ts).zs
    assert (zs - problem.along(ts)).abs().max() < 1e-3


def test_explicit_adams_is_wrong_in_torchdiffeq_itself() -> None:
    """Why that method is left out above: called directly it is far off on z' = A z; when this fails it was mended."""
    ts = torch.tensor([0.0, 1.0], dtype=F64)
    zs = torchdiffeq.odeint(
        lambda t, z: LINEAR.f(z), LINEAR.z0, ts, method="explicit_adams", options={"step_size": 0.01}
    )
    assert (zs[-1] - LINEAR.solution(1.0)).abs().max() > 1.0


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_torchdiffeq_as_a_solver_is_torchdiffeq(method: str) -> None:
    """States are bit for bit those of odeint, gradients those of odeint and odeint_adjoint up to their tolerance."""
    net, z = TanhNet(), torch.randn(4, 3, dtype=F64)
    ts = torch.tensor([0.2, 0.5, 1.3], dtype=F64)
    step = {"step_size": 0.1} if method == "rk4" else None
    for gradient, solve in (({}, torchdiffeq.odeint), ({"gradient": Adjoint()}, torchdiffeq.odeint_adjoint)):
        block = ODEBlock(net, solver=TorchDiffEq(method, 1e-6, 1e-6, step and step["step_size"]), **gradient)
        found = block.solve(z, ts).zs
        wanted = solve(net, z, ts, rtol=1e-6, atol=1e-6, method=method, options=step)
        assert torch.equal(found, wanted)
        grads = [torch.autograd.grad(zs.square().sum(), list(net.parameters())) for zs in (found, wanted)]
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_the_steps_of_torchdiffeq_are_counted() -> None:
    """Evaluations agree with the field's own count, steps with the callbacks, backward passes included."""
    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.sin(5 * z)

    block, z = ODEBlock(f, solver=TorchDiffEq("dopri5"), gradient=Adjoint()), torch.randn(4, 3, requires_grad=True)
    with count_nfe(block) as count:
        stats = block.solve(z).stats
        assert stats.nfe == calls == count.nfe and stats.accepted > 0
        block(z).sum().backward()
        assert count.nfe == calls


def test_each_sample_and_tensor_end_times_pass_through_torchdiffeq() -> None:
    """Per-sample differentiable end times work with the library's solver and its adjoint."""
    net, z = TanhNet(), torch.randn(3, 3, dtype=F64)
    t1 = torch.tensor([0.5, -0.4, 1.3], dtype=F64, requires_grad=True)
    for gradient in ({}, {"gradient": Adjoint()}):
        out = ODEBlock(net, solver=TorchDiffEq("dopri5", 1e-9, 1e-9), **gradient)(z, t1)
        (found,) = torch.autograd.grad(out.sum(), t1)
        assert torch.allclose(found, net(t1[:, None], out).sum(dim=1), atol=1e-6)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_torchdiffeq_s_assertions_become_solve_errors(method: str) -> None:
    """A blow-up, a spent budget: a SolveError with a time, not an AssertionError or a silent inf."""
    with pytest.raises(SolveError, match="torchdiffeq says|NaN or inf") as caught:
        ODEBlock(lambda z: z**2, t1=2.0, solver=TorchDiffEq(method, 1e-3, 1e-3))(torch.ones(2, 1, dtype=F64))
    assert 0 < min(caught.value.t) <= 2.0
    with pytest.raises(SolveError, match="max_num_steps") as caught:
        ODEBlock(lambda z: torch.cos(100 * z) + 2, solver=TorchDiffEq(method, 1e-8, 1e-8, max_steps=4))(
            torch.ones(2, 1)
        )
    assert caught.value.status == Status.MAX_STEPS


@pytest.mark.parametrize("method", ["bosh3", "adaptive_heun", "fehlberg2"])
def test_a_budget_that_is_short_for_this_method_alone_is_named_as_such(method: str) -> None:
    """100 steps at 1e-8 are plenty for Dopri5, which is asked which rows failed: then all did, of the budget."""
    with pytest.raises(SolveError, match="max_num_steps") as caught:
        ODEBlock(lambda z: -z, solver=TorchDiffEq(method, 1e-8, 1e-8, max_steps=100))(torch.ones(2, 1, dtype=F64))
    assert (caught.value.rows, caught.value.status) == ((0, 1), Status.MAX_STEPS)


def test_implicit_methods_solve_what_explicit_ones_cannot() -> None:
    """Radau and BDF take z' = -1e6 (z - cos t) - sin t to its closed form z = cos t, with the adjoint's gradient."""

    def f(t: Tensor, z: Tensor) -> Tensor:
        return -1e6 * (z - torch.cos(t)) - torch.sin(t)

    for method in ("Radau", "BDF"):
        z = torch.ones(2, 1, dtype=F64)
        block = ODEBlock(f, solver=TorchDiffEq("scipy_solver", 1e-8, 1e-8, scipy_method=method), gradient=Adjoint())
        with torch.no_grad():
            assert (block(z) - torch.cos(torch.tensor(1.0))).abs().max() < 1e-6
    slow = ODEBlock(lambda z: -z, solver=TorchDiffEq("scipy_solver", 1e-8, 1e-8), gradient=Adjoint())
    z = torch.ones(2, 1, dtype=F64, requires_grad=True)
    slow(z).sum().backward()
    assert z.grad is not None and (z.grad - 0.36787944).abs().max() < 1e-6


@pytest.mark.parametrize("problem", ORACLES, ids=lambda p: p.name)
def test_three_libraries_agree(problem: Problem) -> None:
    """Own solvers, torchdiffeq's odeint and scipy's DOP853 and Radau meet at every output time, at tolerance 1e-9."""
    ts, shape = np.linspace(0.0, 1.5, 6), problem.z0.shape

    def flat(t: float, y: np.ndarray) -> np.ndarray:
        return problem.rate(torch.tensor(t, dtype=F64), torch.from_numpy(y).view(shape)).numpy().ravel()

    found = [ODEBlock(problem.f, solver=s(1e-9, 1e-9)).solve(problem.z0, ts.tolist()).zs for s in (Dopri5, Tsit5)]
    found.append(torchdiffeq.odeint(problem.rate, problem.z0, torch.from_numpy(ts), rtol=1e-9, atol=1e-9))
    for method in ("DOP853", "Radau"):
        out = solve_ivp(flat, (0.0, 1.5), problem.z0.numpy().ravel(), method, ts, rtol=1e-9, atol=1e-9)
        found.append(torch.from_numpy(out.y.T.copy()).view(6, *shape))
    for zs in found[1:]:
        assert (zs - found[0]).abs().max() < 2e-7


@pytest.mark.parametrize("reading, method", [(r, m) for r, ms in READINGS.items() for m in ms])
def test_every_method_of_torchsde_converges_to_its_reading(reading: str, method: str) -> None:
    """Geometric Brownian motion: the mean of log z at 1 is lambda - sigma^2/2 (Ito) or lambda (Stratonovich)."""
    calculus, noise = (reading.split() + ["diagonal"])[:2]
    lam, sigma, n = -0.2, 0.5, 4000
    block = SDEBlock(
        lambda z: lam * z, lambda z: sigma * z, solver=TorchSDE(method, 40), calculus=calculus, noise=noise
    )
    z = block(torch.ones(n, 1, dtype=F64)).log()
    wanted = lam - sigma**2 / 2 if calculus == "ito" else lam
    assert abs(z.mean().item() - wanted) < 5 * sigma / n**0.5 + 0.01
    assert z.std().item() == pytest.approx(sigma, rel=0.1)


def test_own_and_library_solvers_follow_one_path() -> None:
    """Own Euler-Maruyama and Stratonovich Heun on torchsde's increments are torchsde's euler and heun."""
    z, steps = torch.randn(5, 2, dtype=F64), 10
    drift, diffusion = TanhNet(2), TanhNet(2, scale=0.5)
    for calculus, own, method in (("ito", EulerMaruyama, "euler"), ("stratonovich", StratonovichHeun, "heun")):
        bm = torchsde.BrownianInterval(0.0, 1.0, size=(5, 2), dtype=F64, entropy=7, dt=1 / steps)
        noise = torch.stack([bm(i / steps, (i + 1) / steps) for i in range(steps)])
        block = SDEBlock(drift, diffusion, solver=own(steps), calculus=calculus)
        sde = type("S", (), {"f": lambda s, t, y: drift(t, y), "g": lambda s, t, y: diffusion(t, y)})()
        sde.noise_type, sde.sde_type = "diagonal", calculus
        with torch.no_grad():
            wanted = torchsde.sdeint(sde, z, torch.tensor([0.0, 1.0], dtype=F64), bm=bm, method=method, dt=1 / steps)[
                -1
            ]
            assert (block.solve(z, noise=noise).final - wanted).abs().max() < 1e-9


@pytest.mark.parametrize("shape", [(4,), (4, 2, 3)], ids=str)
@pytest.mark.parametrize("noise", ["diagonal", "scalar"])
def test_torchsde_takes_any_state_shape_and_end_times(shape: tuple[int, ...], noise: str) -> None:
    """torchsde wants (B, D): any shape is flattened for it, with outputs in between and per-sample end times."""
    block = SDEBlock(torch.sin, torch.cos, solver=TorchSDE("euler", 8), noise=noise, time=False)
    z = torch.randn(shape, dtype=F64)
    assert block.solve(z, [0.0, 0.3, 1.0]).zs.shape == (3, *shape)
    ends = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=F64)
    assert torch.allclose(block(z, ends)[0], z[0])


@pytest.mark.parametrize(
    "solver", [TorchDiffEq("dopri5"), TorchDiffEq("rk4", step_size=0.25), TorchSDE("euler", 4)], ids=repr
)
def test_a_compiler_leaves_the_libraries_as_they_are(solver: Any) -> None:
    """torch.compile of a block breaks its graph around their solve (inductor fails inside): same value, no op of f."""
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    more = (torch.cos,) if solver.calculus else ()
    block = (SDEBlock if solver.calculus else ODEBlock)(torch.tanh, *more, solver=solver, time=False)
    z, found = torch.randn(3, 2), []
    for call in (block, torch.compile(block, backend=backend)):
        torch.manual_seed(4)
        found.append(call(z))
    torch._dynamo.reset()
    assert torch.equal(*found) and ops and not any("tanh" in op or "cos" in op for op in ops)


@pytest.mark.parametrize("noise_in_eval", [False, True])
def test_dropout_noise_runs_through_torchsde(noise_in_eval: bool) -> None:
    """In evaluation the noiseless block is deterministic and close to the ODE; otherwise it is noisy."""
    block = DropoutSDEBlock(
        torch.sin, 0.2, solver=TorchSDE("euler", 200), noise_in_eval=noise_in_eval, time=False
    ).eval()
    z = torch.randn(4, 3, dtype=F64)
    assert torch.equal(block(z), block(z)) != noise_in_eval
    if not noise_in_eval:
        assert (block(z) - ODEBlock(torch.sin, time=False)(z)).abs().max() < 1e-2


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_a_fixed_method_of_torchdiffeq_keeps_its_order(problem: Any) -> None:
    """rk4 with halved steps: order 4 through the adapter."""
    sizes = [0.1, 0.05, 0.025]
    blocks = [ODEBlock(problem.f, solver=TorchDiffEq("rk4", step_size=h)) for h in sizes]
    errors = [(block(problem.z0) - problem.solution(1.0)).abs().max().item() for block in blocks]
    assert slopes(sizes, errors)[-1] == pytest.approx(4, abs=0.3)
    assert name(blocks[0].solver) == "TorchDiffEq"
