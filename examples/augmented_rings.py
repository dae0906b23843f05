"""Concentric rings: the flow of an ODE in the plane cannot pull them apart; with one more dimension it can.

A flow is a homeomorphism: the disc stays inside the ring, and no line separates them. Source: Dupont, Doucet, Teh,
"Augmented Neural ODEs" (NeurIPS 2019), proposition 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from odelayers import MLP, AugmentedODEBlock, Midpoint, ODEBlock


def rings(n: int) -> tuple[Tensor, Tensor]:
    """`n` points: half in the disc of radius 0.5, half in the ring from 1 to 1.5."""
    angle, inner = 2 * torch.pi * torch.rand(n), torch.arange(n) % 2 == 0
    radius = torch.where(inner, 0.5 * torch.rand(n).sqrt(), 1 + 0.5 * torch.rand(n))
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), inner.float()


def fit(block: ODEBlock, dim: int) -> nn.Module:
    """Train a block with a linear readout to give positive logits in the disc."""
    model = nn.Sequential(block, nn.Linear(dim, 1), nn.Flatten(0))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        points, labels = rings(256)
        loss = binary_cross_entropy_with_logits(model(points), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.requires_grad_(False)


torch.manual_seed(0)
solver = Midpoint(steps=10)
models = {
    "the plane": fit(ODEBlock(MLP(2, (32,)), solver=solver), 2),
    "one more dimension": fit(AugmentedODEBlock(MLP(3, (32,)), extra=1, solver=solver), 3),
}

# The flow carries the disc inside the circle to the inside of the circle's image, and a linear readout is largest on
# the edge of a plane region: in the plane some point of the circle always scores higher than the whole disc.
angle = torch.linspace(0, 2 * torch.pi, 20_001)
circle = 1.25 * torch.stack([angle.cos(), angle.sin()], 1)
points, labels = rings(4000)
gap, wrong = {}, {}
for name, model in models.items():
    logits = model(points)
    wrong[name] = ((logits > 0) != labels.bool()).sum().item()
    gap[name] = (logits[labels.bool()].max() - model(circle).max()).item()
    print(f"{name:18}: {wrong[name]} of {len(points)} wrong; best score of the disc - of the circle: {gap[name]:+.2f}")

assert gap["the plane"] < 0 < gap["one more dimension"]
assert wrong["one more dimension"] == 0 < wrong["the plane"]
