"""A classifier with an ODE block in it: train it, ask about its field, and put the field on a noisy clock.

Runs in a few seconds on scikit-learn's real 8x8 digits.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from odelayers import DropoutSDEBlock, LyapunovRegularizer, ODEBlock, SineField, check_stability, simplex_head

torch.manual_seed(0)
digits = load_digits()
images = torch.as_tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.as_tensor(digits.target)
train, test = torch.randperm(len(labels)).split([1437, 360])

# Features, then a state that flows for 5 units of time, then ten fixed class vectors as far apart as can be.
features = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
block = ODEBlock(SineField(64), t1=5.0)
model = nn.Sequential(features, block, simplex_head(10, 64))

regularizer = LyapunovRegularizer.sodef_mnist()
optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(20):
    for batch in train[torch.randperm(len(train))].split(128):
        z = features(images[batch])
        loss = cross_entropy(model(images[batch]), labels[batch]) + regularizer(block.f, z)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

model.eval()
with torch.no_grad():
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    solution = block.solve(features(images[test]), ts=torch.linspace(0, 5, 11))
    print(
        f"test accuracy {accuracy:.3f}; {solution.stats.nfe} evaluations of the field, {solution.stats.accepted} steps"
    )
    print(check_stability(block.f, features(images[test])))

    # The same field on a noisy clock, dz = f (dt + sigma dW): p is the drop probability, as in nn.Dropout.
    noisy = DropoutSDEBlock(block.f, p=0.1, t1=5.0, noise_in_eval=True)
    ends = noisy(features(images[test]))
    under_noise = (model[2](ends).argmax(1) == labels[test]).float().mean().item()
    print(f"test accuracy with the noise on {under_noise:.3f}")

assert accuracy > 0.95
assert solution.zs.shape == (11, 360, 64)
assert not torch.equal(ends, solution.final)
