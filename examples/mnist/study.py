"""The stages of the study: each cell of its plan is found recorded, or computed and recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from odelayers import GradientError, Reversible, SineField, SolveError

from . import certified_training
from .accuracy import states
from .attacks import NotFinite, Threat, Transfer, perturb
from .cells import Cell, needs
from .certified import CertifiedClassifier
from .data import Dataset, Split
from .evaluation import Victim, attack_cell, clean_cell, craft, judge, probe_cell, spectrum_cell, stability
from .features import fold
from .models import DIM, Classifier
from .parallel import FailedElsewhere, Processes
from .plane import plane_cell
from .presets import Preset, long_steps
from .recipes import Model
from .records import Record, Records, read, save_weights
from .training import Diverged, train
from .unfinished import Unfinished
from .views import attacked

__all__ = ["Study"]


# Of each kind of cell, raised when its code changes what comes out: what was recorded before is then computed again.
REVISIONS = {"clean": 1, "attack": 1, "spectra": 2, "plane": 1, "probe": 2}
Compute = Callable[[], dict[str, Any]]


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
        self.made: dict[tuple[Cell, int, Threat, Transfer], Tensor] = {}

    def do(self, cell: Cell) -> Record:
        """The record of a cell, computed if it is not there; so are the trainings that it needs."""
        before = {(need.model, need.seed): self.do_training(need) for need in needs(self.preset, cell)}
        if cell.kind == "train":
            return self.do_training(cell)
        config: dict[str, Any] = {
            "revision": REVISIONS[cell.kind],
            "weights": self.records.digest(before[cell.model, cell.seed]),
            "seed": self.seed + cell.seed,
        }
        compute = getattr(self, f"_{cell.kind}")(cell, config)  # which adds to the configuration what it depends on

        def attempt() -> dict[str, Any]:
            try:
                return compute()
            except (SolveError, GradientError, NotFinite) as error:
                return {"diverged": str(error)}

        return self.records.stage(cell.name, config, attempt)

    def do_training(self, cell: Cell) -> Record:
        """Train a model from its start and keep its weights; every model sees the samples in the same order."""
        if (cell.model, cell.seed) in self.trained:
            return self.trained[cell.model, cell.seed]
        spec, seed = self.preset.model(cell.model), self.seed + cell.seed
        start = next((self.do_training(need) for need in needs(self.preset, cell)), None)

        config = {**self.common, "seed": seed, "model": spec.trained_as, "start": start and start.key}
        torch.manual_seed(seed)  # the fresh weights
        model = self.build(spec)
        unfinished = Unfinished(self.records.unfinished(cell.name, config), self.records.writes)
        if isinstance(model, CertifiedClassifier):
            compute = partial(self._train_certified, model, seed)
        else:
            if start is not None:
                model.start_from(self._weights(start), same_head=spec.head == self.preset.model(spec.start).head)
            compute = partial(self._train, model, spec, seed, cell.name, unfinished)
        record = self.records.stage(cell.name, config, compute, partial(save_weights, model))
        unfinished.remove()
        self.trained[cell.model, cell.seed] = record
        return record

    def adopt(self) -> None:
        """Take the trainings in the folder whose weights lie beside their records as they are, whatever made them."""
        for weights in self.records.folder.glob("train-*.safetensors"):
            record = read(weights.with_suffix(".json"))
            config = record["config"]
            self.trained[config["model"]["name"], config["seed"] - self.seed] = record

    def _train(self, model: Classifier, spec: Model, seed: int, what: str, unfinished: Unfinished) -> dict[str, Any]:
        try:
            audit = self._audit if spec.has_field else None
            log = train(model, self.data, spec.phases, spec.regularised, seed, what, unfinished, audit)
        except Diverged as error:
            return {"diverged": str(error).removeprefix(f"{what}: "), **error.outcome}
        return self._outcome(model, log, seed)

    def _train_certified(self, model: CertifiedClassifier, seed: int) -> dict[str, Any]:
        try:
            trained, log = certified_training.train(model.recipe, self.data, seed)
        except (SolveError, FailedElsewhere) as error:
            return {"diverged": str(error)}
        model.load_state_dict(trained.state_dict())
        return self._outcome(model, log, seed)

    def _outcome(self, model: Victim, log: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        noise = torch.Generator(self.device).manual_seed(seed)
        reached = judge(model, self.data.validation, 1, noise).mean
        count = sum(p.numel() for p in model.parameters())
        steps, processes = sum(e["steps"] for e in log), Processes.now().count
        return {"epochs": log, "steps": steps, "validation": reached, "parameters": count, "processes": processes}

    def build(self, spec: Model) -> Victim:
        """The model with fresh weights."""
        if spec.certified is not None:
            return CertifiedClassifier(spec.certified).to(self.device)
        return Classifier(spec.widths or self.preset.widths, spec.block, spec.head, spec.net).to(self.device)

    def _weights(self, record: Record) -> dict[str, Tensor]:
        return load_file(self.records.weights(record), device=str(self.device))

    def load(self, name: str, seed: int) -> Victim:
        """A trained model, for evaluation; it is trained first where no record has it."""
        model = self.build(self.preset.model(name))
        model.load_state_dict(self._weights(self.do_training(Cell("train", name, seed))))
        if isinstance(getattr(model.block, "gradient", None), Reversible):  # an attack may follow a wrong gradient
            model.block.gradient = Reversible(max_gap=1e30, max_drift=1e30)
        fold(model.eval())
        return model.requires_grad_(False)

    def _clean(self, cell: Cell, config: dict[str, Any]) -> Compute:
        config["draws"] = draws = self.preset.suite.judging_draws
        return lambda: clean_cell(self.load(cell.model, cell.seed), self.data.test, draws, config["seed"])

    def _attack(self, cell: Cell, config: dict[str, Any]) -> Compute:
        suite, threat, group = self.preset.suite, cell.threat, cell.group
        if threat is None or group is None:
            raise ValueError(f"{cell.name}: an attack needs a threat and a group")
        data = self.data.test.first(group.images)
        if cell.seed:
            data = data.first(-(-len(data) // suite.thin))
        used = {key: value for key, value in asdict(group).items() if key in ("name", "attacks", "gradient")}
        config |= {"threat": asdict(threat), "group": used, "images": len(data)}
        config |= {"draws": suite.draws, "judging_draws": suite.judging_draws}
        sources = [need for need in needs(self.preset, cell) if need.model != cell.model]
        config["sources"] = {need.model: self.records.digest(self.do_training(need)) for need in sources}

        def compute() -> dict[str, Any]:
            made = {
                f"{method} from {need.model}": self._made(need, data, threat, method)
                for need in sources
                for method in group.attacks
                if isinstance(method, Transfer)
            }
            model = self.load(cell.model, cell.seed)
            return attack_cell(model, data, threat, group, suite, made, config["seed"], cell.name)

        return compute

    def _made(self, need: Cell, data: Split, threat: Threat, method: Transfer) -> Tensor:
        """Images made on another model: once for all that they are shown to."""
        key = (need, len(data), threat, method)
        if key not in self.made:
            seed = self.seed + need.seed
            noise, what = torch.Generator(self.device).manual_seed(seed), f"{need.model} at {threat}"
            view = attacked(self.load(need.model, need.seed), self.preset.suite.draws, noise)
            self.made[key] = craft(view, data, threat, method, seed + 1, what)
        return self.made[key]

    def _probe(self, cell: Cell, config: dict[str, Any]) -> Compute:
        suite = self.preset.suite
        probe = asdict(suite.probe)
        if not self.preset.model(cell.model).block.noisy:
            del probe["eot"], probe["apart"]
        config |= {"probe": probe, "draws": suite.draws, "judging_draws": suite.judging_draws}
        images = self.data.test.first(suite.probe.images)
        return lambda: probe_cell(self.load(cell.model, cell.seed), images, suite, config["seed"], cell.name)

    def _plane(self, cell: Cell, config: dict[str, Any]) -> Compute:
        """The field in two principal components."""
        config["images"] = count = 10 * self.preset.spectrum_points
        return lambda: plane_cell(self.load(cell.model, cell.seed), self.data.test.first(count), config["seed"])

    def _audit(self, model: Classifier) -> dict[str, Any]:
        """The stability of the field on the way, at the first training images."""
        z = states(model, self.data.train.images[: self.preset.spectrum_points])
        return stability(model.block.f, z)

    def _spectra(self, cell: Cell, config: dict[str, Any]) -> Compute:
        """Stability at the same images: of an untrained field and of the trained one; there, on test images, attacked.

        The attack is the primary threat's white-box PGD on the margin.
        """
        threat, method = self.preset.primary[2], long_steps("margin", 40)
        config |= {"points": self.preset.spectrum_points, "threat": asdict(threat), "attack": asdict(method)}

        def compute() -> dict[str, Any]:
            count, seed = self.preset.spectrum_points, config["seed"]
            model, test = self.load(cell.model, cell.seed), self.data.test.first(count)
            noise, start = (torch.Generator(self.device).manual_seed(n) for n in (seed, seed + 1))
            view = attacked(model, self.preset.suite.draws, noise)
            images = perturb(view, test.images, test.labels, threat, method, start)
            z = states(model, self.data.train.images[:count])
            torch.manual_seed(seed)
            untrained, f = SineField(DIM).to(self.device), model.block.f
            return spectrum_cell([
                ("untrained", untrained, z),
                ("trained", f, z),
                ("test images", f, states(model, test.images)),
                ("attacked test images", f, states(model, images)),
            ])  # fmt: skip

        return compute
