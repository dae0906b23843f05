"""Training in phases: epochs over images, or over cached features (the block) or cached end states (the head)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from odelayers import GradientError, SolveError, count_nfe

from .accuracy import accuracy, adversarial_accuracy, ends, states
from .data import Dataset, Split
from .models import SOLVED, Classifier
from .objective import Objective
from .parallel import Processes
from .penalties import Constraints, Penalty
from .phases import SGD, Adam, Phase
from .progress import bar
from .unfinished import Unfinished

__all__ = ["SGD", "Adam", "Diverged", "Phase", "train"]

NOWHERE = Unfinished()


class Diverged(RuntimeError):
    """A training that cannot go on: the loss is no number, or a solve failed.

    Attributes:
        outcome: what a record keeps of it, ready for JSON: phase, what it trains, epoch, step of the phase, the last
            loss (None where it is no number, or there was none), the reason, and the `log` of the epochs before.
    """

    def __init__(self, what: str, outcome: dict[str, Any]) -> None:
        super().__init__(
            f"{what}: training diverged in epoch {outcome['epoch']}, step {outcome['step']}: {outcome['reason']}"
        )
        self.outcome = outcome


def train(
    model: Classifier,
    data: Dataset,
    phases: tuple[Phase, ...],
    regularised: bool,
    seed: int,
    what: str,
    unfinished: Unfinished = NOWHERE,
    audit: Callable[[Classifier], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Train in place; returns one line per epoch.

    A line holds: phase, what it trains, epoch, steps, mean loss, the penalty in it, validation accuracy (of the
    averaged weights where the phase averages), evaluations of the field in a step's forward and backward pass, and
    seconds; in adversarial phases also those of the inner maximisation, and the accuracy under PGD-20 on the first 500
    validation images. `regularised` adds SODEF's constraints to phases without a penalty of their own.

    Order, noise and what penalties draw have generators of their own, so that models which differ in the noise alone
    see the same samples. Under a process group the processes train together: see `Processes`. After every epoch the
    state goes to `unfinished`, and a training that was stopped goes on from there, in as many processes. The last line
    of a phase holds what `audit` says of the model then.

    Raises:
        Diverged: the loss is no number, or a solve failed.
        RuntimeError: what is in `unfinished` was begun by another number of processes.
    """
    device = next(model.parameters()).device
    processes, order = Processes.now(), torch.Generator().manual_seed(seed)
    processes.prepare(model, device)
    draws = _Draws.seeded(seed + 1000 * processes.rank, device)
    judging = torch.Generator(device)  # the same in all processes, and the same noise after every epoch
    kept = unfinished.load(processes.count)
    log: list[dict[str, Any]] = kept.get("log", [])
    if kept:
        model.load_state_dict(kept["model"])
        for generator, state in zip((order, *draws), kept["generators"][processes.rank], strict=True):
            generator.set_state(state)
    begun, done = kept.get("phase", 1), kept.get("epoch", 0)
    for number, phase in list(enumerate(phases, 1))[begun - 1 :]:
        learner, epoch = None, 1
        label = f"{what}: phase {number}/{len(phases)}"
        try:
            with _frozen_but(model, phase.trains):
                penalty = phase.penalty or (Constraints() if regularised else None)
                learner = _Learner(model, phase, penalty, data.train, draws, processes)
                if done:
                    learner.load_state_dict(kept["learner"])
                for epoch in range(done + 1, phase.epochs + 1):
                    line = learner.epoch(order, f"{label}, epoch {epoch}/{phase.epochs}")
                    processes.agree(model, learner.result)
                    line |= _judged(learner.result, phase, data.validation, judging, seed)
                    if audit and epoch == phase.epochs:
                        line["audit"] = audit(learner.result)
                    log.append({"phase": number, "trains": phase.trains, "epoch": epoch, **line})
                    generators = processes.gathered([generator.get_state() for generator in (order, *draws)])
                    unfinished.keep(
                        phase=number, epoch=epoch, log=log, generators=generators,
                        model=model.state_dict(), learner=learner.state_dict(),
                    )  # fmt: skip
                learner.finish()
                done = 0
        except (SolveError, GradientError, _NoNumber) as error:
            loss = learner.loss if learner and math.isfinite(learner.loss) else None
            at = {"phase": number, "trains": phase.trains, "epoch": epoch, "step": learner.done if learner else 0}
            raise Diverged(label, {**at, "loss": loss, "reason": str(error), "log": log}) from error
    return log


def _judged(model: Classifier, phase: Phase, data: Split, judging: torch.Generator, seed: int) -> dict[str, float]:
    scores = {"validation": accuracy(model, data, judging.manual_seed(seed))}
    if phase.adversary:
        scores["adversarial"] = adversarial_accuracy(model, data, judging.manual_seed(seed))
    return scores


class _NoNumber(ArithmeticError):
    """The loss is NaN or infinite."""


class _Draws(NamedTuple):
    """Generators of their own for what is drawn in training."""

    noise: torch.Generator
    penalty: torch.Generator
    attack: torch.Generator

    @classmethod
    def seeded(cls, seed: int, device: torch.device) -> _Draws:
        return cls(*(torch.Generator(device).manual_seed(seed) for _ in range(3)))


@contextmanager
def _frozen_but(model: Classifier, trains: str) -> Iterator[None]:
    """Only what is trained asks for gradients; what was frozen before stays so."""
    trained = {"all": model, "block": model.block, "head": model.head}[trains]
    kept = set(trained.parameters())
    frozen = [p for p in model.parameters() if p.requires_grad and p not in kept]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


class _Learner:
    """One phase: its inputs, its optimiser and its step."""

    def __init__(
        self,
        model: Classifier,
        phase: Phase,
        penalty: Penalty | None,
        data: Split,
        draws: _Draws,
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
        inputs, labels, failed = self.inputs[rows], self.labels[rows], None
        start = nfe.nfe
        try:
            adversarial = self._attacked(inputs, labels)
            searched = nfe.nfe
            self.model.train(self.phase.trains == "all")
            self.model.block.train(self.phase.trains != "head")
            loss, penalty = self.objective(inputs, labels, adversarial)
            self.loss = loss.item()
        except SolveError as error:
            failed = error
        if failed is None and not math.isfinite(self.loss):
            failed = _NoNumber(f"the loss is {self.loss}; a lower lr may help")
        if self.processes.any(failed is not None, self.labels.device):  # all stop, or the others would wait for ever
            raise failed or _NoNumber("the solve or the loss of another process failed")
        forwarded = nfe.nfe
        self.optimiser.zero_grad()
        (weight * loss).backward()
        self.optimiser.step()
        self.schedule.step()
        if self.averaged:
            self.averaged.update_parameters(self.model)
        counts.add(searched - start, forwarded - searched, nfe.nfe - forwarded)
        self.done += 1
        return weight * torch.stack([loss, penalty]).detach()

    def _attacked(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """The adversary's images; the model's batch statistics are those of training, not of what the search meets."""
        adversary = self.phase.adversary
        if adversary is None:
            return None
        self.model.eval()
        share = adversary.share((self.done + 1) / self.total)
        return adversary.find(self._answer, images, labels, self.draws.attack, share)

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
