"""One phase of a training: its inputs, its optimiser and its step, in one process or in several together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from odelayers import GradientError, SolveError, count_nfe

from .accuracy import ends, states
from .data import Split
from .models import SOLVED, Classifier
from .objective import Objective
from .parallel import Processes
from .penalties import Penalty
from .phases import Phase
from .progress import bar

__all__ = ["Draws", "Learner", "NoNumber"]


class NoNumber(ArithmeticError):
    """The loss is NaN or infinite."""


class Draws(NamedTuple):
    """Generators of their own for what is drawn in training."""

    noise: torch.Generator
    penalty: torch.Generator
    attack: torch.Generator

    @classmethod
    def seeded(cls, seed: int, device: torch.device) -> Draws:
        return cls(*(torch.Generator(device).manual_seed(seed) for _ in range(3)))


class Learner:
    """One phase: its inputs, its optimiser and its step."""

    def __init__(
        self,
        model: Classifier,
        phase: Phase,
        penalty: Penalty | None,
        data: Split,
        draws: Draws,
        processes: Processes,
    ) -> None:
        self.model, self.phase, self.draws, self.processes = model, phase, draws, processes
        self.inputs, self.labels = _entering(model, data, phase.trains, draws.noise), data.labels
        self.objective = processes.wrap(
            Objective(model, phase.trains, phase.cross_entropy, penalty, phase.adversary, draws.noise, draws.penalty)
        )
        weights = [p for p in model.parameters() if p.requires_grad]
        if not weights:
            raise ValueError(f"Phase.trains: there is nothing to train in {phase.trains!r}: all its weights are fixed")
        self.optimiser = phase.optimiser.build(weights, phase.lr)
        self.total = phase.epochs * -(-len(data) // phase.batch)
        self.schedule = phase.schedule(self.optimiser, self.total)
        decay = phase.average and get_ema_multi_avg_fn(phase.average)
        self.averaged = AveragedModel(model, multi_avg_fn=decay, use_buffers=True) if decay else None
        self.done, self.loss = 0, math.nan

    @property
    def result(self) -> Classifier:
        """The model that the phase would leave behind now."""
        return self.averaged.module if self.averaged else self.model

    @property
    def _parts(self) -> dict[str, Any]:
        return {"optimiser": self.optimiser, "schedule": self.schedule, "averaged": self.averaged}

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, beside the model."""
        return {"done": self.done, "loss": self.loss} | {
            name: part.state_dict() for name, part in self._parts.items() if part
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.done, self.loss = state["done"], state["loss"]
        for name, part in self._parts.items():
            if part:
                part.load_state_dict(state[name])

    def finish(self) -> None:
        """Leave the averaged weights behind, if there are any."""
        if self.averaged:
            self.model.load_state_dict(self.averaged.module.state_dict())

    def epoch(self, order: torch.Generator, what: str) -> dict[str, Any]:
        started, counts = time.perf_counter(), _Counts()
        batches = torch.randperm(len(self.labels), generator=order).to(self.labels.device).split(self.phase.batch)
        sums = torch.zeros(2, device=self.labels.device)
        counter = count_nfe(self.model) if self.model.spec.kind in SOLVED else nullcontext(counts)
        with bar(len(batches), what) as progress, counter as nfe:
            for rows in batches:
                mine = self.processes.share(rows)
                sums += self.step(mine, self.processes.weight(mine, rows), counts, nfe)
                progress.update()
        loss, penalty = self.processes.average(sums / len(batches)).tolist()
        line = {"steps": len(batches), "loss": loss, "regulariser": penalty, **counts.per_step(len(batches))}
        if not self.phase.adversary:
            del line["nfe_attack"]
        return line | {"seconds": round(time.perf_counter() - started, 3)}

    def step(self, rows: Tensor, weight: float, counts: _Counts, nfe: Any) -> Tensor:
        """One step of the optimiser; the loss and the penalty in it, weighted for the mean over processes."""
        inputs, labels = self.inputs[rows], self.labels[rows]
        start = nfe.nfe
        adversarial = self._attacked(inputs, labels)
        searched = nfe.nfe
        self.model.train(self.phase.trains == "all")
        self.model.block.train(self.phase.trains != "head")
        loss, penalty = self._together(lambda: self._losses(inputs, labels, adversarial))
        forwarded = nfe.nfe
        self.optimiser.zero_grad()
        self._go_back(weight * loss)
        self.optimiser.step()
        self.schedule.step()
        if self.averaged:
            self.averaged.update_parameters(self.model)
        counts.add(searched - start, forwarded - searched, nfe.nfe - forwarded)
        self.done += 1
        return weight * torch.stack([loss, penalty]).detach()

    def _together(self, compute: Callable[[], Any]) -> Any:
        """What is computed, unless it fails in one of the processes."""
        return self.processes.together(compute, (SolveError, GradientError, NoNumber), self.labels.device)

    def _losses(self, inputs: Tensor, labels: Tensor, adversarial: Tensor | None) -> tuple[Tensor, Tensor]:
        loss, penalty = self.objective(inputs, labels, adversarial)
        self.loss = loss.item()
        if not math.isfinite(self.loss):
            raise NoNumber(f"the loss is {self.loss}; a lower lr may help")
        return loss, penalty

    def _go_back(self, loss: Tensor) -> None:
        """One backward pass; where the others wait for this process's gradients already, a failure ends them all."""
        try:
            loss.backward()
        except GradientError as error:
            if self.processes.count == 1:
                raise
            raise RuntimeError(f"one of {self.processes.count} processes has no gradient; train by one") from error

    def _attacked(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """The adversary's images; the model's batch statistics are those of training, not of what the search meets."""
        adversary = self.phase.adversary
        if adversary is None:
            return None
        self.model.eval()
        share = adversary.share((self.done + 1) / self.total)
        return self._together(lambda: adversary.find(self._answer, images, labels, self.draws.attack, share))

    def _answer(self, images: Tensor) -> Tensor:
        return self.model(images, self.draws.noise)


@dataclass
class _Counts:
    """Evaluations of the field so far: in attacks, in forward and in backward passes."""

    attack: int = 0
    forward: int = 0
    backward: int = 0
    nfe: ClassVar[int] = 0  # what a model without a field has

    def add(self, attack: int, forward: int, backward: int) -> None:
        self.attack, self.forward, self.backward = (
            self.attack + attack,
            self.forward + forward,
            self.backward + backward,
        )

    def per_step(self, steps: int) -> dict[str, float]:
        return {
            "nfe_forward": round(self.forward / steps, 2),
            "nfe_backward": round(self.backward / steps, 2),
            "nfe_attack": round(self.attack / steps, 2),
        }


def _entering(model: Classifier, data: Split, trains: str, noise: torch.Generator) -> Tensor:
    """What enters the part that is trained; a head's inputs are end states, drawn once where there is noise."""
    if trains == "all":
        return data.images
    z = states(model, data.images)
    return z if trains == "block" else ends(model, z, noise)
