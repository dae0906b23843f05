"""The study from data to report: a chain of recorded stages."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odelayers import SineField

from .data import Dataset
from .evaluation import attack_cell, clean_cell, spectrum_cell
from .models import DIM, Classifier
from .presets import Model, Preset
from .records import Record, Records, save_weights, write
from .training import accuracy, states, train

__all__ = ["run"]


class Study:
    """One preset on one data set with one seed; every method is a stage that is found done or done now."""

    def __init__(self, preset: Preset, data: Dataset, out: Path, seed: int, device: torch.device) -> None:
        cut = data.first(preset.train_images, preset.validation_images, preset.test_images)
        self.preset, self.seed, self.device = preset, seed, device
        self.data = cut.to(device)
        models, threats = len(preset.models), len(preset.suite.threats)
        self.records = Records(out, stages=models * (2 + threats) + 1)  # trained, clean, attacked; and the spectra
        sizes = [len(cut.train), len(cut.validation), len(cut.test)]
        machine = {"device": device.type, "threads": torch.get_num_threads()}  # both change the last digits
        self.common = {"data": cut.name, "sizes": sizes, "seed": seed, "widths": preset.widths, **machine}
        self.trained: dict[str, Record] = {}

    def train(self, spec: Model) -> Record:
        """Train one model from its start and keep its weights; every model sees the samples in the same order."""
        start = self.trained[spec.start] if spec.start else None

        def compute(weights: Path) -> dict[str, Any]:
            torch.manual_seed(self.seed)  # the fresh weights
            model = self.build(spec, start)
            log = train(model, self.data, spec.phases, spec.regularised, self.seed, spec.name)
            save_weights(weights, model)
            noise = torch.Generator(self.device).manual_seed(self.seed)
            reached = accuracy(model, self.data.validation, noise)
            count = sum(p.numel() for p in model.parameters())
            return {"epochs": log, "steps": sum(e["steps"] for e in log), "validation": reached, "parameters": count}

        config = {**self.common, "model": asdict(spec), "start": start and start.key}
        self.trained[spec.name] = self.records.stage(f"train-{spec.name}", config, compute)
        return self.trained[spec.name]

    def build(self, spec: Model, weights: Record | None) -> Classifier:
        """The model with the weights of a record, as far as they go: a block that the record lacks stays fresh."""
        model = Classifier(self.preset.widths, spec.block).to(self.device)
        if weights:
            state = torch.load(self.records.weights(weights), map_location=self.device, weights_only=True)
            missing, unexpected = model.load_state_dict(state, strict=False)
            strange = [name for name in (*missing, *unexpected) if not name.startswith("block.")]
            if strange:
                raise RuntimeError(f"{self.records.weights(weights)}: does not fit {spec.name}: {', '.join(strange)}")
        return model

    def load(self, spec: Model) -> Classifier:
        """A trained model, for evaluation."""
        return self.build(spec, self.trained[spec.name]).eval().requires_grad_(False)

    def clean(self, spec: Model) -> Record:
        """Score one model on the test set."""
        config = {"weights": self.trained[spec.name].key, "draws": self.preset.suite.judging_draws, "seed": self.seed}
        return self.records.stage(
            f"clean-{spec.name}",
            config,
            lambda _: clean_cell(self.load(spec), self.data.test, config["draws"], self.seed),
        )

    def attack(self, spec: Model, number: int) -> Record:
        """Attack one model within one threat, on the first test images."""
        suite = self.preset.suite
        threat = suite.threats[number]
        used = {name: value for name, value in asdict(suite).items() if name != "threats"}
        config = {"weights": self.trained[spec.name].key, "threat": asdict(threat), "suite": used, "seed": self.seed}
        what = f"{spec.name} under {threat}"
        images = self.data.test.first(suite.images)
        name = f"attack-{spec.name}-{threat.norm}-{threat.eps:g}"
        return self.records.stage(
            name, config, lambda _: attack_cell(self.load(spec), images, threat, suite, self.seed, what)
        )

    def spectra(self) -> Record:
        """Eigenvalues at the same training points: untrained, and of every field that was regularised."""
        specs = [spec for spec in self.preset.models if spec.regularised]
        config = {"weights": [self.trained[spec.name].key for spec in specs], "points": self.preset.spectrum_points}

        def compute(_: Path) -> dict[str, Any]:
            choice = torch.Generator().manual_seed(self.seed)
            points = torch.randperm(len(self.data.train), generator=choice)[: self.preset.spectrum_points]
            images = self.data.train.images[points.to(self.device)]
            torch.manual_seed(self.seed)
            untrained = SineField(DIM).to(self.device)
            fields: dict[str, tuple[nn.Module, torch.Tensor]] = {}
            for spec in specs:
                model = self.load(spec)
                fields.setdefault("untrained", (untrained, states(model, images)))
                fields[spec.name] = (model.block.f, states(model, images))
            return spectrum_cell(fields)

        return self.records.stage("spectra", {**config, "seed": self.seed}, compute)


def run(preset: Preset, data: Dataset, out: Path, seed: int, device: torch.device) -> Path:
    """Do every stage that is not done, write `run.json`, and return its path; the test set comes last."""
    study = Study(preset, data, out, seed, device)
    models = preset.models
    manifest: dict[str, Any] = {
        "preset": preset.name, "warning": preset.warning, "data": data.name, "banner": data.banner, "seed": seed,
        "train": {spec.name: study.train(spec).file for spec in models},
        "spectra": study.spectra().file,
        "clean": {spec.name: study.clean(spec).file for spec in models},
        "attacks": {
            str(threat): {spec.name: study.attack(spec, number).file for spec in models}
            for number, threat in enumerate(preset.suite.threats)
        },
    }  # fmt: skip
    write(out / "run.json", manifest)
    return out / "run.json"
