"""The end-time study from data to report: a chain of recorded stages, one for every cell of its tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..data import Dataset
from ..records import Record, Records, save_weights, write
from .cells import answers_cell, curve_cell, dynamics_cell, film_cell, strong_cell, table_cell
from .models import EndTimeNet, Steps
from .presets import Preset, Row
from .training import accuracy, train

__all__ = ["run"]

NOT_YET, NEEDS_GPU = "not run yet", "not run: needs a GPU"


class Study:
    """One preset on one data set with one seed; every method is a stage that is found done or done now."""

    def __init__(self, preset: Preset, data: Dataset, out: Path, seed: int, device: torch.device) -> None:
        cut = data.first(preset.train_images, preset.validation_images, preset.test_images)
        self.preset, self.seed, self.device, self.data = preset, seed, device, cut.to(device)
        self.rows = [row for row in preset.rows if device.type != "cpu" or not row.needs_gpu]
        stages = len(self.rows) * (1 + len(preset.columns) + 1 + len(preset.checks) + 4)
        self.drawn = [row for row in self.rows if row.name in preset.drawn]
        self.records = Records(out, stages + len(self.drawn) * len(preset.columns))
        sizes = [len(cut.train), len(cut.validation), len(cut.test)]
        machine = {"device": device.type, "threads": torch.get_num_threads()}  # both change the last digits
        self.common = {"data": cut.name, "sizes": sizes, "seed": seed, **machine}
        self.trained: dict[str, Record] = {}

    def train(self, row: Row) -> Record:
        """Train one net and keep its weights; its validation accuracies are taken with the steps of the evaluation."""
        preset = self.preset
        torch.manual_seed(self.seed)  # fresh weights and the regions of the pooling
        net = EndTimeNet(row.channels, preset.training).to(self.device)

        def compute() -> dict[str, Any]:
            log = train(net, self.data, row, self.seed)
            trained = self._net(row, preset.evaluation, net.state_dict())
            reached = accuracy(trained, self.data.validation, preset.columns)
            return {"log": log, "validation": reached, "parameters": sum(p.numel() for p in net.parameters())}

        config = {**self.common, "row": asdict(row), "steps": str(preset.training), "columns": preset.columns}
        self.trained[row.name] = self.records.stage(f"train-{row.name}", config, compute, partial(save_weights, net))
        return self.trained[row.name]

    def _net(self, row: Row, steps: Steps, weights: dict[str, torch.Tensor]) -> EndTimeNet:
        net = EndTimeNet(row.channels, steps).to(self.device)
        net.load_state_dict(weights)
        return net.eval().requires_grad_(False)

    def _asked(
        self, what: str, row: Row, images: int | None, cell: Callable[..., dict[str, Any]],
        *, steps: Steps | None = None, draws: bool = False, **arguments: Any,
    ) -> Record:  # fmt: skip
        """The record of one question to one trained net, on the first test images."""
        steps = steps or self.preset.evaluation
        config = {"weights": self.trained[row.name].key, "images": images, "steps": str(steps), **arguments}

        def compute() -> dict[str, Any]:
            torch.manual_seed(self.seed)  # the regions of the pooling, where they are drawn
            net = self._net(row, steps, load_file(self.records.weights(self.trained[row.name])))
            net.pool.draws = draws
            return cell(net, self.data.test.first(images), **arguments)

        return self.records.stage(f"{what}-{row.name}", config, compute)

    def table(self, row: Row, end: float, draws: bool) -> Record:
        """One cell of the table; with `draws`, the pooling draws its regions, as it did in the blog."""
        what = f"{'draws' if draws else 'table'}-{end:g}"
        return self._asked(what, row, None, _named(table_cell, f"{row.title} at t = {end:g}"), draws=draws,
                           end=end, eps=self.preset.eps)  # fmt: skip

    def answers(self, row: Row, steps: Steps) -> Record:
        """The answers to clean images at the table's end times, by these steps."""
        kind = f"dopri5-{steps.tolerance:g}" if steps.tolerance else f"grid-{steps.density:g}"
        return self._asked(
            f"answers-{kind}", row, self.preset.curve_images, answers_cell, steps=steps, ends=self.preset.columns
        )

    def strong(self, row: Row) -> Record:
        """PGD at the time the net was trained to."""
        cell = _named(strong_cell, f"{row.title}, PGD")
        images, seed = self.preset.strong_images, self.seed
        return self._asked("strong", row, images, cell, end=row.usual_end, eps=self.preset.eps, seed=seed)

    def curve(self, row: Row) -> Record:
        """Accuracy over the end time."""
        return self._asked("curve", row, self.preset.curve_images, curve_cell, ends=self.preset.times)

    def dynamics(self, row: Row) -> Record:
        """How state, field, distances and gradients go with time."""
        cell = _named(dynamics_cell, row.title)
        return self._asked("dynamics", row, self.preset.dynamics_images, cell, times=self.preset.times)

    def film(self, row: Row) -> Record:
        """The state through time of three images."""
        return self._asked("film", row, 100, film_cell, times=self.preset.times)


def _named(cell: Callable[..., dict[str, Any]], what: str) -> Callable[..., dict[str, Any]]:
    """The cell with the label of its progress bar, which is no part of the configuration."""
    return lambda *arguments, **keywords: cell(*arguments, what=what, **keywords)


def run(preset: Preset, data: Dataset, out: Path, seed: int, device: torch.device) -> Path:
    """Do every stage that is not done, and return the path of `run.json`, which names the records there are so far.

    All training comes first, the test set after it. Nets that need a GPU are named as not run where there is none.
    """
    study = Study(preset, data, out, seed, device)
    rows: dict[str, dict[str, Any]] = {
        row.name: {"title": row.title, "net": row.net, "trained_to": row.trained_to, "adversarial": bool(row.pgd),
                   "why": NOT_YET if row in study.rows else NEEDS_GPU}
        for row in preset.rows
    }  # fmt: skip
    manifest = {
        "preset": preset.name, "warning": preset.warning, "data": data.name, "banner": data.banner, "seed": seed,
        "columns": preset.columns, "evaluation": str(preset.evaluation), "eps": preset.eps, "rows": rows,
    }  # fmt: skip

    def done(row: Row, record: Record, *path: str) -> None:
        place = rows[row.name]
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = record.file
        write(out / "run.json", manifest)

    for row in study.rows:
        done(row, study.train(row), "train")
    for question in (study.curve, study.film, study.dynamics, study.strong):  # the quick ones first
        for row in study.rows:
            done(row, question(row), question.__name__)
    for row in study.rows:
        for end in preset.columns:
            done(row, study.table(row, end, draws=False), "table", f"{end:g}")
    for row in study.rows:
        for steps in (preset.evaluation, *preset.checks):
            done(row, study.answers(row, steps), "answers", str(steps))
    for row in study.drawn:
        for end in preset.columns:
            done(row, study.table(row, end, draws=True), "draws", f"{end:g}")
    write(out / "run.json", manifest)
    return out / "run.json"
