"""Watches on a training: what its model answers on the validation images, as they are and attacked."""

from __future__ import annotations

import torch
from torch import Tensor

from .adversary import PGD, Adversary
from .data import Split
from .models import Classifier

__all__ = ["accuracy", "adversarial_accuracy", "ends", "states"]

EVALUATION_BATCH = 1000
JUDGE = Adversary(PGD, steps=20, step=0.03, warm_up=0.0)  # of adversarial phases, on the first validation images
JUDGED = 500


@torch.no_grad()
def states(model: Classifier, images: Tensor) -> Tensor:
    """What enters the block, (N, 64), with the features in evaluation mode."""
    model.eval()
    return torch.cat([model.features(batch) for batch in images.split(EVALUATION_BATCH)])


@torch.no_grad()
def ends(model: Classifier, z: Tensor, noise: torch.Generator) -> Tensor:
    """What leaves the block, (N, 64), from what enters it."""
    return torch.cat([model.end(part, noise) for part in z.split(EVALUATION_BATCH)])


@torch.no_grad()
def accuracy(model: Classifier, data: Split, noise: torch.Generator) -> float:
    """Share of samples classified rightly, one draw of the noise per sample."""
    found = ends(model, states(model, data.images), noise)
    return (model.head(found).argmax(1) == data.labels).float().mean().item()


def adversarial_accuracy(
    model: Classifier, data: Split, generator: torch.Generator, judge: Adversary = JUDGE, images: int = JUDGED
) -> float:
    """Accuracy on the first images under PGD-20 from a random start: a watch on training, not an evaluation."""
    some = data.first(images)
    model.eval()
    found = judge.find(lambda x: model(x, generator), some.images, some.labels, generator)
    return accuracy(model, Split(found, some.labels), generator)
