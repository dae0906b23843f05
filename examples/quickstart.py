"""A stable neural ODE on real digits, in SODEF's two steps; then ask about its field and put it on a noisy clock.

Runs in a few seconds on scikit-learn's 8x8 digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from odelayers import DropoutSDEBlock, LyapunovRegularizer, ODEBlock, SineField, check_stability, simplex_head

torch.manual_seed(0)
digits = load_digits()
images = torch.as_tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.as_tensor(digits.target)
train, test = torch.randperm(len(labels)).split([1437, 360])

# Features, a state that flows for 5 units of time, and ten fixed class vectors as far apart as can be.
features = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh())
block = ODEBlock(SineField(64), t1=5.0)
head = simplex_head(10, 64)


def minimise(loss: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter], epochs: int) -> None:
    """Adam on the training samples."""
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(128):
            optimiser.zero_grad()
            loss(rows).backward()
            optimiser.step()


# 1. The features learn to point at their class's vector.  2. The field learns to rest, stably, where the features are.
minimise(lambda rows: cross_entropy(head(features(images[rows])), labels[rows]), features.parameters(), epochs=15)
features.requires_grad_(False)
before = check_stability(block.f, features(images[test])).abscissa.max().item()
regularizer = LyapunovRegularizer.sodef_mnist(samples=None)
minimise(lambda rows: regularizer(block.f, features(images[rows])), block.parameters(), epochs=15)

with torch.no_grad():
    z = features(images[test])
    solution = block.solve(z, ts=torch.linspace(0, 5, 11))
    noisy = DropoutSDEBlock(block.f, p=0.1, t1=5.0, noise_in_eval=True)  # p is the drop probability, as in nn.Dropout
    ends = {"ODE": solution.final, "noise on": noisy(z)}
    accuracy = {name: (head(end).argmax(1) == labels[test]).float().mean().item() for name, end in ends.items()}
    report = check_stability(block.f, z)

after = report.abscissa.max().item()
print(report)
print(f"largest real part of an eigenvalue at the test points: {before:.3f} -> {after:.3f}")
print(f"one solve: {solution.stats.nfe} evaluations of the field, {solution.stats.accepted} steps")
print("test accuracy: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items()))

assert min(accuracy.values()) > 0.93
assert after < 0.05 < before
assert solution.zs.shape == (11, 360, 64)
assert not torch.equal(*ends.values())
