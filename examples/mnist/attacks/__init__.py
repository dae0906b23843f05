"""Adversarial attacks on any model that maps images in [0, 1] to logits.

Every attack is a frozen dataclass with one method, `run`, which returns the worst image it found for each sample.
Success is always judged on the model itself, also where the gradient comes from a surrogate of it (`gradient_from`, as
in BPDA: Athalye et al. 2018). A model that draws noise returns several draws at once, (draws, B, classes): losses, and
so gradients, are averaged over them (expectation over transformation, EOT), and the noise stays on throughout.
"""

from __future__ import annotations

from .auto import AutoAttack
from .common import Best, Counted, Method, Model, NotFinite, Threat, margin, project
from .gradient import PGD, Transfer, fgsm, input_gradient, perturb
from .search import SimBA, Square
from .spsa import SPSA

__all__ = [
    "PGD",
    "SPSA",
    "AutoAttack",
    "Best",
    "Counted",
    "Method",
    "Model",
    "NotFinite",
    "SimBA",
    "Square",
    "Threat",
    "Transfer",
    "fgsm",
    "input_gradient",
    "margin",
    "perturb",
    "project",
]
