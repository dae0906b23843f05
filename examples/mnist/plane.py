"""A field where its states go: in the plane of the two principal components of all states that its solutions pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .accuracy import states
from .data import Split
from .models import Classifier

__all__ = ["plane_cell"]

TIMES, TRACKS, SIDE = 41, 100, 21  # along a solution; solutions that are kept; arrows along a side of the grid


@torch.no_grad()
def plane_cell(model: Classifier, data: Split, seed: int) -> dict[str, Any]:
    """Solutions from the states of `data` and arrows of the field at its end time, projected on the plane.

    The plane goes through the mean state, along the two directions in which the states on the way vary most;
    `explained` is the share of their variance that it holds. Arrows are the part of f inside the plane.
    """
    z, noise = states(model, data.images), torch.Generator(data.images.device).manual_seed(seed)
    ts = torch.linspace(0, model.spec.t1, TIMES, device=z.device)
    path = model.block.solve(z, ts, generator=noise).zs  # (times, images, 64)
    flat = path.reshape(-1, path.shape[-1])
    centre = flat.mean(0)
    _, values, directions = torch.linalg.svd(flat - centre, full_matrices=False)
    axes = directions[:2]
    axes = axes * axes.sum(1, keepdim=True).sign()  # an SVD leaves the signs open
    shown = (path[:, :TRACKS] - centre) @ axes.mT
    grid = _grid((flat - centre) @ axes.mT)
    arrows = model.block.f(centre + grid @ axes) @ axes.mT
    return {
        "explained": (values[:2].square().sum() / values.square().sum()).item(),
        "times": [round(t, 4) for t in ts.tolist()],
        "tracks": _rounded(shown),
        "labels": data.labels[:TRACKS].tolist(),
        "grid": _rounded(grid),
        "field": _rounded(arrows),
    }


def _grid(points: Tensor) -> Tensor:
    """A square grid (SIDE^2, 2) over all points and a little more."""
    low, high = points.amin(0), points.amax(0)
    margin = 0.05 * (high - low)
    sides = [torch.linspace(a, b, SIDE) for a, b in zip((low - margin).tolist(), (high + margin).tolist(), strict=True)]
    return torch.cartesian_prod(*sides).to(points)


def _rounded(values: Tensor) -> Any:
    return (1e4 * values).round().div(1e4).tolist()
