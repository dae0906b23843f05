"""M14, the certified model: no step moves two states apart, so a margin of the logits is a distance out of reach.

Every block is explicit Euler over the negative gradient of a convex potential, f(z) = -W' relu(Wz + b). A step h has
the Jacobian I - h W' D W, 0 <= D <= I, and so the Lipschitz constant max(1, h ||W||^2 - 1) (Meunier et al. 2022). All
else before the head reorders pixels. The certificate is computed from an SVD of each W as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, one_hot, relu

from odelayers import ConvexPotential, Euler, ODEBlock
from odelayers.heads import Head

from .data import Split

__all__ = ["CertifiedClassifier", "ConvolutionalPotential", "Recipe", "evaluate", "linear", "margins"]

CLASSES, SIDE = 10, 28
STEP = 2.0  # Euler's, so that ||W|| <= 1 is what keeps it from expanding
EVALUATION_BATCH = 1000
RADII = (0.5, 1.0, 1.58)
# Taken off every certified radius: more than ten times what float32 logits, which are attacked, were seen to differ
# from the float64 logits that are certified (`evaluate` measures it), and more than an error bound of the latter.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Recipe:
    """The model and its training as data.

    Images become (squeeze^2, 28/squeeze, 28/squeeze); `convolutions` blocks with kernels of that many rows follow, then
    `dense` blocks of that many rows. The loss is the cross entropy of the certified radii, each `temperature` times
    its excess over `offset`. Training images are shifted by up to `shift` pixels.
    """

    squeeze: int = 4
    convolutions: tuple[int, ...] = (16, 16, 16, 16)
    kernel: int = 3
    dense: tuple[int, ...] = (256, 256, 256, 256)
    steps: int = 1  # of Euler, with the same weights
    scale: float = 1.0  # of the pixels; the certificate takes it off again
    epochs: int = 12
    batch: int = 128
    lr: float = 1e-2
    temperature: float = 8.0
    offset: float = 1.1
    shift: int = 1


class ConvolutionalPotential(nn.Module):
    """f(z) = -W' relu(Wz + b) on states (B, C, size, size), W a convolution with zero padding to `rows` channels."""

    def __init__(self, channels: int, rows: int, kernel: int, size: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"ConvolutionalPotential: kernel: expected an odd size, which has a centre, got {kernel}")
        self.conv = nn.Conv2d(channels, rows, kernel, padding=kernel // 2)
        self.size = size

    def forward(self, z: Tensor) -> Tensor:
        """Give dz/dt at states (B, C, size, size)."""
        return -conv_transpose2d(relu(self.conv(z)), self.conv.weight, padding=self.conv.padding)

    def matrix(self) -> Tensor:
        """Give W as a matrix (rows size^2, C size^2), in float64: the images of the unit vectors."""
        channels = self.conv.in_channels
        units = torch.eye(channels * self.size**2, dtype=torch.float64, device=self.conv.weight.device)
        images = conv2d(units.view(-1, channels, self.size, self.size), self.conv.weight.double(), padding="same")
        return images.flatten(1).mT

    @torch.no_grad()
    def operator_norm(self) -> Tensor:
        """Give ||W|| by a full SVD in float64, the padding included: exact up to rounding."""
        return torch.linalg.matrix_norm(self.matrix(), 2)


class CertifiedClassifier(nn.Module):
    """Logits of images in [0, 1], with a radius around each image within which no image has another class."""

    noisy = False
    routes = ("identity",)  # the ways around the blocks' own gradient

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        if SIDE % recipe.squeeze:
            raise ValueError(f"Recipe.squeeze: expected a divisor of {SIDE}, got {recipe.squeeze}")
        channels, size = recipe.squeeze**2, SIDE // recipe.squeeze
        dim = channels * size**2
        convolutions = [ConvolutionalPotential(channels, rows, recipe.kernel, size) for rows in recipe.convolutions]
        self.convolutions = nn.Sequential(*(_block(f, recipe.steps) for f in convolutions))
        self.dense = nn.Sequential(*(_block(ConvexPotential(dim, rows), recipe.steps) for rows in recipe.dense))
        self.head = Head(nn.init.orthogonal_(torch.empty(CLASSES, dim)), trainable=True)
        for block in self.blocks:
            nn.init.orthogonal_(linear(block).weight)
            nn.init.zeros_(linear(block).bias)

    @property
    def blocks(self) -> list[ODEBlock]:
        """All blocks in order."""
        return [*self.convolutions, *self.dense]

    @property
    def block(self) -> nn.Sequential:
        """What stands between pixels and head: all blocks."""
        size = SIDE // self.recipe.squeeze
        return nn.Sequential(nn.Unflatten(1, (-1, size, size)), self.convolutions, nn.Flatten(), self.dense)

    def features(self, x: Tensor) -> Tensor:
        """The pixels of images (B, 1, 28, 28), in the blocks' order and scale, (B, 784)."""
        return nn.functional.pixel_unshuffle(x * self.recipe.scale, self.recipe.squeeze).flatten(1)

    def end(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The states before the head, (B, 784), from `features`; there is no noise to draw."""
        return self.block(z)

    def states(self, x: Tensor) -> Tensor:
        """The states before the head, (B, 784), of images (B, 1, 28, 28)."""
        return self.end(self.features(x))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits (B, 10) of images (B, 1, 28, 28)."""
        return self.head(self.states(x))

    @torch.no_grad()
    def lipschitz(self) -> float:
        """A Lipschitz constant of `states` in the Euclidean norm, from an SVD of every operator in float64."""
        constant = abs(self.recipe.scale)
        for block in self.blocks:
            h = (block.t1 - block.t0) / block.solver.steps
            constant *= max(1.0, h * block.f.operator_norm().item() ** 2 - 1) ** block.solver.steps
        return constant

    def distances(self) -> Tensor:
        """Distances between the rows of the head, (10, 10)."""
        rows = self.head.weight
        return (rows[:, None] - rows[None]).norm(dim=2)

    @torch.no_grad()
    def certified_radius(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """L2 radius (B,), in float64, within which the class stays: min_j (y_l - y_j) / (||v_l - v_j|| lipschitz()).

        Class l is the predicted one, or that of `labels`; then the radius is negative where another class is ahead.
        Pixels may leave [0, 1] within it. Logits are computed in float64, and `ROUNDING` is taken off at the end.
        """
        exact = copy.deepcopy(self).double().eval()
        logits = torch.cat([exact(part.double()) for part in x.split(EVALUATION_BATCH)])
        classes = logits.argmax(1) if labels is None else labels
        return margins(logits, classes, exact.distances()).amin(1) / exact.lipschitz() - ROUNDING


def _block(f: nn.Module, steps: int) -> ODEBlock:
    return ODEBlock(f, t1=STEP * steps, solver=Euler(steps=steps))


def linear(block: ODEBlock) -> nn.Linear | nn.Conv2d:
    """The layer that holds a block's W."""
    return block.f.linear if isinstance(block.f, ConvexPotential) else block.f.conv


def margins(logits: Tensor, labels: Tensor, distances: Tensor) -> Tensor:
    """(y_l - y_j) / ||v_l - v_j||, (B, 10), the distance of a state from class j's boundary, and inf for j = l."""
    gaps = logits.gather(1, labels[:, None]) - logits
    own = one_hot(labels, CLASSES).bool()
    # Equal rows have equal logits: the gap 0 over any number is the radius 0.
    return (gaps / distances[labels].clamp(min=1e-12)).masked_fill(own, math.inf)


@torch.no_grad()
def evaluate(model: CertifiedClassifier, split: Split, radii: Sequence[float] = RADII) -> dict[str, Any]:
    """Clean accuracy of the model as it is, and the share of samples right and certified beyond each radius.

    `lipschitz` is the constant used, `rounding` the largest difference of the model's logits from those in float64.

    Raises:
        RuntimeError: the model computes too coarsely for what its certificate, in float64, allows for rounding.
    """
    exact = copy.deepcopy(model).double()
    pairs = [(model(part), exact(part.double())) for part in split.images.split(EVALUATION_BATCH)]
    logits, apart = torch.cat([y for y, _ in pairs]), torch.stack([(y - z).abs().max() for y, z in pairs])
    reach = model.certified_radius(split.images, split.labels)
    own = margins(logits.double(), split.labels, exact.distances()).amin(1) / exact.lipschitz() - ROUNDING
    if (moved := (own - reach).abs().max()) > ROUNDING:
        raise RuntimeError(
            f"evaluate: the radii of the model as it is differ from those in float64 by {moved:.2g}, more than the "
            f"{ROUNDING:g} that is taken off them; on a GPU switch TF32 off (torch.backends.cudnn.allow_tf32 = False)"
        )
    return {
        "clean": (logits.argmax(1) == split.labels).double().mean().item(),
        "certified": {str(radius): (reach > radius).double().mean().item() for radius in radii},
        "lipschitz": model.lipschitz(),
        "rounding": apart.max().item(),
    }
