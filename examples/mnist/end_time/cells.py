"""What is asked of a trained net: accuracy at an end time, clean and attacked, and how its state moves in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from ..attacks import PGD, Threat, fgsm, input_gradient, margin, perturb
from ..data import Split
from ..progress import bar
from .models import EndTimeNet
from .training import accuracy, answers

__all__ = ["answers_cell", "curve_cell", "dynamics_cell", "fgsm_images", "film_cell", "strong_cell", "table_cell"]

BATCH = 250  # images differentiated at once: a solve to t = 500 then keeps about 2 GB


def _split(data: Split) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return data.images.split(BATCH), data.labels.split(BATCH)


def _batches(data: Split, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    parts = list(zip(*_split(data), strict=True))
    with bar(len(parts), what) as progress:
        for part in parts:
            yield part
            progress.update()


def fgsm_images(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the fast gradient sign method on images in [0, 1], not clipped and clipped; and the margins (B,).

    The blog did not clip: its adversarial images leave [0, 1] wherever a pixel is nearly black or white, so they are
    no images. The margins are those of the images as given.
    """
    gradient, margins = input_gradient(model, images, labels)
    moved = images + eps * gradient.sign()
    return moved, moved.clamp(0, 1), margins


def table_cell(net: EndTimeNet, data: Split, end: float, eps: float, what: str) -> dict[str, Any]:
    """Accuracy at one end time: clean, and under FGSM against that end time, unclipped and clipped."""
    model = net.eval().at(end)
    right = {"clean": 0, "unclipped": 0, "clipped": 0}
    for images, labels in _batches(data, what):
        unclipped, clipped, margins = fgsm_images(model, images, labels, eps)
        right["clean"] += int((margins < 0).sum())
        right["unclipped"] += int(_right(model, unclipped, labels).sum())
        right["clipped"] += int(_right(model, clipped, labels).sum())
    return {"n": len(data), **{name: count / len(data) for name, count in right.items()}}


def answers_cell(net: EndTimeNet, data: Split, ends: Sequence[float]) -> dict[str, Any]:
    """The answers at each end time, a digit an image, and the share that is right."""
    found = answers(net, data, ends)
    texts = ["".join(map(str, row)) for row in found.tolist()]
    return {"n": len(data), "answers": texts, "clean": (found == data.labels).float().mean(1).tolist()}


def curve_cell(net: EndTimeNet, data: Split, ends: Sequence[float]) -> dict[str, Any]:
    """Accuracy at each end time."""
    return {"n": len(data), "ends": list(ends), "clean": accuracy(net, data, ends)}


def strong_cell(net: EndTimeNet, data: Split, end: float, eps: float, seed: int, what: str) -> dict[str, Any]:
    """Accuracy at one end time under FGSM, PGD-40 on two losses, and PGD whose gradient stops at a tenth of the time.

    All inside [0, 1]. The last goes around what the long solve does to gradients; "worst" is the worst of all of them,
    image by image.
    """
    model, early = net.eval().at(end), net.at(end / 10)
    threat, (_, one) = Threat("linf", eps), fgsm(eps)
    plan = {
        "FGSM": (one, None),
        "PGD-40, cross-entropy": (PGD("ce", steps=40), None),
        "PGD-40, margin": (PGD("margin", steps=40), None),
        "PGD-40, margin, gradient at t/10": (PGD("margin", steps=40), _detour(model, early)),
    }
    start = torch.Generator(data.images.device).manual_seed(seed)
    right: dict[str, Tensor] = {"clean": _right(model, data.images, data.labels)}
    for name, (attack, source) in plan.items():
        found = [
            perturb(model, images, labels, threat, attack, start, gradient_from=source)
            for images, labels in _batches(data, f"{what}: {name}")
        ]
        right[name] = _right(model, torch.cat(found), data.labels)
    right["worst"] = torch.stack(list(right.values())).all(0)
    return {"n": len(data), "end": end, **{name: hit.float().mean().item() for name, hit in right.items()}}


