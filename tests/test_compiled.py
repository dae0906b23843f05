"""Blocks with compile=True: the same numbers as eagerly, or a warning and the same numbers."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from odelayers import (
    MLP,
    RK4,
    Adjoint,
    AugmentedODEBlock,
    Checkpoint,
    Dopri5,
    Euler,
    Heun,
    KineticRegularizer,
    Midpoint,
    ODEBlock,
    SolveError,
    Tsit5,
    count_nfe,
    jacobian,
)
from odelayers._solvers import Programs

F64 = torch.float64
SOLVERS = [Euler(5), Midpoint(5), Heun(5), RK4(5), Dopri5(1e-6, 1e-6), Tsit5(1e-6, 1e-6)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
compiled = pytest.mark.compiled
pytestmark = [  # what torch.compile says to itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch to `torch.compile`:DeprecationWarning"),
]


class Timed(nn.Module):
    """f(t, z, context), smooth, with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=F64)

    def forward(self, t: Tensor, z: Tensor, push: Tensor) -> Tensor:
        return torch.sin(-self.linear(z)) * torch.cos(t) + 0.1 * push


def pair(f: Any, **options: Any) -> tuple[ODEBlock, ODEBlock]:
    """A compiled block and its eager twin."""
    return ODEBlock(f, compile=True, **options), ODEBlock(f, **options)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    torch.compiler.reset()


@compiled
@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_states_and_gradients_are_the_eager_ones(solver: Any, device: str) -> None:
    """To z0, parameters, context and an end time for each sample, with the same evaluations and steps."""
    f, t1 = Timed().to(device), torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=F64, requires_grad=True)
    z, push = (x.to(device).requires_grad_() for x in torch.randn(2, 4, 3, dtype=F64))
    found = []
    for block in pair(f, solver=solver, time=True):
        solution = block.solve(z, t1=t1, context=push)
        gradients = torch.autograd.grad(solution.final.pow(3).sum(), [z, push, t1, *f.parameters()])
        found.append([solution.final, *gradients])
        stats = solution.stats
        found[-1] += [torch.tensor([stats.nfe, stats.accepted, stats.rejected])]
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-11, atol=1e-12)


@compiled
@pytest.mark.timeout(600)
@pytest.mark.parametrize("times", ["one end", "an end for each", "outputs", "backwards"])
@pytest.mark.parametrize("solver", [RK4(3), Dopri5(1e-9, 1e-9)], ids=lambda s: type(s).__name__)
def test_every_compiled_gradient_passes_gradcheck(solver: Any, times: str) -> None:
    """The scan, and the step with and without outputs inside it: in start, context, end times and parameters.

    The tolerance is far below what finite differences see of the part that no gradient has, of the step size.
    """
    f, z, push = Timed(), *torch.randn(2, 2, 3, dtype=F64)
    block = ODEBlock(f, solver=solver, time=True, compile=True)
    t1 = torch.tensor([0.2, 0.3], dtype=F64) if times == "an end for each" else torch.tensor(0.3, dtype=F64)
    ts = {"outputs": [0.0, 0.11, 0.2, 0.3], "backwards": [0.3, 0.17, -0.1]}.get(times)
    inputs = [z.requires_grad_(), push.requires_grad_(), *([] if ts else [t1.requires_grad_()]), *f.parameters()]

    def run(z: Tensor, push: Tensor, *others: Tensor) -> Tensor:  # the parameters are changed where they are
        return block.solve(z, ts, t1=None if ts else others[0], context=push).zs[1:]

    with functorch_config.patch(donated_buffer=False):  # gradcheck takes one backward pass again and again
        assert torch.autograd.gradcheck(run, inputs, atol=1e-6)
    assert isinstance(block._programs, Programs) and set(block._programs._calls.values()) == {True}


@compiled
@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("t1", [6.0, -1.5, torch.tensor([6.0, 1.0, 5.0, 0.0, -1.0], dtype=F64)], ids=str)
def test_inference_as_one_loop_takes_the_eager_steps(t1: float | Tensor, device: str) -> None:
    """Forwards, backwards and to a time of each sample's own, with steps rejected: states and counts of the march."""
    f, z = MLP(3, (8,)).double().to(device), 3 * torch.randn(5, 3, dtype=F64).to(device)
    found = []
    for block in pair(f, solver=Dopri5(1e-8, 1e-8, first_step=1.0)):
        with torch.no_grad(), count_nfe(block) as count:
            found.append(block.solve(z, t1=t1))
        assert count.nfe == found[-1].stats.nfe
    ours, eager = (s.stats for s in found)
    assert (ours.nfe, ours.accepted, ours.rejected) == (eager.nfe, eager.accepted, eager.rejected)
    assert eager.rejected > 0
    torch.testing.assert_close(found[0].final, found[1].final, rtol=1e-12, atol=1e-13)


