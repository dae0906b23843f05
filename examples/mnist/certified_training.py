"""How M14, the certified model, is trained: see `certified`.

In training the rows of W are scaled so that ||W|| <= 1 at Euler's step 2 (Prach and Lampert 2022; Araujo et al. 2023).
The certificate does not rely on that, but on an SVD of each W as it is.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, normalize, pad
from torch.nn.utils import parametrize

from odelayers import SolveError

from .certified import CertifiedClassifier, Recipe, evaluate, linear, margins
from .data import Dataset
from .parallel import Processes
from .progress import bar

__all__ = ["sealed", "train"]


class AlmostOrthogonal(nn.Module):
    """Rows scaled so that ||W|| <= 1: by the absolute row sums of WW', of a matrix or a convolution of any size."""

    def forward(self, weight: Tensor) -> Tensor:
        """Scale a weight (rows, inputs) or (rows, channels, k, k)."""
        if weight.ndim == 2:
            sums = (weight @ weight.mT).abs().sum(1)
        else:
            sums = conv2d(weight, weight, padding=weight.shape[-1] - 1).abs().sum((1, 2, 3))
        return weight * sums.clamp(min=1e-12).rsqrt().view(-1, *[1] * (weight.ndim - 1))


class UnitRows(nn.Module):
    """Rows of length 1."""

    def forward(self, weight: Tensor) -> Tensor:
        """Scale a weight (rows, inputs)."""
        return normalize(weight, dim=1)


class CertifiedLoss(nn.Module):
    """log(1 + sum_j exp(temperature (offset - margin_j))), mean over the batch, over the temperature.

    It is a module so that DistributedDataParallel can wrap it; its parameters are the model's.
    """

    def __init__(self, model: CertifiedClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss of images (B, 1, 28, 28), a 0-d tensor."""
        recipe = self.model.recipe
        excess = margins(self.model(x), labels, self.model.distances()) / recipe.scale - recipe.offset
        exponents = pad(-recipe.temperature * excess, (0, 1))  # exp(-inf) = 0 for the class itself, and the 1
        return exponents.logsumexp(1).mean() / recipe.temperature


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Images (B, 1, H, W), each moved by up to `most` pixels along both axes, zeros moving in."""
    if not most:
        return images
    height, width = images.shape[-2:]
    down, right = torch.randint(2 * most + 1, (2, len(images), 1), generator=generator).to(images.device)
    rows, columns = (n + torch.arange(size, device=images.device) for n, size in ((down, height), (right, width)))
    samples = torch.arange(len(images), device=images.device)[:, None, None]
    return pad(images, [most] * 4)[samples, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def constrained(model: CertifiedClassifier) -> CertifiedClassifier:
    """The model with weights that are scaled at every access: what the optimiser moves has no norm to keep."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        parametrize.register_parametrization(linear(block), "weight", AlmostOrthogonal())
    parametrize.register_parametrization(model.head, "weight", UnitRows())
    return model


def sealed(model: CertifiedClassifier) -> CertifiedClassifier:
    """The same model with the scaled weights as its plain ones, ready to be saved, attacked and certified."""

    def value(name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(model.get_submodule(owner), leaf).detach().clone()

    with torch.device("meta"):  # nothing is drawn
        plain = CertifiedClassifier(model.recipe)
    plain.load_state_dict({name: value(name) for name in plain.state_dict()}, assign=True)
    return plain.requires_grad_(False).eval()


def train(recipe: Recipe, data: Dataset, seed: int = 0) -> tuple[CertifiedClassifier, list[dict[str, Any]]]:
    """Train from fresh weights by Adam on a one-cycle schedule; returns the sealed model and one line per epoch.

    Processes of torchrun share every batch.

    A line holds the epoch, its steps, their mean loss, and the clean and certified accuracy on the validation set.

    Raises:
        SolveError: a state is not finite: the images are not, or training diverged.
        FailedElsewhere: so it was in another process.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = constrained(CertifiedClassifier(recipe)).to(data.train.images.device)
    processes, draws = Processes.now(), torch.Generator().manual_seed(seed)
    objective = processes.wrap(CertifiedLoss(model))
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    steps = -(-len(data.train) // recipe.batch)
    total = recipe.epochs * steps + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=total, pct_start=0.2)
    log = []
    for epoch in range(1, recipe.epochs + 1):
        order = torch.randperm(len(data.train), generator=draws).to(data.train.labels.device)
        losses = torch.zeros((), device=order.device)
        with bar(steps, f"M14: epoch {epoch}/{recipe.epochs}") as progress:
            for rows in order.split(recipe.batch):
                images = shifted(data.train.images[rows], recipe.shift, draws)
                images, labels = processes.share(images), processes.share(data.train.labels[rows])
                with parametrize.cached():
                    loss = processes.together(partial(objective, images, labels), SolveError, labels.device)
                optimiser.zero_grad()
                loss = processes.weight(labels, rows) * loss
                loss.backward()
                optimiser.step()
                schedule.step()
                losses += loss.detach()
                progress.update()
        reached = evaluate(sealed(model), data.validation)
        log.append(
            {"epoch": epoch, "steps": steps, "loss": processes.average(losses).item() / steps, "validation": reached}
        )
    return sealed(model), log