def _detour(model: Callable[[Tensor], Tensor], early: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The model's logits with the gradient of its logits at an earlier time."""

    def logits(x: Tensor) -> Tensor:
        z = early(x)
        with torch.no_grad():
            end = model(x)
        return z + (end - z).detach()

    return logits


@torch.no_grad()
def _right(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    return torch.cat([model(x).argmax(1) for x in images.split(BATCH)]) == labels


def dynamics_cell(net: EndTimeNet, data: Split, times: Sequence[float], what: str) -> dict[str, Any]:
    """At each time: size of the state and of the field, how far both have settled, distances, gradients.

    The field has settled where the cosine with its value at the last time is 1; so has the direction of the state.
    Distances are between directions z / |z|, as the state may grow without end: of pairs of one class and of two.
    """
    with torch.no_grad():
        zs = torch.cat([net.eval().states(x, times) for x in data.images.split(BATCH)], dim=1)
        fs = torch.stack([net.block.f(z) for z in zs]).flatten(2)
        zs = zs.flatten(2)
        near, far = zip(*(_distances(z, data.labels) for z in zs), strict=True)
        scale = zs.shape[-1] ** 0.5
        found = {
            "state": _quartiles(zs.norm(dim=-1) / scale),
            "field": _quartiles(fs.norm(dim=-1) / scale),
            "field_cosine": _quartiles(cosine_similarity(fs, fs[-1:], dim=-1)),
            "state_cosine": _quartiles(cosine_similarity(zs, zs[-1:], dim=-1)),
            "same_class": _quartiles(torch.stack(near)),
            "two_classes": _quartiles(torch.stack(far)),
        }
    return {"n": len(data), "times": list(times), **found, **_gradients(net, data, times, what)}


def _distances(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of directions: of all pairs within a class, and of all pairs of two classes."""
    unit = z / z.norm(dim=1, keepdim=True)
    distance = torch.cdist(unit, unit)
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    pairs = torch.ones_like(same).triu(1)
    return distance[same & pairs], distance[~same & pairs]


def _gradients(net: EndTimeNet, data: Split, times: Sequence[float], what: str) -> dict[str, Any]:
    """At each time: norm at the pixels of the gradients of cross-entropy and margin, and the share that are exactly 0.

    A state that grows makes logits that grow: cross-entropy saturates, and an attack that follows it stands still.
    """
    found: dict[str, list[Tensor]] = {"ce": [], "margin": []}
    with bar(len(times), f"{what}: gradients") as progress:
        for end in times:
            parts = [_gradient_norms(net, *part, end) for part in zip(*_split(data), strict=True)]
            for loss, norms in zip(found, zip(*parts, strict=True), strict=True):
                found[loss].append(torch.cat(norms))
            progress.update()
    norms = {loss: torch.stack(rows) for loss, rows in found.items()}
    return {
        "gradient": {loss: _quartiles(rows) for loss, rows in norms.items()},
        "zero_gradients": {loss: (rows == 0).float().mean(1).tolist() for loss, rows in norms.items()},
    }


def _gradient_norms(net: EndTimeNet, images: Tensor, labels: Tensor, end: float) -> tuple[Tensor, Tensor]:
    """Per image, the norm of the gradient of cross-entropy and of the margin, from one solve."""
    x = images.detach().requires_grad_()
    logits = net(x, end)
    losses = cross_entropy(logits, labels, reduction="sum"), margin(logits, labels).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0].flatten(1).norm(dim=1) for loss in losses)
    return first, second


def _quartiles(values: Tensor) -> dict[str, list[float]]:
    """Lower quartile, median and upper quartile of each row of (T, N)."""
    q = torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype, device=values.device)
    return dict(zip(("low", "median", "high"), values.quantile(q, dim=1).tolist(), strict=True))


@torch.no_grad()
def film_cell(net: EndTimeNet, data: Split, times: Sequence[float], channels: int = 2) -> dict[str, Any]:
    """The state's first channels at each time, for two images of one digit and one of another."""
    first = int(data.labels[0])
    same = (data.labels == first).nonzero().flatten()[:2].tolist()
    other = int((data.labels != first).nonzero()[0])
    chosen = [*same, other]
    zs = net.eval().states(data.images[chosen], times)[:, :, :channels]
    frames = (zs * 1000).round().div(1000).tolist()
    return {"digits": data.labels[chosen].tolist(), "times": list(times), "states": frames}
