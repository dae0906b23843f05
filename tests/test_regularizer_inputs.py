"""Pointwise regularisers and what they are handed: not finite, in inference mode, or a layer that mixes rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from odelayers import LyaNetRegularizer, LyapunovRegularizer
from odelayers.fields import SineField, SkewSymmetric

LAYERS = {
    "tanh": lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh()),
    "relu": lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
    "linear": lambda: nn.Linear(2, 2),
    "skew relu": lambda: SkewSymmetric(2, activation="relu"),
    "other": lambda: lambda z: torch.relu(z),
}


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("name", LAYERS)
def test_points_that_are_not_finite_are_named(name: str, wrong: float) -> None:
    """Also where the Jacobian is known in closed form and is finite there, as a ReLU's is."""
    z = torch.tensor([[0.5, 1.0], [wrong, 1.0]])
    with pytest.raises(ValueError, match=r"LyapunovRegularizer: z: expected finite .* 1 of 2 rows \(1\)"):
        LyapunovRegularizer()(LAYERS[name](), z)


@pytest.mark.parametrize(("parameter", "what"), [("weight", "linearize"), ("bias", r"f\(z\)")])
def test_a_field_that_is_not_finite_is_named(parameter: str, what: str) -> None:
    """An infinite weight or bias behind a ReLU leaves slopes finite, and the Jacobian or the field not."""
    layer = nn.Linear(2, 2)
    getattr(layer, parameter).data.fill_(math.inf)
    with pytest.raises(ValueError, match=f"LyapunovRegularizer: field Sequential: {what}: expected finite"):
        LyapunovRegularizer()(nn.Sequential(layer, nn.ReLU()), torch.ones(3, 2))


def test_a_layer_of_another_width_is_told_by_the_field_s_shape() -> None:
    """Not by the shape of its weight, which the caller never named."""
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 5\)"):
        LyapunovRegularizer()(nn.Sequential(nn.Linear(3, 5), nn.Tanh()), torch.ones(4, 3))


def lyapunov(f: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return LyapunovRegularizer()(f, z)


def lyanet(f: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return LyaNetRegularizer()(f, z, y, lambda z: 2 * z)


@pytest.mark.parametrize("penalty", [lyapunov, lyanet])
def test_inference_mode_gives_what_no_grad_gives(penalty) -> None:
    """Autograd, by which both penalties differentiate, cannot record points and classes made in inference mode."""
    f, found = LAYERS["tanh"](), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found.append(penalty(f, torch.tensor([[0.5, 1.0], [-0.2, 0.3]]), torch.tensor([0, 1])))
    assert found[0] > 0 and torch.equal(*found)


@pytest.mark.parametrize("penalty", [lyapunov, lyanet])
def test_batch_statistics_are_refused_before_they_move(penalty) -> None:
    """Through them the rows interact, and none has a Jacobian or a rate of its own; in eval mode there are none."""
    norm = nn.BatchNorm1d(2)
    f, z, y = nn.Sequential(nn.Linear(2, 2), norm), torch.ones(3, 2), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="BatchNorm1d with batch statistics"):
        penalty(f, z, y)
    assert norm.num_batches_tracked == 0
    assert penalty(f.eval(), z, y).isfinite()


def test_batch_statistics_in_the_head_are_refused_too() -> None:
    """Through them the potential of a row depends on its mates."""
    norm = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="LyaNetRegularizer: head contains BatchNorm1d with batch statistics"):
        LyaNetRegularizer()(lambda z: -z, torch.ones(2, 2), torch.tensor([0, 1]), nn.Sequential(norm, nn.Linear(2, 2)))
    assert norm.num_batches_tracked == 0


def test_the_jacobian_comes_before_the_field() -> None:
    """The order of the graph decides the last digits of a gradient, and with them every training that was published."""
    seen: list[str] = []

    class Noted(SineField):
        def linearize(self, z: Tensor) -> object:
            seen.append("linearize")
            return super().linearize(z)

        def forward(self, z: Tensor) -> Tensor:
            seen.append("forward")
            return super().forward(z)

    LyapunovRegularizer()(Noted(2), torch.ones(3, 2))
    assert seen == ["linearize", "forward"]
