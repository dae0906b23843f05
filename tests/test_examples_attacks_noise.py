"""Attacks on models that draw noise: luck in a draw is not taken for an image that is worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.mnist.attacks import PGD, SPSA, Best, SimBA, Square, Threat, margin

THREAT = Threat("l2", 0.5)


class Linear:
    """A linear model whose logits are drawn with noise from a generator that it names, `draws` at once."""

    def __init__(self, sigma: float = 0.0, draws: int = 8, shared: bool = True) -> None:
        weights = torch.Generator().manual_seed(0)
        self.weight = 0.02 * torch.randn(10, 784, generator=weights)
        self.sigma, self.draws, self.source = sigma, draws, torch.Generator().manual_seed(1)
        if shared:
            self.noise = self.source

    def mean(self, x: Tensor) -> Tensor:
        """The logits without noise."""
        return x.flatten(1) @ self.weight.T

    def __call__(self, x: Tensor) -> Tensor:
        """The logits, (B, 10), or (draws, B, 10) with noise."""
        if not self.sigma:
            return self.mean(x)
        noise = torch.randn(self.draws, len(x), 10, generator=self.source)
        return self.mean(x) + self.sigma * noise


@pytest.fixture(scope="module")
def samples() -> tuple[Tensor, Tensor]:
    images = torch.rand(60, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    return images, Linear().mean(images).argmax(1)


def found(model: Linear, attack: object, samples: tuple[Tensor, Tensor]) -> float:
    """The mean margin without noise of what an attack finds."""
    images, labels = samples
    made = attack.run(model, images, labels, THREAT, torch.Generator().manual_seed(3))
    return margin(model.mean(made), labels).mean().item()


@pytest.mark.parametrize("attack", [Square(200), SimBA(steps=100), SPSA(10, 32)], ids=str)
def test_search_under_noise_gets_nearly_as_far_as_without(attack, samples):
    """With the same draws for the images that it compares, and nowhere near it without (the control)."""
    clean = margin(Linear().mean(samples[0]), samples[1]).mean().item()
    without = found(Linear(), attack, samples) - clean
    shared, unshared = (found(Linear(0.4, shared=s), attack, samples) - clean for s in (True, False))
    assert shared > 0.75 * without > 0
    assert unshared < 0.5 * shared


def test_pgd_returns_the_end_of_its_way_and_not_the_luckiest_draw(samples):
    """With a noise ten times the margin the mean margin still rises as far as the gradient's own noise lets it."""
    clean = margin(Linear().mean(samples[0]), samples[1]).mean().item()
    way = PGD("ce", 20, rate=5.0)
    without, noisy = (found(Linear(sigma), way, samples) - clean for sigma in (0.0, 0.4))
    assert noisy > 0.75 * without > 0


def test_an_incumbent_is_asked_again_beside_what_would_replace_it(samples):
    """A lucky answer that is on record does not keep out an image that is better over the same draws."""
    images, labels = samples
    model = Linear(0.4)
    best = Best(model, images, labels)
    best.margins += 5.0  # as if the first answers had been lucky
    better = images + 0.05 * (model.weight[(labels + 1) % 10] - model.weight[labels]).view_as(images)
    rows = torch.arange(len(images))
    best.judge(rows, better)
    assert torch.equal(best.images, better)
    assert best.margins.max() < 2.0
