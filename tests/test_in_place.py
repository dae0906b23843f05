"""A field that writes into its input z: raised by every solver, in every mode, when it starts and not only at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import (
    RK4,
    Dopri5,
    DropoutSDEBlock,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
    Milstein,
    ODEBlock,
    ReversibleHeun,
    Rodas5P,
    SDEBlock,
    StratonovichHeun,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
)
from problems import name

pytestmark = pytest.mark.timeout(60)
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
ODES = (
    *(cls(steps=20) for cls in (Euler, Midpoint, Heun, RK4)),
    *(Dopri5(), Tsit5(), Dopri5(batch="independent"), Rodas5P()),
    *(TorchDiffEq("dopri5"), TorchDiffEq("rk4", step_size=0.05)),
)
SDES = (EulerMaruyama(20), Milstein(20), StratonovichHeun(20), ReversibleHeun(20), TorchSDE("euler", 20))
KINDS = [  # of a block with noise: which field writes in place; DropoutSDEBlock's noise is not Milstein's
    (solver, kind)
    for solver in SDES
    for kind in ("drift", "diffusion", "dropout")
    if (type(solver), kind) != (Milstein, "dropout")
]
WORDS = r"the field changed its input z in place.*out-of-place operation"


class Decay(nn.Module):
    """z' = -z, in place after a time; `calls` are those in place, of which a raised solve has made one."""

    def __init__(self, after: float) -> None:
        super().__init__()
        self.after, self.calls = after, 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        if not bool((t >= self.after).any()):
            return -z
        self.calls += 1
        return z.mul_(-1.0)


def weak(t: Tensor, z: Tensor) -> Tensor:
    """The other field of an SDE."""
    return 0.1 * z


def noisy(kind: str, f: nn.Module, solver: Any) -> nn.Module:
    """A block with noise whose drift, diffusion or only field is f."""
    calculus = solver.calculus[0]
    if kind == "dropout":
        return DropoutSDEBlock(f, 0.1, solver=solver, calculus=calculus)
    drift, diffusion = (f, weak) if kind == "drift" else (weak, f)
    return SDEBlock(drift, diffusion, solver=solver, calculus=calculus, noise="scalar")


@pytest.mark.parametrize("after", [0.0, 0.3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", ODES, ids=name)
def test_a_field_in_place_on_z_is_raised_whenever_it_starts(solver: Any, mode: str, after: float) -> None:
    """At the start, or after t = 0.3 of 1 in a solve of twenty steps: never exp(-1) with another sign or size."""
    f, z = Decay(after), torch.ones(2, 3)
    with MODES[mode](), pytest.raises(ValueError, match=f"field Decay: {WORDS}"):
        ODEBlock(f, solver=solver)(z)
    assert torch.equal(z, torch.ones(2, 3))
    assert f.calls == 1 or mode == "inference"  # there the field is watched now and then


@pytest.mark.parametrize("after", [0.0, 0.3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver, kind", KINDS, ids=lambda x: x if isinstance(x, str) else name(x))
def test_drift_and_diffusion_in_place_on_z_are_raised(solver: Any, kind: str, mode: str, after: float) -> None:
    """Both fields of an SDE are watched like that of an ODE."""
    error: type[Exception] = ValueError
    words, z = f"field Decay: {WORDS}", torch.ones(2, 3)
    if (type(solver), kind, mode, after) == (Milstein, "diffusion", "inference", 0.3):
        error, words = RuntimeError, "Inplace update to inference tensor"  # torch.func.jvp of g itself refuses it
    with MODES[mode](), pytest.raises(error, match=words):
        noisy(kind, Decay(after), solver)(z)
    assert torch.equal(z, torch.ones(2, 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", ODES, ids=name)
def test_an_in_place_layer_is_raised_though_it_changes_no_value_yet(solver: Any, mode: str) -> None:
    """ReLU(inplace=True) at a positive state writes the values that were there: the version tells, not the values."""
    f, z = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), torch.ones(2, 3)
    with MODES[mode](), pytest.raises(ValueError, match=f"field Sequential: {WORDS}"):
        ODEBlock(f, solver=solver)(z)
    assert torch.equal(z, torch.ones(2, 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", ODES, ids=name)
def test_writing_into_tensors_of_its_own_is_a_field_s_right(solver: Any, mode: str) -> None:
    """Control: a clone of z that is written into is solved for as -z is."""

    def own(z: Tensor) -> Tensor:
        return z.clone().neg_()

    z = torch.ones(2, 3)
    with MODES[mode]():
        found = ODEBlock(own, solver=solver)(z)
        wanted = ODEBlock(lambda z: -z, solver=solver)(z)
    assert (found - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_initial_state_made_in_inference_mode_is_solved_for(mode: Callable[[], Any]) -> None:
    """A tensor without a version is none of these, in either mode."""
    with torch.inference_mode():
        z = torch.ones(2, 3) * 1.0
    with mode():
        for solver in ODES:
            end = ODEBlock(torch.neg, solver=solver, time=False)(z)
            assert (end - torch.tensor(-1.0).exp()).abs().max() < 0.02