@compiled
@pytest.mark.timeout(600)
def test_the_loop_gives_a_field_the_times_of_its_stages() -> None:
    """z' = cos(9 t) z is z0 exp(sin(9 t1) / 9), in as many steps as eagerly: none was given up and tried again so."""
    ours, eager = pair(lambda t, z: torch.cos(9 * t) * z, t1=2.0, solver=Dopri5(1e-9, 1e-9))
    z = torch.randn(4, 3, dtype=F64)
    with torch.no_grad():
        with count_nfe(ours) as count:
            found = ours(z)
        assert count.nfe == eager.solve(z).stats.nfe
    torch.testing.assert_close(found, z * math.exp(math.sin(18.0) / 9), rtol=1e-7, atol=1e-9)


@compiled
@pytest.mark.timeout(600)
@pytest.mark.parametrize("solver", [RK4(7), Dopri5(1e-7, 1e-7)], ids=lambda s: type(s).__name__)
def test_output_times_padding_and_batch_sizes(solver: Any) -> None:
    """Outputs between steps, an augmented state, and batches of several sizes equal the eager ones."""
    f, ts = MLP(4, (8,)).double(), [1.0, 0.7, 0.1, -0.5]
    ours, eager = (AugmentedODEBlock(f, 1, solver=solver, compile=c) for c in (True, False))
    for batch in (2, 5):
        z = torch.randn(batch, 3, dtype=F64)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(ours.solve(z, ts).zs, eager.solve(z, ts).zs, rtol=1e-11, atol=1e-12)


@compiled
@pytest.mark.timeout(600)
def test_every_block_has_programs_of_its_own() -> None:
    """Twelve blocks of one architecture: none runs into torch.compile's limit of programs for one function."""
    z = torch.randn(2, 2, dtype=F64)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True")
        for _ in range(12):
            ours, eager = pair(nn.Linear(2, 2, dtype=F64), solver=RK4(2))
            torch.testing.assert_close(ours(z), eager(z), rtol=1e-12, atol=1e-13)


