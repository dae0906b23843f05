"""A model as attacks see it: several draws of its noise at once, and other gradients than its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from odelayers import Adjoint

from .attacks.common import ascent
from .models import CLASSES, IDENTITY, Classifier

__all__ = ["ADJOINT", "DIRECTIONS", "QUIET", "attacked", "surrogate"]

ADJOINT, QUIET, DIRECTIONS = "adjoint", "noiseless solve", "directions"
ANY_DRIFT = Adjoint(max_drift=1e30)  # an attack may follow a wrong gradient: what it finds is judged on the model


@dataclass(frozen=True)
class View:
    """The model as an attack sees it: logits (B, 10), or (draws, B, 10) where it draws from `noise`.

    With `directions` every draw's gradient is scaled to length 1 at the state that enters the block: their mean follows
    what most draws agree on, not the few whose gradients are longest.
    """

    model: Classifier
    draws: int
    noise: torch.Generator
    directions: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The logits of images (B, 1, 28, 28)."""
        model = self.model
        z = _draws(model, model.features(x), self.draws)
        if self.directions and z.requires_grad:
            z.register_hook(lambda gradient: ascent(gradient, "l2"))
        return _shaped(model, model.head(model.end(z, self.noise)), len(x))


def attacked(model: Classifier, draws: int, generator: torch.Generator) -> View:
    """The model as an attack sees it."""
    return View(model, draws, generator)


def surrogate(
    model: Classifier, route: str | float, draws: int, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """The same logits with the gradient of `route`: the adjoint's, the draws' directions, or as if the block had no
    noise, did nothing or ended at that time.

    Raises:
        ValueError: the route is the adjoint, and the block's solver has none.
    """
    if route == DIRECTIONS:
        return View(model, draws, generator, directions=True)
    block = copy.copy(model.block)  # the same field and weights
    if route == ADJOINT:
        if not ANY_DRIFT.accepts(block.solver):
            raise ValueError(f"surrogate: {block.solver!r} has no adjoint; take one of the routes {model.routes}")
        block.gradient = ANY_DRIFT
    elif route == QUIET:
        block.noise_in_eval = False

    def logits(x: Tensor) -> Tensor:
        z = _draws(model, model.features(x), draws)
        with torch.no_grad():
            end = model.end(z, generator)
        t1 = None if isinstance(route, str) else route
        detour = z if route == IDENTITY else block.solve(z, t1=t1, generator=generator).final
        return _shaped(model, model.head(detour + (end - detour).detach()), len(x))

    return logits


def _draws(model: Classifier, z: Tensor, draws: int) -> Tensor:
    return z.repeat(draws, 1) if model.noisy else z


def _shaped(model: Classifier, logits: Tensor, batch: int) -> Tensor:
    return logits.reshape(-1, batch, CLASSES) if model.noisy else logits
