"""AutoAttack, by the library pyautoattack."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from .common import Best, Method, Model, Threat, Tick, project

__all__ = ["AutoAttack"]

# Passes of a model that stands against everything, counted: APGD on the cross-entropy, targeted APGD, targeted FAB and
# Square; for noise APGD on two losses, every gradient a mean over 20 passes.
PASSES = {"standard": 7_900, "rand": 4_100}
CLASSES = 10  # fewer than ten classes lack the nine targets of the standard version


@dataclass(frozen=True)
class AutoAttack(Method):
    """AutoAttack's version "standard", or "rand" for a model that draws noise.

    The library averages gradients over 20 passes of its own and wants logits (B, classes), so for a noisy model
    `gradient_from` best draws once per call; of several draws it is given the mean logits. Under noise it leaves a
    sample as soon as one pass is wrong; what it found is judged on the model's own draws.

    Source: Croce and Hein, Reliable evaluation of adversarial robustness, ICML 2020; the library pyautoattack.
    """

    version: str = "standard"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("version", tuple(PASSES))

    def __str__(self) -> str:
        return f"AutoAttack {self.version}"

    @property
    def ticks(self) -> int:
        """One a pass of the model."""
        return PASSES[self.version]

    def search(
        self, best: Best, images: Tensor, threat: Threat, generator: torch.Generator, source: Model | None, tick: Tick
    ) -> None:
        """See `Method.search`; with `source` the library attacks that model, and what it finds is judged here."""
        if best.draws is not None and self.version == "standard":
            raise ValueError("AutoAttack: the standard version is for models without noise; use AutoAttack('rand')")
        rows = best.left()

        def logits(x: Tensor) -> Tensor:
            tick()
            answer = (source or best.model)(x)
            return answer if answer.ndim == 2 else answer.mean(0)

        if len(rows):
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
            found = _library(logits, images[rows], best.labels[rows], threat, self.version, seed)
            best.judge(rows, project(found, images[rows], threat))


def _library(model: Model, images: Tensor, labels: Tensor, threat: Threat, version: str, seed: int) -> Tensor:
    """What the library returns, with torch's global generators and the tracer of this thread as they were."""
    import pyautoattack  # an extra, and slow to import: only where it is used

    with torch.no_grad():
        classes = model(images[:1]).shape[-1]
    if classes < CLASSES and version == "standard":
        raise ValueError(f"AutoAttack: the standard version takes nine targets: expected >= 10 classes, got {classes}")
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    devices, tracer = [images.device] if images.device.type == "cuda" else [], sys.gettrace()
    with torch.random.fork_rng(devices=devices):
        try:
            attack = pyautoattack.AutoAttack(
                model, norm=norm, eps=threat.eps, version=version, device=images.device, seed=seed
            )
            return attack.run_standard_evaluation(images, labels, batch_size=len(images))[0]
        finally:
            sys.settrace(tracer)  # its check for dynamic defences takes a debugger's or a coverage tool's away
