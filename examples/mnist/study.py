"""The stages of the study: each cell of its plan is found recorded, or computed and recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from odelayers import SineField

from .cells import Cell, needs
from .data import Dataset
from .evaluation import attack_cell, clean_cell, judge, probe_cell, spectrum_cell
from .models import DIM, Classifier
from .presets import Preset
from .recipes import Model
from .records import Record, Records, save_weights
from .training import Diverged, states, train

__all__ = ["Study"]


class Study:
    """One preset on one data set; `do` is the one way to a cell's record."""

    def __init__(self, preset: Preset, data: Dataset, out: Path, seed: int, device: torch.device) -> None:
        cut = data.first(preset.train_images, preset.validation_images, preset.test_images)
        self.preset, self.seed, self.device = preset, seed, device
        self.data = cut.to(device)
        self.records = Records(out)
        sizes = [len(cut.train), len(cut.validation), len(cut.test)]
        machine = {"device": device.type, "threads": torch.get_num_threads()}  # both change the last digits
        self.common = {"data": cut.name, "sizes": sizes, "widths": preset.widths, **machine}
        self.trained: dict[tuple[str, int], Record] = {}

    def do(self, cell: Cell) -> Record:
        """The record of a cell, computed if it is not there; so are the trainings that it needs."""
        before = {(need.model, need.seed): self.do_training(need) for need in needs(self.preset, cell)}
        if cell.kind == "train":
            return self.do_training(cell)
        config: dict[str, Any] = {"weights": before[cell.model, cell.seed].key, "seed": self.seed + cell.seed}
        kind: Callable[[Cell, dict[str, Any]], Record] = getattr(self, f"_{cell.kind}")
        return kind(cell, config)

    def do_training(self, cell: Cell) -> Record:
        """Train a model from its start and keep its weights; every model sees the samples in the same order."""
        if (cell.model, cell.seed) in self.trained:
            return self.trained[cell.model, cell.seed]
        spec, seed = self.preset.model(cell.model), self.seed + cell.seed
        start = next((self.do_training(need) for need in needs(self.preset, cell)), None)

        config = {**self.common, "seed": seed, "model": asdict(spec), "start": start and start.key}
        del config["model"]["seeds"]  # how many others there are says nothing of this one
        torch.manual_seed(seed)  # the fresh weights
        model = self.build(spec)
        if start is not None:
            model.start_from(self._weights(start))
        compute = partial(self._train, model, spec, seed, cell.name)
        self.trained[cell.model, cell.seed] = self.records.stage(
            cell.name, config, compute, partial(save_weights, model)
        )
        return self.trained[cell.model, cell.seed]

    def _train(self, model: Classifier, spec: Model, seed: int, what: str) -> dict[str, Any]:
        try:
            log = train(model, self.data, spec.phases, spec.regularised, seed, what)
        except Diverged as error:
            return {"diverged": str(error), **error.outcome}
        noise = torch.Generator(self.device).manual_seed(seed)
        reached = judge(model, self.data.validation, 1, noise).mean
        count = sum(p.numel() for p in model.parameters())
        return {"epochs": log, "steps": sum(e["steps"] for e in log), "validation": reached, "parameters": count}

    def build(self, spec: Model) -> Classifier:
        """The model with fresh weights."""
        return Classifier(spec.widths or self.preset.widths, spec.block, spec.head, spec.net).to(self.device)

    def _weights(self, record: Record) -> dict[str, torch.Tensor]:
        return load_file(self.records.weights(record), device=str(self.device))

    def load(self, name: str, seed: int) -> Classifier:
        """A trained model, for evaluation."""
        model = self.build(self.preset.model(name))
        model.load_state_dict(self._weights(self.trained[name, seed]))
        return model.eval().requires_grad_(False)

    def _clean(self, cell: Cell, config: dict[str, Any]) -> Record:
        config["draws"] = draws = self.preset.suite.judging_draws
        return self.records.stage(
            cell.name,
            config,
            lambda: clean_cell(self.load(cell.model, cell.seed), self.data.test, draws, config["seed"]),
        )

    def _attack(self, cell: Cell, config: dict[str, Any]) -> Record:
        suite, threat, group = self.preset.suite, cell.threat, cell.group
        if threat is None or group is None:
            raise ValueError(f"{cell.name}: an attack needs a threat and a group")
        used = {key: value for key, value in asdict(group).items() if key not in ("models", "threats")}
        config |= {"threat": asdict(threat), "group": used, "draws": suite.draws, "judging_draws": suite.judging_draws}
        sources = [need for need in needs(self.preset, cell) if need.model != cell.model]
        config["sources"] = [self.trained[need.model, need.seed].key for need in sources]
        images = self.data.test.first(group.images)

        def compute() -> dict[str, Any]:
            others = {need.model: self.load(need.model, need.seed) for need in sources}
            model = self.load(cell.model, cell.seed)
            return attack_cell(model, images, threat, group, suite, others, config["seed"], cell.name)

        return self.records.stage(cell.name, config, compute)

    def _probe(self, cell: Cell, config: dict[str, Any]) -> Record:
        suite = self.preset.suite
        config |= {"probe": asdict(suite.probe), "draws": suite.draws, "judging_draws": suite.judging_draws}
        images = self.data.test.first(suite.probe.images)
        return self.records.stage(
            cell.name,
            config,
            lambda: probe_cell(self.load(cell.model, cell.seed), images, suite, config["seed"], cell.name),
        )

    def _spectra(self, cell: Cell, config: dict[str, Any]) -> Record:
        """Eigenvalues at the same training points: of the trained field, and of one untrained at its states."""
        config["points"] = count = self.preset.spectrum_points

        def compute() -> dict[str, Any]:
            choice = torch.Generator().manual_seed(config["seed"])
            points = torch.randperm(len(self.data.train), generator=choice)[:count]
            model = self.load(cell.model, cell.seed)
            z = states(model, self.data.train.images[points.to(self.device)])
            torch.manual_seed(config["seed"])
            untrained = SineField(DIM).to(self.device)
            return spectrum_cell([("untrained", untrained, z), ("trained", model.block.f, z)])

        return self.records.stage(cell.name, config, compute)
