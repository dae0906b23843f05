"""The certified model that is shipped: its weights carry the certificate that its record states."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from examples.mnist import certified, certified_training
from examples.mnist.attacks import PGD, Threat, margin, perturb
from examples.mnist.data import load

WEIGHTS = Path(__file__).parents[1] / "docs" / "results" / "weights" / "m14.safetensors"
RECORD = json.loads(WEIGHTS.with_suffix(".json").read_text())
MNIST = pytest.mark.skipif("ODELAYERS_MNIST" not in os.environ, reason="ODELAYERS_MNIST names no folder with MNIST")


@pytest.fixture(scope="module")
def model() -> certified.CertifiedClassifier:
    return certified_training.load(WEIGHTS)


def test_the_record_is_that_of_the_weights(model) -> None:
    """Recipe, parameters, every operator norm and the Lipschitz constant are those of the file; it is small."""
    assert json.loads(json.dumps(RECORD["recipe"])) == json.loads(json.dumps(vars(model.recipe)))
    assert sum(p.numel() for p in model.parameters()) == RECORD["parameters"]
    assert WEIGHTS.stat().st_size < 2e6
    norms = [block.f.operator_norm().item() for block in model.blocks]
    assert norms == pytest.approx(RECORD["norms"], abs=1e-6)
    constant = math.prod(max(1.0, certified.STEP * norm**2 - 1) for norm in norms)
    assert RECORD["test"]["lipschitz"] == pytest.approx(constant, rel=1e-9)


def test_the_shipped_model_moves_no_searched_pair_apart(model) -> None:
    """Gradient ascent on the ratio of distances from random pairs stays within the constant, and comes near it."""
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.rand(20, 1, 28, 28, generator=generator).double().requires_grad_() for _ in range(2))
    exact, best = certified_training.load(WEIGHTS).double(), 0.0
    optimiser = torch.optim.Adam([x, y], lr=0.02)
    for _ in range(60):
        ratios = (exact.states(x) - exact.states(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
        best = max(best, ratios.max().item())
        optimiser.zero_grad()
        (-ratios.log().sum()).backward()
        optimiser.step()
    assert 0.9 * RECORD["test"]["lipschitz"] < best <= RECORD["test"]["lipschitz"] * (1 + 1e-9)


@MNIST
@pytest.mark.slow
def test_the_test_set_is_certified_as_the_record_says(model) -> None:
    """Clean and certified accuracy on MNIST's 10,000 test images, to one image for rounding on other machines."""
    found = certified.evaluate(model, load(say=lambda text: None).test)
    assert found["clean"] == pytest.approx(RECORD["test"]["clean"], abs=1.01e-4)
    assert found["certified"] == pytest.approx(RECORD["test"]["certified"], abs=1.01e-4)
    assert found["rounding"] < certified.ROUNDING / 10


@MNIST
@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.5, 1.58])
def test_no_attack_breaks_a_certified_test_image(model, eps: float) -> None:
    """PGD on the margin breaks images that are not certified, and none that is."""
    test = load(say=lambda text: None).test.first(500)
    sure = model.certified_radius(test.images, test.labels) > eps
    found = perturb(model, test.images, test.labels, Threat("l2", eps), PGD("margin", 20), torch.Generator())
    broken = margin(model(found), test.labels) > 0
    assert not (broken & sure).any()
    assert (broken & ~sure).any() and sure.any()


def test_a_model_that_computes_too_coarsely_is_not_certified(model, monkeypatch) -> None:
    """Logits rounded as bfloat16 rounds them move radii by more than is taken off: an error, not a certificate."""
    forward = certified.CertifiedClassifier.forward

    def coarse(self, x, generator=None):
        logits = forward(self, x)
        return logits if logits.dtype == torch.float64 else logits.bfloat16().float()

    monkeypatch.setattr(certified.CertifiedClassifier, "forward", coarse)
    with pytest.raises(RuntimeError, match="more than the 0.0001 that is taken off them"):
        certified.evaluate(model, load("digits").test)
