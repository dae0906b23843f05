"""Training in phases: epochs over images, or over cached features (the block) or cached end states (the head)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from odelayers import GradientError, SolveError

from .accuracy import accuracy, adversarial_accuracy
from .data import Dataset, Split
from .learner import Draws, Learner, NoNumber
from .models import Classifier
from .parallel import FailedElsewhere, Processes
from .penalties import Constraints
from .phases import SGD, Adam, Phase
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
        RuntimeError: what is in `unfinished` was begun by another number of processes, or some do not see it.
    """
    device = next(model.parameters()).device
    processes, order = Processes.now(), torch.Generator().manual_seed(seed)
    processes.prepare(model, device)
    draws = Draws.seeded(seed + 1000 * processes.rank, device)
    judging = torch.Generator(device)  # the same in all processes, and the same noise after every epoch
    kept = unfinished.load(processes.count)
    if len({*processes.gathered((kept.get("phase"), kept.get("epoch")))}) > 1:
        raise RuntimeError(f"{what}: not all processes see {unfinished.path}; they need one folder between them")
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
                learner = Learner(model, phase, penalty, data.train, draws, processes)
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
        except (SolveError, GradientError, NoNumber, FailedElsewhere) as error:
            loss = learner.loss if learner and math.isfinite(learner.loss) else None
            at = {"phase": number, "trains": phase.trains, "epoch": epoch, "step": learner.done if learner else 0}
            raise Diverged(label, {**at, "loss": loss, "reason": str(error), "log": log}) from error
    return log


def _judged(model: Classifier, phase: Phase, data: Split, judging: torch.Generator, seed: int) -> dict[str, float]:
    scores = {"validation": accuracy(model, data, judging.manual_seed(seed))}
    if phase.adversary:
        scores["adversarial"] = adversarial_accuracy(model, data, judging.manual_seed(seed))
    return scores


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
