"""What happens to a compiled block between its calls: hooks, sizes, and failures that are none of compiling."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.autograd import forward_ad

from odelayers import (
    RK4,
    Dopri5,
    ODEBlock,
)
from odelayers._solvers import Programs

F64 = torch.float64
compiled = pytest.mark.compiled
pytestmark = [  # what torch.compile says to itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch to `torch.compile`:DeprecationWarning"),
]


def pair(f: Any, **options: Any) -> tuple[ODEBlock, ODEBlock]:
    """A compiled block and its eager twin."""
    return ODEBlock(f, compile=True, **options), ODEBlock(f, **options)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    torch.compiler.reset()


@compiled
@pytest.mark.timeout(600)
@pytest.mark.parametrize("solver", [RK4(3), Dopri5()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("grad", [True, False])
def test_hooks_that_come_and_go_are_seen(solver: Any, grad: bool) -> None:
    """A forward hook registered after the first call changes the field, and its removal changes it back."""
    f, z = nn.Sequential(nn.Linear(2, 2, dtype=F64), nn.Tanh()), torch.randn(3, 2, dtype=F64)
    ours, eager = pair(f, solver=solver)

    def same() -> Tensor:
        out = ours(z)
        torch.testing.assert_close(out, eager(z), rtol=1e-12, atol=1e-13)
        return out

    with torch.set_grad_enabled(grad):
        plain = same()
        for layer in (f, f[0]):
            hook = layer.register_forward_hook(lambda module, inputs, out: 2 * out)
            assert not torch.allclose(same(), plain)
            hook.remove()
            assert torch.equal(same(), plain)


@compiled
@pytest.mark.timeout(600)
def test_sizes_beyond_the_limit_are_solved_eagerly_and_the_others_stay_compiled() -> None:
    """torch.compile keeps so many programs of a function: the next size warns once, with the remedy."""
    f, calls = nn.Linear(2, 2, dtype=F64), []
    ours, eager = pair(f, solver=RK4(3))
    with dynamo_config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True")
        for batch in (1, 2, 3, 4, 2, 4):
            z = torch.randn(batch, 2, dtype=F64)
            if batch in (3, 4) and batch not in calls:
                with pytest.warns(UserWarning, match=r"compiled into 2 programs already.*eagerly. Pad the batches"):
                    found = ours(z)
            else:
                found = ours(z)
            calls.append(batch)
            torch.testing.assert_close(found, eager(z), rtol=1e-12, atol=1e-13)
    assert isinstance(ours._programs, Programs) and list(ours._programs._calls.values()) == [True, True, False, False]


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory left"), RuntimeError("the device is lost")], ids=repr
)
def test_what_fails_for_another_reason_than_compiling_is_not_hidden(
    error: Exception, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out, or a device that fails in a program that has run, comes out; the block stays compiled."""
    ours, eager = pair(nn.Linear(2, 2, dtype=F64), solver=RK4(3))
    z, failing = torch.randn(3, 2, dtype=F64), not seen

    def compiler(program: Any, **options: Any) -> Any:
        def run(*inputs: Any) -> Any:
            if failing:
                raise error
            return program(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr("odelayers._solvers.compiled.scan", lambda body, z, xs: (z, stepped(body, z, *xs)))
    if seen:
        torch.testing.assert_close(ours(z), eager(z))
        failing = True
    if seen or isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(type(error), match=str(error)):
            ours(z)
    else:
        with pytest.warns(UserWarning, match="the device is lost.*solved eagerly"):
            ours(z)
    failing = False
    torch.testing.assert_close(ours(z), eager(z))


@compiled
@pytest.mark.timeout(600)
@pytest.mark.parametrize("solver", [RK4(3), Dopri5()], ids=lambda s: type(s).__name__)
def test_dual_numbers_go_around_the_programs(solver: Any) -> None:
    """Forward-mode tangents through a compiled block are the eager ones, and it stays compiled without a warning."""
    ours, eager = pair(nn.Linear(2, 2, dtype=F64), solver=solver)
    z, v = torch.randn(2, 3, 2, dtype=F64)

    def tangent(block: ODEBlock) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            return forward_ad.unpack_dual(block(forward_ad.make_dual(z, v))).tangent

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True")
        for _ in range(2):
            torch.testing.assert_close(tangent(ours), tangent(eager), rtol=1e-12, atol=1e-13)
            with torch.no_grad():
                torch.testing.assert_close(ours(z), eager(z), rtol=1e-12, atol=1e-13)
    assert isinstance(ours._programs, Programs) and True in ours._programs._calls.values()


@compiled
@pytest.mark.timeout(600)
def test_outputs_on_the_way_need_other_programs_but_take_none_away() -> None:
    """Where no further program is kept, what has been compiled goes on."""
    ours, eager = pair(nn.Linear(2, 2, dtype=F64), solver=Dopri5(1e-8, 1e-8))
    z, ts = torch.randn(3, 2, dtype=F64), torch.linspace(0, 1, 4)
    with dynamo_config.patch(recompile_limit=2):
        torch.testing.assert_close(ours(z), eager(z), rtol=1e-12, atol=1e-13)
        before = dict(ours._programs._calls)  # type: ignore[union-attr]
        with pytest.warns(UserWarning, match="compiled into 2 programs already"):
            torch.testing.assert_close(ours.solve(z, ts).zs, eager.solve(z, ts).zs, rtol=1e-11, atol=1e-12)
    assert before and all(ours._programs._calls[call] for call in before)  # type: ignore[union-attr]


def stepped(body: Any, z: Tensor, times: Tensor, lengths: Tensor) -> Tensor:
    """What scan does."""
    states = []
    for at in zip(times, lengths, strict=True):
        z, out = body(z, at)
        states.append(out)
    return torch.stack(states)