@compiled
@pytest.mark.timeout(600)
@pytest.mark.parametrize("solver", [RK4(3), Dopri5()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("grad", [True, False])
def test_a_field_that_does_not_compile_says_so_and_is_solved_eagerly(solver: Any, grad: bool) -> None:
    """A branch on a value: one warning, the eager numbers, and transforms of an eager field still work after it."""

    class Branching(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            return -super().forward(z) if z.sum() > 1e9 else torch.tanh(super().forward(z))

    ours, eager = pair(Branching(2, 2, dtype=F64), solver=solver)
    z = torch.randn(3, 2, dtype=F64)
    with torch.set_grad_enabled(grad):
        with pytest.warns(UserWarning, match=r"compile=True: torch.compile failed on field Branching.*solved eagerly"):
            first = ours(z)
        assert torch.equal(first, eager(z)) and torch.equal(ours(z), eager(z))  # the second call does not warn
    f = MLP(2, (4,)).double()
    by_row = torch.func.vmap(torch.func.jacrev(lambda x: f(x[None])[0]))(z)
    torch.testing.assert_close(jacobian(f, z), by_row, rtol=1e-12, atol=1e-13)


@compiled
@pytest.mark.timeout(600)
@pytest.mark.parametrize("solver", [RK4(200), Dopri5(max_steps=300)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("grad", [True, False])
def test_a_solve_that_fails_fails_as_eagerly(solver: Any, grad: bool) -> None:
    """Blow-up: the rows, their times and the reason are those of the eager solve; isolate leaves the others healthy."""
    z, errors = torch.tensor([[0.1], [1.0]], dtype=F64), []
    ours, eager = pair(lambda z: z**2 * 1.0, t1=2.0, solver=solver)
    with torch.set_grad_enabled(grad):
        for block in (ours, eager):
            with pytest.raises(SolveError) as caught:
                block(z)
            errors.append((caught.value.rows, caught.value.status, caught.value.t))
        assert errors[0][:2] == errors[1][:2] and errors[0][2] == pytest.approx(errors[1][2], rel=1e-6)
        isolated = ours.solve(z, on_failure="isolate")
    torch.testing.assert_close(isolated.final[0, 0], torch.tensor(0.1 / (1 - 0.2), dtype=F64), rtol=1e-4, atol=0)
    assert isolated.final[1].isnan().all()


@compiled
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first_step", [None, 0.03, 50.0])
def test_the_loop_begins_with_the_eager_first_step(first_step: float | None) -> None:
    """Chosen inside the program, or given: steps and states are the eager solve's, both ways and from a row at rest."""
    f, z = (lambda z: torch.sin(-z) * (z > 0)), torch.tensor([[0.3, 2.0], [0.0, 0.0]], dtype=F64)
    solver = Dopri5(1e-7, 1e-7, first_step=first_step)
    for t1 in (3.0, -0.5):
        with torch.no_grad():
            ours, eager = (block.solve(z) for block in pair(f, t1=t1, solver=solver))
        torch.testing.assert_close(ours.final, eager.final, rtol=1e-12, atol=1e-14)
        told = [(s.stats.nfe, s.stats.accepted, s.stats.rejected) for s in (ours, eager)]
        assert told[0] == told[1]
    start = torch.tensor([[0.3, 2.0], [math.nan, 0.0]], dtype=F64)
    for block in pair(f, solver=solver):
        with torch.no_grad(), pytest.raises(SolveError, match=r"1 row\(s\) failed \[1\]"):
            block(start)


@compiled
@pytest.mark.timeout(600)
def test_an_overflow_is_no_result_of_the_loop_either() -> None:
    """The whole solve in one graph ends at inf, with an error of 0 beside it: the eager solve says what happened."""
    ours, _ = pair(lambda z: torch.where(z > 1e38, 1e33, 0.0), t1=1e5, solver=Dopri5())
    with torch.no_grad(), pytest.raises(SolveError, match=r"1 row\(s\) failed \[1\]"):
        ours(torch.tensor([[1.0], [3.4e38]]))


@compiled
@pytest.mark.timeout(600)
def test_running_integrals_and_half_precision(recwarn: pytest.WarningsRecorder) -> None:
    """Running regularisers give the eager integrals; a half-precision state is solved eagerly, with a warning."""
    ours, eager = pair(MLP(3, (4,)).double(), solver=RK4(4))
    z = torch.randn(2, 3, dtype=F64)
    sums = [b.solve(z, running=[KineticRegularizer()]).running[0] for b in (ours, eager)]
    torch.testing.assert_close(*sums, rtol=1e-11, atol=1e-12)
    f = MLP(3, (4,))
    with pytest.warns(UserWarning, match="runs under autocast; the block is solved eagerly"):
        half = ODEBlock(f, solver=RK4(4), compile=True)(z.bfloat16())
    assert torch.equal(half, ODEBlock(f, solver=RK4(4))(z.bfloat16()))


@compiled
@pytest.mark.timeout(600)
def test_second_derivatives_and_second_passes_are_refused_by_torch() -> None:
    """A compiled gradient cannot be differentiated again, nor taken twice, and torch says so."""
    block, z = ODEBlock(MLP(2, (4,)).double(), solver=RK4(3), compile=True), torch.randn(2, 2, dtype=F64)
    for options in ({"create_graph": True}, {"retain_graph": True}):
        with pytest.raises(RuntimeError, match="create_graph=False and retain_graph=False"):
            torch.autograd.grad(block(z.requires_grad_()).pow(2).sum(), z, **options)


@compiled
@pytest.mark.timeout(600)
@pytest.mark.parametrize("solver", [Euler(steps=3), RK4(steps=3)], ids=repr)
def test_a_fixed_grid_is_one_graph_to_compilers(solver: Any) -> None:
    """torch.compile with fullgraph=True and strict export trace a whole solve, with its gradient."""
    flow, z = ODEBlock(MLP(4, (8,)).double(), solver=solver), torch.randn(5, 4, dtype=F64)
    expected = flow(z)
    assert (torch.export.export(flow, (z,), strict=True).module()(z) - expected).abs().max() < 1e-14
    compiled = torch.compile(flow, fullgraph=True)(z)
    assert (compiled - expected).abs().max() < 1e-14
    pairs = (torch.autograd.grad(out.sum(), flow.parameters()) for out in (compiled, expected))
    for found, wanted in zip(*pairs, strict=True):
        assert (found - wanted).abs().max() < 1e-13


def test_what_is_not_compiled_is_refused_at_construction() -> None:
    """Gradients that evaluate again, steps of each row's own, and anything but a bool."""
    for options in ({"gradient": Checkpoint()}, {"gradient": Adjoint()}, {"solver": Dopri5(batch="independent")}):
        with pytest.raises(ValueError, match=r"compile=True compiles.*gradient=Backprop\(\)"):
            ODEBlock(nn.Linear(2, 2), compile=True, **options)
    with pytest.raises(TypeError, match="compile: expected True or False, got 'yes'"):
        ODEBlock(nn.Linear(2, 2), compile="yes")  # type: ignore[arg-type]


def test_a_copy_makes_programs_of_its_own() -> None:
    """deepcopy and pickle carry the option, not what was compiled."""
    block = ODEBlock(nn.Linear(2, 2), compile=True)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert twin._programs is not None and twin._programs is not block._programs
        assert "compile=True" in repr(twin)
