"""The certified model as the study trains it, briefly, on MNIST; and what its certificate asks of arithmetic."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from examples.mnist import certified, certified_training
from examples.mnist.attacks import PGD, Threat, margin, perturb
from examples.mnist.data import Split, load


@pytest.fixture(scope="module")
def trained() -> tuple[certified.CertifiedClassifier, Split]:
    """The study's recipe for two epochs of 20,000 images, and test images."""
    if "ODELAYERS_MNIST" not in os.environ:
        pytest.skip("ODELAYERS_MNIST names no folder with MNIST")
    data = load(say=lambda text: None).first(20_000, 500, 10_000)
    return certified_training.train(replace(certified.Recipe(), epochs=2), data)[0], data.test


@pytest.mark.slow
def test_the_study_s_model_moves_no_searched_pair_apart(trained) -> None:
    """Gradient ascent on the ratio of distances from random pairs stays within the constant, and comes near it."""
    exact, best = trained[0].double(), 0.0
    generator, bound = torch.Generator().manual_seed(2), exact.lipschitz()
    x, y = (torch.rand(20, 1, 28, 28, generator=generator).double().requires_grad_() for _ in range(2))
    optimiser = torch.optim.Adam([x, y], lr=0.02)
    for _ in range(60):
        ratios = (exact.states(x) - exact.states(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
        best = max(best, ratios.max().item())
        optimiser.zero_grad()
        (-ratios.log().sum()).backward()
        optimiser.step()
    exact.float()
    assert 0.9 * bound < best <= bound * (1 + 1e-9)


@pytest.mark.slow
def test_float32_is_far_within_what_is_taken_off(trained) -> None:
    """On all 10,000 test images the logits of float32 and float64 differ by less than a tenth of `ROUNDING`."""
    found = certified.evaluate(*trained)
    assert found["rounding"] < certified.ROUNDING / 10
    assert found["clean"] > found["certified"]["0.5"] > found["certified"]["1.58"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.5, 1.58])
def test_no_attack_breaks_a_certified_test_image(trained, eps: float) -> None:
    """PGD on the margin breaks images that are not certified, and none that is."""
    model, test = trained[0], trained[1].first(500)
    sure = model.certified_radius(test.images, test.labels) > eps
    found = perturb(model, test.images, test.labels, Threat("l2", eps), PGD("margin", 20), torch.Generator())
    broken = margin(model(found), test.labels) > 0
    assert not (broken & sure).any()
    assert (broken & ~sure).any() and sure.any()


def test_a_model_that_computes_too_coarsely_is_not_certified(monkeypatch) -> None:
    """Logits rounded as bfloat16 rounds them move radii by more than is taken off: an error, not a certificate."""
    forward = certified.CertifiedClassifier.forward

    def coarse(self, x, generator=None):
        logits = forward(self, x)
        return logits if logits.dtype == torch.float64 else logits.bfloat16().float()

    data = load("digits", say=lambda text: None)
    model, test = certified_training.train(replace(certified.Recipe(), epochs=1), data)[0], data.test
    certified.evaluate(model, test)
    monkeypatch.setattr(certified.CertifiedClassifier, "forward", coarse)
    with pytest.raises(RuntimeError, match="more than the 0.0001 that is taken off them"):
        certified.evaluate(model, test)
