"""Training: Adam over batches, each solved to its own end time; adversarial training besides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from odelayers import Uniform

from ..attacks import Threat, input_gradient, project
from ..data import Dataset, Split
from ..progress import bar
from .models import EndTimeNet
from .presets import Pgd, Row

__all__ = ["accuracy", "answers", "pgd", "train"]

BATCH = 500  # images evaluated at once
LINES = 20  # of the training log


def train(net: EndTimeNet, data: Dataset, row: Row, seed: int) -> list[dict[str, float]]:
    """Train in place; returns some lines of batch number, mean loss since the last line, and gradient norm.

    The learning rate falls from `row.lr` to 0 along half a cosine. In adversarial training half of each batch is
    replaced by adversarial images, as in the blog.
    """
    order, times = (torch.Generator().manual_seed(seed + k) for k in range(2))
    start = torch.Generator(data.train.images.device).manual_seed(seed + 2)
    optimiser = torch.optim.Adam(net.parameters(), lr=row.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, row.batches)
    every, losses, log = -(-row.batches // LINES), [], []
    with bar(row.batches, row.title) as progress:
        for number, rows in enumerate(_batches(len(data.train), row, order), 1):
            images, labels = data.train.images[rows], data.train.labels[rows]
            end = _end(row, times)
            if row.pgd:
                half = len(images) // 2
                images = torch.cat([pgd(net, images[:half], labels[:half], end, row.pgd, start), images[half:]])
            net.train()
            loss = cross_entropy(net(images, end), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
            progress.update()
            if number % every == 0 or number == row.batches:
                log.append(_line(number, torch.stack(losses).mean().item(), net, row.title))
                losses.clear()
    return log


def _end(row: Row, times: torch.Generator) -> float:
    low, high = row.end
    return low if low == high else Uniform(low, high).draw(times)


def _batches(count: int, row: Row, order: torch.Generator) -> list[Tensor]:
    """Rows of each batch: epochs of whole batches in a new order each, cut at the number asked for."""
    whole = max(1, count // row.batch)
    epochs = -(-row.batches // whole)
    batches = [b for _ in range(epochs) for b in torch.randperm(count, generator=order).split(row.batch)[:whole]]
    return batches[: row.batches]


def _line(number: int, loss: float, net: EndTimeNet, what: str) -> dict[str, float]:
    if not loss < float("inf"):
        raise RuntimeError(f"{what}: the mean loss is {loss} at batch {number}: training diverged; lower the row's lr")
    norm = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm().item()
    return {"batch": number, "loss": loss, "gradient": norm}


def pgd(net: EndTimeNet, images: Tensor, labels: Tensor, end: float, spec: Pgd, generator: torch.Generator) -> Tensor:
    """Images (B, 1, 28, 28) inside the ball and [0, 1] that raise the loss, every one taken all `spec.steps` steps.

    The net is in evaluation mode, so that its running statistics are those of training, but draws its pooling regions
    as in training.
    """
    threat = Threat("linf", spec.eps)
    net.eval()
    net.pool.draws = True
    change = 2 * torch.rand(images.shape, generator=generator, device=images.device) - 1
    x = project(images + spec.eps * change, images, threat)
    for _ in range(spec.steps):
        x = project(x + spec.size * input_gradient(net.at(end), x, labels)[0].sign(), images, threat)
    net.pool.draws = False
    return x


@torch.no_grad()
def answers(net: EndTimeNet, data: Split, ends: Sequence[float]) -> Tensor:
    """The class (T, N) that each image is given at each of the increasing times, in evaluation mode."""
    net.eval()
    return torch.cat([net.read(net.states(x, ends)).argmax(-1) for x in data.images.split(BATCH)], dim=1)


def accuracy(net: EndTimeNet, data: Split, ends: Sequence[float]) -> list[float]:
    """Share of images classified rightly at each of the increasing times."""
    return (answers(net, data, ends) == data.labels).float().mean(1).tolist()
